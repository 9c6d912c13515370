"""Which blocks of keys a block of queries can see: the lists that let kernels skip and not fetch the rest.

Also the mask in the form kernels compare: plain rows of numbers, padded to whole blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask

_INT = jnp.iinfo(jnp.int32)


class Visible(NamedTuple):
    """For each block of one side, the blocks of the other side that a mask lets it meet.

    Attributes:
        blocks: (B, own blocks, other blocks) int32: ascending, the last one repeated (0 where there is none).
        counts: (B, own blocks) int32: how many of them count.
    """

    blocks: jax.Array
    counts: jax.Array


class MaskRows(NamedTuple):
    """An `AttentionMask` to compare: query t sees key s if segments are equal and key slot ≤ query slot.

    Attributes:
        query_segments: (B, T') int32; queries that see nothing hold a number that no key has.
        key_segments: (B, S') int32.
        query_slots: (B, T') int32, or None where attention is not causal.
        key_slots: (B, S') int32, or None likewise.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_slots: jax.Array | None
    key_slots: jax.Array | None


def mask_rows(mask: AttentionMask, keys: int, query_block: int, key_block: int) -> MaskRows:
    """The mask of S = `keys` keys, T and S padded up to whole blocks by tokens that meet nobody."""
    rows = mask.query_segments.shape[0]
    queries = mask.query_segments.astype(jnp.int32)
    if mask.key_segments is None:
        queries, key_segments = jnp.where(queries == 0, 0, 1), jnp.ones((rows, keys), jnp.int32)
    else:
        key_segments = mask.key_segments.astype(jnp.int32)
    queries = jnp.where(queries == 0, _INT.min, queries)
    query_slots = key_slots = None
    if mask.query_slots is not None:
        query_slots = _padded(mask.query_slots.astype(jnp.int32), query_block, 0)
        key_slots = jnp.arange(keys, dtype=jnp.int32) if mask.key_slots is None else mask.key_slots
        key_slots = _padded(jnp.broadcast_to(key_slots.astype(jnp.int32), (rows, keys)), key_block, 0)
    return MaskRows(
        _padded(queries, query_block, _INT.min),
        _padded(key_segments, key_block, 0),
        query_slots,
        key_slots,
    )


def visible_keys(mask: AttentionMask, keys: int, query_block: int, key_block: int) -> Visible:
    """For each block of queries the blocks of keys (of S = `keys`) it can see, or a few more."""
    return _listed(_can_see(mask, keys, query_block, key_block))


def visible_queries(mask: AttentionMask, keys: int, query_block: int, key_block: int) -> Visible:
    """For each block of keys the blocks of queries that can see it, or a few more."""
    return _listed(_can_see(mask, keys, query_block, key_block).swapaxes(1, 2))


def wholly_visible(mask: AttentionMask, keys: int, query_block: int, key_block: int) -> jax.Array:
    """(B, query blocks, key blocks) bool: every query sees every key, so that no mask is needed there."""
    rows = mask_rows(mask, keys, query_block, key_block)
    everyone = jnp.bool_(True)
    q_least, q_most = _range(rows.query_segments, everyone, query_block)
    k_least, k_most = _range(rows.key_segments, everyone, key_block)
    one = (q_least == q_most)[:, :, None] & (k_least == k_most)[:, None]
    whole = one & (q_least[:, :, None] == k_least[:, None])
    if rows.query_slots is not None and rows.key_slots is not None:
        first, _ = _range(rows.query_slots, everyone, query_block)
        _, latest = _range(rows.key_slots, everyone, key_block)
        whole &= latest[:, None] <= first[:, :, None]
    return whole


def _can_see(mask: AttentionMask, keys: int, query_block: int, key_block: int) -> jax.Array:
    """(B, query blocks, key blocks) bool, from the smallest and largest segment and slot of each block."""
    rows = mask_rows(mask, keys, query_block, key_block)
    queries, others = rows.query_segments, rows.key_segments
    sees, seen = queries != _INT.min, others != 0
    q_least, q_most = _range(queries, sees, query_block)
    k_least, k_most = _range(others, seen, key_block)
    visible = (q_least[:, :, None] <= k_most[:, None]) & (k_least[:, None] <= q_most[:, :, None])
    if rows.query_slots is not None and rows.key_slots is not None:
        _, latest = _range(rows.query_slots, sees, query_block)
        earliest, _ = _range(rows.key_slots, seen, key_block)
        visible &= earliest[:, None] <= latest[:, :, None]
    return visible


def _listed(visible: jax.Array) -> Visible:
    counts = visible.sum(axis=-1, dtype=jnp.int32)
    order = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.maximum(counts - 1, 0)[..., None]
    blocks = jnp.take_along_axis(order, jnp.minimum(jnp.arange(visible.shape[-1]), last), axis=-1)
    return Visible(jnp.where(counts[..., None] > 0, blocks, 0), counts)


def _range(x: jax.Array, counts: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest number of each block among those that count; (max, min) of int32 if none does."""
    least = jnp.where(counts, x, _INT.max).reshape(x.shape[0], -1, block).min(axis=-1)
    most = jnp.where(counts, x, _INT.min).reshape(x.shape[0], -1, block).max(axis=-1)
    return least, most


def _padded(x: jax.Array, block: int, value: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)], constant_values=value)
