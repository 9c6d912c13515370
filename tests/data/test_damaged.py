"""500 damaged inputs among good ones: no crash, no hang, each named and counted, good ones once an epoch."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeding import PROCESSOR, config_of, feed, line, source, write_corpus
from media import write_video
from PIL import Image

from iv3jax.data.digits import clip_path
from iv3jax.data.mixture import Mixture
from iv3jax.data.quarantine import Dropped
from iv3jax.data.read import Read, configured
from iv3jax.data.sample import Sample
from iv3jax.data.sources import open_sources

DAMAGED = 500
GOOD = 60
SEED = 11

CODECS = [
    ("mp4", {"codec": "libx264"}),
    ("mp4", {"codec": "mpeg4", "b_frames": 0}),
    ("mkv", {"codec": "libx264"}),
    ("webm", {"codec": "libvpx"}),
    ("avi", {"codec": "mpeg4", "b_frames": 0}),
    ("ts", {"codec": "libx264"}),
]


def clips(folder: Path) -> list[Path]:
    """Good ones: of several kinds, and one of real video."""
    made = []
    for number, (suffix, options) in enumerate(CODECS):
        path = folder / f"good{number}.{suffix}"
        made.append(write_video(path, 8 + number, height=32, width=64, rate=10, **options))
    return [*made, clip_path("carphone_pristine.mp4")]


def broken_file(rng: np.random.Generator, good: list[Path], path: Path) -> str:
    """A video or picture that is truncated, empty, bit-flipped or no video at all; its kind."""
    kind = ("cut", "flipped", "flipped", "zeroed", "empty", "noise", "picture")[rng.integers(7)]
    data = np.frombuffer(good[rng.integers(len(CODECS))].read_bytes(), np.uint8).copy()
    if kind == "cut":
        data = data[: int(len(data) * rng.uniform(0.02, 0.98))]
    elif kind == "flipped":
        at = rng.integers(len(data), size=int(rng.integers(1, 60)))
        np.bitwise_xor.at(data, at, (1 << rng.integers(8, size=len(at))).astype(np.uint8))
    elif kind == "zeroed":
        start = int(rng.integers(len(data) - 64))
        data[start : start + int(rng.integers(64, len(data)))] = 0
    elif kind == "empty":
        data = data[:0]
    elif kind == "noise":
        data = rng.integers(256, size=int(rng.integers(1, 4096)), dtype=np.uint8)
    path.write_bytes(data.tobytes())
    if kind == "picture":
        Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path, "PNG")
    return kind


def set_part(key: str, value: Any) -> Callable[[dict], None]:
    """Changes a field of the first part, a video_url."""

    def change(record: dict) -> None:
        record["messages"][0]["content"][0]["video_url"][key] = value

    return change


def set_message(number: int, **fields: Any) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record["messages"][number].update(fields)

    return change


def set_text(text: str) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record["messages"][0]["content"][-1]["text"] = text

    return change


RECORD_DAMAGE: list[Callable[[dict], Any]] = [
    lambda record: record.pop("messages"),
    lambda record: record["messages"].clear(),
    lambda record: record["messages"][1].pop("role"),
    lambda record: record["messages"][0].pop("content"),
    lambda record: record["messages"].pop(),
    lambda record: record["messages"][0]["content"][0].pop("video_url"),
    lambda record: record["messages"][0]["content"][0].pop("type"),
    lambda record: record["messages"][0]["content"][0]["video_url"].pop("url"),
    lambda record: record["messages"][0]["content"].append(None),
    lambda record: record.update(messages={"role": "user"}),
    set_message(0, role="robot"),
    set_message(0, role=["user"]),
    set_message(0, content=7),
    set_message(1, content=[{"type": "text", "text": None}]),
    set_message(1, content="a lone \ud800 surrogate"),
    set_message(1, loss=False),
    set_part("url", ""),
    set_part("url", None),
    set_part("url", "x" * 5000),
    set_part("url", "nul\0byte.mp4"),
    set_part("url", "gone.mp4"),
    set_part("url", "."),
    set_part("url", "https://example.org/v.mp4"),
    set_part("image_wh", [-64, 32]),
    set_part("image_wh", [0, 0]),
    set_part("image_wh", [10**12, 10**12]),
    set_part("image_wh", "64x32"),
    set_part("origin_fps", -25.0),
    set_part("origin_fps", 1e300),
    set_part("origin_video_length", -10),
    set_part("origin_video_length", 10**40),
    set_text("no place for the video"),
    set_text("<VIDEO_CONTEXT><VIDEO_CONTEXT>"),
    set_text("<VIDEO_CONTEXT> and <IMG_CONTEXT>"),
    set_text("<IMG_CONTEXT>"),
]


def broken_bytes(rng: np.random.Generator, good: bytes) -> bytes:
    """A line that is no JSON object in UTF-8."""
    kind = rng.integers(5)
    if kind == 0:
        return good[: int(rng.integers(1, len(good) - 1))]
    if kind == 1:
        at = int(rng.integers(1, len(good) - 1))
        return good[:at] + bytes([0xFF, 0xFE]) + good[at:]
    if kind == 2:
        return rng.integers(128, 256, size=50, dtype=np.uint8).tobytes().replace(b"\n", b"")
    if kind == 3:
        return good.decode().encode("utf-16")[:-2].replace(b"\n", b"")
    return [b"[]", b"null", b"3", b'"text"', b"NaN", b"{" * 100_000, b'{"a": ' + b"9" * 9999 + b"}"][
        rng.integers(7)
    ]


def write_damaged(folder: Path, good: list[Path]) -> tuple[Path, Counter]:
    """DAMAGED damaged lines in shuffled order with GOOD good ones, and how many there are of each kind."""
    rng = np.random.default_rng(SEED)
    lines: list[bytes] = []
    kinds: Counter = Counter()

    def video_line(url: str) -> dict:
        return line(len(lines), "What happens?", ("video", url))

    for i in range(DAMAGED):
        whole = video_line(good[i % len(good)].name if i % 7 else str(good[-1]))
        if i < 260:
            path = folder / f"bad{i}{good[i % len(CODECS)].suffix}"
            kinds[broken_file(rng, good, path)] += 1
            lines.append(json.dumps(video_line(path.name)).encode())
        elif i < 400:
            RECORD_DAMAGE[i % len(RECORD_DAMAGE)](whole)
            kinds["record"] += 1
            lines.append(json.dumps(whole).encode())
        else:
            kinds["bytes"] += 1
            lines.append(broken_bytes(rng, json.dumps(whole).encode()))
    for i in range(GOOD):
        url = str(good[-1]) if i % 10 == 0 else good[i % len(CODECS)].name
        lines.append(json.dumps(video_line(url) if i % 2 else line(i, "Only text. " * (1 + i % 5))).encode())
    path = folder / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines[i] for i in rng.permutation(len(lines))) + b"\n")
    return path, kinds


@pytest.mark.medium
def test_damaged_inputs_are_named_and_good_ones_used_once_an_epoch(tmp_path):
    good = clips(tmp_path)
    path, kinds = write_damaged(tmp_path, good)
    assert sum(kinds.values()) == DAMAGED and min(kinds.values()) > 20
    config = config_of(source(path), source(write_corpus(tmp_path)), workers=2, timeout=30.0, look_ahead=3)
    opened = open_sources(config)
    sizes = [len(one.source) for one in opened]
    assert sizes == [DAMAGED + GOOD, 14]

    # What each file is worth, read alone: a flipped bit may do no harm that a decoder can see.
    read = Read([one.source for one in opened], configured(PROCESSOR, config))
    alone = {one.source.name(i): read((s, i)) for s, one in enumerate(opened) for i in range(len(one.source))}
    bad = {name: found for name, found in alone.items() if isinstance(found, Dropped)}
    assert DAMAGED - kinds["flipped"] - kinds["zeroed"] <= len(bad) <= DAMAGED
    for name, found in bad.items():
        assert found.name == name and found.reason and "\n" not in found.reason
    # What nobody foresaw is caught, too, but should be rare.
    assert sum(found.kind != "unreadable" for found in bad.values()) <= DAMAGED // 100
    whole = [name for name in alone if name not in bad]
    assert all(isinstance(alone[name], Sample) for name in whole)
    assert len(whole) >= GOOD + 14

    quarantine = tmp_path / "quarantine.jsonl"
    order = Mixture(sizes, [float(size) for size in sizes], 7)
    used: Counter = Counter()
    total = sum(sizes)
    with feed(config, quarantine=quarantine) as opened_feed:
        state = np.zeros((4, 4), np.int64)
        # Two epochs of everything.
        while 4 * state[:, 0].min() < 2 * total:
            fed = next(opened_feed)
            state = fed.state
            used.update(name for row in fed.names for name in row)
        counters = opened_feed.counters
    # All that was taken: each lane's numbers up to its state, but for those that wait.
    taken = [
        r + 4 * key for r in range(4) for key in range(int(state[r, 0])) if key not in state[r, 1:].tolist()
    ]
    names = [opened[s].source.name(record) for s, record in (order[i] for i in taken)]
    assert Counter(name for name in names if name not in bad) == used
    for epoch in range(2):
        in_epoch = Counter(
            name for i, name in zip(taken, names, strict=True) if i // total == epoch and name not in bad
        )
        waits = {r + 4 * key for r in range(4) for key in state[r, 1:].tolist() if key >= 0}
        missing = {
            opened[s].source.name(record) for s, record in (order[i] for i in waits if i // total == epoch)
        }
        assert in_epoch == Counter(set(whole) - missing)
    assert not set(used) & set(bad)
    # Counted: each failed, once or, when lanes were reading it for two epochs, twice, and then was skipped.
    dropped = [name for name in names if name in bad]
    assert set(dropped) == set(bad)
    failed = counters.dropped["unreadable"] + counters.dropped.get("failed", 0)
    assert len(bad) <= failed < 1.2 * len(bad) and counters.dropped["quarantined"] == len(dropped) - failed
    assert counters.samples == sum(used.values())
    # Named.
    entries = [json.loads(text) for text in quarantine.read_text(encoding="utf-8").splitlines()]
    assert {entry["name"]: entry["reason"] for entry in entries} == {n: d.reason for n, d in bad.items()}
    assert len(entries) == len(bad)

    # A second run does not touch them, and makes the same batches.
    again = replace(config, workers=0)
    with feed(again, quarantine=quarantine, state=state) as later, feed(again, state=state) as fresh:
        for _ in range(3):
            assert next(later).batch.input_ids.tobytes() == next(fresh).batch.input_ids.tobytes()
        assert set(later.counters.dropped) <= {"quarantined"}
