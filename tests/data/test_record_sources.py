"""Sources: what a record becomes, and that damage is named when the record is read, not before."""

import json
import pickle

import numpy as np
import pytest

from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.record import lines_of, parse_object
from iv3jax.data.sources import Opened, open_sources
from iv3jax.data.tfds_source import write_dataset
from iv3jax.errors import UserError

VIDEO = {"type": "video_url", "video_url": {"url": "a/v.mp4", "image_wh": [640, 360], "origin_fps": 29.97}}
IMAGE = {"type": "image_url", "image_url": {"url": "/abs/p.png", "image_wh": None}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def record(*messages: dict) -> dict:
    return {"id": 1, "messages": [*messages, {"role": "assistant", "content": "Yes."}]}


def write(path, *records) -> str:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def open_one(kind: str, path: str, **fields) -> Opened:
    [opened] = open_sources(DataConfig((SourceConfig(kind, path=path, **fields),)))
    return opened


def test_an_annotation(tmp_path):
    path = write(
        tmp_path / "set.jsonl",
        record(user(VIDEO, IMAGE, text("<IMG_CONTEXT> before <VIDEO_CONTEXT>\nWhich?"))),
        b"",
        b"\r",
        record(user(text("Only text."))),
        {"messages": [{"role": "pretrain", "content": "All of it."}]},
    )
    opened = open_one("internvideo3", path, fps=4.0, max_frames=9)
    source = opened.source
    assert (opened.name, opened.weight, len(source)) == ("set.jsonl", 3, 3)
    # Empty lines count as lines only.
    assert [source.name(i) for i in range(3)] == ["set.jsonl:1", "set.jsonl:4", "set.jsonl:5"]
    first = source[0]
    assert (first.name, first.fps, first.min_frames, first.max_frames) == ("set.jsonl:1", 4.0, 0, 9)
    assert first.messages[0]["content"] == [
        {"type": "image", "image": "/abs/p.png"},
        text(" before "),
        {"type": "video", "video": str(tmp_path / "a/v.mp4")},
        text("\nWhich?"),
    ]
    assert first.messages[1] == {"role": "assistant", "content": [text("Yes.")]}
    assert source[1].messages[0]["content"] == [text("Only text.")]
    assert source[2].messages == [{"role": "pretrain", "content": [text("All of it.")]}]
    other = open_one("internvideo3", path, media_root="/media", name="mine").source
    assert other[0].messages[0]["content"][2]["video"] == "/media/a/v.mp4"
    assert other.name(0) == "mine:1"
    assert pickle.loads(pickle.dumps(other))[0] == other[0]


def test_lines_without_an_end_and_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("iv3jax.data.record._BLOCK", 7)
    path = tmp_path / "l.jsonl"
    lines = [json.dumps({"i": i, "pad": "x" * (i % 11)}) for i in range(50)]
    for end in ("", "\n", "\n\n"):
        path.write_text("\n".join(lines) + end)
        pieces = lines_of(path, "l")
        assert [pieces.parse(i)["i"] for i in range(len(pieces))] == list(range(50))
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    pieces = lines_of(path, "l")
    assert [pieces.parse(i)["i"] for i in range(len(pieces))] == list(range(50))
    path.write_bytes(b"")
    assert len(lines_of(path, "l")) == 0


def test_a_meta_file(tmp_path):
    (tmp_path / "sets").mkdir()
    write(tmp_path / "sets" / "one.jsonl", *[record(user(VIDEO, text("<VIDEO_CONTEXT>")))] * 4)
    write(tmp_path / "two.jsonl", *[record(user(text("?")))] * 6)
    meta = {
        "one": {"annotation": "sets/one.jsonl", "media_root": "clips", "sample_ratio": 0.5, "fps": 4},
        "two": {"annotation": str(tmp_path / "two.jsonl"), "media_root": "", "max_frames": 2048},
    }
    path = write(tmp_path / "meta.json", meta)
    sources = (
        SourceConfig("internvideo3_meta", path=path, fps=1.0),
        SourceConfig("internvideo3", path=path[:-9] + "two.jsonl"),
    )
    one, two, third = open_sources(DataConfig(sources))
    assert [(x.name, x.weight) for x in (one, two, third)] == [("one", 2.0), ("two", 6.0), ("two.jsonl", 6)]
    first = one.source[0]
    assert first.messages[0]["content"][0]["video"] == str(tmp_path / "clips" / "a/v.mp4")
    assert (first.fps, first.max_frames, two.source[0].fps, two.source[0].max_frames) == (4, 0, 1.0, 2048)
    # A weight is shared out by size.
    weighted = open_sources(DataConfig((SourceConfig("internvideo3_meta", path=path, weight=4.0),)))
    assert [x.weight for x in weighted] == [1.0, 3.0]


CONVERSATION = {
    "id": "x",
    "video": "v.mp4",
    "image": ["p.png", "/q.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nand <image> or <video>?"},
        {"from": "gpt", "value": "None."},
    ],
}


