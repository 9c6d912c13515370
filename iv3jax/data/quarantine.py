"""The quarantine file: which samples could not be read, so that they are not tried again. No reading here."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from iv3jax.data.record import MEND, is_number
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, make_path


@dataclass(frozen=True)
class Dropped:
    """A sample that is not used.

    Attributes:
        name: where it is found.
        kind: "unreadable" (its data are at fault), "failed" (a library's error, or a dead process),
            "timeout", "too large" (for any row) or "quarantined" (one of the first three, earlier).
        reason: one line.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A line of the file: `index` is the first place in the global order where the sample failed, `count` how
    often it was met there and later.
    """

    name: str
    kind: str
    reason: str
    index: int
    count: int = 1


class Quarantine:
    """Samples that failed, from a file in JSON lines and into it.

    A sample is skipped from the first place where it failed. What lies before was read and may be needed
    again by a run that goes on from an earlier state: so it makes the same batches, also where a failure
    comes and goes. (Only where lanes are a whole epoch of a source apart could one that comes and goes
    matter.)

    Args:
        path: the file, or None to forget at the end. Of several hosts, each writes one of its own beside
            it, `STEM-HOST.jsonl`, and reads all.
    """

    def __init__(self, path: PathArgument | None, host: int = 0, hosts: int = 1):
        self._entries: dict[str, Entry] = {}
        self._others: set[str] = set()
        self._path: AnyPath | None = None
        if path is None:
            return
        shared = make_path(path)
        stem, suffix = shared.name.removesuffix(shared.suffix), shared.suffix
        self._path = shared if hosts == 1 else shared.parent / f"{stem}-{host}{suffix}"
        try:
            shared.parent.mkdir(parents=True, exist_ok=True)
            files = [
                file
                for file in shared.parent.iterdir()
                if file == shared or (file.name.startswith(f"{stem}-") and file.suffix == suffix)
            ]
        except FileNotFoundError:
            # A folder on a store is there when something lies in it.
            files = []
        except OSError as error:
            raise UserError(f"{shared}: cannot be made ({error.strerror}); check the folder") from None
        for file in sorted(files, key=str):
            for entry in _read(file):
                known = self._entries.get(entry.name)
                first = entry if known is None or entry.index < known.index else known
                count = max(entry.count, known.count if known else 0)
                self._entries[entry.name] = replace(first, count=count)
                if file != self._path:
                    self._others.add(entry.name)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str, index: int) -> Entry | None:
        """The sample's entry, if it failed at this place of the global order or before."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.index <= index else None

    def add(self, dropped: Dropped, index: int) -> None:
        """Names a sample that failed now; it is on the disk when this returns."""
        known = self._entries.get(dropped.name)
        entry = Entry(dropped.name, dropped.kind, dropped.reason, index)
        if known is not None:
            entry = replace(entry, index=min(index, known.index), count=known.count + 1)
        self._entries[dropped.name] = entry
        self._others.discard(dropped.name)
        if isinstance(self._path, Path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
        else:
            self.save()

    def met(self, name: str) -> None:
        """Counts that a sample was skipped."""
        self._entries[name] = replace(self._entries[name], count=self._entries[name].count + 1)

    def save(self) -> None:
        """Writes the file anew, one line a sample, with today's counts."""
        if self._path is None or not (self._entries.keys() - self._others):
            return
        text = "".join(_line(entry) for name, entry in self._entries.items() if name not in self._others)
        if isinstance(self._path, Path):
            new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)
        else:
            self._path.write_text(text)


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"


def _read(path: AnyPath) -> Iterator[Entry]:
    """The entries of a file. A last line without its end was cut off when the run was killed."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = Entry(**json.loads(line))
            good = is_number(entry.index + 1, 2**63) and is_number(entry.count, 2**63)
        except (ValueError, TypeError):
            good = False
        if not good:
            raise UserError(f"{path}:{number}: is no line of a quarantine file; {MEND}")
        yield entry
