"""Processor: files and frames in memory become a Sample; budgets are read and saved."""

import dataclasses
import json
import pickle
import shutil
import time

import av
import numpy as np
import pytest
from PIL import Image

from iv3jax.data.patches import patchify
from iv3jax.data.processor import IMAGE_FILE, VIDEO_FILE, Processor
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.presets import preset

CONFIG = preset("tiny")
TINY = Processor(
    Tokenizer.from_dir(TINY_FOLDER, CONFIG),
    CONFIG,
    image_pixels=(32 * 32, 64 * 64),
    video_pixels=(4096, 65536),
)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def ask(*content) -> list:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "When is the number 42 shown?"}]}]


def memory_video(frames: int, height: int = 32, width: int = 32) -> dict:
    return {"type": "video", "frames": pixels(frames, height, width), "times": np.arange(frames) / 2}


@pytest.fixture
def video_file(tmp_path) -> str:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for image in pixels(30, 64, 96):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return str(path)


def test_frames_in_memory():
    video = memory_video(4, 32, 64)
    sample = TINY(ask(video), generation=True)
    assert sample.grids == ((2, 2, 4),)
    np.testing.assert_array_equal(sample.patches, patchify(video["frames"], 16, 2, 2)[0])
    text = TINY.tokenizer.decode(sample.input_ids, skip_special=False)
    block = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert text == (
        f"<|im_start|>user\n<0.2 seconds>{block}<1.2 seconds>{block}When is the number 42 shown?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (len(sample),) == sample.input_ids.shape
    assert sample.positions.shape == (3, len(sample))
    assert (sample.labels == -100).all()
    [media] = sample.media
    assert (media.kind, media.path, media.frames, media.total_frames) == ("video", None, 4, 4)
    assert media.times == (0.0, 0.5, 1.0, 1.5)
    assert media.size == (32, 64)


def test_labels_are_the_next_token():
    messages = [*ask(memory_video(2)), {"role": "assistant", "content": "From 1.0 to 2.0."}]
    sample = TINY(messages)
    at = np.flatnonzero(sample.labels != -100)
    np.testing.assert_array_equal(sample.labels[at], sample.input_ids[at + 1])
    assert TINY.tokenizer.decode(sample.labels[at], skip_special=False) == "From 1.0 to 2.0.<|im_end|>"
    assert sample.labels[-1] == -100


def test_odd_video_repeats_its_last_frame():
    sample = TINY(ask(memory_video(3)))
    assert sample.grids == ((2, 2, 2),)
    assert sample.media[0].times == (0.0, 0.5, 1.0, 1.0)
    assert "<1.0 seconds>" in TINY.tokenizer.decode(sample.input_ids)


def test_image_fills_both_frames():
    image = pixels(32, 64)
    sample = TINY(ask({"type": "image", "image": image}))
    assert sample.grids == ((1, 2, 4),)
    np.testing.assert_array_equal(sample.patches, patchify(np.stack([image, image]), 16, 2, 2)[0])
    assert "seconds" not in TINY.tokenizer.decode(sample.input_ids)
    assert (sample.input_ids == CONFIG.image_token_id).sum() == 2
    assert sample.media[0].times == (0.0,)


def test_files(tmp_path, video_file):
    picture = str(tmp_path / "a.png")
    Image.fromarray(pixels(60, 100)).save(picture)
    sample = TINY(ask({"type": "image", "image": picture}, {"type": "video", "video": video_file}))
    image, video = sample.media
    assert (image.kind, image.path, image.size) == ("image", picture, (32, 64))
    assert (video.kind, video.path, video.size) == ("video", video_file, (64, 96))
    assert (video.frames, video.total_frames) == (6, 30)
    np.testing.assert_allclose(video.times, np.round(np.linspace(0, 29, 6)) / 10, atol=1e-6)
    assert sample.grids == ((1, 2, 4), (3, 4, 6))
    assert sample.patches.shape == (8 + 72, CONFIG.vision_config.patch_dim)
    ids = sample.input_ids
    assert (ids == CONFIG.image_token_id).sum() == 2
    assert (ids == CONFIG.video_token_id).sum() == 18


def test_text_alone():
    sample = TINY(ask())
    assert sample.patches.shape == (0, CONFIG.vision_config.patch_dim)
    assert sample.grids == sample.media == ()
    np.testing.assert_array_equal(sample.positions, np.broadcast_to(np.arange(len(sample)), (3, len(sample))))


def test_vision_id():
    sample = dataclasses.replace(TINY, add_vision_id=True)(ask(memory_video(2)))
    assert "user\nVideo 1: <0.2 seconds>" in TINY.tokenizer.decode(sample.input_ids)


def test_text_model_refuses_a_video():
    processor = dataclasses.replace(TINY, config=dataclasses.replace(CONFIG, vision_config=None))
    assert len(processor(ask())) > 0
    with pytest.raises(
        UserError, match="message 0: there is a part of type video, but this model has no vision tower"
    ):
        processor(ask(memory_video(2)))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (memory_video(2, 32, 40), "multiples of 32"),
        (memory_video(2) | {"times": np.zeros(3)}, "2 frames need as many times"),
        (memory_video(2) | {"frames": np.zeros((2, 32, 32, 3), np.float32)}, "pixels must be uint8"),
        (memory_video(2) | {"frames": pixels(0, 32, 32), "times": []}, "pixels must be uint8"),
        ({"type": "video", "video": "/nowhere.mp4"}, "/nowhere.mp4"),
        ({"type": "image", "image": "/nowhere.png"}, "/nowhere.png"),
    ],
)
def test_media_that_cannot_be_used(part, says):
    with pytest.raises(UserError, match=says):
        TINY(ask(part))


