"""Packing fills rows first-fit in tokens and vision chunks, and never cuts."""

from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iv3jax.data.collate import collate
from iv3jax.data.packing import Item, Limits, RowPacker, pack_rows
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError
from iv3jax.models.presets import preset

CONFIG = preset("tiny")
PATCH_DIM = CONFIG.vision_config.patch_dim


def sample(tokens: int, patches: int = 0) -> Sample:
    ids = np.zeros(tokens, np.int32)
    grids = ((patches, 2, 2),) if patches else ()
    return Sample(ids, np.zeros((3, tokens), np.int32), ids, np.zeros((0, 1536), np.uint8), grids, ())


def video_sample(text: int, t: int, h: int, w: int) -> Sample:
    """So many tokens of text, and those of t temporal patches of h × w patches."""
    tokens = [CONFIG.video_token_id] * (t * h * w // 4) + [1] * text
    ids = np.array(tokens, np.int32)
    patches = np.zeros((t * h * w, PATCH_DIM), np.uint8)
    return Sample(ids, np.zeros((3, len(ids)), np.int32), ids, patches, ((t, h, w),) if t else (), ())


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


def reference_rows(samples: list[Sample], limits: Limits, look_ahead: int, rows: int) -> list[list[int]]:
    """The same by asking collate whether a row fits."""

    def fits(row: list[int]) -> bool:
        try:
            collate(
                [[samples[i] for i in row]],
                CONFIG,
                length=limits.length,
                chunks=limits.chunks,
                chunk_patches=limits.chunk_patches,
            )
        except UserError:
            return False
        return True

    made, waiting, left = [], [], list(range(len(samples)))
    for _ in range(rows):
        row: list[int] = []
        passed = []
        for i in waiting:
            (row if fits([*row, i]) else passed).append(i)
        while left and (fits([*row, left[0]]) or len(passed) < look_ahead):
            i = left.pop(0)
            (row if fits([*row, i]) else passed).append(i)
        if not left:
            break
        made.append(row)
        waiting = passed
    return made


shapes = st.tuples(st.integers(1, 12), st.integers(0, 4), st.sampled_from([(2, 2), (2, 4), (4, 4), (2, 6)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=30), st.integers(0, 4), st.integers(1, 4))
def test_rows_keep_to_both_limits_and_cut_nothing(drawn, look_ahead, chunks):
    limits = Limits(20, chunks, 16)
    samples = [video_sample(tokens, t, *side) for tokens, t, side in drawn]
    samples = [sample for sample in samples if limits.refusal(sample) is None]
    packer = RowPacker(limits, look_ahead)
    rows = [row for i, one in enumerate(samples) if (row := packer.offer(Item(i, str(i), one))) is not None]
    keys = [[item.key for item in row.items] for row in rows]
    assert keys == reference_rows(samples, limits, look_ahead, len(rows) + 1)
    for row in rows:
        # What comes out is what went in, and collate takes it with these limits.
        assert all(item.sample is samples[item.key] for item in row.items)
        collate([[item.sample for item in row.items]], CONFIG, length=20, chunks=chunks, chunk_patches=16)
        assert len(row.waiting) == look_ahead
    # None is lost and none is used twice: the rest is in the row being filled or waits for the next.
    last = rows[-1] if rows else None
    used = sorted(key for row in keys for key in row)
    rest = set(range(len(samples))) - set(used)
    assert len(used) == len(set(used))
    if last is not None:
        assert rest == set(last.waiting) | set(range(last.next, len(samples)))


@settings(max_examples=40, deadline=None)
@given(st.lists(shapes, min_size=5, max_size=30), st.integers(0, 4), st.integers(1, 4))
def test_a_packer_goes_on_from_what_a_row_says(drawn, look_ahead, chunks):
    limits = Limits(20, chunks, 16)
    samples = [video_sample(tokens, t, *side) for tokens, t, side in drawn]
    samples = [sample for sample in samples if limits.refusal(sample) is None]

    def rows(keys) -> list[list[int]]:
        packer = RowPacker(limits, look_ahead)
        offered = (packer.offer(Item(i, "", samples[i])) for i in keys)
        made = [row for row in offered if row is not None]
        states.extend((row.waiting, row.next) for row in made)
        return [[item.key for item in row.items] for row in made]

    states: list = []
    whole = rows(range(len(samples)))
    for done, (waiting, following) in enumerate(tuple(states), start=1):
        assert rows([*waiting, *range(following, len(samples))]) == whole[done:]


def test_what_fits_no_row_is_refused():
    limits = Limits(16, 2, 16)
    assert limits.refusal(video_sample(8, 2, 4, 4)) is None
    assert "17 tokens do not fit in a row of 16" in str(limits.refusal(sample(17)))
    assert "24 patches does not fit in a chunk of 16" in str(limits.refusal(video_sample(9, 1, 4, 6)))
    assert "3 vision chunks do not fit in a row of 2" in str(limits.refusal(video_sample(1, 3, 4, 4)))
    # Four quarters of a chunk are one chunk.
    assert limits.refusal(video_sample(8, 8, 2, 2)) is None
