"""A video file → the frames the model looks at, with their times. Choosing frames is sampling.py.

A frame is known by its number in presentation order. Which frames there are is read from the packets,
without decoding, where the container can be trusted to say it; otherwise the file is decoded once to
find out. Reading decodes only from the keyframe before a wanted frame, and checks that what came out
is what the packets promised.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NoReturn

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from iv3jax.data.image import resize
from iv3jax.data.sampling import sample_indices
from iv3jax.data.sizes import video_size
from iv3jax.errors import UserError

_THREADS = 2
# Draining and refilling the decoder costs about this many frames.
_MIN_SKIP = 8
# Demuxers that pass on the presentation times the file holds. Others (AVI, MPEG program streams, raw
# streams) make them up, wrongly where there are B-frames.
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_TIMED_CONTAINERS = {_MP4, "matroska,webm", "mpegts", "flv"}
_NONE = np.iinfo(np.int64).min
_REENCODE = "re-encode it with `ffmpeg -i IN OUT.mp4`"
_PICTURES = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a video file holds.

    Attributes:
        path: the file.
        width, height: of a frame as it is shown, in pixels.
        times: (N,) float64 presentation time of each frame in seconds, the first being 0.
        fps: average rate, frames a second; the nominal one where the rate is constant.
        duration: seconds, the last frame's own included.
    """

    path: Path
    width: int
    height: int
    times: npt.NDArray[np.float64]
    fps: float
    duration: float

    @property
    def num_frames(self) -> int:
        """N, the number of frames."""
        return len(self.times)


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames sampled from a video.

    Attributes:
        frames: (n, h, w, 3) uint8 RGB, resized; n is even.
        times: (n,) float64 presentation time in seconds, the file's first frame being 0.
        indices: (n,) int64 numbers of the frames in the file, not decreasing.
        total_frames: frames in the file.
        source_fps: average rate of the file, frames a second.
        duration: of the file, in seconds.
        source_size: (height, width) of the file's frames as they are shown, in pixels.
    """

    frames: npt.NDArray[np.uint8]
    times: npt.NDArray[np.float64]
    indices: npt.NDArray[np.int64]
    total_frames: int
    source_fps: float
    duration: float
    source_size: tuple[int, int]


def probe(path: str | Path) -> VideoInfo:
    """Finds the frames of a video and their times, reading the whole file once.

    Raises:
        UserError: no such file, a folder, no video, a picture, sound only, no frames, truncated or
            damaged. The text names the file and a way out.
    """
    return _scan(Path(path)).info


def read_video(
    path: str | Path,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    min_pixels: int,
    max_pixels: int,
) -> VideoFrames:
    """Samples frames evenly over a whole video and resizes them with antialiased bicubic.

    Only the sampled frames are kept, each resized as it is decoded.

    Args:
        path: any video FFmpeg reads.
        fps, min_frames, max_frames: see `sampling.sample_indices`. Frames are chosen by number, so a
            variable rate gives uneven times; `times` tells the true ones.
        min_pixels, max_pixels: budget for frames · height · width (`sizes.video_size`).

    Raises:
        UserError: as `probe`, and for a side under 32 pixels, an aspect ratio above 200, or bounds
            that make no sense. The text names the file.
    """

    def sample(scan: _Scan) -> VideoFrames:
        info = scan.info
        try:
            indices = sample_indices(info.num_frames, info.fps, fps, min_frames, max_frames)
            size = video_size(len(indices), info.height, info.width, min_pixels, max_pixels)
        except UserError as error:
            raise UserError(f"{info.path}: {error}") from None
        frames = _read(scan, indices, size)
        source_size = (info.height, info.width)
        return VideoFrames(
            frames, info.times[indices], indices, info.num_frames, info.fps, info.duration, source_size
        )

    path = Path(path)
    try:
        return sample(_scan(path))
    except _NotAsListed:
        return sample(_scan_by_decoding(path))


class _NotAsListed(Exception):
    """What was decoded differs from what the packets promised."""


@dataclass(frozen=True, eq=False)
class _Packets:
    """The P packets of the stream in file order; empty ones are left out everywhere.

    pts, dts and duration (P,) int64 in ticks, _NONE where not given; keyframe (P,) bool; shown (P,)
    bool, False for what an edit list cuts off.
    """

    pts: npt.NDArray[np.int64]
    dts: npt.NDArray[np.int64]
    duration: npt.NDArray[np.int64]
    keyframe: npt.NDArray[np.bool_]
    shown: npt.NDArray[np.bool_]

    def order(self) -> npt.NDArray[np.int64]:
        """(N,) int64: where in the file each frame's packet is, in presentation order."""
        shown = np.flatnonzero(self.shown)
        return shown[np.argsort(self.pts[shown])]


