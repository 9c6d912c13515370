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
        grids: (t, h, w) in patches of each image and video, in order of appearance.
        media: one record for each of the grids.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    patches: np.ndarray
    grids: tuple[tuple[int, int, int], ...]
    media: tuple[Media, ...]

    def __len__(self) -> int:
        return len(self.input_ids)
