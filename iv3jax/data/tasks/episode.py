"""Episode: a long video that is described, not stored: its frames are made when they are looked at.

How its events are laid out in time, and the times at which a view looks at it, are here as well. What is
asked about an episode is its task's business.
"""

from dataclasses import dataclass

import numpy as np

from iv3jax.data.digits import CLIPS, EVENT_GAP, SIDE, Event, Split, background, draw, number_image
from iv3jax.data.sampling import sample_indices

SOURCE_FPS = 24.0
"""The rate that an episode is taken to be stored at, frames a second."""
VIEW_FPS = 2.0
"""The highest rate of a uniform view, which is the Processor's rate for a file."""
DENSE_FPS = 8.0
"""The rate at which everything there is to see is seen; backgrounds have no more frames than that."""

Span = tuple[float, float]
"""Start and end in seconds, the end not included."""


@dataclass(frozen=True)
class Episode:
    """A real clip, there and back for as long as is wanted, with numbers on a panel at known times.

    Attributes:
        duration: seconds.
        events: in order of time, not overlapping. A number above 99 is drawn with three digits.
        split: whose clips and handwriting are used.
        look: seed of the clip, its offset, side and brightness, and of the handwriting.
        varied: how much each digit differs from the one that was written, see `digits.number_image`.
        zeroed: blacken the panel in every frame: the control from which nothing can be read.
    """

    duration: float
    events: tuple[Event, ...]
    split: Split
    look: int
    varied: float = 0.0
    zeroed: bool = False

    def frames(self, times: np.ndarray) -> np.ndarray:
        """(n, SIDE, SIDE, 3) uint8: what is seen at these n seconds, the same at the same time always."""
        rng = np.random.default_rng([self.look, 0])
        clip = background(str(rng.choice(CLIPS[self.split])))
        period = 2 * len(clip) - 2
        at = ((np.asarray(times) * DENSE_FPS).astype(int) + rng.integers(period)) % period
        frames = clip[np.minimum(at, period - at)]
        if rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        frames = (frames * rng.uniform(0.6, 1.0)).astype(np.uint8)
        for number, event in enumerate(self.events):
            shown = np.flatnonzero((times >= event.start) & (times < event.end))
            if len(shown):
                rng = np.random.default_rng([self.look, 1 + number])
                image = panel(rng, event.number, self.split, self.varied)
                for i in shown:
                    frames[i] = draw(frames[i], image)
        if self.zeroed:
            frames[:, SIDE // 2 :] = 0
        return frames

    def seen(self, times: np.ndarray) -> np.ndarray:
        """(events,) bool: which events are seen at one of these times, which do not decrease."""
        first, last = seen_frames(times, *np.array([(e.start, e.end) for e in self.events]).T)
        return first < last


def panel(rng: np.random.Generator, number: int, split: Split, varied: float = 0.0) -> np.ndarray:
    """(SIDE / 2, SIDE) float32 in [0, 1]: a number of two or three handwritten digits."""
    height = SIDE // 2
    if number < 100:
        return number_image(rng, number, split, height, SIDE, varied)
    width = SIDE // 3
    ten = number_image(rng, number // 10, split, height, 2 * width, varied)
    unit = number_image(rng, number % 10, split, height, 2 * width, varied)[:, width:]
    return np.pad(np.concatenate([ten, unit], axis=1), ((0, 0), (0, SIDE - 3 * width)))


def seen_frames(times: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each span the number of the first frame inside it and of the first one after it."""
    return np.searchsorted(times, starts), np.searchsorted(times, ends)


def spread(rng: np.random.Generator, duration: float, cells: int, shown: Span) -> tuple[Span, ...]:
    """One span in each of `cells` equal parts of the video, anywhere in its part, in order of time.

    Its length is uniform in `shown`, or less at the top where a part is shorter than that; EVENT_GAP or more
    lies between two spans. So whether a fixed set of frames sees one says nothing about another, which is
    what makes the ceilings exact (`ceilings.py`).
    """
    edges = np.arange(cells) * (duration / cells) + EVENT_GAP / 2
    lengths = rng.uniform(shown[0], longest(duration, cells, shown), cells)
    starts = edges + rng.uniform(0, 1, cells) * (duration / cells - EVENT_GAP - lengths)
    return tuple(
        (start, round(start + length, 2))
        for start, length in zip(starts.round(2).tolist(), lengths.round(2).tolist(), strict=True)
    )


def longest(duration: float, cells: int, shown: Span) -> float:
    """The longest that anything is shown in such a video, in seconds."""
    return max(shown[0], min(shown[1], duration / cells - EVENT_GAP))


def uniform_times(duration: float, frames: int) -> np.ndarray:
    """(n,) seconds, n ≤ `frames` and even: the frames of the whole video, as a file of it is sampled."""
    return sample_indices(round(duration * SOURCE_FPS), SOURCE_FPS, VIEW_FPS, 4, frames) / SOURCE_FPS


def dense_times(duration: float) -> np.ndarray:
    """(n,) seconds: everything there is to see."""
    return np.arange(round(duration * DENSE_FPS)) / DENSE_FPS


def window_times(
    rng: np.random.Generator, duration: float, evidence: tuple[Span, ...], frames: int
) -> np.ndarray:
    """(n,) seconds, n ≤ `frames` and even: the frames shared by windows around the evidence, in order.

    A window is longer than its evidence by a quarter to the whole of it at each end, by chance, so that its
    own ends don't give the answer away. Its 4 frames or more never miss the evidence.

    Raises:
        ValueError: fewer than 4 frames a window.
    """
    count = frames // len(evidence) // 2 * 2
    if count < 4:
        raise ValueError(f"{frames} frames for {len(evidence)} windows")
    times = []
    for start, end in evidence:
        before, after = rng.uniform(0.25, 1.0, 2) * (end - start)
        last = min(end + after, duration - 1 / SOURCE_FPS)
        times.append(np.linspace(max(start - before, 0.0), last, count))
    return np.sort(np.concatenate(times))
