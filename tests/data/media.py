"""Small videos for tests, written with PyAV. Every frame shows its own number, so a test can read it back."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.packet import Packet

_BITS = 8


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: eight bars, black or white, spell the number; below, a moving ramp."""
    frame = np.empty((height, width, 3), np.uint8)
    ramp = (np.arange(width) * 255 // width + 37 * number) % 256
    frame[:] = np.stack([ramp, ramp[::-1], np.full(width, 5 * number % 256)], -1)
    for bit in range(_BITS):
        columns = slice(width * bit // _BITS, width * (bit + 1) // _BITS)
        frame[: height // 2, columns] = 255 * (number >> bit & 1)
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number that a decoded, perhaps resized, `numbered_frame` shows."""
    height, width = frame.shape[:2]
    centres = [width * (2 * bit + 1) // (2 * _BITS) for bit in range(_BITS)]
    return sum(int(frame[height // 4, x].mean() > 127) << bit for bit, x in enumerate(centres))


def write_video(
    path: Path,
    count: int = 30,
    *,
    height: int = 64,
    width: int = 96,
    rate: int | Fraction = 30,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int | None = None,
    hflip: bool = False,
    edit: Callable[[list[Packet]], list[Packet]] = lambda packets: packets,
) -> Path:
    """Writes `count` numbered frames; `edit` may change the packets between encoder and file.

    `ticks` are the frames' times in units of `time_base`; by default a constant rate from 0.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        if codec == "libx264":
            options = {"preset": "ultrafast", "bf": str(b_frames)} | (options or {})
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        time_base = time_base or 1 / Fraction(rate)
        stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        packets: list[Packet] = []
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = time_base
            packets += stream.encode(frame)
        container.start_encoding()
        # An encoder that never saw a frame has nothing to flush.
        packets += stream.encode() if count else []
        container.mux(edit(packets))
    return path


def write_sound(path: Path) -> Path:
    """Half a second of silence, no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame) + stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Keeps the first part of a file, as a broken download does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def decode_all(path: Path) -> tuple[list[np.ndarray], list[int | None]]:
    """Every frame (h, w, 3) and its timestamp, decoded straight on: the reference."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [f.to_ndarray(format="rgb24") for f in frames], [f.pts for f in frames]
