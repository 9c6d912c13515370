"""A model folder written to a store: shard by shard, what makes it complete last. Local ones: target.py."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from iv3jax.errors import UserError
from iv3jax.paths import StorePath


class StoreTarget:
    """Fills a folder on a store; used like `LocalTarget`.

    Each file is written under TMPDIR, uploaded when it is closed and deleted here, so the local disk holds
    one shard. The file called `last` is held back until `finish`: a process that is killed leaves a folder
    without it, which no program takes for a model, and which the next export refuses as not empty.
    """

    def __init__(self, folder: StorePath, last: str = "config.json") -> None:
        """Looks at the store before anything is computed for it.

        Args:
            folder: a place on a store where nothing lies.
            last: name of the file without which the folder is not complete.

        Raises:
            UserError: something lies there, or the store cannot be reached.
        """
        self.folder, self._last = folder, last
        self._held: bytes | None = None
        self._written: list[str] = []
        refuse_taken(folder, last)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the folder (`/` makes inner ones), open for writing; on the store when closed.

        After an exception nothing of it is uploaded.

        Raises:
            UserError: the local disk is full or cannot be written to, or the store refuses.
        """
        with _local_file(self.folder / name) as file:
            yield file
            file.flush()
            if name != self._last:
                (self.folder / name).upload(Path(file.name))
                self._written.append(name)
            else:
                file.seek(0)
                self._held = file.read()

    def finish(self) -> None:
        """Uploads the file held back, which makes the folder complete.

        Raises:
            UserError: it was never written, or the store refuses.
        """
        if self._held is None:
            raise UserError(f"{self.folder}: {self._last} was never written, so the folder is not complete")
        (self.folder / self._last).write_bytes(self._held)
        self._written.append(self._last)

    def discard(self) -> None:
        """Removes what was uploaded and is still there, the file that makes it complete first."""
        while self._written:
            with suppress(FileNotFoundError):
                (self.folder / self._written.pop()).unlink()


def refuse_taken(folder: StorePath, last: str) -> None:
    """Raises UserError if something lies in the folder; without `last` it is what an upload left."""
    if folder.is_file():
        raise UserError(f"{folder}: a file; name a new folder to export to")
    if folder.is_dir() and (found := [inner.name for inner in folder.iterdir()]):
        why = "" if last in found else f" and has no {last}, as after an export that was cut off"
        raise UserError(f"{folder}: is not empty{why}; name a new folder to export to, or remove this one")


@contextmanager
def _local_file(path: StorePath) -> Iterator[IO[bytes]]:
    """A temporary file for what goes to `path`; the disk's refusals in one line."""
    try:
        with NamedTemporaryFile(prefix="iv3-upload-") as file:
            yield file
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written by way of the local disk ({error.strerror or error}); point TMPDIR "
            "at a disk with room for one file"
        ) from None
