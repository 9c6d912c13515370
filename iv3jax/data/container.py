"""Opening a video file with PyAV: what is no video, or not all of one, is refused in one clear line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from iv3jax.data.image import is_picture
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath

REENCODE = "re-encode it with `ffmpeg -i IN OUT.mp4`"
"""The way out for files that are damaged or odd."""

_THREADS = 2


def check_file(path: AnyPath) -> None:
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
    if is_picture(path):
        raise UserError(f"{path}: is a picture, not a video; pass it as an image")


@contextmanager
def open_video(path: AnyPath, missing: int) -> Iterator[VideoStream]:
    """The video stream of a file, closed afterwards; `missing` bytes explain why it may not open."""
    # The prefix keeps a colon in a file name from being read as a protocol.
    file = f"file:{path}" if isinstance(path, Path) else path.open("rb")
    try:
        # Names and comments in other encodings are none of ours, and must not end in an error.
        container = av.open(file, "r", metadata_errors="replace")
    except FFmpegError:
        with path.open("rb") as file:
            unfinished = missing or _is_mp4(file.read(8))
        if unfinished:
            raise UserError(
                f"{path}: truncated or never finished, its index is missing; fetch it again"
            ) from None
        raise UserError(f"{path}: not a video that FFmpeg can read; convert it to MP4") from None
    with container:
        video = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if container.format.name == "tty":
            raise UserError(f"{path}: is a text file, not a video; give a video file")
        if not video and missing:
            raise UserError(f"{path}: truncated, {missing} bytes are missing; fetch it again")
        if not video:
            holds = "sound but no picture" if container.streams.audio else "neither picture nor sound"
            raise UserError(f"{path}: holds {holds}; give a file with a video track")
        stream = video[0]
        if stream.codec_context is None:
            raise UserError(f"{path}: its codec cannot be decoded here; {REENCODE}")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _THREADS
        yield stream


def demux(stream: VideoStream) -> Iterator[Packet]:
    """The packets of a stream without empty ones, which a decoder takes for the end."""
    container = cast(InputContainer, stream.container)
    return (packet for packet in container.demux(stream) if packet.size)


def missing_bytes(path: AnyPath) -> int:
    """How many bytes the container's own headers (AVI, Matroska, MP4) promise beyond the end."""
    end = 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(4096)
        segment = head.find(b"\x18\x53\x80\x67") + 4
        if head[:4] == b"RIFF" and head[4:8] != b"\xff\xff\xff\xff":
            end = 8 + int.from_bytes(head[4:8], "little")
        elif head[:4] == b"\x1a\x45\xdf\xa3" and segment > 4 and any(head[segment : segment + 1]):
            # As many leading zero bits as bytes follow; all ones, in a live recording, mean unknown.
            width = 9 - head[segment].bit_length()
            unknown = (1 << 7 * width) - 1
            length = int.from_bytes(head[segment : segment + width], "big") & unknown
            end = 0 if length == unknown else segment + width + length
        while _is_mp4(head) and end + 8 <= size:
            file.seek(end)
            box = file.read(16)
            length = int.from_bytes(box[8:16] if box[:4] == b"\0\0\0\1" else box[:4], "big")
            # 0 means to the end of the file; odd kinds of box are padding that some recorders leave.
            if length < 8 or (end + length > size and box[4:8] not in (b"moov", b"moof", b"mdat")):
                break
            end += length
    return max(end - size, 0)


def _is_mp4(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"styp")
