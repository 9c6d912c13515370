"""Samples → Batch: packs, padding, and vision chunks. Which samples share a row is the packer's to say."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from iv3jax.data.chunks import Chunks
from iv3jax.data.patches import patch_coords
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.config import ModelConfig, VisionConfig

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
    features: int | None = None,
    feature_dtype: npt.DTypeLike | None = None,
) -> Batch:
    """Pads rows, each a pack of one or more samples, into one Batch of numpy arrays.

    Temporal patches go into the first chunk of their row with room for the whole of them. Videos that come as
    features are in no chunk.

    Args:
        rows: the samples of each row, in order.
        config: the model's; without a vision tower, or without any patch, the Batch has no vision.
        length: T, tokens per row.
        chunks: V, vision chunks per row; None means as many as the fullest row needs.
        chunk_patches: C, patches per chunk; None means the largest temporal patch of the batch.
            Given together with `chunks`, every batch has the same shapes, also one without vision.
        features: N, ready features per row; None means as many as the fullest row needs. Given (`length` is
            always enough), every batch has them, of the same shape.
        feature_dtype: None takes the samples', fp32 where there are none; give it together with `features`.

    Returns:
        The Batch, as its contract says. Padding has input id and positions 0, segment 0, no label,
        visual index −1.

    Raises:
        UserError: a row has more tokens than `length`, needs more than `chunks` chunks or `features`
            features, or has a temporal patch above `chunk_patches`.
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
    vision = config.vision_config
    pixels, slots = _pixels(rows, vision, chunks, chunk_patches)
    ready = _ready(rows, vision, features, feature_dtype)
    if vision is None or (not pixels and ready is None):
        return Batch(input_ids, positions, segment_ids, labels)
    # In a row's vision tokens, those of its chunks come before the ready ones.
    merge = vision.spatial_merge_size**2
    first = pixels["patches"].shape[1] * pixels["patches"].shape[2] // merge if pixels else 0
    index = np.full(shape, -1, np.int32)
    for row, samples in enumerate(rows):
        stored = _is_stored(samples, merge)
        places = np.empty(len(stored), np.int32)
        places[~stored] = slots[row][::merge] // merge
        places[stored] = first + np.arange(stored.sum())
        ids = input_ids[row]
        index[row, (ids == config.image_token_id) | (ids == config.video_token_id)] = places
    return Batch(input_ids, positions, segment_ids, labels, index, **pixels, features=ready)


def _pixels(
    rows: Sequence[Sequence[Sample]],
    vision: VisionConfig | None,
    chunks: int | None,
    chunk_patches: int | None,
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The Batch's patches, and for each row where each of its patches went in its chunks, laid end to end.

    No arrays where no row has a patch and the shapes are not given.
    """
    sizes = [_concatenate([sample.temporal_patches for sample in samples]) for samples in rows]
    largest = max((int(size.max()) for size in sizes if len(size)), default=0)
    width = largest if chunk_patches is None else chunk_patches
    if vision is None and largest:
        raise ValueError("the samples have patches, but the model has no vision tower")
    if vision is None or width == 0 or (largest == 0 and not chunks):
        return {}, [np.zeros(0, np.int64)] * len(rows)
    merge = vision.spatial_merge_size**2
    if width % merge:
        raise ValueError(f"chunk_patches {width} is no multiple of {merge}, the patches of a vision token")
    for row, size in enumerate(sizes):
        if len(size) and size.max() > width:
            raise UserError(
                f"row {row}: a temporal patch has {size.max()} patches, above a chunk's limit of {width}"
            )
    filled = [Chunks(width) for _ in rows]
    starts = [one.place(size) for one, size in zip(filled, sizes, strict=True)]
    needed = [len(one) for one in filled]
    if chunks is None:
        chunks = max(needed)
    elif max(needed) > chunks:
        row = needed.index(max(needed))
        raise UserError(
            f"row {row}: {needed[row]} vision chunks of {width} patches are above the limit of {chunks}"
        )

    room = chunks * width
    dtypes = [sample.patches.dtype for samples in rows for sample in samples]
    patches = np.zeros((len(rows), room, vision.patch_dim), np.result_type(*dtypes) if dtypes else np.uint8)
    coords = np.zeros((len(rows), room, 4), np.int32)
    segments = np.zeros((len(rows), room), np.int32)
    slots = []
    for row, samples in enumerate(rows):
        # Where each patch of the row goes: its temporal patch's start plus its place in it.
        first = sizes[row].cumsum() - sizes[row]
        to = np.repeat(starts[row] - first, sizes[row]) + np.arange(sizes[row].sum())
        slots.append(to)
        segments[row, to] = np.repeat(np.arange(1, len(first) + 1), sizes[row])
        done = 0
        for sample in samples:
            own = to[done : done + len(sample.patches)]
            patches[row, own] = sample.patches
            coords[row, own] = _patch_coords(sample, vision.spatial_merge_size)
            done += len(own)
    shape = (len(rows), chunks, width)
    arrays = {
        "patches": patches.reshape(*shape, -1),
        "patch_coords": coords.reshape(*shape, 4),
        "patch_segment_ids": segments.reshape(shape),
    }
    return arrays, slots


def _ready(
    rows: Sequence[Sequence[Sample]],
    vision: VisionConfig | None,
    count: int | None,
    dtype: npt.DTypeLike | None,
) -> np.ndarray | None:
    """The Batch's features; None where no row has any and their number is not given."""
    parts = [
        [ready for sample in samples for ready in sample.features if ready is not None] for samples in rows
    ]
    needed = [sum(map(len, part)) for part in parts]
    count = max(needed) if count is None else count
    if count == 0:
        return None
    if vision is None:
        raise ValueError("there are features, but the model has no vision tower")
    if max(needed) > count:
        row = needed.index(max(needed))
        raise UserError(f"row {row}: {needed[row]} features are above the limit of {count}")
    if dtype is None:
        dtype = np.result_type(*{one.dtype for part in parts for one in part}) if any(parts) else np.float32
    levels = 1 + len(vision.deepstack_visual_indexes)
    out = np.zeros((len(rows), count, levels, vision.out_hidden_size), dtype)
    for row, part in enumerate(parts):
        if part:
            out[row, : needed[row]] = np.concatenate(part)
    return out


def _is_stored(samples: Sequence[Sample], merge: int) -> np.ndarray:
    """(n,) bool of a row's vision tokens in order: whether each comes as a feature."""
    media = [pair for sample in samples for pair in zip(sample.grids, sample.ready, strict=True)]
    return _concatenate([np.full(t * h * w // merge, ready is not None) for (t, h, w), ready in media], bool)


def _patch_coords(sample: Sample, merge: int) -> np.ndarray:
    """(N, 4) int32, of the sample's patches."""
    pairs = zip(sample.grids, sample.ready, strict=True)
    tiles = [np.tile(_coords(h, w, merge), (t, 1)) for (t, h, w), ready in pairs if ready is None]
    return np.concatenate(tiles) if tiles else np.zeros((0, 4), np.int32)


def _concatenate(arrays: Sequence[np.ndarray], dtype: npt.DTypeLike = np.int64) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