@pytest.mark.parametrize("layout", ["lines", "list", "indented"])
def test_conversations(tmp_path, layout):
    tricky = {
        "id": 'a "quoted]" {brace',
        "conversations": [{"from": "human", "value": '[1, {"\\": ]}'}, {"from": "gpt", "value": "é]"}],
    }
    records = [CONVERSATION, tricky, CONVERSATION]
    path = tmp_path / "c.json"
    if layout == "lines":
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    else:
        path.write_text(
            json.dumps(records, ensure_ascii=False, indent=2 if layout == "indented" else None),
            encoding="utf-8",
        )
    source = open_one("llava", str(path)).source
    assert len(source) == 3
    assert source.name(2) == ("c.json:3" if layout == "lines" else "c.json[2]")
    for i in (0, 2):
        human, gpt = source[i].messages
        assert human["role"] == "user" and gpt == {"role": "assistant", "content": [text("None.")]}
        assert human["content"] == [
            {"type": "image", "image": str(tmp_path / "p.png")},
            text("\nand "),
            {"type": "image", "image": "/q.png"},
            text(" or "),
            {"type": "video", "video": str(tmp_path / "v.mp4")},
            text("?"),
        ]
    assert source[1].messages[0]["content"] == [text('[1, {"\\": ]}')]
    assert source[1].messages[1]["content"] == [text("é]")]


def test_other_spellings_of_conversations(tmp_path):
    openai = {
        "messages": [{"role": "user", "content": "<video>Hm?"}, {"role": "assistant", "content": "Hm."}],
        "videos": ["v.mp4"],
    }
    video = {
        "video": "v.mp4",
        "conversations": [{"from": "human", "value": "<image>\nHm?"}, {"from": "gpt", "value": "Hm."}],
    }
    source = open_one("llava", write(tmp_path / "c.jsonl", openai, video)).source
    assert source[0].messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "v.mp4")}
    # LLaVA-Video's way.
    assert source[1].messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "v.mp4")}


