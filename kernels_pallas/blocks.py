"""Block sizes: one table per chip, a heuristic of each operation's own for what is not in it.

The table holds what was tuned or chosen for the released model's sizes; `iv3 bench tune` measures the
candidates of an operation on the device at hand and prints its row.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from kernels_pallas.choice import chip

Blocks = dict[str, int]

TABLE: dict[str, dict[tuple[str, str], Blocks]] = {
    "v5e": {},
    "v5p": {},
    "h100": {},
}
"""Chip → (operation, its key for the shapes) → block sizes."""

asked: dict[str, tuple[str, Blocks]] = {}
"""Operation → the key it last asked with and what it was given: where the tuner begins."""

_override: ContextVar[dict[str, Blocks] | None] = ContextVar("override", default=None)


def pick(op: str, key: str, heuristic: Mapping[str, int]) -> Blocks:
    """The block sizes of an operation: overridden, from the chip's table, or its heuristic's.

    Args:
        op: name of the operation.
        key: the shapes that block sizes depend on, as the operation writes them, for example
            "heads32 rank896 rope128 bfloat16".
        heuristic: every block size and what the operation would choose itself.

    Raises:
        ValueError: an override or a row of the table names a block size that the operation does not have.
    """
    chosen = TABLE.get(chip().name, {}).get((op, key), {}) | (_override.get() or {}).get(op, {})
    if unknown := set(chosen) - set(heuristic):
        raise ValueError(f"{op}: unknown block size {sorted(unknown)[0]!r}; it has {', '.join(heuristic)}")
    asked[op] = (key, dict(heuristic) | chosen)
    return asked[op][1]


@contextmanager
def override(op: str, **sizes: int) -> Iterator[None]:
    """Inside, an operation traced anew takes these block sizes: for tests and the tuner."""
    token = _override.set((_override.get() or {}) | {op: sizes})
    try:
        yield
    finally:
        _override.reset(token)
