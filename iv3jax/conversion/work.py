"""The folder beside the output that holds a conversion's finished steps, so that a killed run goes on.

What a step computes is its caller's affair; the final folder is made in `assemble.py`.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from iv3jax.checkpoint.dtypes import bits_of
from iv3jax.checkpoint.target import refuse_taken
from iv3jax.errors import UserError
from iv3jax.paths import PathArgument, make_path

FINGERPRINT = "fingerprint.json"
_LOCK = "lock"
_PART = ".part"
_SUFFIX = ".converting"
_BFLOAT16 = ".bfloat16"
"""Stands in the name of an array whose file holds the bits of bf16, a dtype that .npy has no word for."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Work:
    """A conversion under way. Every step is a folder that is there whole, and on the disk, or not at all.

    Attributes:
        folder: `OUT_DIR.converting`; only one process at a time has it.
    """

    folder: Path

    @property
    def out(self) -> Path:
        """Where the finished model will be."""
        return self.folder.with_name(self.folder.name.removesuffix(_SUFFIX))

    @staticmethod
    @contextmanager
    def open(
        out_dir: PathArgument, fingerprint: Mapping[str, Any], restart: bool = False
    ) -> Iterator["Work"]:
        """The work folder of an output, made or found, and locked.

        Args:
            out_dir: where the finished model will be: a local place that is free, or an empty folder.
            fingerprint: everything that decides the result, in JSON's types; nested dicts are compared key
                by key.
            restart: throw away what an earlier run left.

        Raises:
            UserError: an output on a store or one that is taken, another run at work, steps of a conversion
                with another fingerprint, a folder of that name that is no work folder, or a disk that is
                full or cannot be written to.
        """
        out = make_path(out_dir)
        if not isinstance(out, Path):
            raise UserError(f"{out}: convert to a local folder, then `iv3 export` it to the store")
        out = Path(os.path.abspath(out))
        refuse_taken(out)
        work = Work(out.with_name(f"{out.name}{_SUFFIX}"))
        with _disk(work.folder):
            work.folder.mkdir(parents=True, exist_ok=True)
        with work._locked():
            work._begin(json.loads(json.dumps(fingerprint)), restart)
            yield work

    def done(self, step: str) -> bool:
        """Whether a step is finished."""
        return self.path(step).is_dir()

    def path(self, step: str) -> Path:
        """The folder of a finished step."""
        return self.folder / step

    @contextmanager
    def step(self, name: str) -> Iterator[Path]:
        """An empty folder to write a step into; it becomes `path(name)` when the block ends without an error.

        An interrupted step leaves nothing that is taken for finished.

        Raises:
            UserError: the disk is full; the finished steps stay, and the same command goes on after them.
        """
        part = self.folder / f"{name}{_PART}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            with _disk(self.folder):
                part.mkdir()
                yield part
                for path in (*part.rglob("*"), part):
                    _sync(path)
                part.rename(self.path(name))
                _sync(self.folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def arrays(self, step: str) -> dict[str, np.ndarray]:
        """The arrays that `save_arrays` wrote in a finished step, mapped from the disk, read-only."""
        found = {}
        for path in sorted(self.path(step).glob("*.npy")):
            value, name = np.load(path, mmap_mode="r"), path.stem
            if name.endswith(_BFLOAT16):
                value, name = value.view(ml_dtypes.bfloat16), name.removesuffix(_BFLOAT16)
            found[name] = value
        return found

    def require_space(self, nbytes: int) -> None:
        """Checks that the disk has room before hours are spent.

        Args:
            nbytes: what the whole work folder and the output will take; what finished steps already hold
                is counted off.

        Raises:
            UserError: names what is needed and what is free.
        """
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        needed, free = nbytes - held, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder.parent}: the conversion needs {_gigabytes(needed)} more on this disk and "
                f"{_gigabytes(free)} are free; make room, or name an output on another disk"
            )

    def remove(self) -> None:
        """Removes the folder, when the output is in its place."""
        shutil.rmtree(self.folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the folder against other processes; the system lets go when this one ends, even killed."""
        with _disk(self.folder):
            file = (self.folder / _LOCK).open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run that had it may have finished between our opening and our locking.
                taken = os.fstat(file.fileno()).st_nlink == 0
            except BlockingIOError:
                taken = True
            except OSError as error:
                raise UserError(
                    f"{self.folder}: cannot be locked on this file system ({error.strerror}); name an output "
                    "on a local disk"
                ) from None
            if taken:
                raise UserError(f"{self.folder}: another conversion to this output is running; wait for it")
            yield

    def _begin(self, fingerprint: Mapping[str, Any], restart: bool) -> None:
        """Goes on with a conversion of this fingerprint, or starts one."""
        path = self.folder / FINGERPRINT
        others = [p for p in self.folder.iterdir() if p.name != _LOCK and not p.name.endswith(_PART)]
        if others and not path.exists():
            raise UserError(
                f"{self.folder}: is no work folder of a conversion (it holds {others[0].name}); name another "
                "output, or move it away"
            )
        if restart:
            # Last goes the file by which the folder is known.
            for other in sorted(self.folder.iterdir(), key=lambda p: p.name == FINGERPRINT):
                if other.is_dir():
                    shutil.rmtree(other)
                elif other.name != _LOCK:
                    other.unlink()
        if path.exists():
            difference = _difference(_read(path), fingerprint)
            if difference is not None:
                raise UserError(
                    f"{self.folder}: holds an unfinished conversion with {difference}; delete it or give "
                    "--restart to begin anew, or repeat the command that began it"
                )
            return
        with _disk(self.folder):
            part = self.folder / f"{FINGERPRINT}{_PART}"
            part.write_text(json.dumps(fingerprint, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _sync(part)
            part.rename(path)
            _sync(self.folder)


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `NAME.npy` for each array, for `Work.arrays` to map.

    Raises:
        OSError: the disk is full, with its errno, which numpy's own writer loses.
    """
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            array, name = bits_of(array), f"{name}{_BFLOAT16}"
        array = np.asarray(array, order="C")
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_2_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.reshape(-1).view(np.uint8).data)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete {path.parent} to begin anew") from None


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first field in which two fingerprints differ: `rank 64 instead of 96`; None if they are equal."""
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found = _difference(before, now, f"{prefix}{key}.")
            if found is not None:
                return found
        elif before != now:
            return f"{prefix}{key} {json.dumps(before)} instead of {json.dumps(now)}"
    return None


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full disk, or one that may not be written to, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{folder}: the disk is full; finished steps are kept, so make room and run the same command "
                "again to go on"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        raise


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
