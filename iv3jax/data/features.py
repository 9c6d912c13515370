"""The feature store: a vision tower's outputs for a set of videos, kept so that nobody decodes them again.

Here is what reads and writes it, with tensorstore and NumPy; the tower is run in generate/encode.py.

    STORE/store.json                    which tower, and the shape and dtype of a token
    STORE/part-00000/features.zarr      zarr3, (tokens, 1+K, D): vision tokens and their DeepStack levels
    STORE/part-00000/clips-00000.jsonl  one line a clip: the file, how it was sampled, where its tokens are
    STORE/part-00000/quarantine.jsonl   the videos that the last run could not read, and why

A part is written by one host, so hosts need not know of each other; a store is read as the sum of its parts.

All clips of a part lie on one token axis. A clip begins at a new shard, a file of up to 128 MiB, and its
shards hold nothing else: no other clip is ever written again, clips of any length fit, and a part can grow.
(An axis of clips beside one of tokens would have to know the longest clip before the first is read.) Inside a
shard, chunks of about 1 MiB can be read one by one, each with a checksum; those that a short clip leaves
empty take no room. Numbers are kept as they come, bf16 by default, in zstd's quickest form: what is saved, a
fifth with bf16, is mostly in the exponents.

A clip is there when its line is. The line is written, to the disk, after the clip's tokens; what an
interrupted run leaves beyond the last line is removed by the next.
"""

import dataclasses
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from iv3jax.data.clips import (
    FORMAT,
    STORE,
    Clip,
    Index,
    StoreSpec,
    VideoFile,
    VideoSampling,
    absolute,
    identify,
    is_same,
    part_folder,
    part_lines,
    read_spec,
    to_json,
    to_line,
    write_whole,
)
from iv3jax.data.sample import Media
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path

QUARANTINE = "quarantine.jsonl"

_CHUNK_BYTES, _SHARD_BYTES = 1 << 20, 128 << 20
_CLIPS_A_FILE = 100
"""Lines in one file of the index; the last file is written anew with each clip."""


