"""A local model folder being written: it appears whole or not at all. On a store: upload.py."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from iv3jax.errors import UserError


class LocalTarget:
    """A folder beside its final place, renamed at the end.

    A process that is killed leaves `NAME.<8 hex digits>.part`, which may be deleted; it never becomes
    NAME, and without config.json no program takes it for a model.
    """

    def __init__(self, folder: Path, replace: bool = False) -> None:
        """`replace` allows an older folder of that name, which goes when the new one is whole.

        Raises:
            UserError: the place is taken, or cannot be written to.
        """
        self.folder = Path(os.path.abspath(folder))
        self._replace = replace
        self._token = uuid.uuid4().hex[:8]
        if not replace:
            refuse_taken(folder)
        # An own name: two exports to one place must not write into each other's files.
        self.part = self.folder.with_name(f"{self.folder.name}.{self._token}.part")
        with _as_user_error(self.folder):
            self.part.mkdir(parents=True)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the folder, open for writing, and on the disk when closed."""
        with _as_user_error(self.folder), (self.part / name).open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Puts the folder into its place.

        Raises:
            UserError: something appeared there in the meantime.
        """
        with _as_user_error(self.folder):
            if self._replace and self.folder.exists():
                old = self.folder.with_name(f"{self.folder.name}.{self._token}.old")
                self.folder.rename(old)
                self.part.rename(self.folder)
                shutil.rmtree(old)
            else:
                # Refused by the system unless the place is free or an empty folder.
                self.part.rename(self.folder)

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.part, ignore_errors=True)


def refuse_taken(folder: Path) -> None:
    """Raises UserError unless a local path is free, or an empty folder."""
    with _as_user_error(folder):
        if folder.is_dir():
            if any(folder.iterdir()):
                raise UserError(f"{folder}: is not empty; name a new folder to export to")
        elif folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: a file; name a new folder to export to")


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """The system's refusals (no permission, disk full, …) in one line that names the target."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
