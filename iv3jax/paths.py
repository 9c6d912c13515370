"""Where a model folder, a video or a picture lies: a local path, or an object on a store (gs://, s3://).

`make_path` gives a `pathlib.Path` for a local path and a `StorePath`, which has the same few methods, for
the others, so that code written for one reads both. Stores are spoken to through fsspec. Every failure
that is not "no such file" is a UserError; nothing waits for more than seconds on a store that never
answered. Ids of the Hugging Face hub are not paths: they are turned into a folder in checkpoint/hub.py.
"""

import asyncio
import importlib
import io
import logging
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, cast

import fsspec
from fsspec.asyn import sync

from iv3jax.errors import UserError

_MIB = 1 << 20
_PIECE, _PIECES = 8 * _MIB, 8
"""A range is read in pieces of so many bytes, so many at a time."""

_BLOCK, _MOST_AHEAD, _KEPT = _MIB, 16, 64
"""Files are opened in blocks: bytes of one, most read at once, most kept in memory (all files together)."""

_FIRST_ANSWER, _LATER_ANSWER = 10.0, 120.0
"""Seconds to wait for a store: short until it has answered once, then long enough to ride out a hiccup."""


@dataclass(frozen=True)
class _Store:
    """A kind of store: its file system's module and class, our extra with it, options, words for errors."""

    module: str
    file_system: str
    extra: str
    options: dict[str, Any]
    credentials: str
    endpoint: str


_RETRIES = {"total_max_attempts": 3, "mode": "standard"}
_STORES = {
    "gs": _Store(
        # Not the class that fsspec names: that one first asks by gRPC what kind of bucket it is, which needs
        # a right of its own and, where only HTTP gets through (proxies, emulators), takes a minute.
        "gcsfs.core",
        "GCSFileSystem",
        "gcs",
        {"use_listings_cache": False},
        "log in with `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS",
        "STORAGE_EMULATOR_HOST",
    ),
    "s3": _Store(
        "s3fs",
        "S3FileSystem",
        "s3",
        {
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": _RETRIES},
        },
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true reads public "
        "buckets)",
        "AWS_ENDPOINT_URL",
    ),
}
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://?(?P<key>.*)", re.DOTALL)


