"""Which samples share a row: a stream of samples → rows filled in tokens and in vision chunks."""

from collections.abc import Iterator

from iv3jax.data.sample import Sample
from iv3jax.errors import UserError


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
