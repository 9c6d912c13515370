"""What a feature store says of its clips: the records, the lines they are kept in, and the index of them.

The features themselves, and how a store is laid out, are in features.py.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iv3jax.data.sample import Media
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path

FORMAT = 1
DTYPES = ("bfloat16", "float32")
STORE = "store.json"

_PART = re.compile(r"part-(\d{5})")
_INDEX = re.compile(r"clips-(\d{5})\.jsonl")

_ENDS = 64 * 1024
"""Bytes at the beginning and at the end of a video by which its content is known."""


@dataclass(frozen=True)
class VideoSampling:
    """How frames are taken from a video and resized: all that decides the pixels beside the file.

    Attributes:
        fps, min_frames, max_frames: see `sampling.sample_indices`.
        min_pixels, max_pixels: budget of the whole video (`sizes.video_size`).
    """

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int

    def __str__(self) -> str:
        return (
            f"fps {self.fps:g}, {self.min_frames} to {self.max_frames} frames, "
            f"{self.min_pixels} to {self.max_pixels} pixels"
        )


@dataclass(frozen=True)
class StoreSpec:
    """What all clips of a store share.

    Attributes:
        tower: the fingerprint of the tower that made them (`generate.encode.tower_fingerprint`).
        levels: K, of DeepStack.
        width: D, of a token.
        dtype: of DTYPES.
    """

    tower: str
    levels: int
    width: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class VideoFile:
    """A video file, and how to tell whether it is still the same.

    Attributes:
        path: absolute, or a URL on a store.
        size: bytes.
        modified: nanoseconds since 1970; None on a store.
        digest: of the size and both ends of the file: the same file in another place has the same.
    """

    path: str
    size: int
    modified: int | None
    digest: str


@dataclass(frozen=True)
class Clip:
    """One video in a store.

    Attributes:
        file: the video. sampling: how it was looked at.
        grid: (t, h, w) in patches.
        media: what was seen of it; `media.path` is the file's.
        tokens: N of the whole clip, N/t of each temporal patch.
        part, start: where the first token is.
    """

    file: VideoFile
    sampling: VideoSampling
    grid: tuple[int, int, int]
    media: Media
    tokens: int
    part: int
    start: int


def identify(path: PathArgument) -> VideoFile:
    """What a video file is known by.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = make_path(path)
    try:
        size, modified = _stat(path)
        with path.open("rb") as file:
            ends = file.read(_ENDS)
            file.seek(max(size - _ENDS, 0))
            ends += file.read(_ENDS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the video") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return VideoFile(absolute(path), size, modified, hashlib.sha256(b"%d " % size + ends).hexdigest()[:32])


class Index:
    """The clips of a store, by path and by content.

    Lines are parsed when they are asked for: a long video has many times, and Python's floats take more room
    than their text.
    """

    def __init__(self) -> None:
        self._all: list[tuple[bytes, int]] = []
        self._at: dict[str, list[int]] = {}
        self._like: dict[str, list[int]] = {}

    @staticmethod
    def read(folder: AnyPath) -> "Index":
        """The index of a whole store."""
        index = Index()
        for path in folder.iterdir():
            if match := _PART.fullmatch(path.name):
                for line in part_lines(path):
                    index.add(line, int(match[1]))
        return index

    def add(self, line: bytes, part: int) -> None:
        """One more clip, by its line."""
        file, number = json.loads(line)["file"], len(self._all)
        self._all.append((line, part))
        self._at.setdefault(file["path"], []).append(number)
        self._like.setdefault(file["digest"], []).append(number)

    def at(self, path: str) -> list[Clip]:
        """The clips of a path; a file that changed has several."""
        return [from_line(*self._all[number]) for number in self._at.get(path, ())]

    def like(self, digest: str) -> list[Clip]:
        """The clips of a content."""
        return [from_line(*self._all[number]) for number in self._like.get(digest, ())]

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Clip]:
        return (from_line(*entry) for entry in self._all)


def part_folder(folder: AnyPath, number: int) -> AnyPath:
    """Where a host's part is."""
    return folder / f"part-{number:05}"


def part_lines(part: AnyPath) -> list[bytes]:
    """The lines of a part's index.

    Raises:
        UserError: one that is no clip.
    """
    if not part.is_dir():
        return []
    files = sorted(path.name for path in part.iterdir() if _INDEX.fullmatch(path.name))
    return [line for name in files for line in _checked_lines(part / name)]


def _checked_lines(path: AnyPath) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            from_line(line, 0)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: line {number} is no clip; remove the folder {path.parent} and encode again"
            ) from None
    return lines


def to_line(clip: Clip) -> bytes:
    """A clip as it stands in the index of its part."""
    data = dataclasses.asdict(clip)
    del data["part"], data["media"]["path"]
    return to_json(data)


def from_line(line: bytes, part: int) -> Clip:
    """What `to_line` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    data = json.loads(line)
    media, file = data.pop("media"), VideoFile(**data.pop("file"))
    media |= {"times": tuple(media["times"]), "size": tuple(media["size"]), "path": file.path}
    sampling = VideoSampling(**data.pop("sampling"))
    return Clip(
        file=file, sampling=sampling, media=Media(**media), grid=tuple(data.pop("grid")), part=part, **data
    )


def to_json(data: Any) -> bytes:
    """One line of JSON, in ASCII because names of files need not be UTF-8."""
    return (json.dumps(data) + "\n").encode()


def absolute(path: AnyPath) -> str:
    """A path that means the same in any folder."""
    return str(path) if isinstance(path, StorePath) else os.path.abspath(path)


def _stat(path: AnyPath) -> tuple[int, int | None]:
    """Size in bytes, and time of modification in nanoseconds where there is one."""
    if isinstance(path, StorePath):
        return path.size(), None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def is_same(path: AnyPath, file: VideoFile) -> bool:
    """Whether a file is what it was; one that was only touched, copied or moved away is.

    Raises:
        UserError: the file is there and cannot be read.
    """
    if not path.exists() or _stat(path) == (file.size, file.modified):
        return True
    return identify(path).digest == file.digest


def read_spec(folder: AnyPath) -> StoreSpec:
    """What a store is of.

    Raises:
        UserError: no feature store, or one that this version cannot read.
    """
    path = folder / STORE
    if not path.exists():
        raise UserError(f"{folder}: is no feature store, {STORE} is missing; make one with `iv3 data encode`")
    try:
        data = json.loads(path.read_text())
        version = data.pop("format")
        spec = StoreSpec(**data)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not what `iv3 data encode` writes; encode into another folder") from None
    if version != FORMAT or spec.dtype not in DTYPES:
        raise UserError(
            f"{path}: format {version}, dtype {spec.dtype}: this version of iv3jax reads format {FORMAT} of "
            f"{' and '.join(DTYPES)}; encode again"
        )
    return spec


def write_whole(path: AnyPath, data: bytes, writer: str = "") -> None:
    """Writes a small file that appears whole, and on the disk, or not at all.

    Args:
        writer: tells those apart who may write it at the same time.
    """
    if isinstance(path, StorePath):
        path.write_bytes(data)
        return
    new = path.with_name(f".{path.name}.{writer}new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
