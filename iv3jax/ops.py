"""The one door between models and kernels_pallas: it picks the implementation of each operation.

Today every operation has its XLA form only. Long sequences are cut into blocks of queries, each
recomputed in the backward pass, so that no T × S array of logits is ever whole in memory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from iv3jax.typing import Array
from kernels_pallas.latent_attention.reference import latent_attention as _latent_attention
from kernels_pallas.latent_decode.reference import latent_decode as _latent_decode
from kernels_pallas.mask import AttentionMask, masked_softmax

__all__ = ["AttentionMask", "attention", "latent_attention", "latent_decode"]

QUERY_BLOCK = 1024
"""Queries worked on at a time once there are more than this."""


def attention(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """Grouped-query attention, scaled by head_dim^-½: the GQA decoder's and the vision tower's.

    Args:
        query: (B, T, H, head_dim). key, value: (B, S, G, head_dim), H a multiple of G.

    Returns:
        (B, T, H, head_dim) in value's dtype; softmax in fp32. Rows that see nothing are 0.
    """

    def block(mask: AttentionMask, query: Array) -> Array:
        rows, tokens, heads, dim = query.shape
        grouped = query.reshape(rows, tokens, key.shape[2], heads // key.shape[2], dim)
        logits = jnp.einsum("btgqk,bsgk->bgqts", grouped, key, preferred_element_type=jnp.float32)
        weights = masked_softmax(logits * dim**-0.5, mask.dense(key.shape[1])[:, None, None])
        out = jnp.einsum("bgqts,bsgk->btgqk", weights.astype(value.dtype), value)
        return out.reshape(rows, tokens, heads, dim)

    return _in_query_blocks(block, mask, query)


def latent_attention(
    q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, value: Array, mask: AttentionMask
) -> Array:
    """Expanded M²LA attention; shapes as in `kernels_pallas.latent_attention.reference`."""

    def block(mask: AttentionMask, q_nope: Array, q_rope: Array) -> Array:
        return _latent_attention(q_nope, q_rope, k_nope, k_rope, value, mask)

    return _in_query_blocks(block, mask, q_nope, q_rope)


def latent_decode(q_latent: Array, q_rope: Array, latent: Array, mask: AttentionMask, scale: float) -> Array:
    """Absorbed M²LA attention over a cache; shapes as in `kernels_pallas.latent_decode.reference`."""
    return _latent_decode(q_latent, q_rope, latent, mask, scale)


def _in_query_blocks(attend: Callable[..., Array], mask: AttentionMask, *queries: Array) -> Array:
    """attend(mask, *queries), block of queries by block of queries if there are many."""
    tokens = queries[0].shape[1]
    if tokens <= QUERY_BLOCK:
        return attend(mask, *queries)
    blocks = -(-tokens // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - tokens

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    queries = tuple(padded(q) for q in queries)
    slots = None if mask.query_slots is None else padded(mask.query_slots)
    # Padded queries are of segment 0, which sees nothing.
    mask = AttentionMask(padded(mask.query_segments), mask.key_segments, slots)

    @jax.checkpoint
    def one(start: Array) -> Array:
        parts = (jax.lax.dynamic_slice_in_dim(q, start, QUERY_BLOCK, axis=1) for q in queries)
        return attend(mask.block(start, QUERY_BLOCK), *parts)

    out = jax.lax.map(one, jnp.arange(blocks) * QUERY_BLOCK)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], blocks * QUERY_BLOCK, *out.shape[3:])[:, :tokens]
