"""Reads character vectors out of an R package's lazy-load database (`Rdata.rdx` and `Rdata.rdb`).

The index is a serialised list of variables, each an (offset, length) into the database, where its value
lies serialised and compressed. The format is that of R Internals, section "Serialization Formats".
"""

import bz2
import lzma
import struct
import zlib
from typing import Any

_NIL, _GLOBAL, _BASE, _EMPTY, _REFERENCE = 254, 253, 241, 242, 255
_SYMBOL, _PAIRLIST, _CHAR, _LOGICAL, _INTEGER, _REAL, _STRING, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG, _IS_LATIN1 = 1 << 9, 1 << 10, 1 << 14


def read_strings(index: bytes, database: bytes, name: str) -> list[str]:
    """The character vector `name` of a package's data.

    Raises:
        KeyError: there is no such variable.
        ValueError: the files are no lazy-load database, or the value is of a kind that is not read here.
    """
    variables = _Reader(zlib.decompress(index, wbits=zlib.MAX_WBITS | 32)).value()["variables"]
    start, length = variables[name]
    value = _Reader(_unpacked(database[start : start + length])).value()
    if not isinstance(value, list):
        raise ValueError(f"{name} is no character vector")
    return value


def _unpacked(chunk: bytes) -> bytes:
    """A database's entry: its unpacked length, and for all but zlib a letter that names the packing."""
    letter, rest = chunk[4:5], chunk[5:]
    if letter == b"2":
        return bz2.decompress(rest)
    if letter == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(rest, lzma.FORMAT_RAW, filters=filters)
    return rest if letter == b"0" else zlib.decompress(chunk[4:])


class _Reader:
    """A cursor over one serialised value, in the big-endian form that R writes."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError("no serialised R value")
        self._data, self._at = data, 2
        self._references: list[Any] = []
        version = self._integers(3)[0]
        if version == 3:
            self._take(self._integers(1)[0])

    def value(self) -> Any:
        """The next value: lists with names and pairlists as dict, vectors as list, others as they are."""
        flags = self._integers(1)[0]
        kind = flags & 0xFF
        if kind in (_NIL, _GLOBAL, _BASE, _EMPTY):
            return None
        if kind == _REFERENCE:
            return self._references[(flags >> 8 or self._integers(1)[0]) - 1]
        if kind == _SYMBOL:
            self._references.append(self.value())
            return self._references[-1]
        if kind == _PAIRLIST:
            return self._pairs(flags)
        length = self._integers(1)[0]
        if kind == _CHAR:
            encoding = "latin-1" if flags & _IS_LATIN1 else "utf-8"
            return None if length < 0 else self._take(length).decode(encoding)
        content = self._content(kind, length)
        attributes = self.value() if flags & _HAS_ATTRIBUTES else {}
        names = attributes.get("names")
        return dict(zip(names, content, strict=True)) if names else content

    def _content(self, kind: int, length: int) -> list[Any]:
        if kind in (_LOGICAL, _INTEGER):
            return list(self._integers(length))
        if kind == _REAL:
            return list(struct.unpack(f">{length}d", self._take(8 * length)))
        if kind in (_STRING, _LIST):
            return [self.value() for _ in range(length)]
        raise ValueError(f"R values of type {kind} are not read")

    def _pairs(self, flags: int) -> dict[Any, Any]:
        """A pairlist is a chain of (attributes, tag, value); the last link is nil."""
        out: dict[Any, Any] = {}
        while flags & 0xFF == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self.value()
            tag = self.value() if flags & _HAS_TAG else len(out)
            out[tag] = self.value()
            flags = self._integers(1)[0]
        return out

    def _integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._take(4 * count))

    def _take(self, count: int) -> bytes:
        out = self._data[self._at : self._at + count]
        if len(out) != count:
            raise ValueError("a serialised R value ends early")
        self._at += count
        return out
