"""What a source of samples is, and what its formats share: pieces of a file by number, checked fields,
placeholders filled with media. The formats are in files of their own, the list of them in sources.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iv3jax.data.chat import Message
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, make_path

MEND = "mend it or take it out"
"""The way out for a damaged record."""

_MOST_BYTES = 64 << 20
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Record:
    """One sample before its media are read.

    Attributes:
        name: where a person finds it, `FILE:LINE` or `SOURCE:NUMBER`.
        messages: see `chat.Message`.
        fps, min_frames, max_frames: how its videos are sampled, where it says so; 0 leaves it to the config.
    """

    name: str
    messages: Sequence[Message]
    fps: float = 0.0
    min_frames: int = 0
    max_frames: int = 0


class Source(Protocol):
    """Samples by number. Sources are pickled into the worker processes, so they hold no open files."""

    def __len__(self) -> int:
        """How many records there are."""

    def __getitem__(self, index: int) -> Record:
        """One record.

        Raises:
            UserError: it is damaged; the text names file, record and field.
        """

    def name(self, index: int) -> str:
        """The record's name, which must not need a look into it."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The records of a text file, by where their bytes lie; 24 bytes of memory each.

    Attributes:
        path: the file.
        label: what the file is called in names.
        starts, stops: (N,) int64, the bytes [start, stop) of each record.
        numbers: (N,) int64, the line or place of each as a person counts it.
        form: how label and number make a name, `{}:{}` or `{}[{}]`.
    """

    path: AnyPath
    label: str
    starts: np.ndarray
    stops: np.ndarray
    numbers: np.ndarray
    form: str

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        """The record's name."""
        return self.form.format(self.label, self.numbers[index])

    def where(self, index: int) -> str:
        """The record's place with the whole path, for errors."""
        return self.form.format(self.path, self.numbers[index])

    def raw(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
            UserError: they are too many.
        """
        start, stop = int(self.starts[index]), int(self.stops[index])
        if stop - start > _MOST_BYTES:
            raise UserError(f"{self.where(index)}: {stop - start} bytes are too many for one record; {MEND}")
        return read_range(self.path, start, stop)

    def parse(self, index: int) -> dict[str, Any]:
        """The JSON object of a record.

        Raises:
            UserError: it is no JSON object in UTF-8, or too large to be one.
        """
        return parse_object(self.raw(index), self.where(index))


def open_file(path: AnyPath, scan: Callable[[Any], Any]) -> Any:
    """What `scan` makes of an annotation file that is opened for reading bytes."""
    try:
        with path.open("rb") as file:
            return scan(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the source") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give an annotation file inside it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def lines_of(path: AnyPath, label: str) -> Pieces:
    """The lines of a file that are not empty.

    Raises:
        UserError: the file cannot be read.
    """
    ends = open_file(path, _line_ends)
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1] + 1])
    filled = ends > starts
    for i in np.flatnonzero(ends - starts == 1):
        # What is left of an empty line that ends as on Windows.
        filled[i] = read_range(path, int(starts[i]), int(ends[i])) != b"\r"
    return Pieces(path, label, starts[filled], ends[filled], np.flatnonzero(filled) + 1, "{}:{}")


def _line_ends(file: Any) -> np.ndarray:
    """(N,) int64 place of each line's end, which the last need not have."""
    found, size = [np.zeros(0, np.int64)], 0
    last = b"\n"
    while block := file.read(_BLOCK):
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
        size, last = size + len(block), block[-1:]
    if last != b"\n":
        found.append(np.array([size]))
    return np.concatenate(found)


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file."""
    if not isinstance(path, Path):
        return bytes(path.read_range(start, stop))
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8.

    Raises:
        UserError: it is something else; `where` is what the text starts with.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); {MEND}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds {_short(value)}, not a JSON object; {MEND}")
    return value


def get(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A field that must be there, of a JSON kind: str, list or dict; neither may be empty.

    Raises:
        UserError: it is missing, empty or of another kind.
    """
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    if key not in data:
        raise UserError(f"{where}: {key} is missing; {MEND}")
    value = data[key]
    if not isinstance(value, kind) or not value:
        raise UserError(f"{where}: {key} is {_short(value)}, not {kinds[kind]} with content; {MEND}")
    return value


def get_number(data: Mapping[str, Any], key: str, where: str, most: float, whole: bool = False) -> float:
    """A positive number up to `most`; 0 where the field is missing or null.

    Raises:
        UserError: it is something else.
    """
    value = data.get(key)
    if value is None:
        return 0
    if not is_number(value, most, whole):
        kind = "whole number" if whole else "number"
        raise UserError(f"{where}: {key} is {_short(value)}, not a {kind} above 0 and up to {most:g}; {MEND}")
    return value


def is_number(value: Any, most: float, whole: bool = False) -> bool:
    """Whether a JSON value is a positive (whole) number up to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= most and (not whole or value == int(value))


def media_part(kind: str, url: Any, root: AnyPath, where: str) -> dict[str, str]:
    """A part of a message for a media file; a relative path lies in `root`.

    Raises:
        UserError: the path is no text with content.
    """
    if not isinstance(url, str) or not url.strip() or "\0" in url:
        raise UserError(f"{where} is {_short(url)}, not the path of a file; {MEND}")
    lies_apart = "://" in url or url.startswith("/")
    return {"type": kind, kind: url if lies_apart else str(root / url)}


def interleave(texts: Iterable[str], media: Mapping[str, list[dict]], where: str) -> list[list[dict]]:
    """The parts of each text, with its placeholders replaced by the media, in order.

    Args:
        texts: of one message or one conversation.
        media: placeholder → the parts that stand in its places.
        where: what an error starts with.

    Raises:
        UserError: there are more or fewer placeholders than media.
    """
    pattern = re.compile("(" + "|".join(map(re.escape, media)) + ")")
    pieces = [pattern.split(text) for text in texts]
    for placeholder, items in media.items():
        found = sum(piece.count(placeholder) for piece in pieces)
        if found != len(items):
            raise UserError(f"{where}: {found} {placeholder} for {len(items)} of such media; {MEND}")
    left = {placeholder: iter(items) for placeholder, items in media.items()}
    return [
        [next(left[piece]) if piece in left else {"type": "text", "text": piece} for piece in split if piece]
        for split in pieces
    ]


def folder_of(path: AnyPath, media_root: str) -> AnyPath:
    """The folder that media paths are relative to: the one named, else the annotation's own."""
    return make_path(media_root) if media_root else path.parent


def _short(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"