@pytest.mark.medium
def test_a_dataset_written_and_read_without_tensorflow(tmp_path):
    records = [record(user(VIDEO, text(f"<VIDEO_CONTEXT> {i}"))) for i in range(7)]
    annotation = write(tmp_path / "set.jsonl", *records)
    folder = write_dataset(annotation, str(tmp_path / "out"), "clips")
    assert folder == tmp_path / "out" / "clips" / "1.0.0"
    source = open_one("tfds", str(folder), name="set", media_root=str(tmp_path)).source
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 7
    plain = open_one("internvideo3", annotation).source
    got = sorted(json.dumps(source[i].messages) for i in range(7))
    assert got == sorted(json.dumps(plain[i].messages) for i in range(7))
    assert source[3].name == source.name(3) == "set:3"
    for fields, message in (
        ({"options": ("split=test",)}, "split test, not train"),
        ({"options": ("shuffle=1",)}, "option 'shuffle=1' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            open_one("tfds", str(folder), **fields)
    with pytest.raises(UserError, match="no data set"):
        open_one("tfds", str(tmp_path))
    write(tmp_path / "bad.jsonl", records[0], {"messages": []})
    with pytest.raises(UserError, match=r"bad\.jsonl:2: messages is \[\]"):
        write_dataset(str(tmp_path / "bad.jsonl"), str(tmp_path / "out"), "bad")


def annotation_errors() -> list:
    def media(**fields) -> dict:
        return record(
            user({"type": "video_url", "video_url": {"url": "v.mp4"} | fields}, text("<VIDEO_CONTEXT>"))
        )

    return [
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b'{"messages": [', "not valid JSON"),
        (b'{"messages": ' + b"[" * 200_000 + b"}", "not valid JSON"),
        (b"[1, 2]", r"holds \[1, 2\], not a JSON object"),
        ({}, "messages is missing"),
        ({"messages": "x"}, "messages is 'x', not a list"),
        ({"messages": []}, r"messages is \[\], not a list with content"),
        ({"messages": [3]}, r"messages\[0\] is not an object"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: role is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: role 'robot' is not one of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "content is None"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content is {'a': 1}, not a list"),
        ({"messages": [{"role": "user", "content": "x", "loss": True}]}, "loss is set by the role"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "tool_calls is not supported",
        ),
        (record(user("x")), r"content\[0\]: is not a text"),
        (record(user({"type": "text", "text": 3})), r"content\[0\]: is not a text"),
        (record(user({"type": ["text"]})), r"content\[0\]: is not a text"),
        (record(user({"type": "audio_url"})), r"content\[0\]: is not a text"),
        (record(user({"type": "video_url"})), r"content\[0\]: video_url is missing"),
        (record(user({"type": "video_url", "video_url": "v"})), "video_url is 'v', not an object"),
        (record(user({"type": "video_url", "video_url": {"a": 1}})), r"video_url\.url is missing"),
        (media(url=""), r"video_url\.url is '', not the path"),
        (media(url=7), r"video_url\.url is 7"),
        (media(url="a\0b"), r"video_url\.url is 'a\\x00b'"),
        (media(image_wh=[640]), "image_wh is not"),
        (media(image_wh=[-640, 360]), "image_wh is not"),
        (media(image_wh=[640, 10**30]), "image_wh is not"),
        (media(image_wh=[640, "360"]), "image_wh is not"),
        (media(image_wh=[True, 1]), "image_wh is not"),
        (media(image_wh={"w": 1, "h": 2}), "image_wh is not"),
        (media(origin_video_length=-3), "origin_video_length is -3"),
        (media(origin_fps=0), "origin_fps is 0"),
        (media(origin_fps=float("nan")), "origin_fps is nan"),
        (media(origin_fps=float("inf")), "origin_fps is inf"),
        (media(origin_fps="30"), "origin_fps is '30'"),
        (record(user(VIDEO, text("no place"))), "0 <VIDEO_CONTEXT> for 1"),
        (record(user(VIDEO, text("<VIDEO_CONTEXT><VIDEO_CONTEXT>"))), "2 <VIDEO_CONTEXT> for 1"),
        (record(user(VIDEO, text("<IMG_CONTEXT>"))), "0 <VIDEO_CONTEXT> for 1"),
        ({"messages": [{"role": "user", "content": "<IMG_CONTEXT>"}]}, "1 <IMG_CONTEXT> for 0"),
    ]


@pytest.mark.parametrize(("damage", "message"), annotation_errors())
def test_a_damaged_line_is_named_when_it_is_read(tmp_path, damage, message):
    good = record(user(text("Fine.")))
    source = open_one("internvideo3", write(tmp_path / "set.jsonl", good, damage, good)).source
    assert len(source) == 3
    with pytest.raises(UserError, match=message) as caught:
        source[1]
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/set.jsonl:2: ") and "\n" not in told and len(told) < 400
    assert source[0].messages == source[2].messages


def conversation(**fields) -> dict:
    return {key: value for key, value in (CONVERSATION | fields).items() if value != "take out"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (conversation(conversations="take out"), "conversations is missing"),
        (conversation(conversations=[7]), r"conversations\[0\] is not an object"),
        (conversation(conversations=[{"value": "x"}]), "from is missing"),
        (conversation(conversations=[{"from": "cat", "value": "x"}]), "from 'cat' is not one of"),
        (conversation(conversations=[{"from": "gpt"}]), "value is missing"),
        (conversation(conversations=[{"from": "gpt", "value": 5}]), "value is 5, not a text"),
        (conversation(video="take out"), "1 <video> for 0"),
        (conversation(image=["p.png"]), "2 <image> for 1"),
        (conversation(image=["p.png", None]), r"image\[1\] is None"),
        (conversation(video={"path": "v"}), r"video\[0\] is {'path'"),
    ],
)
def test_a_damaged_conversation_is_named(tmp_path, damage, message):
    source = open_one("llava", write(tmp_path / "c.jsonl", CONVERSATION, damage)).source
    assert source[0].messages
    with pytest.raises(UserError, match=message) as caught:
        source[1]
    assert str(caught.value).startswith(f"{tmp_path}/c.jsonl:2: ")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("internvideo3", None, "no such file"),
        ("internvideo3", b"", "holds no records"),
        ("internvideo3_meta", b"{", "not valid JSON"),
        ("internvideo3_meta", b'{"a": 3}', "a: is not an object"),
        ("internvideo3_meta", b'{"a": {"annotation": ""}}', "a: annotation is ''"),
        ("internvideo3_meta", b'{"a": {"annotation": "x", "repeat": 3}}', "'repeat' is not one of"),
        ("internvideo3_meta", b'{"a": {"annotation": "set", "sample_ratio": -1}}', "sample_ratio is -1"),
        ("internvideo3_meta", b'{"a": {"annotation": "gone.jsonl"}}', "gone.jsonl: no such file"),
        ("llava", b"[]", "holds no records"),
        ("llava", b'[{"a": 1}, {"b', "the JSON list never ends"),
        ("parquet", b"x", "kind: 'parquet' is not one of internvideo3, "),
        ("task:dance", b"x", "there is no task 'dance'"),
    ],
)
def test_what_cannot_be_opened(tmp_path, kind, content, message):
    path = tmp_path / "set"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_one(kind, str(path))


