"""Which frames of a video are looked at, and the times the model reads beside them (SPEC §5)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from iv3jax.errors import UserError


def sample_indices(
    total_frames: int, source_fps: float, fps: float, min_frames: int, max_frames: int
) -> npt.NDArray[np.int64]:
    """Numbers of the frames to read, evenly spread over the whole video.

    Args:
        total_frames: frames in the file, at least 1.
        source_fps: their average rate, frames a second.
        fps: rate asked for, frames a second.
        min_frames, max_frames: bounds on the number of frames read. `min_frames` wins over the
            length of the file, so a short video gives some frames twice.

    Returns:
        (n,) int64, not decreasing, n even (the last frame is repeated to make it so, which may go
        one above an odd `max_frames`).

    Raises:
        UserError: a rate or bound that makes no sense.
        ValueError: no frames, or a source rate that is not positive.
    """
    if total_frames < 1 or not source_fps > 0:
        raise ValueError(f"{total_frames} frames at {source_fps} frames a second")
    if not 0 < fps < float("inf"):
        raise UserError(f"fps {fps} must be a positive number of frames a second")
    if not 1 <= min_frames <= max_frames:
        raise UserError(f"min_frames {min_frames} must be at least 1 and at most max_frames {max_frames}")
    # This order of operations decides which way a whole number falls: keep it.
    wanted = int(total_frames / source_fps * fps)
    count = max(min(max(wanted, min_frames), max_frames, total_frames), min_frames)
    indices = np.linspace(0, total_frames - 1, count).round().astype(np.int64)
    return np.append(indices, indices[-1:]) if count % 2 else indices


def average_rate(
    times: npt.NDArray[np.float64], duration: float, stated: Sequence[float], tick: float
) -> float:
    """The rate of a video, frames a second: a stated one if the times keep to it, else frames / duration.

    Args:
        times: (N,) seconds, the first 0.
        duration: seconds, the last frame's own included.
        stated: rates that the file claims, best first.
        tick: unit of the file's timestamps in seconds. A rate is kept to within one tick, because
            timestamps in whole milliseconds round a constant rate.
    """
    for rate in stated:
        if np.abs(times - np.arange(len(times)) / rate).max() <= 1.001 * tick:
            return rate
    return len(times) / duration


def temporal_patch_times(frame_times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Times of the temporal patches: the mean of each pair of frames.

    Args:
        frame_times: (n,) seconds, n even.

    Returns:
        (n/2,) float64 seconds.

    Raises:
        ValueError: n is odd.
    """
    pairs = np.asarray(frame_times, np.float64)
    if pairs.ndim != 1 or len(pairs) % 2:
        raise ValueError(f"frame times of shape {pairs.shape} do not form pairs")
    return (pairs[0::2] + pairs[1::2]) / 2


def timestamp_text(seconds: float) -> str:
    """The text in front of a temporal patch, `<12.3 seconds>`."""
    return f"<{seconds:.1f} seconds>"