@dataclass(frozen=True)
class StorePath:
    """A file or folder on a store, with the methods of `pathlib.Path` that the package needs.

    They raise FileNotFoundError where Path does, and UserError where the store cannot be reached, refuses
    the credentials, or its library is not installed. A store has no folders of its own: one exists where
    a file lies below it.

    Attributes:
        scheme: gs or s3.
        key: bucket and name, `bucket/folder/file`, without slashes around it.
    """

    scheme: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str | PurePosixPath) -> "StorePath":
        return StorePath(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's ending, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "StorePath":
        """The folder this lies in; a bucket is its own."""
        return StorePath(self.scheme, self.key.rpartition("/")[0] or self.key)

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return self._kind() is not None

    def is_dir(self) -> bool:
        """Whether files lie below this path."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """Whether there is a file of this name."""
        return self._kind() == "file"

    def size(self) -> int:
        """Bytes of a file."""
        return self._info()["size"]

    def iterdir(self) -> Iterator["StorePath"]:
        """What lies in the folder, in order of the names."""
        names = self._call("ls", detail=False)
        keys = (name.rstrip("/") for name in names)
        return iter([StorePath(self.scheme, key) for key in sorted(keys) if key != self.key])

    def read_bytes(self) -> bytes:
        """A whole small file."""
        return self._call("cat_file")

    def read_text(self, encoding: str = "utf-8") -> str:
        """A whole small file, decoded."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of a file, several pieces at a time.

        Beside the result the host holds about twice the pieces under way, 128 MiB.

        Raises:
            UserError: also where the file ends before `stop`.
        """
        out = bytearray(max(stop - start, 0))
        pieces = [(place, min(place + _PIECE, stop)) for place in range(start, stop, _PIECE)]

        def put(place: int, end: int, data: bytes) -> None:
            if len(data) != end - place:
                raise UserError(f"{self}: ended or changed while it was read; read it again")
            out[place - start : end - start] = data

        with _translated(self):
            system = _file_system(self.scheme)
            sync(system.loop, _read_pieces, system, self.key, pieces, put, _patience(self.scheme))
        return out

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, seekable, read in blocks; the last 64 MiB read this way are kept in memory."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: files on a store are opened for reading bytes only")
        if self._info()["type"] == "directory":
            raise IsADirectoryError(str(self))
        return cast(BinaryIO, io.BufferedReader(_StoreFile(self), 64 * 1024))

    def write_bytes(self, data: bytes) -> None:
        """Writes a small file; it appears whole or not at all."""
        with _no_bucket(self):
            self._call("pipe_file", data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes a small file of text; it appears whole or not at all."""
        self.write_bytes(text.encode(encoding))

    def upload(self, local: Path) -> None:
        """Writes a local file of any size here; it appears whole or not at all."""
        # A shard may take minutes: the library's own retries are the limit.
        with _no_bucket(self):
            self._call("put_file", timeout=None, local_first=str(local))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: on a store a folder is there as soon as a file lies below it."""

    def unlink(self) -> None:
        """Removes a file."""
        self._call("rm_file")

    def _kind(self) -> str | None:
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return None

    def _info(self) -> dict[str, Any]:
        return self._call("info")

    def _call(
        self,
        method: str,
        *args: Any,
        timeout: float | None = 0,
        local_first: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """One operation of fsspec on this path; `timeout` 0 waits as long as is due, None without end."""
        before = () if local_first is None else (local_first,)
        with _translated(self):
            system = _file_system(self.scheme)
            limit = _patience(self.scheme) if timeout == 0 else timeout
            call = getattr(system, f"_{method}")
            return sync(system.loop, call, *before, self.key, *args, timeout=limit, **kwargs)


async def _read_pieces(
    system: Any,
    key: str,
    pieces: list[tuple[int, int]],
    put: Callable[[int, int, bytes], None],
    patience: float,
) -> None:
    """Reads the ranges [start, stop) of a file and hands each over as it arrives, in any order."""
    gate = asyncio.Semaphore(_PIECES)

    async def piece(start: int, stop: int) -> bytes:
        return await asyncio.wait_for(system._cat_file(key, start=start, end=stop), patience)

    async def read(start: int, stop: int) -> None:
        async with gate:
            data = await piece(start, stop)
            if len(data) != stop - start:
                # An answer may be cut or mixed up on its way; a file that really ended says so again.
                data = await piece(start, stop)
            put(start, stop, data)

    tasks = [asyncio.ensure_future(read(*piece)) for piece in pieces]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


AnyPath = Path | StorePath
"""A path that can be read."""

PathArgument = str | Path | StorePath
"""What a user may name."""


def make_path(source: PathArgument) -> AnyPath:
    """A local path, or a path on a store for `gs://bucket/…` and `s3://bucket/…`.

    Raises:
        UserError: a URL of another kind, or one without a bucket.
    """
    if isinstance(source, StorePath):
        return source
    text = str(source)
    match = _URL.fullmatch(text)
    # pathlib makes one slash of two; a local folder may be called `gs:` no more than `https:`.
    if match is None or ("://" not in text and match["scheme"] not in _STORES):
        return Path(source)
    scheme, key = match["scheme"].lower(), match["key"].strip("/")
    if scheme not in _STORES:
        known = " and ".join(f"{name}://" for name in _STORES)
        raise UserError(f"{text}: paths are local or start with {known}; download it first")
    if not key:
        raise UserError(f"{text}: names no bucket; write {scheme}://BUCKET/PATH")
    return StorePath(scheme, key)


def remove_folder(path: PathArgument) -> None:
    """Removes a folder and all in it, or nothing where there is none."""
    path = make_path(path)
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_dir():
        for inner in path.iterdir():
            remove_folder(inner) if inner.is_dir() else inner.unlink()


class _StoreFile(io.RawIOBase):
    """A file on a store. Reading on in order fetches ever more blocks at once; a jump starts small again."""

    _blocks: ClassVar[OrderedDict[tuple[str, str, int], bytes]] = OrderedDict()
    _lock = threading.Lock()

    def __init__(self, path: StorePath) -> None:
        info = path._info()
        self.name = str(path)
        self._path, self._size, self._position = path, int(info["size"]), 0
        # A file that was replaced has another tag, so blocks of the old one are never mixed in.
        known = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")
        self._version = f"{self._size} {next((info[k] for k in known if info.get(k)), '')}"
        self._next, self._ahead = 0, 1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._size or not view:
            return 0
        number, inside = divmod(self._position, _BLOCK)
        data = self._block(number)[inside : inside + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        """One block, from memory or, with those that are likely to follow, from the store."""
        with self._lock:
            found = self._blocks.get((self.name, self._version, number))
            if found is not None:
                self._blocks.move_to_end((self.name, self._version, number))
                return found
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if number == self._next else 1
        start, stop = number * _BLOCK, min((number + self._ahead) * _BLOCK, self._size)
        data = self._path.read_range(start, stop)
        blocks = [bytes(data[i : i + _BLOCK]) for i in range(0, len(data), _BLOCK)]
        self._next = number + len(blocks)
        with self._lock:
            for i, block in enumerate(blocks):
                self._blocks[self.name, self._version, number + i] = block
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return blocks[0]


_answered: set[str] = set()


def _patience(scheme: str) -> float:
    return _LATER_ANSWER if scheme in _answered else _FIRST_ANSWER


def _file_system(scheme: str) -> Any:
    """fsspec's file system; fsspec keeps one for each process and thread, and remakes it after a fork."""
    store, settings = _STORES[scheme], fsspec.config.conf
    configured = settings.get(scheme, {}) | (settings.get("gcs", {}) if scheme == "gs" else {})
    options = {k: v for k, v in store.options.items() if k not in configured}
    if scheme == "gs" and os.environ.get(store.endpoint) and "token" not in configured:
        # Else it looks for credentials, for many seconds, that no emulator asks for.
        options["token"] = "anon"
    library = store.module.split(".")[0]
    try:
        kind = getattr(importlib.import_module(store.module), store.file_system)
    except ImportError:
        raise UserError(f"{scheme}:// paths need {library}: pip install 'iv3jax[{store.extra}]'") from None
    # It logs the tracebacks of errors that it also raises.
    logging.getLogger(library).setLevel(logging.CRITICAL)
    return kind(**options)


# Where the exceptions of the stores' libraries are defined, besides the built-in ones.
_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "s3fs", "requests", "grpc", "urllib3"}
_REFUSED = re.compile(
    r"NoCredentials|PartialCredentials|CredentialRetrieval|TokenRetrieval|SSO|ProfileNotFound|"
    r"DefaultCredentials|RefreshError|Permission|Unauthenticated|Forbidden|Invalid Credentials|\b40[13]\b"
)
_UNREACHABLE = re.compile(r"Connect|Timeout|Proxy|gaierror|ServerDisconnected|TransportError|ClientOSError")