def test_entries_of_a_config(tmp_path):
    path = write(tmp_path / "set.jsonl", record(user(text("?"))))
    with pytest.raises(UserError, match=r"two are called 'set\.jsonl'"):
        open_sources(DataConfig((SourceConfig("internvideo3", path=path),) * 2))
    with pytest.raises(UserError, match=r"sources\[0\].path: is missing"):
        open_sources(DataConfig((SourceConfig("internvideo3"),)))
    with pytest.raises(UserError, match=r"sources\[0\].weight: -1"):
        open_one("internvideo3", path, weight=-1.0)
    with pytest.raises(UserError, match="is a folder"):
        open_one("internvideo3", str(tmp_path))


def test_a_synthetic_task(tmp_path):
    opened = open_one("task:read", "", options=("count=5",), name="numbers")
    assert (opened.name, opened.weight) == ("numbers", 5)
    found = pickle.loads(pickle.dumps(opened.source))[3]
    assert found.name == "numbers:3" and found.messages[-1]["role"] == "assistant"


def test_a_record_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("iv3jax.data.record._MOST_BYTES", 40)
    source = open_one("internvideo3", write(tmp_path / "set.jsonl", record(user(text("long " * 20))))).source
    with pytest.raises(UserError, match=r"set\.jsonl:1: \d+ bytes are too many"):
        source[0]


def test_a_number_with_too_many_digits():
    with pytest.raises(UserError, match="x: not valid JSON"):
        parse_object(b'{"a": ' + b"9" * 5000 + b"}", "x")
    assert np.isinf(parse_object(b'{"a": 1e999}', "x")["a"])
