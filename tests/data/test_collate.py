"""collate: padding, packing and chunks, against the samples read back out of the Batch."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iv3jax.data.collate import collate, round_up_bucket
from iv3jax.data.patches import patch_coords
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.presets import preset

CONFIG = preset("tiny")
PROCESSOR = Processor(Tokenizer.from_dir(TINY_FOLDER, CONFIG), CONFIG)
MERGE = CONFIG.vision_config.spatial_merge_size


def sample(
    *sizes: tuple[int, int, int], text: str = "Which number?", answer: str = "No.", seed: int = 0
) -> Sample:
    """A conversation with a video for each (frames, height, width), sides in units of 32 pixels."""
    rng = np.random.default_rng(seed)
    content: list[dict] = [
        {
            "type": "video",
            "frames": rng.integers(0, 256, (n, 32 * h, 32 * w, 3), dtype=np.uint8),
            "times": np.arange(n),
        }
        for n, h, w in sizes
    ]
    content.append({"type": "text", "text": text})
    return PROCESSOR([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])


def assert_holds(batch, rows) -> None:
    """Everything the samples hold is where the Batch's contract says, and nothing else is there."""
    for row, samples in enumerate(rows):
        start = 0
        used = np.zeros(batch.patches.shape[1:3], bool) if batch.patches is not None else None
        for segment, one in enumerate(samples, 1):
            at = slice(start, start + len(one))
            start = at.stop
            np.testing.assert_array_equal(batch.input_ids[row, at], one.input_ids)
            np.testing.assert_array_equal(batch.positions[:, row, at], one.positions)
            np.testing.assert_array_equal(batch.labels[row, at], one.labels)
            assert (batch.segment_ids[row, at] == segment).all()
            visual = np.isin(one.input_ids, [CONFIG.image_token_id, CONFIG.video_token_id])
            if used is None:
                assert not visual.any()
                continue
            index = batch.visual_index[row, at]
            np.testing.assert_array_equal(index >= 0, visual)
            assert_patches(batch, row, one, index[visual], used)
        assert (batch.segment_ids[row, start:] == 0).all()
        assert (batch.labels[row, start:] == -100).all()
        if used is not None:
            assert (batch.visual_index[row, start:] == -1).all()
            assert (batch.patch_segment_ids[row][~used] == 0).all()
            assert not batch.patches[row][~used].any()


def assert_patches(batch, row: int, one: Sample, index: np.ndarray, used: np.ndarray) -> None:
    """Reads a sample's patches back, one vision token at a time."""
    chunk_tokens = batch.patches.shape[2] // MERGE**2
    coords = [patch_coords(h, w, MERGE) for t, h, w in one.grids for _ in range(t)]
    ends = np.cumsum([len(c) for c in coords])
    expect_coords = np.concatenate([np.zeros((0, 4), np.int32), *coords])
    segments: list[set] = [set() for _ in coords]
    for token, place in enumerate(index):
        chunk, slot = place // chunk_tokens, place % chunk_tokens * MERGE**2
        here, there = slice(slot, slot + MERGE**2), slice(token * MERGE**2, (token + 1) * MERGE**2)
        np.testing.assert_array_equal(batch.patches[row, chunk, here], one.patches[there])
        np.testing.assert_array_equal(batch.patch_coords[row, chunk, here], expect_coords[there])
        assert not used[chunk, here].any()
        used[chunk, here] = True
        temporal = int(np.searchsorted(ends, there.start, side="right"))
        segments[temporal] |= {(chunk, s) for s in batch.patch_segment_ids[row, chunk, here].tolist()}
    # Each temporal patch is whole in one chunk, under a number that no other has.
    assert all(len(s) == 1 for s in segments)
    assert len(set().union(*segments)) == len(segments)
    assert all(number > 0 for s in segments for _, number in s)