@dataclass(frozen=True, eq=False)
class _Scan:
    """A video and how to find its frames: by packet, or (packets None) by counting decoded ones.

    `matrix` holds a, b, c, d of the display matrix: x' = a·x + c·y, y' = b·x + d·y.
    """

    info: VideoInfo
    matrix: tuple[int, int, int, int]
    packets: _Packets | None


class _Decoder:
    """Decodes the packets of a stream, counting those that fail instead of stopping at them."""

    def __init__(self, stream: VideoStream) -> None:
        self.stream = stream
        self.failures = 0

    def feed(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """The frames that come out when a packet goes in; None asks for all that are left."""
        try:
            return self.stream.decode(packet)
        except FFmpegError:
            self.failures += 1
            return []

    def drain(self) -> list[VideoFrame]:
        """The frames that are left; afterwards the decoder can start anew at a keyframe."""
        frames = self.feed(None)
        self.stream.codec_context.flush_buffers()
        return frames


def _scan(path: Path) -> _Scan:
    """Finds the frames from the packets, or by decoding where those leave a doubt."""
    _check_file(path)
    missing = _missing_bytes(path)
    rows: list[tuple[int, int, int, bool, bool]] = []
    first: list[VideoFrame] = []
    hidden = cut = False
    with _open(path, missing) as stream:
        decoder = _Decoder(stream)
        try:
            for packet in _demux(stream):
                pts, dts = (_NONE if t is None else t for t in (packet.pts, packet.dts))
                rows.append((pts, dts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
                cut = packet.is_corrupt
                # VP8 puts reference frames that are never shown into packets of their own.
                hidden |= stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
                first = first or decoder.feed(packet)
        except FFmpegError:
            cut = True
        first = first or decoder.drain()
        entries, is_mp4 = len(stream.index_entries), stream.container.format.name == _MP4
        timed = stream.container.format.name in _TIMED_CONTAINERS
        rates, tick = _rates(stream), Fraction(stream.time_base or 1)
    columns = list(zip(*rows, strict=True)) or [()] * 5
    packets = _Packets(
        *(np.array(c, np.int64) for c in columns[:3]), *(np.array(c, np.bool_) for c in columns[3:])
    )
    if missing or cut:
        _raise_truncated(path, packets, tick, len(rows) - cut, entries if is_mp4 else 0)
    if not packets.shown.any():
        raise UserError(f"{path}: the video holds no frames; record or export it again")
    if not first:
        raise UserError(f"{path}: none of its {len(rows)} frames can be decoded; {_REENCODE}")
    if hidden or not timed or not _is_complete(packets):
        return _scan_by_decoding(path)
    order = packets.order()
    info = _info(path, first[0], packets.pts[order], int(packets.duration[order[-1]]), tick, rates)
    return _Scan(info, _display_matrix(first[0]), packets)


def _is_complete(packets: _Packets) -> bool:
    """True where the packets surely tell all frames, in their order."""
    pts, dts = packets.pts, packets.dts[packets.dts != _NONE]
    return bool(
        not (pts == _NONE).any()
        and len(np.unique(pts)) == len(pts)
        # Time that runs backwards: recordings joined without new timestamps.
        and (np.diff(dts) > 0).all()
        # Frames before the first keyframe may or may not be decodable.
        and packets.keyframe[0]
        and pts[0] == pts.min()
    )


def _scan_by_decoding(path: Path) -> _Scan:
    """Finds the frames by decoding them all."""
    with _open(path, 0) as stream:
        decoder = _Decoder(stream)
        pts: list[int | None] = []
        first: VideoFrame | None = None
        total = allowed = 0
        for packet in _and_end(_demux(stream)):
            total += packet is not None
            if total == 1 and packet is not None:
                starts_inside = not packet.is_keyframe
            for frame in decoder.feed(packet):
                if first is None:
                    first = frame
                    # A recording that starts between keyframes cannot show anything before the next.
                    allowed = decoder.failures if starts_inside else 0
                pts.append(frame.pts)
        rates, tick = _rates(stream), Fraction(stream.time_base or 1)
    if first is None or decoder.failures > allowed:
        raise UserError(
            f"{path}: truncated or damaged: only {len(pts)} of {total} frames can be decoded; {_REENCODE}"
        )
    known = [p for p in pts if p is not None]
    if len(known) < len(pts) or (np.diff(known) <= 0).any():
        # No usable times: the rate is all there is.
        if not rates:
            raise UserError(f"{path}: tells neither times nor a frame rate; {_REENCODE}")
        known, tick = list(range(len(pts))), 1 / rates[0]
    info = _info(path, first, np.array(known, np.int64), 0, tick, rates)
    return _Scan(info, _display_matrix(first), None)


def _info(
    path: Path,
    first: VideoFrame,
    pts: npt.NDArray[np.int64],
    last_duration: int,
    tick: Fraction,
    rates: list[Fraction],
) -> VideoInfo:
    """Times and average rate from timestamps in presentation order, in ticks of `tick` seconds."""
    # Divided last, so that a constant rate gives exactly index / fps.
    times = (pts - pts[0]) * tick.numerator / tick.denominator
    if last_duration > 0:
        last = float(last_duration * tick)
    elif len(times) > 1:
        last = float(np.median(np.diff(times)))
    else:
        last = float(1 / rates[0]) if rates else 1.0
    duration = float(times[-1]) + last
    fps = len(times) / duration
    for rate in rates:
        # Timestamps in whole milliseconds round a constant rate; it is constant all the same.
        if np.abs(times - np.arange(len(times)) / float(rate)).max() <= 1.001 * tick:
            fps = float(rate)
            break
    a, b, _, _ = _display_matrix(first)
    height, width = first.height, first.width
    if abs(b) > abs(a):
        height, width = width, height
    return VideoInfo(path, width, height, times, fps, duration)


def _rates(stream: VideoStream) -> list[Fraction]:
    """The frame rates that the file or FFmpeg states, best first."""
    stated = (stream.guessed_rate, stream.average_rate, stream.base_rate)
    return [Fraction(rate) for rate in stated if rate]


def _read(scan: _Scan, indices: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decodes frames by number: (n, h, w, 3) uint8 RGB, each upright and resized to (h, w)."""
    out = np.empty((len(indices), *size, 3), np.uint8)

    def store(frame: VideoFrame, number: int) -> None:
        rgb = _upright(frame.to_ndarray(format="rgb24"), scan.matrix)
        out[indices == number] = resize(Image.fromarray(rgb), *size)

    with _open(scan.info.path, 0) as stream:
        if scan.packets is None:
            _decode_counting(stream, scan.info, set(indices.tolist()), store)
        else:
            _decode_listed(stream, scan.packets, np.unique(indices), store)
    return out


def _decode_counting(
    stream: VideoStream, info: VideoInfo, wanted: set[int], store: Callable[[VideoFrame, int], None]
) -> None:
    """Decodes everything and stores the wanted frames by their place among what comes out."""
    decoder, number = _Decoder(stream), 0
    for packet in _and_end(_demux(stream)):
        for frame in decoder.feed(packet):
            if number in wanted:
                store(frame, number)
            number += 1
    if number != info.num_frames:
        raise UserError(f"{info.path}: changed while it was read; read it again")


def _decode_listed(
    stream: VideoStream,
    packets: _Packets,
    wanted: npt.NDArray[np.int64],
    store: Callable[[VideoFrame, int], None],
) -> None:
    """Decodes the runs of packets that hold the wanted frames and stores them by their timestamp."""
    order = packets.order()
    numbers = {int(packets.pts[order[number]]): int(number) for number in wanted}
    decoder, source = _Decoder(stream), enumerate(_demux(stream))
    for first, last in _runs(packets, order[wanted]):
        start = packets.pts[first]
        seen: list[int] = []
        # Packets in between are read past, not sought past: demuxers land on a keyframe only roughly,
        # and reading is cheap beside decoding.
        for position, packet in source:
            if position < first:
                continue
            frames = decoder.feed(packet)
            if position == last:
                frames += decoder.drain()
            for frame in frames:
                if frame.pts is None:
                    raise _NotAsListed
                # Frames before the keyframe belong to the group before, and may be garbage here.
                if frame.pts >= start:
                    seen.append(frame.pts)
                    if frame.pts in numbers:
                        store(frame, numbers[frame.pts])
            if position == last:
                break
        promised = packets.pts[first : last + 1][packets.shown[first : last + 1]]
        if sorted(seen) != sorted(promised[promised >= start].tolist()):
            raise _NotAsListed


def _runs(packets: _Packets, positions: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Which packets to decode, first and last, for the frames whose packets lie at `positions`.

    Each run starts at a keyframe. A gap too short to be worth a fresh start is decoded through.
    """
    keys = np.flatnonzero(packets.keyframe)
    runs: list[tuple[int, int]] = []
    for position in positions.tolist():
        k = int(np.searchsorted(keys, position, side="right")) - 1
        # In an open group, frames shown before the keyframe need the group before.
        while packets.pts[keys[k]] > packets.pts[position]:
            k -= 1
        first = int(keys[k])
        if runs and first - runs[-1][1] <= _MIN_SKIP:
            runs[-1] = (runs[-1][0], max(runs[-1][1], position))
        else:
            runs.append((first, position))
    return runs


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    return a, b, c, d


def _upright(rgb: npt.NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """Turns and mirrors (H, W, 3) pixels as the display matrix says, to quarter turns."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _check_file(path: Path) -> None:
    """Refuses what is no file, or is a picture."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: the file is empty; fetch it again")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the video") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a video file inside it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from None
    try:
        with Image.open(path, formats=_PICTURES) as picture:
            moves = picture.format in ("GIF", "PNG") and getattr(picture, "is_animated", False)
    # Only the header matters here: whatever Pillow cannot open is no picture.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return
    if not moves:
        raise UserError(f"{path}: is a picture, not a video; pass it as an image")


@contextmanager
def _open(path: Path, missing: int) -> Iterator[VideoStream]:
    """The video stream of a file, closed afterwards; `missing` bytes explain why it may not open."""
    try:
        # The prefix keeps a colon in a file name from being read as a protocol.
        container = av.open(f"file:{path}", "r")
    except FFmpegError:
        if missing or _is_mp4(path):
            raise UserError(
                f"{path}: truncated or never finished, its index (moov) is missing; fetch or record it again"
            ) from None
        raise UserError(f"{path}: not a video that FFmpeg can read; convert it to MP4") from None
    with container:
        video = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if container.format.name == "tty":
            raise UserError(f"{path}: is a text file, not a video; give a video file")
        if not video and container.streams.audio:
            raise UserError(f"{path}: holds sound but no picture; give a file with a video track")
        if not video:
            if missing:
                raise UserError(f"{path}: truncated, {missing} bytes are missing; fetch it again")
            raise UserError(f"{path}: holds no video track; give a video file")
        stream = video[0]
        if stream.codec_context is None:
            raise UserError(f"{path}: its codec cannot be decoded here; {_REENCODE}")
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield stream


def _demux(stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets of a stream without empty ones, which a decoder takes for the end."""
    return (packet for packet in stream.container.demux(stream) if packet.size)


def _and_end(
    packets: Iterator[Packet[VideoStream]],
) -> Iterator[Packet[VideoStream] | None]:
    """The packets, then None."""
    yield from packets
    yield None


def _raise_truncated(path: Path, packets: _Packets, tick: Fraction, whole: int, entries: int) -> NoReturn:
    """Refuses a file that was cut off, telling how far it goes."""
    times = packets.pts[:whole]
    times = times[times != _NONE]
    seconds = float((times.max() - times.min()) * tick) if len(times) else 0.0
    of = f" of {entries}" if entries > whole else ""
    raise UserError(
        f"{path}: truncated: only {whole}{of} frames, the first {seconds:.1f} seconds, are there; "
        "fetch it again, or keep those with `ffmpeg -i IN OUT.mp4`"
    )


def _missing_bytes(path: Path) -> int:
    """How many bytes the container's own headers (MP4, Matroska, AVI) promise beyond the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            end = _riff_end(file, size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _segment_end(file)
        elif _is_mp4(path):
            end = _boxes_end(file, size)
        else:
            end = 0
    return max(end - size, 0)


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] in (b"ftyp", b"moov", b"mdat", b"wide", b"styp")


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the top-level boxes of an MP4 end."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        # 0 means to the end of the file; odd kinds of box are padding that some recorders leave.
        if length < 8 or (position + length > size and head[4:8] not in (b"moov", b"moof", b"mdat")):
            return size
        position += length
    return position


def _segment_end(file: BinaryIO) -> int:
    """Where the segment of a Matroska file ends; 0 for a live recording, which does not say."""
    file.seek(4)
    file.seek(_ebml_size(file) or 0, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _ebml_size(file)
    return 0 if length is None else file.tell() + length


def _ebml_size(file: BinaryIO) -> int | None:
    """A Matroska length: as many leading zero bits as bytes follow; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    unknown = (1 << 7 * (more + 1)) - 1
    value = int.from_bytes(first + file.read(more), "big") & unknown
    return None if value == unknown else value


def _riff_end(file: BinaryIO, size: int) -> int:
    """Where the RIFF chunks of an AVI end; large files have several."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return 0
        position += 8 + length
    return position
