"""Packing fills rows first-fit, never cuts, and stops at the first sample without room."""

from itertools import count

import numpy as np
import pytest

from iv3jax.data.packing import pack_rows
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError


def sample(tokens: int, patches: int = 0) -> Sample:
    ids = np.zeros(tokens, np.int32)
    grids = ((patches, 2, 2),) if patches else ()
    return Sample(ids, np.zeros((3, tokens), np.int32), ids, np.zeros((0, 1536), np.uint8), grids, ())


def test_first_fit_by_tokens_and_patches():
    stream = [sample(6), sample(5, 3), sample(4, 2), sample(2, 2), sample(5), sample(1)]
    rows = pack_rows(iter(stream), rows=2, length=10, chunks=3)
    # The fourth fits the second row in tokens, but that has no patch left: it ends the batch.
    assert rows == [[stream[0], stream[2]], [stream[1]]]


def test_an_endless_stream_ends():
    rows = pack_rows((sample(1 + i % 3) for i in count()), rows=3, length=7, chunks=1)
    assert all(sum(map(len, row)) <= 7 for row in rows) and all(rows)


def test_a_sample_larger_than_a_row_is_refused():
    with pytest.raises(UserError, match="11 tokens and 0 temporal patches"):
        pack_rows(iter([sample(11)]), rows=2, length=10, chunks=3)
    with pytest.raises(UserError, match="5 tokens and 4 temporal patches"):
        pack_rows(iter([sample(5, 4)]), rows=2, length=10, chunks=3)