SIZE = st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(1, 3))
ROWS = st.lists(st.lists(st.lists(SIZE, max_size=2), max_size=3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([None, 24, 28, 64]))
def test_nothing_is_lost_or_moved(shapes, chunk_patches):
    rows = [[sample(*sizes, seed=i) for i, sizes in enumerate(row)] for row in shapes]
    batch = collate(rows, CONFIG, length=512, chunk_patches=chunk_patches)
    assert_holds(batch, rows)


def test_shapes_and_dtypes():
    batch = collate([[sample((8, 1, 1))], [sample((2, 2, 1))]], CONFIG, length=100)
    assert batch.input_ids.shape == batch.segment_ids.shape == batch.labels.shape == (2, 100)
    assert batch.positions.shape == (3, 2, 100)
    assert batch.visual_index.shape == (2, 100)
    assert batch.patches.shape == (2, 2, 8, CONFIG.vision_config.patch_dim)
    assert batch.patch_coords.shape == (2, 2, 8, 4)
    assert batch.patch_segment_ids.shape == (2, 2, 8)
    assert batch.patches.dtype == np.uint8
    assert batch.order is None and batch.features is None
    others = (a for f, a in batch._asdict().items() if f not in ("patches", "order", "features"))
    assert {a.dtype for a in others} == {np.dtype(np.int32)}


def test_first_fit_fills_gaps():
    # Temporal patches of 8, 16, 8 and 4 patches into chunks of 24.
    rows = [[sample((2, 1, 2), (2, 2, 2), (2, 1, 2), (2, 1, 1))]]
    batch = collate(rows, CONFIG, length=128, chunk_patches=24)
    assert batch.patch_segment_ids[0].tolist() == [[1] * 8 + [2] * 16, [3] * 8 + [4] * 4 + [0] * 12]
    later = collate(
        [[sample((2, 2, 2), (2, 2, 1), (2, 2, 2), (2, 2, 1))]], CONFIG, length=128, chunk_patches=24
    )
    assert later.patch_segment_ids[0].tolist() == [[1] * 16 + [2] * 8, [3] * 16 + [4] * 8]
    back = collate([[sample((2, 2, 2), (2, 2, 2), (2, 2, 1))]], CONFIG, length=128, chunk_patches=24)
    assert back.patch_segment_ids[0].tolist() == [[1] * 16 + [3] * 8, [2] * 16 + [0] * 8]


def test_text_only_batches():
    rows = [[sample()], [sample(), sample()]]
    assert collate(rows, CONFIG, length=64).patches is None
    assert_holds(collate(rows, CONFIG, length=64), rows)
    fixed = collate(rows, CONFIG, length=64, chunks=3, chunk_patches=8)
    assert fixed.patches.shape[:3] == (2, 3, 8)
    assert (fixed.visual_index == -1).all()
    assert_holds(fixed, rows)
    no_tower = dataclasses.replace(CONFIG, vision_config=None)
    assert collate(rows, no_tower, length=64, chunks=3, chunk_patches=8).visual_index is None


def test_patches_for_a_model_without_tower():
    with pytest.raises(ValueError, match="no vision tower"):
        collate([[sample((2, 1, 1))]], dataclasses.replace(CONFIG, vision_config=None), length=64)


def test_given_chunks_pad():
    rows = [[sample((2, 1, 1))]]
    batch = collate(rows, CONFIG, length=64, chunks=4, chunk_patches=8)
    assert batch.patches.shape[:3] == (1, 4, 8)
    assert_holds(batch, rows)


def test_row_too_long():
    one = sample()
    with pytest.raises(
        UserError, match=rf"row 1: {2 * len(one)} tokens do not fit in a length of {len(one)}"
    ):
        collate([[one], [one, one]], CONFIG, length=len(one))
    assert collate([[one]], CONFIG, length=len(one)).segment_ids.all()


def test_too_many_chunks():
    with pytest.raises(UserError, match="row 1: 3 vision chunks of 4 patches are above the limit of 2"):
        collate([[sample()], [sample((6, 1, 1))]], CONFIG, length=64, chunks=2)


def test_temporal_patch_above_the_chunk():
    with pytest.raises(UserError, match="row 0: a temporal patch has 16 patches, above a chunk's limit of 8"):
        collate([[sample((2, 2, 2))]], CONFIG, length=64, chunk_patches=8)


def test_chunk_that_cuts_a_vision_token():
    with pytest.raises(ValueError, match="no multiple of 4"):
        collate([[sample((2, 1, 1))]], CONFIG, length=64, chunk_patches=6)


def test_buckets():
    sizes = [round_up_bucket(n) for n in (0, 1, 16, 17, 24, 25, 32, 33, 49, 65, 1000)]
    assert sizes == [16, 16, 16, 24, 24, 32, 32, 48, 64, 96, 1024]
    assert [round_up_bucket(n, 256) for n in (1, 257, 385, 600)] == [256, 384, 512, 768]
    assert len({round_up_bucket(n) for n in range(1, 4097)}) == 17
    assert all(n <= round_up_bucket(n) <= 1.5 * n for n in range(16, 4097))
