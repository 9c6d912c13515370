"""Samples → Batch: packs, padding, and vision chunks. Which samples share a row is the packer's to say."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from iv3jax.data.patches import patch_coords
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.config import ModelConfig

_coords = lru_cache(maxsize=256)(patch_coords)


def round_up_bucket(n: int, smallest: int = 16) -> int:
    """The least of smallest · {1, 1.5, 2, 3, 4, 6, 8, …} that holds n, so that shapes are few.

    Above `smallest`, at most a third of a bucket is padding. With `smallest` a multiple of 2k, every
    bucket is a multiple of k.
    """
    size = smallest
    while size < n:
        if size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def collate(
    rows: Sequence[Sequence[Sample]],
    config: ModelConfig,
    *,
    length: int,
    chunks: int | None = None,
    chunk_patches: int | None = None,
) -> Batch:
    """Pads rows, each a pack of one or more samples, into one Batch of numpy arrays.

    Temporal patches go into the first chunk of their row with room for the whole of them.

    Args:
        rows: the samples of each row, in order.
        config: the model's; without a vision tower, or without any patch, the Batch has no vision.
        length: T, tokens per row.
        chunks: V, vision chunks per row; None means as many as the fullest row needs.
        chunk_patches: C, patches per chunk; None means the largest temporal patch of the batch.
            Given together with `chunks`, every batch has the same shapes, also one without vision.

    Returns:
        The Batch, as its contract says. Padding has input id and positions 0, segment 0, no label,
        visual index −1.

    Raises:
        UserError: a row has more tokens than `length`, needs more than `chunks` chunks, or has a
            temporal patch above `chunk_patches`.
    """
    shape = (len(rows), length)
    input_ids, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.zeros((3, *shape), np.int32)
    labels = np.full(shape, IGNORE_LABEL, np.int32)
    for row, samples in enumerate(rows):
        needed = sum(map(len, samples))
        if needed > length:
            raise UserError(f"row {row}: {needed} tokens do not fit in a length of {length}")
        start = 0
        for segment, sample in enumerate(samples, start=1):
            at = slice(start, start + len(sample))
            input_ids[row, at] = sample.input_ids
            positions[:, row, at] = sample.positions
            segment_ids[row, at] = segment
            labels[row, at] = sample.labels
            start = at.stop
    vision = _vision(rows, config, input_ids, chunks, chunk_patches)
    return Batch(input_ids, positions, segment_ids, labels, **vision)


def _vision(
    rows: Sequence[Sequence[Sample]],
    config: ModelConfig,
    input_ids: np.ndarray,
    chunks: int | None,
    chunk_patches: int | None,
) -> dict[str, np.ndarray]:
    """The Batch's vision fields; none where no row has a patch and the shapes are not given."""
    vision = config.vision_config
    sizes = [_temporal_patches(samples) for samples in rows]
    largest = max((int(size.max()) for size in sizes if len(size)), default=0)
    width = largest if chunk_patches is None else chunk_patches
    if vision is None and largest:
        raise ValueError("the samples have patches, but the model has no vision tower")
    if vision is None or width == 0 or (largest == 0 and not chunks):
        return {}
    merge = vision.spatial_merge_size**2
    if width % merge:
        raise ValueError(f"chunk_patches {width} is no multiple of {merge}, the patches of a vision token")
    for row, size in enumerate(sizes):
        if len(size) and size.max() > width:
            raise UserError(
                f"row {row}: a temporal patch has {size.max()} patches, above a chunk's limit of {width}"
            )
    starts = [_first_fit(size, width) for size in sizes]
    needed = [int(start.max()) // width + 1 if len(start) else 0 for start in starts]
    if chunks is None:
        chunks = max(needed)
    elif max(needed) > chunks:
        row = needed.index(max(needed))
        raise UserError(
            f"row {row}: {needed[row]} vision chunks of {width} patches are above the limit of {chunks}"
        )

    slots = chunks * width
    index = np.full(input_ids.shape, -1, np.int32)
    dtypes = [sample.patches.dtype for samples in rows for sample in samples]
    patches = np.zeros((len(rows), slots, vision.patch_dim), np.result_type(*dtypes) if dtypes else np.uint8)
    coords = np.zeros((len(rows), slots, 4), np.int32)
    segments = np.zeros((len(rows), slots), np.int32)
    for row, samples in enumerate(rows):
        if not len(sizes[row]):
            continue
        # Where each patch of the row goes: its temporal patch's start plus its place in it.
        first = sizes[row].cumsum() - sizes[row]
        to = np.repeat(starts[row] - first, sizes[row]) + np.arange(sizes[row].sum())
        segments[row, to] = np.repeat(np.arange(1, len(first) + 1), sizes[row])
        coords[row, to] = np.concatenate(
            [
                np.tile(_coords(h, w, vision.spatial_merge_size), (t, 1))
                for sample in samples
                for t, h, w in sample.grids
            ]
        )
        done = 0
        for sample in samples:
            patches[row, to[done : done + len(sample.patches)]] = sample.patches
            done += len(sample.patches)
        ids = input_ids[row]
        visual = (ids == config.image_token_id) | (ids == config.video_token_id)
        index[row, visual] = to[::merge] // merge
    shape = (len(rows), chunks, width)
    return {
        "visual_index": index,
        "patches": patches.reshape(*shape, -1),
        "patch_coords": coords.reshape(*shape, 4),
        "patch_segment_ids": segments.reshape(shape),
    }


def _temporal_patches(samples: Sequence[Sample]) -> np.ndarray:
    """Patches in each temporal patch of a row, in order of appearance."""
    return np.array([h * w for sample in samples for t, h, w in sample.grids for _ in range(t)], np.int64)


def _first_fit(sizes: np.ndarray, width: int) -> np.ndarray:
    """Where each temporal patch starts in its row's chunks of `width` patches, laid end to end."""
    if len(sizes) and sizes.min() == sizes.max():
        per_chunk = width // int(sizes[0])
        order = np.arange(len(sizes))
        return order // per_chunk * width + order % per_chunk * sizes[0]
    used = np.zeros(len(sizes), np.int64)
    starts = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes):
        chunk = int(np.argmax(used + size <= width))
        starts[i] = chunk * width + used[chunk]
        used[chunk] += size
    return starts
