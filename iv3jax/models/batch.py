"""Batch: the one contract between data and model.

Data fills it with numpy arrays, the model reads it as a pytree. This file imports no jax, because
data workers import it.

Axes: B rows, T tokens of a row, V vision chunks of a row, C patches of a chunk, P numbers of a patch
(channel · 2 frames · patch_size²), N ready features of a row, K DeepStack levels, D the decoder's width.
Attention in the vision tower stays inside one temporal patch of one item; a chunk holds one or more
whole temporal patches, so memory grows with the chunk.
"""

from typing import Any, NamedTuple

import numpy as np

from iv3jax.models.config import ModelConfig

IGNORE_LABEL = -100
"""A label that no loss is taken on (the value every PyTorch loss uses)."""

Array = Any
"""A numpy array on the data side, a jax array or tracer on the model side."""


class Batch(NamedTuple):
    """One batch of rows, each a pack of one or more samples or one prompt.

    Attributes:
        input_ids: (B, T) int32 token ids; padding may hold anything.
        positions: (3, B, T) int32 time, height and width position of each token (SPEC §5).
        segment_ids: (B, T) int32, 0 for padding, 1, 2, … for the samples of a pack, in order.
        labels: (B, T) int32 or None; the *next* token where a loss is taken, else IGNORE_LABEL.
        visual_index: (B, T) int32 or None; which of the row's vision tokens stands at this position, −1
            for text. The V·C/merge² of the patches come first, then the N of the features.
        patches: (B, V, C, P) or None; uint8 pixels, or floats already normalised to [−1, 1]. Four
            consecutive patches (merge²) form one vision token.
        patch_coords: (B, V, C, 4) int32; row and column of the patch in its grid, grid height and
            grid width, all in patches.
        patch_segment_ids: (B, V, C) int32; 0 for padding, equal inside one temporal patch.
        order: (B, T) int32 or None; the place of each token in its row where they lie in another order
            (`dealt`). A token sees those of its sample with no larger place.
        features: (B, N, 1+K, D) bf16 or fp32, or None; vision tokens and their DeepStack levels that a tower
            computed before (data/features.py). Padding may hold anything finite.
    """

    input_ids: Array
    positions: Array
    segment_ids: Array
    labels: Array | None = None
    visual_index: Array | None = None
    patches: Array | None = None
    patch_coords: Array | None = None
    patch_segment_ids: Array | None = None
    order: Array | None = None
    features: Array | None = None


LOGICAL_AXES = Batch(
    input_ids=("batch", "sequence"),
    positions=(None, "batch", "sequence"),
    segment_ids=("batch", "sequence"),
    labels=("batch", "sequence"),
    visual_index=("batch", "sequence"),
    patches=("batch", None, None, None),
    patch_coords=("batch", None, None, None),
    patch_segment_ids=("batch", None, None),
    order=("batch", "sequence"),
    features=("batch", None, None, "hidden"),
)
"""The logical axes of each field (`sharding.RULES`)."""


def dealt(batch: Batch, order: np.ndarray) -> Batch:
    """The batch with its tokens in another order, each remembering its place.

    Nothing else changes: every loss and every logit belongs to a token. `sharding.zigzag` is the order in
    which the devices of a context axis have equal work.

    Args:
        batch: numpy arrays, tokens in their own order.
        order: (T,), the place of the token that goes to each position.
    """
    tokens = ("input_ids", "positions", "segment_ids", "labels", "visual_index")
    moved = {name: np.asarray(x)[..., order] for name in tokens if (x := getattr(batch, name)) is not None}
    places = np.broadcast_to(order.astype(np.int32), np.shape(batch.input_ids))
    return batch._replace(**moved, order=places)


def fake_batch(
    config: ModelConfig,
    rows: int = 2,
    length: int = 24,
    chunks: int = 2,
    grid: tuple[int, int] = (4, 4),
    seed: int = 0,
) -> Batch:
    """A random batch of the right shapes: text, then `chunks` temporal patches, then text.

    Every row is one sample without padding. With `chunks=0`, or a text-only config, it has no vision.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, min(config.text_config.vocab_size, 256), (rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, rows, length)).copy()
    labels = np.concatenate([ids[:, 1:], np.full((rows, 1), IGNORE_LABEL, np.int32)], axis=1)
    text = Batch(ids, positions, np.ones((rows, length), np.int32), labels)
    vision = config.vision_config
    if vision is None or chunks == 0:
        return text
    merge = vision.spatial_merge_size
    height, width = grid
    per_chunk = height * width
    tokens = chunks * per_chunk // merge**2
    if tokens + 2 > length:
        raise ValueError(f"length {length} is too short for {tokens} vision tokens")
    index = np.full((rows, length), -1, np.int32)
    index[:, 1 : 1 + tokens] = np.arange(tokens)
    ids[:, 1 : 1 + tokens] = config.video_token_id
    blocks = np.arange(per_chunk).reshape(height // merge, merge, width // merge, merge)
    order = blocks.transpose(0, 2, 1, 3).ravel()
    coords = np.stack(
        [order // width, order % width, np.full_like(order, height), np.full_like(order, width)], -1
    )
    return text._replace(
        visual_index=index,
        patches=rng.integers(0, 256, (rows, chunks, per_chunk, vision.patch_dim), dtype=np.uint8),
        patch_coords=np.broadcast_to(coords.astype(np.int32), (rows, chunks, per_chunk, 4)).copy(),
        patch_segment_ids=np.ones((rows, chunks, per_chunk), np.int32),
    )
