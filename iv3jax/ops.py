"""The one door between models and kernels_pallas: it picks the implementation of each operation.

Today every operation has its XLA form only. Long sequences are cut into blocks of queries, each
recomputed in the backward pass, so that no T × S array of logits is ever whole in memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from iv3jax.typing import Array, DType
from kernels_pallas.cached_attention import cached_attention
from kernels_pallas.latent_attention.reference import latent_attention as _latent_attention
from kernels_pallas.latent_decode.reference import latent_decode as _latent_decode
from kernels_pallas.mask import AttentionMask, masked_softmax

__all__ = [
    "AttentionMask",
    "attention",
    "attention_over_cache",
    "latent_attention",
    "latent_attention_over_cache",
    "latent_decode",
    "product",
]

FEW_QUERIES = 64
"""Up to this many new tokens a row, attention over a cache looks at all slots at once, M²LA's absorbed.

Absorbing costs r+e+r multiplications a query, key and head against n+e+v, expanding r·(n+v) a key and
head: at the 8B's sizes they meet at 149 queries, and absorbing needs no expanded keys in memory.
"""

_CPU_PARTS = 4
"""Pieces of a kernel that a CPU's threads share when there is one token."""

QUERY_BLOCK = 1024
"""Queries worked on at a time once there are more than this."""


def product(x: Array, kernel: Array, dtype: DType) -> Array:
    """x · kernelᵀ: (…, K) and (N, K) → (…, N) in `dtype`."""

    def plain(x: Array, kernel: Array) -> Array:
        axes = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, kernel, axes, preferred_element_type=dtype)

    def shared(x: Array, kernel: Array) -> Array:
        parts = kernel.reshape(_CPU_PARTS, -1, x.shape[-1])
        rows = jnp.broadcast_to(x.reshape(-1), (_CPU_PARTS, x.shape[-1]))
        out = jax.lax.dot_general(parts, rows, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
        return out.reshape(*x.shape[:-1], -1)

    # One token on a CPU: XLA gives a matrix-vector product to one thread, several at once to all.
    if x.size == x.shape[-1] and kernel.shape[0] % _CPU_PARTS == 0 and _on_one_device():
        return jax.lax.platform_dependent(x, kernel, cpu=shared, default=plain)
    return plain(x, kernel)


def _on_one_device() -> bool:
    """Whether no mesh of several devices is ambient; there, a reshape could cut across what is sharded."""
    return jax.sharding.get_abstract_mesh().size <= 1


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


def attention_over_cache(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """Grouped-query attention of new tokens over a cache, scaled by head_dim^-½.

    Args:
        query: (B, T, H, head_dim). key, value: (B, G, S, head_dim), H a multiple of G.

    Returns:
        (B, T, H, head_dim) in query's dtype; softmax in fp32. Rows that see nothing are 0.
    """
    rows, tokens, heads, dim = query.shape
    groups, capacity = key.shape[1:3]
    if tokens > FEW_QUERIES:

        def block(start: Array, size: int) -> tuple[Array, Array]:
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2)
            return cut(key).astype(query.dtype), cut(value).astype(query.dtype)

        return cached_attention(query, block, mask, capacity, dim, dim**-0.5)
    grouped = query.reshape(rows, tokens, groups, -1, dim).swapaxes(1, 2).reshape(rows, groups, -1, dim)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    logits = jnp.einsum("bgtk,bgsk->bgts", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, groups, tokens, -1, capacity)
    weights = masked_softmax(logits * dim**-0.5, mask.dense(capacity)[:, None, :, None])
    weights = weights.astype(value.dtype).reshape(rows, groups, -1, capacity)
    out = jnp.einsum("bgts,bgsk->bgtk", weights, value)
    return out.reshape(rows, groups, tokens, -1, dim).swapaxes(1, 2).reshape(rows, tokens, heads, dim)


def latent_attention_over_cache(
    q_nope: Array, q_rope: Array, latent: Array, kernel: Array, mask: AttentionMask
) -> Array:
    """M²LA of many new tokens over a cache, each block of latents expanded when it is looked at.

    Args:
        q_nope: (B, T, H, n). q_rope: (B, T, H, e), rotated.
        latent: (B, S, r+e), the cache of one layer: [c ‖ rotated k_rope].
        kernel: (H, n+v, r), from a latent to each head's [k_nope ‖ value].

    Returns:
        (B, T, H, v) in q_nope's dtype; softmax in fp32. Rows that see nothing are 0.
    """
    n, (both, rank) = q_nope.shape[-1], kernel.shape[1:]

    def block(start: Array, size: int) -> tuple[Array, Array]:
        part = jax.lax.dynamic_slice_in_dim(latent, start, size, axis=1).astype(q_nope.dtype)
        expanded = jnp.einsum("bsr,hkr->bhsk", part[..., :rank], kernel)
        k_rope = jnp.broadcast_to(part[:, None, :, rank:], (*expanded.shape[:3], part.shape[-1] - rank))
        return jnp.concatenate([expanded[..., :n], k_rope], axis=-1), expanded[..., n:]

    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    return cached_attention(query, block, mask, latent.shape[1], both - n, query.shape[-1] ** -0.5)


def latent_decode(q_latent: Array, q_rope: Array, latent: Array, mask: AttentionMask, scale: float) -> Array:
    """Absorbed M²LA attention of a few new tokens over a cache; shapes as in its reference."""
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
