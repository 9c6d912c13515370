"""latent_attention backward on a TPU: one kernel for dquery, one for dkv, dk_rope and dlogit_scale.

With p the softmax weights and dp = dout·valueᵀ, the logits' gradient is ds = p·(dp − delta). The two kernels
compute p and ds both: one that did everything would write a part of dquery for each block of keys.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.latent_attention import tpu_tiles as tiles
from kernels_pallas.latent_attention.tpu_tiles import Index, Sizes, across
from kernels_pallas.latent_attention.visible import MaskRows, mask_rows, visible_queries, wholly_visible
from kernels_pallas.mask import AttentionMask


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
    interpret: tiles.Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Shapes as in ops.py.

    Args:
        lse: (B, H, T) fp32, from `forward`.
        delta: (B, H, T) fp32, Σ_v out·dout − dlse.
        dout: (B, T, H, v) in query's dtype.

    Returns:
        dquery, dkv, dk_rope and dlogit_scale (None without a logit scale), each as its argument.
    """
    sizes = tiles.sizes_of(query, kv, k_rope, logit_scale)
    flat = (query.reshape(*query.shape[:2], -1), kv.reshape(*kv.shape[:2], -1), k_rope, logit_scale)
    # A row that sees nothing has −inf there; its masked logits must still give exp(…) = 0.
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    rest = (lse, delta, dout.reshape(*dout.shape[:2], -1))
    dquery = _dquery(sizes, *flat, mask, *rest, interpret)
    dkv, dk_rope, dlogit_scale = _dkv(sizes, *flat, mask, *rest, interpret)
    return dquery.reshape(query.shape), dkv.reshape(kv.shape), dk_rope, dlogit_scale


def row_products(out: jax.Array, dout: jax.Array, *, interpret: tiles.Interpret) -> jax.Array:
    """Σ_v out·dout: (B, T, H, v) twice → (B, H, T) fp32.

    A kernel because XLA, to add up lanes by head, first writes the fp32 products in another layout.
    """
    rows, tokens, heads, v = out.shape
    block = tiles.fitted(1024, tokens)
    own = pl.BlockSpec((None, block, v), lambda b, h, i: (b, i, h))
    found = pl.pallas_call(
        _row_products_kernel,
        grid=(rows, heads, pl.cdiv(tokens, block)),
        in_specs=[own, own],
        out_specs=pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h, 0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, heads, 1, tokens), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name="latent_attention_row_products",
    )(out.reshape(rows, tokens, -1), dout.reshape(rows, tokens, -1))
    return found[:, :, 0]


def _row_products_kernel(out_ref: Any, dout_ref: Any, found_ref: Any) -> None:
    products = out_ref[...].astype(jnp.float32) * dout_ref[...].astype(jnp.float32)
    found_ref[...] = tiles.row(tiles.column_of(products.sum(axis=1, keepdims=True)))


