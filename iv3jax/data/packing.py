"""Which samples share a row: rows filled in tokens and in vision chunks. Samples are never cut.

`RowPacker` fills one row after the other from an endless order of samples, as training's lanes do
(lanes.py); `pack_rows` fills a batch of rows at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from iv3jax.data.chunks import Chunks
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a row holds at most: `length` tokens, and `chunks` vision chunks of `chunk_patches` patches."""

    length: int
    chunks: int
    chunk_patches: int

    def refusal(self, sample: Sample) -> str | None:
        """Why a sample fits no row, however empty; None where it does."""
        if len(sample) > self.length:
            return f"{len(sample)} tokens do not fit in a row of {self.length}; raise `length`"
        sizes = sample.temporal_patches
        largest = int(sizes.max(initial=0))
        if largest > self.chunk_patches:
            return (
                f"a frame of {largest} patches does not fit in a chunk of {self.chunk_patches}; "
                "raise `chunk_patches`, or lower the pixels"
            )
        chunks = Chunks(self.chunk_patches)
        chunks.place(sizes)
        if len(chunks) > self.chunks:
            return f"its {len(chunks)} vision chunks do not fit in a row of {self.chunks}; raise `chunks`"
        return None


@dataclass(frozen=True, eq=False)
class Item:
    """A sample on its way into a row, with its number in the lane's order and its name."""

    key: int
    name: str
    sample: Sample


@dataclass(frozen=True, eq=False)
class Row:
    """A finished row.

    Attributes:
        items: its samples, in order.
        waiting: those passed over, first in the next row.
        next: the first that was not taken at all: the next row goes on with it after those waiting.
    """

    items: tuple[Item, ...]
    waiting: tuple[int, ...]
    next: int


class RowPacker:
    """Fills rows from samples as they come.

    A row takes every sample that still fits. One that doesn't waits for the next row, where it is tried
    before new ones; when `look_ahead` wait already, the row is finished. The first that waits always
    fits the next row, so none waits for ever.
    """

    def __init__(self, limits: Limits, look_ahead: int):
        self._limits, self._look_ahead = limits, look_ahead
        self._start(())

    @property
    def items(self) -> tuple[Item, ...]:
        """The row that is being filled."""
        return tuple(self._items)

    def offer(self, item: Item) -> Row | None:
        """Takes the next sample, one that `Limits.refusal` has nothing against.

        Returns:
            The row that this finishes, if it does; the sample is then already in the row after it.
        """
        if self._fits(item):
            return None
        if len(self._waiting) < self._look_ahead:
            self._waiting.append(item)
            return None
        row = Row(tuple(self._items), tuple(one.key for one in self._waiting), item.key)
        self._start((*self._waiting, item))
        return row

    def _start(self, items: tuple[Item, ...]) -> None:
        self._items: list[Item] = []
        self._tokens, self._chunks = 0, Chunks(self._limits.chunk_patches)
        self._waiting = [item for item in items if not self._fits(item)]

    def _fits(self, item: Item) -> bool:
        """Puts a sample into the row if there is room."""
        tokens = self._tokens + len(item.sample)
        chunks = self._chunks.copy()
        if tokens <= self._limits.length:
            chunks.place(item.sample.temporal_patches)
        if tokens > self._limits.length or len(chunks) > self._limits.chunks:
            return False
        self._items.append(item)
        self._tokens, self._chunks = tokens, chunks
        return True


def pack_rows(samples: Iterator[Sample], rows: int, length: int, chunks: int) -> list[list[Sample]]:
    """Fills `rows` rows from the stream, each with at most `length` tokens and `chunks` temporal patches.

    A sample goes into the first row with room for it; the first that finds none ends the batch. Samples
    are never cut.

    Raises:
        UserError: a sample alone is larger than a row.
    """
    filled: list[list[Sample]] = [[] for _ in range(rows)]
    room = [(length, chunks)] * rows
    for sample in samples:
        tokens, patches = len(sample), sum(t for t, _, _ in sample.grids)
        if tokens > length or patches > chunks:
            raise UserError(
                f"a sample of {tokens} tokens and {patches} temporal patches does not fit a row of "
                f"{length} and {chunks}"
            )
        fits = [i for i, (t, p) in enumerate(room) if tokens <= t and patches <= p]
        if not fits:
            break
        row = fits[0]
        filled[row].append(sample)
        room[row] = (room[row][0] - tokens, room[row][1] - patches)
    return filled
