"""Patch rows against a plain loop and against transformers' own image processor."""

import numpy as np
import pytest

from iv3jax.data.patches import patch_coords, patchify
from iv3jax.models.batch import fake_batch
from iv3jax.models.config import ModelConfig


def loop_patchify(frames: np.ndarray, size: int, per: int, merge: int) -> np.ndarray:
    count, height, width, channels = frames.shape
    rows = []
    for t in range(0, count, per):
        for block_y in range(0, height, size * merge):
            for block_x in range(0, width, size * merge):
                for y0 in range(block_y, block_y + size * merge, size):
                    for x0 in range(block_x, block_x + size * merge, size):
                        row = [
                            frames[t + f, y0 + y, x0 + x, c]
                            for c in range(channels)
                            for f in range(per)
                            for y in range(size)
                            for x in range(size)
                        ]
                        rows.append(row)
    return np.array(rows)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("size", "per", "merge"), [(16, 2, 2), (4, 2, 2), (4, 3, 1), (2, 1, 3)])
def test_against_loop(size, per, merge):
    frames = pixels(2 * per, 2 * size * merge, 3 * size * merge, 3)
    patches, grid = patchify(frames, size, per, merge)
    assert patches.dtype == np.uint8
    assert grid == (2, 2 * merge, 3 * merge)
    np.testing.assert_array_equal(patches, loop_patchify(frames, size, per, merge))


def test_picture_is_doubled_and_odd_video_repeats_its_last_frame():
    frames = pixels(3, 32, 64, 3)
    np.testing.assert_array_equal(patchify(frames[0])[0], patchify(frames[[0, 0]])[0])
    patches, grid = patchify(frames)
    assert grid == (2, 2, 4)
    np.testing.assert_array_equal(patches, patchify(frames[[0, 1, 2, 2]])[0])


@pytest.mark.parametrize("shape", [(2, 48, 64, 3), (2, 64, 48, 3), (2, 64, 64, 4), (64, 64), (0, 64, 64, 3)])
def test_refuses_shapes(shape):
    with pytest.raises(ValueError):
        patchify(np.zeros(shape, np.uint8))


def test_coords_follow_the_rows():
    height, width = 4, 6
    coords = patch_coords(height, width)
    assert (coords.shape, coords.dtype) == ((24, 4), np.int32)
    frames = np.zeros((2, height * 16, width * 16, 3), np.uint8)
    frames[..., 0] = np.arange(height).repeat(16)[:, None]
    frames[..., 1] = np.arange(width).repeat(16)
    patches = patchify(frames)[0].reshape(24, 3, -1)
    np.testing.assert_array_equal(coords[:, 0], patches[:, 0, 0])
    np.testing.assert_array_equal(coords[:, 1], patches[:, 1, 0])
    np.testing.assert_array_equal(coords[:, 2:], [[height, width]] * 24)
    with pytest.raises(ValueError):
        patch_coords(3, 4)


def test_coords_match_the_model_side(golden):
    config = ModelConfig.from_file(golden / "gqa")
    batch = fake_batch(config, rows=1, chunks=1, grid=(4, 6))
    np.testing.assert_array_equal(batch.patch_coords[0, 0], patch_coords(4, 6))


def test_against_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=4096, max_pixels=1 << 20
    )
    picture = pixels(96, 160, 3)
    theirs = processor(images=[picture], return_tensors="np", input_data_format="channels_last")
    patches, grid = patchify(picture)
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    np.testing.assert_allclose(patches / 127.5 - 1, theirs["pixel_values"], atol=1e-6)