class FeatureStore:
    """A store that is read. Use it in any thread, and in processes that were spawned, not forked.

    Videos themselves may be elsewhere, or gone: a clip is found by its path. Where the file is there, it must
    be the one that was encoded, and it is found, too, if it moved.
    """

    def __init__(self, folder: PathArgument, tower: str | None = None) -> None:
        """Reads the index.

        Args:
            folder: local, or on a store (gs://, s3://).
            tower: fingerprint of the tower whose outputs are wanted; None takes any.

        Raises:
            UserError: no feature store, a broken one, or one of another tower.
        """
        self.folder = make_path(folder)
        self.spec = read_spec(self.folder)
        if tower is not None and tower != self.spec.tower:
            raise _other(self.folder, "tower", self.spec.tower, tower)
        self._index = Index.read(self.folder)
        self._arrays: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}

    @property
    def clips(self) -> Iterator[Clip]:
        """All clips, part by part."""
        return iter(self._index)

    def find(self, path: PathArgument, sampling: VideoSampling) -> Clip:
        """The clip of a video.

        Raises:
            UserError: the video is not in the store, was sampled in another way, or has changed since.
        """
        path = make_path(path)
        clips = self._index.at(absolute(path))
        moved = not clips and path.exists()
        if moved:
            clips = self._index.like(identify(path).digest)
        if not clips:
            raise UserError(
                f"{path}: is not in the feature store {self.folder}; add it with `iv3 data encode`, and see "
                f"{QUARANTINE} there for videos that could not be read"
            )
        fitting = [clip for clip in clips if clip.sampling == sampling]
        if not fitting:
            raise UserError(
                f"{path}: in the feature store {self.folder} it has {clips[-1].sampling}, but {sampling} are "
                "asked for; encode it so, or ask for what is there"
            )
        for clip in reversed(fitting):
            if moved or is_same(path, clip.file):
                return clip
        raise UserError(
            f"{path}: has changed since it was encoded into {self.folder}; run `iv3 data encode` again"
        )

    def read(self, clip: Clip, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The features of the temporal patches [start, stop) of a clip, by default of all.

        Returns:
            (n, 1+K, D) of the store's dtype, n tokens.

        Raises:
            UserError: data that is damaged or missing.
        """
        each = clip.tokens // clip.grid[0]
        first, last, _ = slice(start, stop).indices(clip.grid[0])
        begin, end = clip.start + first * each, clip.start + max(first, last) * each
        part = part_folder(self.folder, clip.part)
        with _told(
            f"{part}: {clip.file.path}", "if it is damaged or lost, remove that part and encode again"
        ):
            array = self._arrays.get(clip.part)
            if array is None:
                array = self._arrays[clip.part] = _open_array(part)
            return array[begin:end].read().result()


class FeatureWriter:
    """One host's part of a store, being written. `open` makes one."""

    def __init__(self, folder: AnyPath, spec: StoreSpec, part: int) -> None:
        self._folder, self._part, self._number = folder, part_folder(folder, part), part
        self.spec = spec
        self._index = Index.read(folder)
        self._lines = part_lines(self._part)
        self._end = max((clip.start + clip.tokens for clip in self._index if clip.part == part), default=0)
        self._quarantined: list[bytes] = []
        if (self._part / QUARANTINE).exists():
            (self._part / QUARANTINE).unlink()
        with _told(self._part):
            self._array = _open_array(self._part, spec)
            # What lies beyond the last clip is the rest of one that was not finished: its shards go.
            self._array = _resized(self._array, self._end)
            self._shard = self._array.chunk_layout.write_chunk.shape[0]

    @staticmethod
    @contextmanager
    def open(folder: PathArgument, spec: StoreSpec, part: int = 0) -> Iterator["FeatureWriter"]:
        """A part, made or found.

        Args:
            folder: of the store.
            spec: what is to be written.
            part: which part, by the number of the host. Only one process may write it; for a local folder
                this is made sure of.

        Raises:
            UserError: a store of another tower, shape or dtype, a folder that cannot be written to, or a part
                that another process is writing.
        """
        folder = make_path(folder)
        if (folder / STORE).exists():
            found = read_spec(folder)
            for field in dataclasses.fields(StoreSpec):
                if (old := getattr(found, field.name)) != (new := getattr(spec, field.name)):
                    raise _other(folder, field.name, old, new)
        with _told(folder):
            part_folder(folder, part).mkdir(parents=True, exist_ok=True)
            # All hosts write the same.
            write_whole(folder / STORE, to_json({"format": FORMAT, **dataclasses.asdict(spec)}), f"{part}.")
        with _locked(part_folder(folder, part)):
            yield FeatureWriter(folder, spec, part)

    def has(self, path: PathArgument, sampling: VideoSampling) -> bool:
        """Whether a video as it is now is in any part of the store, as far as it was there at the start.

        Raises:
            UserError: the video cannot be read.
        """
        path = make_path(path)
        clips = [clip for clip in self._index.at(absolute(path)) if clip.sampling == sampling]
        return any(is_same(path, clip.file) for clip in clips)

    def add(
        self,
        file: VideoFile,
        sampling: VideoSampling,
        media: Media,
        grid: tuple[int, int, int],
        tokens: int,
        pieces: Iterable[np.ndarray],
    ) -> Clip:
        """Writes one video. It counts as there when this returns, not before.

        After an error nothing more can be added; open the part anew.

        Args:
            file: the video, as `identify` says.
            sampling, media, grid, tokens: see `Clip`.
            pieces: its features in order, each (n, 1+K, D); a shard of them is held in memory, and another
                while it is written.

        Raises:
            UserError: the folder cannot be written to.
            ValueError: pieces that are not as many tokens.
        """
        start = -(-self._end // self._shard) * self._shard
        clip = Clip(file, sampling, grid, media, tokens, self._number, start)
        with _told(self._part):
            self._array = _resized(self._array, start + tokens)
        writing = None
        try:
            for block in _regrouped(pieces, tokens, self._shard):
                with _told(self._part):
                    if writing is not None:
                        writing.result()
                    writing = self._array[start : start + len(block)].write(block)
                start += len(block)
        finally:
            if writing is not None:
                with _told(self._part):
                    writing.result()
        with _told(self._part):
            line = to_line(clip)
            number = len(self._lines) // _CLIPS_A_FILE
            recent = [*self._lines[number * _CLIPS_A_FILE :], line]
            write_whole(self._part / f"clips-{number:05}.jsonl", b"".join(recent))
        self._lines.append(line)
        self._index.add(line, self._number)
        self._end = start
        return clip

    def quarantine(self, path: PathArgument, reason: str) -> None:
        """Notes a video that could not be read; the next run tries it again."""
        self._quarantined.append(to_json({"path": absolute(make_path(path)), "reason": reason}))
        with _told(self._part):
            write_whole(self._part / QUARANTINE, b"".join(self._quarantined))


def _other(folder: AnyPath, field: str, found: object, wanted: object) -> UserError:
    return UserError(
        f"{folder}: {field} of this feature store is {found}, but {wanted} is asked for; encode the videos "
        "into another folder"
    )


def _open_array(part: AnyPath, create: StoreSpec | None = None) -> Any:
    """The array of a part; with a spec it is made if it is not there."""
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": _kvstore(part / "features.zarr"),
        # Chunks of zeros are stored like others, so that one that is missing is known to be lost.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    if create is None or (part / "features.zarr" / "zarr.json").exists():
        return ts.open(spec, open=True).result()
    row = (1 + create.levels, create.width)
    row_bytes = row[0] * row[1] * ts.dtype(create.dtype).numpy_dtype.itemsize
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    shard = chunk * max(1, _SHARD_BYTES // (chunk * row_bytes))
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
        {"name": "crc32c"},
    ]
    spec["metadata"] = {
        "shape": [0, *row],
        "data_type": create.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *row]}},
        "codecs": [
            {"name": "sharding_indexed", "configuration": {"chunk_shape": [chunk, *row], "codecs": inner}}
        ],
        "dimension_names": ["token", "level", "width"],
    }
    return ts.open(spec, create=True, open=False).result()


