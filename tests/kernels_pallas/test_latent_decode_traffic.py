"""The bytes that latent_decode's TPU kernel moves, counted from its grid and index maps."""

import itertools

import numpy as np
import pytest

from kernels_pallas.latent_decode.tpu import Plan
from kernels_pallas.latent_decode.traffic import bytes_moved

SIZES = {"rank": 896, "rope_dim": 128, "heads": 32}
GQA = 4096
"""Bytes per token and layer of a GQA that reads its cache once: 8 heads of 128 keys and values, bf16."""


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.51), ("int8", 0.29)])
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_the_cache_is_read_once(kind, most, chip):
    slots = 131072
    moved = bytes_moved([slots], slots, **SIZES, kind=kind, chip=chip)
    assert moved.cache == slots * {"bfloat16": 2048, "int8": 896 + 256}[kind]
    assert moved.total / slots <= most * GQA


def test_short_rows_read_no_more_than_they_see():
    lengths = [1, 5000, 2048, 32768]
    moved = bytes_moved(lengths, 32768, **SIZES, chip="v5e")
    assert moved.cache == sum(-(-n // 2048) * 2048 for n in lengths) * 2048


def test_a_split_of_few_blocks_reads_no_more():
    one = bytes_moved([5000], 32768, **SIZES, splits=1)
    assert bytes_moved([5000], 32768, **SIZES, splits=8).cache == one.cache


def test_pages_are_read_where_they_lie():
    table = np.asarray([[3, 1, 0, 2], [4, 5, 6, 7]], np.int32)
    moved = bytes_moved([300, 1024], 256, **SIZES, chip="v5e", page_table=table)
    assert moved.cache == (2 + 4) * 256 * 2048


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'int4'; accepted are"):
        bytes_moved([1], 1, **SIZES, kind="int4")


@pytest.mark.parametrize(
    ("pages", "page", "block", "splits"), [(1, 100, 16, 3), (5, 20, 16, 2), (1, 7, 16, 1)]
)
def test_every_block_is_visited_once(pages, page, block, splits):
    walk = Plan(1, pages, page, block, block, splits)
    for length in range(pages * page + 1):
        parts = [walk.part(s, np.int32(length)) for s in range(splits)]
        assert all(stop - start <= walk.grid[2] for start, stop in parts)
        blocks = list(itertools.chain(*(range(int(start), int(stop)) for start, stop in parts)))
        seen = {
            p * walk.blocks_of_page + s // block
            for p in range(pages)
            for s in range(page)
            if p * page + s < length
        }
        assert blocks == sorted(seen)
