"""Sample: one conversation ready for the model, before it is padded or packed into a Batch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Media:
    """What was taken from one image or video, for people to read.

    Attributes:
        kind: "image" or "video".
        path: the file, or None for pixels that came in memory.
        frames: how many frames the model sees (an odd video's repeated last one counted).
        total_frames: how many the source has.
        times: seconds of each of the frames; (0.0,) for an image.
        size: height and width in pixels, after resizing.
    """

    kind: Literal["image", "video"]
    path: str | None
    frames: int
    total_frames: int
    times: tuple[float, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One conversation of T tokens with N patches.

    Attributes:
        input_ids: (T,) int32.
        positions: (3, T) int32, time, height and width (SPEC §5), from 0.
        labels: (T,) int32, the next token where a loss is taken, else −100; the last is −100.
        patches: (N, P) uint8 in the order of SPEC §4, or floats normalised to [−1, 1]; (0, P) without vision.
            Images and videos that come as features have none.
        grids: (t, h, w) in patches of each image and video, in order of appearance.
        media: one record for each of the grids.
        features: for each of the grids the tower's output (t·h·w/merge², 1+K, D), tokens and DeepStack
            levels, where it comes from a feature store, else None; empty where nothing does.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    patches: np.ndarray
    grids: tuple[tuple[int, int, int], ...]
    media: tuple[Media, ...]
    features: tuple[np.ndarray | None, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def ready(self) -> tuple[np.ndarray | None, ...]:
        """`features`, one for each of the grids in any case."""
        return self.features or (None,) * len(self.grids)

    @property
    def temporal_patches(self) -> np.ndarray:
        """(n,) int64: patches in each temporal patch that the tower has to look at, in order of appearance.

        What comes as features is not among them: it takes tokens of a row, but no room in its chunks.
        """
        pairs = zip(self.grids, self.ready, strict=True)
        return np.array([h * w for (t, h, w), ready in pairs if ready is None for _ in range(t)], np.int64)

    @property
    def feature_tokens(self) -> int:
        """How many vision tokens come as features."""
        return sum(len(ready) for ready in self.features if ready is not None)
