"""Attention in plain XLA, block of queries by block of queries.

No queries × keys array of logits is ever whole in memory: each block is recomputed in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask

QUERY_BLOCK = 1024
"""Queries worked on at a time once there are more than this."""


def in_query_blocks(attend: Callable[..., Any], mask: AttentionMask, *queries: jax.Array) -> Any:
    """attend(mask, *queries), block by block if there are many queries.

    Args:
        attend: takes a mask and queries of some T, returns a pytree of arrays (B, T, …).
        mask: of all queries.
        queries: (B, T, …).
    """
    tokens = queries[0].shape[1]
    if tokens <= QUERY_BLOCK:
        return attend(mask, *queries)
    blocks = -(-tokens // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - tokens

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    queries = tuple(padded(q) for q in queries)
    # Padded queries are of segment 0, which sees nothing.
    mask = mask._replace(
        query_segments=padded(mask.query_segments),
        query_slots=None if mask.query_slots is None else padded(mask.query_slots),
    )

    @jax.checkpoint
    def one(start: jax.Array) -> Any:
        parts = (jax.lax.dynamic_slice_in_dim(q, start, QUERY_BLOCK, axis=1) for q in queries)
        return attend(mask.block(start, QUERY_BLOCK), *parts)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], blocks * QUERY_BLOCK, *x.shape[3:])[:, :tokens]

    return jax.tree.map(joined, jax.lax.map(one, jnp.arange(blocks) * QUERY_BLOCK))
