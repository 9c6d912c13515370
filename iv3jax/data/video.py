"""A video file → the frames the model looks at, with their times. Choosing frames is sampling.py.

A frame is known by its number in presentation order. Which frames there are is read from the packets,
without decoding, where the container can be trusted to say it; otherwise the file is decoded once to
find out. Reading decodes only from the keyframe before a wanted frame, and checks that what came out
is what the packets promised.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt
from av.buffer import Buffer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from iv3jax.data.container import REENCODE, check_file, demux, missing_bytes, open_video
from iv3jax.data.image import resize
from iv3jax.data.sampling import average_rate, sample_indices
from iv3jax.data.sizes import video_size
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, make_path

# Draining and refilling the decoder costs about this many frames.
_MIN_SKIP = 8
# Demuxers that pass on the presentation times the file holds. Others (AVI, MPEG program streams, raw
# streams) make them up, wrongly where there are B-frames.
_TIMED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}
# A recording in these may begin between two keyframes; what comes before the first cannot be shown.
_START_ANYWHERE = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc"}
_NONE = np.iinfo(np.int64).min


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

    path: AnyPath
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
        total_frames, source_fps, duration: the file's, in frames, frames a second and seconds.
        source_size: (height, width) of the file's frames as they are shown, in pixels.
    """

    frames: npt.NDArray[np.uint8]
    times: npt.NDArray[np.float64]
    indices: npt.NDArray[np.int64]
    total_frames: int
    source_fps: float
    duration: float
    source_size: tuple[int, int]


def probe(path: PathArgument) -> VideoInfo:
    """Finds the frames of a video and their times, reading the whole file.

    Raises:
        UserError: no such file, a folder, no video, a picture, sound only, no frames, truncated or
            damaged. The text names the file and a way out.
    """
    return _scan(make_path(path)).info