def _dquery(
    sizes: Sizes,
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    interpret: tiles.Interpret,
) -> jax.Array:
    chosen = sizes.blocks()
    bq = tiles.fitted(chosen["dq_queries"], sizes.tokens)
    bk = tiles.fitted(chosen["dq_keys"], sizes.keys)
    walk = tiles.walk(sizes, mask, logit_scale, bq, bk)
    return pl.pallas_call(
        partial(_dquery_kernel, sizes=sizes, bk=bk, compute=chosen["dq_compute"], most=walk.most),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=walk.grid,
            in_specs=[*walk.in_specs, walk.own_row, walk.own_row, walk.own(sizes.v)],
            out_specs=walk.own(sizes.n + sizes.e),
            scratch_shapes=[
                pltpu.VMEM((bq, tiles.LANES), jnp.int32),
                pltpu.VMEM((bq, tiles.LANES), jnp.int32),
                pltpu.VMEM((bq, tiles.LANES), jnp.float32),
                pltpu.VMEM((bq, tiles.LANES), jnp.float32),
                pltpu.VMEM((bq, sizes.n + sizes.e), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_LIMIT,
        ),
        interpret=interpret,
        name="latent_attention_dq",
    )(
        *walk.listed,
        query,
        kv,
        k_rope,
        *walk.arguments,
        tiles.padded_rows(lse, bq),
        tiles.padded_rows(delta, bq),
        dout,
    )


def _dquery_kernel(
    lists_ref: Any,
    counts_ref: Any,
    query_ref: Any,
    kv_ref: Any,
    rope_ref: Any,
    scale_ref: Any,
    mask_refs: list[Any],
    lse_ref: Any,
    delta_ref: Any,
    dout_ref: Any,
    dquery_ref: Any,
    segments_ref: Any,
    slots_ref: Any,
    lse_column_ref: Any,
    delta_column_ref: Any,
    acc_ref: Any,
    *,
    sizes: Sizes,
    bk: int,
    compute: int,
    most: int,
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    place = b * pl.num_programs(2) + i
    masks = MaskRows(*mask_refs)

    @pl.when(j == 0)
    def _start() -> None:
        segments_ref[...] = tiles.column(masks.query_segments[...])
        if masks.query_slots is not None:
            slots_ref[...] = tiles.column(masks.query_slots[...])
        lse_column_ref[...] = tiles.column(lse_ref[...])
        delta_column_ref[...] = tiles.column(delta_ref[...])
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def _look(start: Index, masked: bool) -> None:
        for begin, size in tiles.parts(bk, compute):
            part = pl.ds(begin, size)
            both = tiles.inside(kv_ref[part, :], start + begin, sizes.keys, bk)
            rope = tiles.inside(rope_ref[part, :], start + begin, sizes.keys, bk)
            key = jnp.concatenate([both[:, : sizes.n], rope], axis=-1)
            factor = None if scale_ref is None else scale_ref[:, part]
            logits = tiles.dot(query_ref[...], key, (1, 1))
            logits *= sizes.scale if factor is None else sizes.scale * factor
            if masked:
                seen = tiles.allowed(
                    across(segments_ref[...], size),
                    masks.key_segments[:, part],
                    None if masks.query_slots is None else across(slots_ref[...], size),
                    None if masks.key_slots is None else masks.key_slots[:, part],
                )
                logits = jnp.where(seen, logits, tiles.LOWEST)
            weights = jnp.exp(logits - across(lse_column_ref[...], size))
            dweights = tiles.dot(dout_ref[...], both[:, sizes.n :], (1, 1))
            dlogits = weights * (dweights - across(delta_column_ref[...], size))
            if factor is not None:
                dlogits *= factor
            acc_ref[...] += tiles.dot(dlogits.astype(key.dtype), key, (1, 0))

    @pl.when(j < counts_ref[place])
    def _visible() -> None:
        entry = lists_ref[place * most + j]
        tiles.look(entry, partial(_look, tiles.block_of(entry) * bk))

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish() -> None:
        dquery_ref[...] = (acc_ref[...] * sizes.scale).astype(dquery_ref.dtype)


def _dkv(
    sizes: Sizes,
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    interpret: tiles.Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    chosen = sizes.blocks()
    bq = tiles.fitted(chosen["dkv_queries"], sizes.tokens)
    bk = tiles.fitted(chosen["dkv_keys"], sizes.keys)
    visible = visible_queries(mask, sizes.keys, bq, bk)
    masks = mask_rows(mask, sizes.keys, bq, bk)
    _, blocks, most = visible.blocks.shape

    def met(b: Index, k: Index, j: Index, lists: Any) -> Index:
        return tiles.block_of(lists[(b * blocks + k) * most + j])

    own = pl.BlockSpec((None, bk, sizes.n + sizes.v), lambda b, k, h, j, *_: (b, k, h))
    own_rope = pl.BlockSpec((None, bk, sizes.e), lambda b, k, h, j, *_: (b, k, 0))
    own_scale = None
    if logit_scale is not None:
        own_scale = pl.BlockSpec((None, None, 1, bk), lambda b, k, h, j, *_: (b, sizes.group(h), 0, k))
    other = partial(pl.BlockSpec, index_map=lambda b, k, h, j, lists, _: (b, met(b, k, j, lists), h))
    other_row = pl.BlockSpec((None, None, 1, bq), lambda b, k, h, j, lists, _: (b, h, 0, met(b, k, j, lists)))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(sizes.rows, blocks, sizes.heads, jnp.maximum(visible.counts.max(), 1)),
        in_specs=[
            other((None, bq, sizes.n + sizes.e)),
            own,
            own_rope,
            own_scale,
            tiles.mask_specs(
                masks,
                bq,
                bk,
                lambda b, k, h, j, lists, _: (b, 0, met(b, k, j, lists)),
                lambda b, k, h, j, *_: (b, 0, k),
            ),
            other_row,
            other_row,
            other((None, bq, sizes.v)),
        ],
        out_specs=[own, own_rope, own_scale],
        scratch_shapes=[
            pltpu.VMEM((bk, tiles.LANES), jnp.int32),
            pltpu.VMEM((bk, tiles.LANES), jnp.int32),
            pltpu.VMEM((bk, tiles.LANES), jnp.float32),
            pltpu.VMEM((bk, sizes.n + sizes.e), jnp.float32),
            pltpu.VMEM((bk, sizes.v), jnp.float32),
            pltpu.VMEM((bk, sizes.e), jnp.float32),
        ],
    )
    scale = None if logit_scale is None else tiles.padded_rows(logit_scale, bk)
    dkv, dk_rope, dscale = pl.pallas_call(
        partial(_dkv_kernel, sizes=sizes, bq=bq, compute=chosen["dkv_compute"], most=most),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct(kv.shape, kv.dtype),
            jax.ShapeDtypeStruct(k_rope.shape, k_rope.dtype),
            None if scale is None else jax.ShapeDtypeStruct(scale.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_LIMIT,
        ),
        interpret=interpret,
        name="latent_attention_dkv",
    )(
        *tiles.listed(visible, wholly_visible(mask, sizes.keys, bq, bk).swapaxes(1, 2)),
        query,
        kv,
        k_rope,
        scale,
        tiles.mask_arguments(masks),
        tiles.padded_rows(lse, bq),
        tiles.padded_rows(delta, bq),
        dout,
    )
    return dkv, dk_rope, None if dscale is None else dscale[:, :, 0, : sizes.keys]


def _dkv_kernel(
    lists_ref: Any,
    counts_ref: Any,
    query_ref: Any,
    kv_ref: Any,
    rope_ref: Any,
    scale_ref: Any,
    mask_refs: list[Any],
    lse_ref: Any,
    delta_ref: Any,
    dout_ref: Any,
    dkv_ref: Any,
    drope_ref: Any,
    dscale_ref: Any,
    segments_ref: Any,
    slots_ref: Any,
    scale_column_ref: Any,
    dkey_acc_ref: Any,
    dvalue_acc_ref: Any,
    drope_acc_ref: Any,
    *,
    sizes: Sizes,
    bq: int,
    compute: int,
    most: int,
) -> None:
    """Keys lie in rows and queries in lanes, so that a query's statistics are used as the rows they are."""
    b, k, h, j = (pl.program_id(axis) for axis in range(4))
    place = b * pl.num_programs(1) + k
    masks = MaskRows(*mask_refs)
    last = j == pl.num_programs(3) - 1

    @pl.when((h == 0) & (j == 0))
    def _start_keys() -> None:
        segments_ref[...] = tiles.column(masks.key_segments[...])
        if masks.key_slots is not None:
            slots_ref[...] = tiles.column(masks.key_slots[...])
        drope_acc_ref[...] = jnp.zeros_like(drope_acc_ref)

    @pl.when(j == 0)
    def _start_head() -> None:
        if scale_ref is not None:
            scale_column_ref[...] = tiles.column(scale_ref[...])
        dkey_acc_ref[...] = jnp.zeros_like(dkey_acc_ref)
        dvalue_acc_ref[...] = jnp.zeros_like(dvalue_acc_ref)

    def keys() -> jax.Array:
        return jnp.concatenate([kv_ref[:, : sizes.n], rope_ref[...]], axis=-1)

    def _look(start: Index, masked: bool) -> None:
        key, value = keys(), kv_ref[:, sizes.n :]
        for begin, size in tiles.parts(bq, compute):
            part = pl.ds(begin, size)
            query = tiles.inside(query_ref[part, :], start + begin, sizes.tokens, bq)
            dout = tiles.inside(dout_ref[part, :], start + begin, sizes.tokens, bq)
            logits = tiles.dot(key, query, (1, 1)) * sizes.scale
            if scale_ref is not None:
                logits *= across(scale_column_ref[...], size)
            if masked:
                seen = tiles.allowed(
                    masks.query_segments[:, part],
                    across(segments_ref[...], size),
                    None if masks.query_slots is None else masks.query_slots[:, part],
                    None if masks.key_slots is None else across(slots_ref[...], size),
                )
                logits = jnp.where(seen, logits, tiles.LOWEST)
            weights = jnp.exp(logits - lse_ref[:, part])
            dvalue_acc_ref[...] += tiles.dot(weights.astype(dout.dtype), dout, (1, 0))
            dweights = tiles.dot(value, dout, (1, 1))
            dlogits = weights * (dweights - delta_ref[:, part])
            dkey_acc_ref[...] += tiles.dot(dlogits.astype(query.dtype), query, (1, 0))

    @pl.when(j < counts_ref[place])
    def _visible() -> None:
        entry = lists_ref[place * most + j]
        tiles.look(entry, partial(_look, tiles.block_of(entry) * bq))

    @pl.when(last)
    def _finish_head() -> None:
        dkey = dkey_acc_ref[...] * sizes.scale
        if scale_ref is not None:
            # Key s enters as scale(s)·key(s), so dscale(s) is the product of its gradient with key(s).
            found = (dkey * keys().astype(jnp.float32)).sum(axis=1, keepdims=True)
            found = tiles.row(tiles.column_of(found))
            first = jax.lax.rem(h, sizes.heads_per_group) == 0
            dscale_ref[...] = jnp.where(first, found, dscale_ref[...] + found)
            dkey *= across(scale_column_ref[...], dkey.shape[1])
        dkv_ref[:, : sizes.n] = dkey[:, : sizes.n].astype(dkv_ref.dtype)
        dkv_ref[:, sizes.n :] = dvalue_acc_ref[...].astype(dkv_ref.dtype)
        drope_acc_ref[...] += dkey[:, sizes.n :]

    @pl.when(last & (h == pl.num_programs(2) - 1))
    def _finish_keys() -> None:
        drope_ref[...] = drope_acc_ref[...].astype(drope_ref.dtype)