def test_save_and_read_back(tmp_path):
    processor = dataclasses.replace(TINY, fps=1.5, min_frames=2, max_frames=32)
    processor.save(tmp_path)
    again = Processor.from_dir(tmp_path, CONFIG)
    same = dataclasses.replace(processor, tokenizer=again.tokenizer)
    assert again == same
    assert again.tokenizer.to_json() == processor.tokenizer.to_json()


def test_missing_files_mean_the_defaults(tmp_path):
    shutil.copy(TINY_FOLDER / "tokenizer.json", tmp_path)
    processor = Processor.from_dir(tmp_path, CONFIG)
    assert processor == Processor(processor.tokenizer, CONFIG)
    assert processor.image_pixels == (65_536, 16_777_216)
    assert processor.video_pixels == (4_096, 25_165_824)
    assert (processor.fps, processor.min_frames, processor.max_frames) == (2.0, 4, 768)


def test_older_names_win(tmp_path):
    TINY.save(tmp_path)
    size = {"shortest_edge": 1, "longest_edge": 2}
    (tmp_path / IMAGE_FILE).write_text(json.dumps({"size": size, "max_pixels": 3}))
    assert Processor.from_dir(tmp_path, CONFIG).image_pixels == (1, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"fps": "2"}', "fps is '2', not a positive number"),
        ('{"max_frames": 0}', "max_frames is 0"),
        ('{"size": 3}', "size is 3, not an object"),
        ('{"size": {"longest_edge": -1}}', "longest_edge is -1"),
    ],
)
def test_bad_budget_file(tmp_path, content, says):
    TINY.save(tmp_path)
    (tmp_path / VIDEO_FILE).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        Processor.from_dir(tmp_path, CONFIG)
    assert VIDEO_FILE in str(error.value)


def test_pickles_for_data_workers():
    again = pickle.loads(pickle.dumps(TINY))
    messages = ask(memory_video(2))
    np.testing.assert_array_equal(again(messages).input_ids, TINY(messages).input_ids)


def test_synthetic_samples_are_fast():
    messages = ask(memory_video(32))
    TINY(messages)
    best = min(_seconds(lambda: TINY(messages)) for _ in range(30))
    # Measured 0.2 ms; the limit leaves room for a busy machine.
    assert best < 2e-3


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