def read_video(
    path: PathArgument,
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
        path: any video FFmpeg reads, local or on a store.
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

    path = make_path(path)
    try:
        return sample(_scan(path))
    except _NotAsListedError:
        return sample(_scan_by_decoding(path))


class _NotAsListedError(Exception):
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

    def feed(self, packet: Packet | None) -> list[VideoFrame]:
        """The frames that come out when a packet goes in; None asks for all that are left."""
        try:
            return self.stream.decode(packet)
        except FFmpegError:
            self.failures += 1
            return []

    def everything(self) -> Iterator[VideoFrame]:
        """All frames of the file."""
        for packet in chain(demux(self.stream), (None,)):
            yield from self.feed(packet)

    def drain(self) -> list[VideoFrame]:
        """The frames that are left; afterwards the decoder can start anew at a keyframe."""
        frames = self.feed(None)
        self.stream.codec_context.flush_buffers()
        return frames


def _scan(path: AnyPath) -> _Scan:
    """Finds the frames from the packets, or by decoding where those leave a doubt."""
    check_file(path)
    missing = missing_bytes(path)
    rows: list[tuple[int, int, int, bool, bool]] = []
    first: list[VideoFrame] = []
    hidden = cut = False
    with open_video(path, missing) as stream:
        decoder = _Decoder(stream)
        try:
            for packet in demux(stream):
                pts, dts = (_NONE if t is None else t for t in (packet.pts, packet.dts))
                rows.append((pts, dts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
                cut = packet.is_corrupt
                # VP8 puts reference frames that are never shown into packets of their own.
                hidden |= stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10
                first = first or decoder.feed(packet)
        except FFmpegError:
            cut = True
        first = first or decoder.drain()
        timed, stated = stream.container.format.name in _TIMED_CONTAINERS, stream.frames
        rates, tick = _rates(stream), Fraction(stream.time_base or 1)
    table = np.array(rows, np.int64).reshape(-1, 5)
    packets = _Packets(table[:, 0], table[:, 1], table[:, 2], table[:, 3] > 0, table[:, 4] > 0)
    if missing or cut:
        raise _truncated(path, packets, tick, len(rows) - cut, stated)
    if not packets.shown.any():
        raise UserError(f"{path}: the video holds no frames; record or export it again")
    if not first:
        raise UserError(f"{path}: none of its {len(rows)} frames can be decoded; {REENCODE}")
    if hidden or not timed or not _is_complete(packets):
        return _scan_by_decoding(path)
    order = packets.order()
    info = _info(path, first[0], packets.pts[order], int(packets.duration[order[-1]]), tick, rates)
    return _Scan(info, _display_matrix(first[0]), packets)


def _is_complete(packets: _Packets) -> bool:
    """True where the packets surely tell all frames, in their order."""
    pts, dts = packets.pts, packets.dts[packets.dts != _NONE]
    timed = not (pts == _NONE).any() and len(np.unique(pts)) == len(pts)
    # Time runs backwards in recordings joined without new timestamps.
    one_piece = (np.diff(dts) > 0).all()
    # Frames before the first keyframe may or may not be decodable.
    return bool(timed and one_piece and packets.keyframe[0] and pts[0] == pts.min())


def _truncated(path: AnyPath, packets: _Packets, tick: Fraction, whole: int, stated: int) -> UserError:
    """The error for a file that was cut off after `whole` packets of a `stated` number of frames."""
    pts = packets.pts[:whole]
    seconds = float(np.ptp(pts[pts != _NONE]) * tick) if (pts != _NONE).any() else 0.0
    of = f" of {stated}" if stated > whole else ""
    return UserError(
        f"{path}: truncated: only {whole}{of} frames, the first {seconds:.1f} seconds, are there; "
        "fetch it again, or keep those with `ffmpeg -i IN OUT.mp4`"
    )


def _scan_by_decoding(path: AnyPath) -> _Scan:
    """Finds the frames by decoding them all."""
    with open_video(path, 0) as stream:
        decoder = _Decoder(stream)
        pts: list[int | None] = []
        listed: list[int | None] = []
        first, early = None, 0
        for packet in chain(demux(stream), (None,)):
            if packet is not None and not packet.is_discard:
                listed.append(packet.pts)
            for frame in decoder.feed(packet):
                if first is None:
                    first, early = frame, decoder.failures
                pts.append(frame.pts)
        rates, tick = _rates(stream), Fraction(stream.time_base or 1)
        anywhere = stream.container.format.name in _START_ANYWHERE
    start = None if first is None else first.pts
    lost = 0 if start is None else sum(p is not None and p < start for p in listed)
    if first is None or (decoder.failures > early if anywhere else decoder.failures or lost):
        some = f"only {len(pts)} of {len(listed)} frames can be decoded"
        raise UserError(f"{path}: truncated or damaged: {some}; {REENCODE}")
    known = [p for p in pts if p is not None]
    if len(known) < len(pts) or (np.diff(known) <= 0).any():
        # No usable times: the rate is all there is.
        if not rates:
            raise UserError(f"{path}: tells neither times nor a frame rate; {REENCODE}")
        known, tick = list(range(len(pts))), 1 / rates[0]
    info = _info(path, first, np.array(known, np.int64), 0, tick, rates)
    return _Scan(info, _display_matrix(first), None)


def _info(
    path: AnyPath,
    first: VideoFrame,
    pts: npt.NDArray[np.int64],
    last_duration: int,
    tick: Fraction,
    rates: list[Fraction],
) -> VideoInfo:
    """Times and average rate from timestamps in presentation order, in ticks of `tick` seconds."""
    # Divided last, so that a constant rate gives exactly index / fps.
    times = (pts - pts[0]) * tick.numerator / tick.denominator
    last = float(last_duration * tick)
    if last_duration <= 0:
        last = float(np.median(np.diff(times)) if len(times) > 1 else 1 / rates[0] if rates else 1)
    duration = float(times[-1]) + last
    fps = average_rate(times, duration, [float(rate) for rate in rates], float(tick))
    a, b, _, _ = _display_matrix(first)
    turned = abs(b) > abs(a)
    width, height = (first.height, first.width) if turned else (first.width, first.height)
    return VideoInfo(path, width, height, times, fps, duration)


def _rates(stream: VideoStream) -> list[Fraction]:
    """The frame rates that the file or FFmpeg states, best first."""
    stated = (stream.guessed_rate, stream.average_rate, stream.base_rate)
    return [Fraction(rate) for rate in stated if rate]


def _read(scan: _Scan, indices: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decodes frames by number: (n, h, w, 3) uint8 RGB, each upright and resized to (h, w)."""
    out = np.empty((len(indices), *size, 3), np.uint8)
    left = set(indices.tolist())

    def store(frame: VideoFrame, number: int) -> None:
        rgb = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        out[indices == number] = resize(Image.fromarray(_upright(rgb, scan.matrix)), *size)
        left.discard(number)

    with open_video(scan.info.path, 0) as stream:
        if scan.packets is None:
            for number, frame in enumerate(_Decoder(stream).everything()):
                if number in left:
                    store(frame, number)
        else:
            _decode_listed(stream, scan.packets, np.unique(indices), store)
    if left:
        raise UserError(f"{scan.info.path}: changed while it was read; read it again")
    return out


def _decode_listed(
    stream: VideoStream,
    packets: _Packets,
    wanted: npt.NDArray[np.int64],
    store: Callable[[VideoFrame, int], None],
) -> None:
    """Decodes the runs of packets that hold the wanted frames and stores them by their timestamp."""
    order = packets.order()
    numbers = {int(packets.pts[order[number]]): int(number) for number in wanted}
    decoder, source = _Decoder(stream), enumerate(demux(stream))
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
                    raise _NotAsListedError
                # Frames before the keyframe belong to the group before, and may be garbage here.
                if frame.pts >= start:
                    seen.append(frame.pts)
                    if frame.pts in numbers:
                        store(frame, numbers[frame.pts])
            if position == last:
                break
        promised = packets.pts[first : last + 1][packets.shown[first : last + 1]]
        if sorted(seen) != sorted(promised[promised >= start].tolist()):
            raise _NotAsListedError


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
    # The stubs know a single kind of side data.
    data = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _upright(rgb: npt.NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """Turns and mirrors (H, W, 3) pixels as the display matrix says, to quarter turns."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