@contextmanager
def _translated(path: StorePath) -> Iterator[None]:
    """What a store's library raises, as a FileNotFoundError or one line for the user."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        _answered.add(path.scheme)
        if isinstance(error, PermissionError):
            raise _refused(path, error) from None
        raise type(error)(str(path)) from None
    except Exception as error:
        if (
            not isinstance(error, OSError | ValueError)
            and type(error).__module__.split(".")[0] not in _LIBRARIES
        ):
            raise
        kind, text = type(error).__name__, _line(error)
        if _REFUSED.search(f"{kind} {text}"):
            raise _refused(path, error) from None
        if _UNREACHABLE.search(kind):
            store = _STORES[path.scheme]
            raise UserError(
                f"{path}: the store cannot be reached ({text}); check the network and {store.endpoint}"
            ) from None
        raise UserError(f"{path}: the store refuses ({text}); check the path and the bucket") from None
    else:
        _answered.add(path.scheme)


@contextmanager
def _no_bucket(path: StorePath) -> Iterator[None]:
    """Writing makes folders as it goes, so all that can be missing is the bucket."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such bucket; make it first, or check its name") from None


def _refused(path: StorePath, error: Exception) -> UserError:
    return UserError(f"{path}: access denied ({_line(error)}); {_STORES[path.scheme].credentials}")


def _line(error: Exception) -> str:
    """An exception's text in one short line."""
    text = " ".join(str(error).split())[:200] or "no answer in time"
    return text if not isinstance(error, TimeoutError) else "no answer in time"
