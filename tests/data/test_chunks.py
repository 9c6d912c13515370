"""First fit over runs of equal temporal patches is first fit, one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv3jax.data.chunks import Chunks


def one_by_one(sizes: list[int], width: int) -> list[int]:
    used: list[int] = []
    starts = []
    for size in sizes:
        chunk = next((i for i, full in enumerate(used) if full + size <= width), len(used))
        if chunk == len(used):
            used.append(0)
        starts.append(chunk * width + used[chunk])
        used[chunk] += size
    return starts


@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 9)), max_size=8),
    st.integers(24, 40),
    st.integers(0, 8),
)
def test_first_fit(runs, width, cut):
    sizes = [size for size, count in runs for _ in range(count)]
    want = one_by_one(sizes, width)
    chunks = Chunks(width)
    # In two parts, as samples come one after the other.
    parts = [chunks.place(np.array(part, np.int64)) for part in (sizes[:cut], sizes[cut:])]
    assert np.concatenate(parts).tolist() == want
    assert len(chunks) == (max(want) // width + 1 if want else 0)


def test_a_copy_is_apart():
    chunks = Chunks(8)
    chunks.place(np.array([8]))
    other = chunks.copy()
    other.place(np.array([4, 8]))
    assert (len(chunks), len(other)) == (1, 3)


def test_too_large():
    with pytest.raises(ValueError, match="9 patches, a chunk only 8"):
        Chunks(8).place(np.array([9]))
