"""latent_attention forward on a TPU: flash attention over the key blocks that each query block can see."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.latent_attention import tpu_tiles as tiles
from kernels_pallas.latent_attention.tpu_tiles import Sizes, across
from kernels_pallas.latent_attention.visible import MaskRows
from kernels_pallas.mask import AttentionMask


def forward(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
    *,
    interpret: tiles.Interpret,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in ops.py.

    Returns:
        out (B, T, H, v) in query's dtype, lse (B, H, T) fp32.
    """
    sizes = tiles.sizes_of(query, kv, k_rope, logit_scale)
    chosen = sizes.blocks()
    bq = tiles.fitted(chosen["forward_queries"], sizes.tokens)
    bk = tiles.fitted(chosen["forward_keys"], sizes.keys)
    walk = tiles.walk(sizes, mask, logit_scale, bq, bk)
    out, lse = pl.pallas_call(
        partial(_kernel, sizes=sizes, bk=bk, compute=chosen["forward_compute"], most=walk.most),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=walk.grid,
            in_specs=walk.in_specs,
            out_specs=[walk.own(sizes.v), walk.own_row],
            scratch_shapes=[
                pltpu.VMEM((bq, tiles.LANES), jnp.int32),
                pltpu.VMEM((bq, tiles.LANES), jnp.int32),
                pltpu.VMEM((bq, tiles.LANES), jnp.float32),
                pltpu.VMEM((bq, tiles.LANES), jnp.float32),
                pltpu.VMEM((bq, sizes.v), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((sizes.rows, sizes.tokens, sizes.heads * sizes.v), query.dtype),
            jax.ShapeDtypeStruct((sizes.rows, sizes.heads, 1, sizes.tokens), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_LIMIT,
        ),
        interpret=interpret,
        name="latent_attention_forward",
    )(
        *walk.listed,
        query.reshape(sizes.rows, sizes.tokens, -1),
        kv.reshape(sizes.rows, sizes.keys, -1),
        k_rope,
        *walk.arguments,
    )
    return out.reshape(sizes.rows, sizes.tokens, sizes.heads, sizes.v), lse[:, :, 0]


def _kernel(
    lists_ref: Any,
    counts_ref: Any,
    query_ref: Any,
    kv_ref: Any,
    rope_ref: Any,
    scale_ref: Any,
    mask_refs: list[Any],
    out_ref: Any,
    lse_ref: Any,
    segments_ref: Any,
    slots_ref: Any,
    top_ref: Any,
    total_ref: Any,
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
        top_ref[...] = jnp.full_like(top_ref, tiles.LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def _look(block: tiles.Index, masked: bool) -> None:
        for begin, size in tiles.parts(bk, compute):
            part = pl.ds(begin, size)
            both = kv_ref[part, :]
            key = jnp.concatenate([both[:, : sizes.n], rope_ref[part, :]], axis=-1)
            value = tiles.inside(both[:, sizes.n :], block * bk + begin, sizes.keys, bk)
            factor = sizes.scale if scale_ref is None else sizes.scale * scale_ref[:, part]
            logits = tiles.dot(query_ref[...], key, (1, 1)) * factor
            if masked:
                seen = tiles.allowed(
                    across(segments_ref[...], size),
                    masks.key_segments[:, part],
                    None if masks.query_slots is None else across(slots_ref[...], size),
                    None if masks.key_slots is None else masks.key_slots[:, part],
                )
                logits = jnp.where(seen, logits, tiles.LOWEST)
            before = top_ref[...]
            top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights = jnp.exp(logits - across(top, size))
            shrink = jnp.exp(before - top)
            top_ref[...] = top
            total_ref[...] = total_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
            found = tiles.dot(weights.astype(value.dtype), value, (1, 0))
            acc_ref[...] = acc_ref[...] * across(shrink, sizes.v) + found

    @pl.when(j < counts_ref[place])
    def _visible() -> None:
        entry = lists_ref[place * most + j]
        tiles.look(entry, partial(_look, tiles.block_of(entry)))

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish() -> None:
        # A row that saw nothing has summed exp(0) of masked logits, or nothing at all.
        top = top_ref[...]
        saw = top > tiles.LOWEST / 2
        total = jnp.where(saw, total_ref[...], 1.0)
        share = jnp.where(saw, 1 / total, 0.0)
        out_ref[...] = (acc_ref[...] * across(share, sizes.v)).astype(out_ref.dtype)
        lse_ref[...] = tiles.row(jnp.where(saw, top + jnp.log(total), -jnp.inf))
