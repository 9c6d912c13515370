"""What a compiled program says of itself: its collectives, read from its text; nothing is compiled here.

The text is a TPU's, GPU's or CPU's. A loop's body stands in it once, so every collective comes with how often
it runs. XLA for a TPU writes a reduce-scatter as a fusion `all-reduce-scatter`, an all-reduce and a slice of
it.
"""

import math
import re
from dataclasses import dataclass

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_KINDS = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-(?:permute|broadcast)"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_OF_A_REDUCE_SCATTER = "all-reduce-scatter"


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", …
        shapes: of the whole arrays, on one device: an all-gather's results, a reduce-scatter's operands.
        bytes: of these.
        group: devices that take part in one of them together.
        times: how often it runs: trips of the loops around it, multiplied.
        name: where it comes from, the path of `jax.named_scope`s and modules.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    group: int
    times: int
    name: str

    @property
    def received(self) -> float:
        """Bytes that a device must at least receive for all of them, rings over its group."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        share = (self.group - 1) / self.group
        return self.bytes * self.times * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text; branches of a conditional all count.

    Raises:
        ValueError: a loop whose trips are not written in the text.
    """
    entry, computations = _computations(text)
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                found.append(_collective(match, line, name, times))
            if " while(" in line:
                body = _attribute(line, "body")
                walk(body, times * _trips(line, computations))
                continue
            for called in _called(line):
                walk(called, times)

    walk(entry, 1)
    return found


def collective_bytes(text: str) -> dict[str, int]:
    """Kind of collective → bytes of the whole arrays on one device, all that a run of the program moves."""
    found: dict[str, int] = {}
    for one in collectives(text):
        found[one.kind] = found.get(one.kind, 0) + one.bytes * one.times
    return found


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of every computation."""
    entry, current = "", None
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if current is None:
            if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
                current = found.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif _END.match(line):
            current = None
        elif line.startswith(" ") or not current:
            current.append(line)
        else:
            # A kernel's attributes may have lines of their own.
            current[-1] += line
    return entry, found


def _attribute(line: str, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", line)
    if match is None:
        raise ValueError(f"no {name} in {line.strip()[:200]}")
    return match[1]


def _called(line: str) -> list[str]:
    """Computations that an instruction runs once."""
    names = re.findall(r"\b(?:calls|true_computation|false_computation|async_computation)=%?([\w.\-]+)", line)
    if " call(" in line:
        names += re.findall(r"\bto_apply=%?([\w.\-]+)", line)
    for listed in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop's body runs: as XLA says, or from a condition counter < number, counted from 0."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(match[1])
    condition = computations.get(_attribute(line, "condition"), [])
    numbers = [int(n) for one in condition for n in re.findall(r"\bs(?:32|64)\[\]\S* constant\((\d+)\)", one)]
    if len(numbers) != 1 or not any("direction=LT" in one for one in condition):
        raise ValueError(f"the trips of a loop are not known: {line.strip()[:200]}")
    return numbers[0]


def _collective(match: re.Match[str], line: str, computation: str, times: int) -> Collective:
    kind, starts = match[2], match[3]
    shapes = _sizes(match[1])
    group = _group(line)
    if starts and kind != "all-reduce" and len(shapes) > 1:
        # An asynchronous one names its operands and then its results, and a permute two counters more.
        shapes = [s for s in shapes if s[0] != "u32" or s[1]]
        shapes = shapes[len(shapes) // 2 :]
    if kind == "all-reduce" and computation.startswith(_OF_A_REDUCE_SCATTER):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        # Its operands are `group` times its results.
        shapes = [(dtype, dims) for dtype, dims in shapes for _ in range(group)]
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind,
        tuple(dims for _, dims in shapes),
        sum(math.prod(dims) * _BYTES.get(dtype, 1) for dtype, dims in shapes),
        group,
        times,
        name[1] if name else "",
    )


def _sizes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def _group(line: str) -> int:
    """Devices of one group, in any of the ways that XLA writes groups; 1 where it writes none."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # A part of an axis is 'name':(what is before it)size.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    return 1