def _resized(array: Any, tokens: int) -> Any:
    """The array with so many tokens. Shards beyond them are removed."""
    return array.resize(exclusive_max=[tokens, None, None]).result()


def _kvstore(folder: AnyPath) -> dict[str, Any]:
    """Where a folder is, in tensorstore's words."""
    if isinstance(folder, Path):
        return {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
    bucket, _, key = folder.key.partition("/")
    if folder.scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    # It finds region and credentials as other tools do, but not this variable of theirs.
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    extra = {} if endpoint is None else {"endpoint": endpoint}
    return {"driver": "s3", "bucket": bucket, "path": f"{key}/", **extra}


def _regrouped(pieces: Iterable[np.ndarray], tokens: int, most: int) -> Iterator[np.ndarray]:
    """The pieces as blocks of `most` tokens, the last of what is left."""
    left, filled = tokens, 0
    block: np.ndarray | None = None
    for piece in pieces:
        while len(piece):
            if block is None:
                if left == 0:
                    raise ValueError(f"there are more features than {tokens} tokens")
                block, filled = np.empty((min(most, left), *piece.shape[1:]), piece.dtype), 0
            count = min(len(piece), len(block) - filled)
            block[filled : filled + count] = piece[:count]
            piece, filled = piece[count:], filled + count
            if filled == len(block):
                yield block
                left, block = left - len(block), None
    if left:
        raise ValueError(f"of {tokens} tokens, {left - (0 if block is None else filled)} have no features")


@contextmanager
def _locked(part: AnyPath) -> Iterator[None]:
    """Keeps other processes of this machine from a local part."""
    if isinstance(part, StorePath):
        yield
        return
    with (part / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{part}: another process is writing it; give each its own --host, or wait for it"
            ) from None
        yield


_GO_ON = "finished clips stay, the same command goes on after them"


@contextmanager
def _told(what: object, way_out: str = _GO_ON) -> Iterator[None]:
    """What tensorstore (whose errors are ValueErrors) and the disk say, in one line."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        text = " ".join(str(error).split(" [tensorstore_spec=")[0].split())[:400]
        raise UserError(f"{what}: {text}; {way_out}") from None
