"""The kinds of sources, and opening those of a config. What a source is stands in record.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from iv3jax.data import internvideo3_json, llava_json, tfds_source
from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.record import Record as Record
from iv3jax.data.record import Source as Source
from iv3jax.data.record import is_number
from iv3jax.errors import UserError

Found = tuple[str, Source, float]
"""A name, the source, and how often its records are drawn relative to those of the same config entry."""

KINDS: Mapping[str, Callable[[SourceConfig], Sequence[Found]]] = {
    "internvideo3": internvideo3_json.open_annotation,
    "internvideo3_meta": internvideo3_json.open_meta,
    "llava": llava_json.open_conversations,
    "tfds": tfds_source.open_dataset,
}
"""`SourceConfig.kind` → what opens it. `task:NAME` is a synthetic task of iv3jax/data/tasks, `trace:NAME` the
scripted traces of one.
"""

_TASK, _TRACE = "task:", "trace:"


@dataclass(frozen=True)
class Opened:
    """A source of the mixture, under a name that no other has, with its weight, relative to the others'."""

    name: str
    source: Source
    weight: float


@dataclass(frozen=True)
class Named:
    """A source whose records are named `LABEL:NUMBER`, whatever they call themselves."""

    label: str
    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return replace(self.source[index], name=self.name(index))

    def name(self, index: int) -> str:
        """`LABEL:NUMBER`."""
        return f"{self.label}:{index}"


def open_sources(config: DataConfig) -> tuple[Opened, ...]:
    """Opens the sources of a mixture.

    Raises:
        UserError: no sources, an unknown kind, a file that cannot be read, no records, a weight that makes no
            sense, or two sources of one name.
    """
    if not config.sources:
        raise UserError("data.sources: is empty; name what to train on")
    opened: list[Opened] = []
    for number, entry in enumerate(config.sources):
        where = f"data.sources[{number}]"
        if entry.weight and not is_number(entry.weight, 1e12):
            raise UserError(f"{where}.weight: {entry.weight} is not a positive number, or 0 for the size")
        found = _open(entry, where)
        sizes = [len(source) * ratio for _, source, ratio in found]
        for (name, source, _), size in zip(found, sizes, strict=True):
            if not len(source):
                raise UserError(f"{where}: {name} holds no records; take it out")
            opened.append(Opened(name, source, entry.weight * size / sum(sizes) if entry.weight else size))
    names = [one.name for one in opened]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.sources: two are called {name!r}; give one of them another `name`")
    return tuple(opened)


def _open(entry: SourceConfig, where: str) -> Sequence[Found]:
    if entry.kind.startswith((_TASK, _TRACE)):
        label = entry.name or entry.kind
        return [(label, Named(label, _open_task(entry, where)), 1.0)]
    if entry.kind not in KINDS:
        raise UserError(
            f"{where}.kind: {entry.kind!r} is not one of {', '.join(KINDS)}, {_TASK}NAME, {_TRACE}NAME"
        )
    if not entry.path:
        raise UserError(f"{where}.path: is missing; a source of kind {entry.kind} is read from a file")
    return KINDS[entry.kind](entry)


def _open_task(entry: SourceConfig, where: str) -> Source:
    # Tasks draw with libraries that no other source needs.
    from iv3jax.data.tasks import TASKS, TRACES

    prefix, _, name = entry.kind.partition(":")
    known: Mapping[str, Callable[[tuple[str, ...]], Source]] = TASKS if f"{prefix}:" == _TASK else TRACES
    if name not in known:
        raise UserError(f"{where}.kind: there is no task {name!r}; known are {', '.join(sorted(known))}")
    return known[name](entry.options)
