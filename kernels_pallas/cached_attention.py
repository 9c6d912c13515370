"""Attention of many new tokens over a cache, in XLA: block by block with a running softmax.

The cache's capacity costs nothing: the loop ends at the last key that any query sees, and a block of
queries skips the blocks of keys that lie after it. Not differentiable: a cache is for inference.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask

BLOCK = 512
"""Queries, and keys, worked on at a time."""

Block = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
"""(first slot, number of slots) → keys (B, G, slots, k) and values (B, G, slots, v)."""


def cached_attention(
    query: jax.Array, block: Block, mask: AttentionMask, capacity: int, value_dim: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """softmax(query · key · scale) · value over the slots that the mask allows.

    Args:
        query: (B, T, H, k), H a multiple of the G key heads.
        block: keys and values of a run of slots; never asked for slots past the capacity.
        mask: of the T queries; `query_slots` is needed.
        capacity: S, slots of the cache.

    Returns:
        (B, T, H, v) in query's dtype, and the log-sum-exp of the logits (B, T, H) fp32; logits and softmax in
        fp32. Rows that see nothing are 0 and −inf.
    """
    assert mask.query_slots is not None
    rows, tokens, heads, _ = query.shape
    size = min(BLOCK, capacity)
    groups = jax.eval_shape(lambda: block(jnp.int32(0), size)[0]).shape[1]
    per_group = heads // groups
    count = -(-tokens // BLOCK)
    width = -(-tokens // count)

    def blocks(x: jax.Array) -> jax.Array:
        """(B, T, …) → (count, B, width, …)."""
        x = jnp.pad(x, [(0, 0), (0, count * width - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    # Padding has segment 0: it sees nothing and makes no block visible.
    last = jnp.where(mask.query_segments != 0, jnp.minimum(mask.query_slots, capacity - 1), -1)
    last = blocks(last + 1) - 1
    queries = blocks(query).reshape(count, rows, width, groups, per_group, -1)
    queries = queries.transpose(0, 1, 3, 4, 2, 5).reshape(count, rows, groups, per_group * width, -1)
    newest = jnp.max(last, axis=(1, 2))

    def over_keys(j: jax.Array, state: tuple) -> tuple:
        # The last block is moved back to end at the capacity; its first slots were seen before.
        start = jnp.minimum(j * size, capacity - size)
        key, value = block(start, size)
        slots = start + jnp.arange(size, dtype=jnp.int32)
        fresh = slots >= j * size

        def over_queries(i: jax.Array, state: tuple) -> tuple:
            def seen() -> tuple:
                old, total, out = (x[i] for x in state)
                logits = jnp.einsum("bgtk,bgsk->bgts", queries[i], key, preferred_element_type=jnp.float32)
                allowed = (slots <= last[i][:, :, None]) & fresh
                allowed = jnp.tile(allowed, (1, per_group, 1))[:, None]
                logits = jnp.where(allowed, logits * scale, -jnp.inf)
                new = jnp.maximum(old, jnp.max(logits, axis=-1, keepdims=True))
                weights = jnp.exp(logits - new)
                shrink = jnp.exp(old - new)
                total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
                part = jnp.einsum(
                    "bgts,bgsv->bgtv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
                )
                parts = (new, total, out * shrink + part)
                return tuple(x.at[i].set(y) for x, y in zip(state, parts, strict=True))

            return jax.lax.cond(newest[i] >= j * size, seen, lambda: state)

        return jax.lax.fori_loop(0, count, over_queries, state)

    shape = (count, rows, groups, per_group * width)
    # The least finite number, not −inf: exp(−inf − −inf) of a row that sees nothing would be NaN.
    state = (
        jnp.full((*shape, 1), jnp.finfo(jnp.float32).min),
        jnp.zeros((*shape, 1)),
        jnp.zeros((*shape, value_dim)),
    )
    highest, total, out = jax.lax.fori_loop(0, jnp.max(newest) // size + 1, over_keys, state)
    out = (out / jnp.where(total == 0, 1, total)).astype(query.dtype)

    def tokens_first(x: jax.Array) -> jax.Array:
        x = x.reshape(count, rows, groups, per_group, width, -1).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(rows, count * width, heads, -1)[:, :tokens]

    return tokens_first(out), tokens_first(highest + jnp.log(total))[..., 0]
