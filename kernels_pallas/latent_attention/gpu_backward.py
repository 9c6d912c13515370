"""The gradients of flash attention of M²LA on a GPU (Triton): one kernel for queries, one for keys.

Both compute the logits anew. With p = exp(logits − lse), dp = dout·valueᵀ and delta = Σ out·dout − dlse:
dlogits = p · (dp − delta) (FlashAttention-2, algorithm 2). What they share is in `gpu.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.latent_attention.gpu import (
    Dims,
    MaskRefs,
    Tokens,
    allowed,
    block_sizes,
    dims_of,
    dot,
    load,
    mask_specs,
    rows_inside,
    store,
)
from kernels_pallas.latent_attention.visible import mask_rows, visible_keys, visible_queries
from kernels_pallas.mask import AttentionMask

_PROGRAMS = 1024
"""Programs of the key kernel to aim for: 8 for each processor of an H100, so that uneven ones level out."""


def _weights(raw: jax.Array, factor: jax.Array | float, lse: jax.Array, seen: jax.Array) -> jax.Array:
    """p of a block; `raw` are the products before any scale. Queries that see nothing have lse −inf."""
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    return jnp.exp(jnp.where(seen, raw * factor, -jnp.inf) - lse[:, None])


def _query_kernel(
    query_ref: Any,
    kv_ref: Any,
    k_rope_ref: Any,
    logit_scale_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    query_segments: Any,
    key_segments: Any,
    query_slots: Any,
    key_slots: Any,
    blocks_ref: Any,
    count_ref: Any,
    dquery_ref: Any,
    *,
    dims: Dims,
    block_q: int,
    block_k: int,
) -> None:
    masks = MaskRefs(query_segments, key_segments, query_slots, key_slots)
    n = dims.nope
    first = pl.program_id(2) * block_q
    inside = rows_inside(first, block_q, dims.queries)
    q_nope, q_rope = load(query_ref.at[:, :n], inside), load(query_ref.at[:, n:], inside)
    dout, lse, delta = load(dout_ref, inside), load(lse_ref, inside), load(delta_ref, inside)
    of_queries: Tokens = masks.queries(first, block_q)

    def one(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_nope, d_rope = state
        start = blocks_ref[j] * block_k
        rows = pl.ds(start, block_k)
        key_inside = rows_inside(start, block_k, dims.keys)
        k_nope, k_rope = load(kv_ref.at[rows, :n], key_inside), load(k_rope_ref.at[rows, :], key_inside)
        raw = dot(q_nope, k_nope, (1, 1)) + dot(q_rope, k_rope, (1, 1))
        factor: jax.Array | float = dims.scale
        if logit_scale_ref is not None:
            factor = dims.scale * load(logit_scale_ref.at[rows], key_inside)[None, :]
        p = _weights(raw, factor, lse, allowed(of_queries, masks.keys(start, block_k)))
        dp = dot(dout, load(kv_ref.at[rows, n:], key_inside), (1, 1))
        draw = (p * (dp - delta[:, None]) * factor).astype(k_nope.dtype)
        return d_nope + dot(draw, k_nope, (1, 0)), d_rope + dot(draw, k_rope, (1, 0))

    zeros = jnp.zeros((block_q, n), jnp.float32), jnp.zeros((block_q, dims.rope), jnp.float32)
    d_nope, d_rope = jax.lax.fori_loop(0, count_ref[...], one, zeros)
    store(dquery_ref.at[:, :n], d_nope, inside)
    store(dquery_ref.at[:, n:], d_rope, inside)


def _key_kernel(
    query_ref: Any,
    kv_ref: Any,
    k_rope_ref: Any,
    logit_scale_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    query_segments: Any,
    key_segments: Any,
    query_slots: Any,
    key_slots: Any,
    blocks_ref: Any,
    count_ref: Any,
    dkv_ref: Any,
    dk_rope_ref: Any,
    dlogit_scale_ref: Any = None,
    *,
    dims: Dims,
    block_q: int,
    block_k: int,
    heads: int,
    per_group: int,
) -> None:
    masks = MaskRefs(query_segments, key_segments, query_slots, key_slots)
    n = dims.nope
    first = pl.program_id(1) * block_k
    inside = rows_inside(first, block_k, dims.keys)
    first_head = pl.program_id(2) * heads
    k_rope = load(k_rope_ref, inside)
    of_keys: Tokens = masks.keys(first, block_k)

    def head(h: jax.Array, d_rope: jax.Array) -> jax.Array:
        k_nope, value = load(kv_ref.at[:, h, :n], inside), load(kv_ref.at[:, h, n:], inside)
        factor: jax.Array | float = dims.scale
        if logit_scale_ref is not None:
            group = jax.lax.div(first_head + h, jnp.int32(per_group))
            factor = dims.scale * load(logit_scale_ref.at[group, :], inside)[None, :]

        def one(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_nope, d_rope, d_value, *d_scale = state
            start = blocks_ref[j] * block_q
            rows = pl.ds(start, block_q)
            query_inside = rows_inside(start, block_q, dims.queries)
            q_nope = load(query_ref.at[rows, h, :n], query_inside)
            q_rope = load(query_ref.at[rows, h, n:], query_inside)
            dout = load(dout_ref.at[rows, h, :], query_inside)
            lse, delta = load(lse_ref.at[h, rows], query_inside), load(delta_ref.at[h, rows], query_inside)
            raw = dot(q_nope, k_nope, (1, 1)) + dot(q_rope, k_rope, (1, 1))
            p = _weights(raw, factor, lse, allowed(masks.queries(start, block_q), of_keys))
            d_value += dot(p.astype(dout.dtype), dout, (0, 0))
            dlogits = p * (dot(dout, value, (1, 1)) - delta[:, None])
            if d_scale:
                d_scale = [d_scale[0] + jnp.sum(dlogits * raw, axis=0) * dims.scale]
            draw = (dlogits * factor).astype(q_nope.dtype)
            d_nope += dot(draw, q_nope, (0, 0))
            return d_nope, d_rope + dot(draw, q_rope, (0, 0)), d_value, *d_scale

        state = [jnp.zeros((block_k, n), jnp.float32), d_rope, jnp.zeros((block_k, dims.value), jnp.float32)]
        if dlogit_scale_ref is not None:
            state.append(jnp.zeros((block_k,), jnp.float32))
        d_nope, d_rope, d_value, *d_scale = jax.lax.fori_loop(0, count_ref[...], one, tuple(state))
        store(dkv_ref.at[:, h, :n], d_nope, inside)
        store(dkv_ref.at[:, h, n:], d_value, inside)
        if dlogit_scale_ref is not None:
            store(dlogit_scale_ref.at[h, :], d_scale[0], inside)
        return d_rope

    d_rope = jax.lax.fori_loop(0, heads, head, jnp.zeros((block_k, dims.rope), jnp.float32))
    store(dk_rope_ref, d_rope, inside)


def _dquery(query: jax.Array, rest: tuple, mask: AttentionMask, interpret: bool) -> jax.Array:
    kv, k_rope, logit_scale, dout, lse, delta = rest
    rows, tokens, heads, width = query.shape
    dims = dims_of(query, kv, k_rope)
    sizes = block_sizes(query, dims)
    block_q, block_k = sizes["dq_q"], sizes["dq_k"]
    visible = visible_keys(mask, dims.keys, block_q, block_k)
    masks = mask_rows(mask, dims.keys, block_q, block_k)
    per_group = 1 if logit_scale is None else heads // logit_scale.shape[1]
    block = pl.BlockSpec((None, block_q, None, width), lambda b, h, i: (b, i, h, 0))
    row = pl.BlockSpec((None, None, block_q), lambda b, h, i: (b, h, i))
    return pl.pallas_call(
        partial(_query_kernel, dims=dims, block_q=block_q, block_k=block_k),
        grid=(rows, heads, pl.cdiv(tokens, block_q)),
        in_specs=[
            block,
            pl.BlockSpec((None, dims.keys, None, kv.shape[-1]), lambda b, h, i: (b, 0, h, 0)),
            pl.BlockSpec((None, dims.keys, dims.rope), lambda b, h, i: (b, 0, 0)),
            None
            if logit_scale is None
            else pl.BlockSpec((None, None, dims.keys), lambda b, h, i: (b, h // per_group, 0)),
            pl.BlockSpec((None, block_q, None, dims.value), lambda b, h, i: (b, i, h, 0)),
            row,
            row,
            *mask_specs(masks),
            pl.BlockSpec((None, None, visible.blocks.shape[-1]), lambda b, h, i: (b, i, 0)),
            pl.BlockSpec((None, None), lambda b, h, i: (b, i)),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="latent_attention_dquery",
    )(query, kv, k_rope, logit_scale, dout, lse, delta, *masks, *visible)


def _parts(rows: int, blocks: int, heads: int) -> int:
    """Into how many programs the heads of one block of keys are divided.

    One program adds up dk_rope over its heads in registers, so the fewer the better: each part is an array
    (B, S, e) in memory, added up afterwards. Atomic additions would need no such arrays, but then the sum,
    and with it a training run, would depend on who came first.
    """
    divisors = [parts for parts in range(1, heads + 1) if heads % parts == 0]
    enough = [parts for parts in divisors if rows * blocks * parts >= _PROGRAMS]
    return enough[0] if enough else heads


def _dkeys(
    query: jax.Array, rest: tuple, mask: AttentionMask, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    kv, k_rope, logit_scale, dout, lse, delta = rest
    rows, tokens, heads, width = query.shape
    dims = dims_of(query, kv, k_rope)
    sizes = block_sizes(query, dims)
    block_q, block_k = sizes["dkv_q"], sizes["dkv_k"]
    visible = visible_queries(mask, dims.keys, block_q, block_k)
    masks = mask_rows(mask, dims.keys, block_q, block_k)
    blocks = pl.cdiv(dims.keys, block_k)
    parts = _parts(rows, blocks, heads)
    per_part = heads // parts
    block = pl.BlockSpec((None, block_k, per_part, kv.shape[-1]), lambda b, k, p: (b, k, p, 0))
    row = pl.BlockSpec((None, per_part, tokens), lambda b, k, p: (b, p, 0))
    out_specs = [block, pl.BlockSpec((None, None, block_k, dims.rope), lambda b, k, p: (b, p, k, 0))]
    out_shape = [
        jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        jax.ShapeDtypeStruct((rows, parts, *k_rope.shape[1:]), k_rope.dtype if parts == 1 else jnp.float32),
    ]
    scale_spec, per_group = None, 1
    if logit_scale is not None:
        groups = logit_scale.shape[1]
        per_group = heads // groups
        scale_spec = pl.BlockSpec((None, groups, block_k), lambda b, k, p: (b, 0, k))
        out_specs.append(pl.BlockSpec((None, per_part, block_k), lambda b, k, p: (b, p, k)))
        out_shape.append(jax.ShapeDtypeStruct((rows, heads, dims.keys), jnp.float32))
    dkv, dk_rope, *dlogit_scale = pl.pallas_call(
        partial(
            _key_kernel, dims=dims, block_q=block_q, block_k=block_k, heads=per_part, per_group=per_group
        ),
        grid=(rows, blocks, parts),
        in_specs=[
            pl.BlockSpec((None, tokens, per_part, width), lambda b, k, p: (b, 0, p, 0)),
            block,
            pl.BlockSpec((None, block_k, dims.rope), lambda b, k, p: (b, k, 0)),
            scale_spec,
            pl.BlockSpec((None, tokens, per_part, dims.value), lambda b, k, p: (b, 0, p, 0)),
            row,
            row,
            *mask_specs(masks),
            pl.BlockSpec((None, None, visible.blocks.shape[-1]), lambda b, k, p: (b, k, 0)),
            pl.BlockSpec((None, None), lambda b, k, p: (b, k)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        # Three gradients and two blocks of logits: 128 of the 255 registers of a thread with 8 warps.
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="latent_attention_dkeys",
    )(query, kv, k_rope, logit_scale, dout, lse, delta, *masks, *visible)
    dk_rope = jnp.sum(dk_rope, axis=1).astype(k_rope.dtype)
    if logit_scale is None:
        return dkv, dk_rope, None
    shape = (*logit_scale.shape[:2], per_group, dims.keys)
    return dkv, dk_rope, dlogit_scale[0].reshape(shape).sum(axis=2)


def backward(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Shapes as in `latent_attention.ops`.

    Args:
        lse: (B, H, T) fp32, the forward pass's. delta: (B, H, T) fp32, Σ_v out·dout − dlse.
        dout: (B, T, H, v).

    Returns:
        dquery, dkv, dk_rope and dlogit_scale (None without a logit_scale), each like its argument.
    """
    rest = (kv, k_rope, logit_scale, dout.astype(query.dtype), lse, delta)
    return _dquery(query, rest, mask, interpret), *_dkeys(query, rest, mask, interpret)
