"""Picture and video files → uint8 frames with their times, and frames → rows of patches.

Needs Pillow, PyAV and numpy only. A frame's time is its presentation time after the first frame's.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps

_MAX_ASPECT = 200
# Demuxers that pass on the presentation times the file holds; elsewhere frames are decoded to learn them.
_TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}


@dataclass
class MediaSettings:
    """How pictures or videos are prepared: the fields of preprocessor_config.json.

    Attributes:
        size: `shortest_edge` and `longest_edge`, least and most pixels of a picture or of a whole video.
        patch_size, temporal_patch_size, merge_size: the vision tower's.
        image_mean, image_std: for pixels between 0 and 1.
        fps, min_frames, max_frames: how many frames of a video file are looked at.
        do_resize: False takes pictures and frames given in memory as they are.
    """

    size: dict[str, int]
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    do_resize: bool = True

    @property
    def factor(self) -> int:
        """Both sides of a frame are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def pixels(self) -> tuple[int, int]:
        """The budget."""
        return self.size["shortest_edge"], self.size["longest_edge"]


def fitted(count: int, height: int, width: int, settings: MediaSettings) -> tuple[int, int]:
    """(height, width) of `count` resized frames, rounded to the factor and inside the budget.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    factor, (least, most) = settings.factor, settings.pixels
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(f"{width}x{height} pixels is an aspect ratio above {_MAX_ASPECT}: crop it")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    total = (1 if count == 1 else round(count / 2) * 2) * h * w
    if total > most:
        beta = math.sqrt(count * height * width / most)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif total < least:
        beta = math.sqrt(least / (count * height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def read_image(source: Any, settings: MediaSettings) -> np.ndarray:
    """A picture file, PIL image or (h, w, 3) uint8 array → (1, h, w, 3) uint8, upright and resized.

    Raises:
        ValueError: no picture that can be read, or an aspect ratio above 200. The text names the file.
    """
    name = source if isinstance(source, str | Path) else "image"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise ValueError(f"image: must be uint8 (h, w, 3), not {source.dtype} {source.shape}")
        picture = Image.fromarray(source)
    else:
        try:
            with Image.open(source) if isinstance(source, str | Path) else source.copy() as opened:
                opened.load()
                picture = _rgb(ImageOps.exif_transpose(opened))
        # Pillow's decoders raise any of these on bad bytes.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: cannot be read as a picture ({error})") from None
    try:
        return _resized(np.asarray(picture)[None], settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # convert() would clip at 255 and leave a white picture.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def _resized(frames: np.ndarray, settings: MediaSettings) -> np.ndarray:
    if not settings.do_resize:
        return frames
    height, width = fitted(len(frames), frames.shape[1], frames.shape[2], settings)
    return np.stack([_resize(frame, height, width) for frame in frames])


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def given_frames(
    frames: Any, times: Any, settings: MediaSettings, name: str = "video"
) -> tuple[np.ndarray, np.ndarray]:
    """Frames in memory, (n, h, w, 3) uint8, with the time of each → the same as `read_video`.

    None is left out; they are resized unless `do_resize` is False.
    """
    frames, times = np.asarray(frames), np.asarray(times, np.float64)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"{name}: frames must be uint8 (n, h, w, 3), not {frames.dtype} {frames.shape}")
    if times.shape != (len(frames),):
        raise ValueError(f"{name}: {len(frames)} frames need as many times, not {times.shape}")
    if len(frames) % 2:
        frames, times = np.concatenate([frames, frames[-1:]]), np.append(times, times[-1:])
    return _resized(frames, settings), times


def read_video(path: str | Path, settings: MediaSettings) -> tuple[np.ndarray, np.ndarray]:
    """Samples frames evenly over a whole video file.

    Returns:
        frames: (n, h, w, 3) uint8 RGB, upright and resized; n is even.
        times: (n,) float64 seconds.

    Raises:
        ValueError: no such file, no video, truncated or damaged, frames too small or too long. The text
            names the file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; check the path of the video")
    try:
        pts, last, size, rates, tick = _scan(path)
        times, fps = _times_and_rate(pts, last, rates, tick)
        indices = sample_indices(len(pts), fps, settings)
        if min(size) < settings.factor:
            raise ValueError(f"frames of {size[1]}x{size[0]} pixels are too small, scale the video up")
        height, width = fitted(len(indices), *size, settings)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        seen = 0
        with _open(path) as stream:
            for number, frame in enumerate(stream.container.decode(stream)):
                seen += 1
                if (wanted := indices == number).any():
                    out[wanted] = _resize(_upright(frame), height, width)
        if seen != len(pts):
            raise ValueError(f"truncated or damaged, {seen} of {len(pts)} frames can be decoded")
    except (FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a video ({error})") from None
    return out, times[indices]


def sample_indices(total: int, source_fps: float, settings: MediaSettings) -> np.ndarray:
    """Numbers of the frames to look at, an even count; `min_frames` wins over the length of the file."""
    fps, least, most = settings.fps, settings.min_frames, settings.max_frames
    if not (fps > 0 and 1 <= least <= most):
        raise ValueError(f"fps {fps}, min_frames {least} and max_frames {most} make no sense")
    # This order of operations decides which way a whole number falls.
    count = max(min(max(int(total / source_fps * fps), least), most, total), least)
    indices = np.linspace(0, total - 1, count).round().astype(np.int64)
    return np.append(indices, indices[-1:]) if count % 2 else indices


def _scan(path: str | Path) -> tuple[np.ndarray, int, tuple[int, int], list[Fraction], Fraction]:
    """Timestamps of the frames in the order shown, the last one's length, (height, width), rates, tick."""
    with _open(path) as stream:
        packets = [p for p in stream.container.demux(stream) if p.size]
        stated, tick = stream.frames, Fraction(stream.time_base or 1)
        rates = [Fraction(r) for r in (stream.guessed_rate, stream.average_rate, stream.base_rate) if r]
        timed = stream.container.format.name in _TIMED and stream.codec_context.name != "vp8"
        if len(packets) < stated or any(p.is_corrupt for p in packets):
            raise ValueError(f"truncated or damaged, {len(packets)} of {stated} frames are there")
        rows = sorted((p.pts, p.duration or 0) for p in packets if p.pts is not None and not p.is_discard)
        dts = [p.dts for p in packets if p.dts is not None]
        timed &= all(p.pts is not None for p in packets) and dts == sorted(set(dts))
        timed &= len({pts for pts, _ in rows}) == len(rows) > 0 and packets[0].is_keyframe
        timed = timed and packets[0].pts == min(p.pts for p in packets)
    with _open(path) as stream:
        first, shown = None, []
        for frame in stream.container.decode(stream):
            first = frame if first is None else first
            if timed:
                break
            shown.append(frame.pts)
    if first is None:
        raise ValueError("it holds no frames")
    height, width = _upright(first).shape[:2]
    if timed:
        return np.array([pts for pts, _ in rows]), rows[-1][1], (height, width), rates, tick
    if None in shown or (np.diff(shown) <= 0).any():
        if not rates:
            raise ValueError("it tells neither times nor a frame rate")
        shown, tick = list(range(len(shown))), 1 / rates[0]
    return np.array(shown), 0, (height, width), rates, tick


def _times_and_rate(
    pts: np.ndarray, last: int, rates: list[Fraction], tick: Fraction
) -> tuple[np.ndarray, float]:
    """Seconds of each frame; the average rate, a stated one where the times keep to it within a tick."""
    times = (pts - pts[0]) * tick.numerator / tick.denominator
    length = float(last * tick)
    if last <= 0:
        length = float(np.median(np.diff(times)) if len(times) > 1 else 1 / rates[0] if rates else 1)
    for rate in map(float, rates):
        if np.abs(times - np.arange(len(times)) / rate).max() <= 1.001 * float(tick):
            return times, rate
    return times, len(times) / (float(times[-1]) + length)


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    # The prefix keeps a colon in a file name from being read as a protocol.
    with av.open(f"file:{path}") as container:
        if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
            raise ValueError("it is a picture or a text; give a video, or pass it as an image")
        streams = [s for s in container.streams.video if s.codec_context is not None]
        if not streams:
            raise ValueError("it holds no video")
        streams[0].thread_type = "AUTO"
        yield streams[0]


def _upright(frame: Any) -> np.ndarray:
    """(h, w, 3) RGB, turned and mirrored by quarters as the display matrix says."""
    rgb = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            rgb, a, d = rgb.transpose(1, 0, 2), c, b
        rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(rgb)


def patch_rows(frames: np.ndarray, settings: MediaSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Normalised patches (t·h·w, 3·2·16·16) fp32 and (t, h, w) in patches.

    A row is one patch: channel, frame, y, x. merge² rows in turn form one vision token. A single frame is
    doubled.
    """
    side, f, m = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    if frames.shape[1] % settings.factor or frames.shape[2] % settings.factor:
        raise ValueError(
            f"frames of {frames.shape[1:3]} pixels; sides must be multiples of {settings.factor}"
        )
    if missing := -len(frames) % f:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, height, width, _ = frames.shape
    t, h, w = count // f, height // side, width // side
    mean, std = (np.array(x, np.float32) for x in (settings.image_mean, settings.image_std))
    values = frames / (255 * std) - mean / std
    values = values.reshape(t, f, h // m, m, side, w // m, m, side, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return values.reshape(t * h * w, -1), (t, h, w)
