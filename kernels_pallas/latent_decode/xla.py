"""latent_decode in XLA, the whole cache read once: block by block with a running softmax.

A block stays in a CPU's cache between scores and values, and of each row only those blocks are read that one
of its queries sees: rows of any lengths, and rows without queries, wait for nobody. For bf16, and for few
queries of small caches, the plain form is faster on a CPU, and taken.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.choice import chip
from kernels_pallas.latent_decode.reference import latent_decode_reference
from kernels_pallas.latents import Latents, dequantize

_PLAIN_BYTES = 8 << 20
"""Up to this much of a layer stays in a CPU's last cache, and is faster looked at as a whole."""

_BLOCK_BYTES = 1 << 20
"""Of a block in fp32 on a CPU: it stays in a core's cache, and two cores still share the products of it."""

_LOGITS_BYTES = 5 << 16
"""Of a block's logits on a CPU, likewise; so few the plain form makes all at once."""


def latent_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latents: Latents,
    layer: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None,
    page_table: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as of `ops.latent_decode`, queries in the dtype that products are taken in.

    Returns:
        (1, B, T, H, r) and (1, B, T, H) fp32: the context is one part.
    """
    rows, tokens, heads, rank = q_latent.shape
    width, queries = rank + q_rope.shape[-1], rows * tokens * heads
    page, on_cpu = latents.capacity, chip().platform == "cpu"
    narrow = q_latent.dtype != jnp.float32
    small = page_table is None and 4 * rows * page * width < _PLAIN_BYTES
    small &= 4 * queries * page <= _LOGITS_BYTES
    if on_cpu and not latents.quantized and (narrow or small):
        # Measured: on a CPU XLA multiplies whole bf16 arrays fast, blocks of them slowly.
        return latent_decode_reference(
            q_latent, q_rope, latents, layer, query_slots, logit_scale, page_table, scale=scale
        )
    # Elsewhere than on a CPU a step should be worth its start.
    fitting = min(_BLOCK_BYTES // (4 * rows * width), max(128, _LOGITS_BYTES // (4 * queries)))
    wanted = max(32, 1 << max(fitting, 1).bit_length() - 1) if on_cpu else max(512, 8192 // rows)
    dtype = jnp.float32 if on_cpu else q_latent.dtype
    if page_table is None:
        size, end = min(wanted, page), page
    else:
        together = max(1, min(wanted // page, page_table.shape[1]))
        size, end = together * page, page_table.shape[1] * page
        page_table = jnp.pad(page_table, [(0, 0), (0, -page_table.shape[1] % together)])

    def blocks(x: jax.Array, row: jax.Array, start: jax.Array, slots_axis: int) -> jax.Array:
        """Of one layer of a cache's array `size` slots of each of these rows: (B, …, size, …)."""
        if page_table is None:

            def one(row: jax.Array, start: jax.Array) -> jax.Array:
                begin: list[jax.Array | int] = [layer, row, *[0] * (x.ndim - 2)]
                sizes = [1, 1, *x.shape[2:]]
                begin[slots_axis], sizes[slots_axis] = start, size
                return jax.lax.dynamic_slice(x, begin, sizes)[0, 0]

            return jax.vmap(one)(row, start)
        pages = page_table[row[:, None], (start // page)[:, None] + jnp.arange(size // page)]
        # (B, pages, …): the pages' axis moves to the slots' and becomes one with it.
        found = jnp.moveaxis(x[layer, pages], 1, slots_axis - 1)
        return found.reshape(*found.shape[: slots_axis - 1], size, *found.shape[slots_axis + 1 :])

    query = jnp.concatenate([q_latent, q_rope], axis=-1).astype(dtype)
    query = query.reshape(rows, tokens * heads, -1)
    last = jnp.repeat(query_slots, heads, axis=1)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    to_rows = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # Each row has as many blocks as it needs; all are one list, of which each turn takes as many as rows.
    needed = jnp.maximum(jnp.max(query_slots, axis=1) + size, 0) // size
    after = jnp.cumsum(needed)

    def over(turn: jax.Array, state: tuple) -> tuple:
        number = turn * rows + jnp.arange(rows, dtype=jnp.int32)
        real, number = number < after[-1], jnp.minimum(number, after[-1] - 1)
        row = jnp.sum(number[:, None] >= after, axis=1)
        first = (number - (after - needed)[row]) * size
        # Without pages the last block is moved back to end at the capacity; its first slots were seen before.
        start = first if page_table is not None else jnp.minimum(first, end - size)
        slots = start[:, None] + jnp.arange(size, dtype=jnp.int32)
        values = blocks(latents.values, row, start, 2)
        if latents.scale is not None and latents.k_rope is not None:
            codes_scale = jnp.swapaxes(blocks(latents.scale, row, start, 3), 1, 2)
            c = dequantize(values, codes_scale)
            values = jnp.concatenate([c, blocks(latents.k_rope, row, start, 2).astype(c.dtype)], axis=-1)
        values = values.astype(dtype)
        logits = dot("bqw,bsw->bqs", query[row], values) * scale
        if logit_scale is not None:
            factor = blocks(logit_scale, row, start, 3)
            factor = jnp.repeat(factor, heads // factor.shape[1], axis=1)
            logits *= jnp.tile(factor, (1, tokens, 1))
        seen = (slots >= first[:, None]) & real[:, None]
        logits = jnp.where(seen[:, None] & (slots[:, None] <= last[row][..., None]), logits, -jnp.inf)
        top, total, out = state
        # Blocks of one row may meet in a turn: which (N,) is whose (B,).
        mine = row[:, None] == jnp.arange(rows)
        tops = jnp.where(mine[..., None], jnp.max(logits, axis=-1)[:, None], -jnp.inf)
        new = jnp.maximum(top, jnp.max(tops, axis=0))
        weights, shrink = jnp.exp(logits - new[row][..., None]), jnp.exp(top - new)
        own = mine.astype(jnp.float32)
        total = total * shrink + to_rows("nb,nq->bq", own, jnp.sum(weights, axis=-1))
        found = dot("bqs,bsw->bqw", weights.astype(dtype), values)
        return new, total, out * shrink[..., None] + to_rows("nb,nqw->bqw", own, found)

    # The least finite number, not −inf: exp(−inf − −inf) of a row that sees nothing would be NaN.
    state = (
        jnp.full((rows, tokens * heads), jnp.finfo(jnp.float32).min),
        jnp.zeros((rows, tokens * heads)),
        jnp.zeros(query.shape),
    )
    top, total, out = jax.lax.fori_loop(0, (after[-1] + rows - 1) // rows, over, state)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    shape = (1, rows, tokens, heads)
    return out.reshape(*shape, -1)[..., :rank], lse.reshape(shape)
