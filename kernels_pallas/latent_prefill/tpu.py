"""M²LA of many new tokens over a cache of latents on a TPU (Mosaic).

A block of latents is expanded for one head in VMEM, as [k_nope ‖ value]ᵀ = kernel_h · cᵀ: with the slots
last, the scales of a quantised cache multiply rows, and neither product with the queries needs a transpose.
One expansion serves up to 2048 queries, which is why the whole chunk is one block of queries: expanding costs
r·(n+v) multiplications a key and head, looking at it n+e+v a query.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import pick
from kernels_pallas.choice import chip
from kernels_pallas.latents import GROUP, Latents

LOWEST = -1e30
"""Where a running maximum starts: finite, or a row that sees nothing would be exp(−inf − −inf), NaN."""

_LANES, _SUBLANES = 128, 8
_VMEM = 64 * 2**20


def refusal(query: jax.Array, latents: Latents, kernel: jax.Array, rope_dim: int) -> str | None:
    """Why a TPU cannot take these arguments, or None if it can. Interpreted, the kernel takes everything."""
    here = chip()
    if here.platform != "tpu":
        return None
    n, (_, both, rank) = query.shape[-1] - rope_dim, kernel.shape
    for name, size in (("n", n), ("e", rope_dim), ("v", both - n), ("r", rank)):
        if size % _LANES:
            return f"{name} is {size}; a TPU takes multiples of {_LANES}"
    if latents.capacity % _SUBLANES:
        # The compiler lays such an array out in another way, and would copy all of it for the kernel.
        return f"latents has {latents.capacity} slots; a TPU takes multiples of {_SUBLANES}"
    return None


def _expanded(
    kernel_ref: Any, values_ref: Any, scale_ref: Any, rank: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """[k_nope ‖ value] of a block of latents for one head, transposed: (n+v, slots) fp32."""
    if scale_ref is None:
        return _dot(kernel_ref[0], values_ref[0, 0, :, :rank].astype(dtype), (1, 1))
    width = min(GROUP, rank)
    parts = (
        _dot(
            kernel_ref[0, :, start : start + width],
            values_ref[0, 0, :, start : start + width].astype(dtype),
            (1, 1),
        )
        * scale_ref[0, 0, group : group + 1, :]
        for group, start in enumerate(range(0, rank, width))
    )
    return sum(parts, start=jnp.float32(0))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The product over a's and b's axes `contract`, in fp32; fp32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision, preferred_element_type=jnp.float32
    )


def _kernel(
    layer_ref: Any,
    last_ref: Any,
    query_ref: Any,
    kernel_ref: Any,
    slots_ref: Any,
    values_ref: Any,
    scale_ref: Any,
    k_rope_ref: Any,
    logit_scale_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    highest_ref: Any,
    total_ref: Any,
    sum_ref: Any,
    *,
    nope: int,
    rank: int,
    capacity: int,
    scale: float,
    per_group: int,
    step: int,
) -> None:
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    dtype = query_ref.dtype

    @pl.when(j == 0)
    def _() -> None:
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(j <= last_ref[b, i])
    def _() -> None:
        block_k = values_ref.shape[2]
        slots = j * block_k + jax.lax.broadcasted_iota(jnp.int32, (1, block_k), 1)
        expanded = _expanded(kernel_ref, values_ref, scale_ref, rank, dtype)
        if capacity % block_k:
            # Past the capacity lies anything, also NaN, and 0 · NaN is NaN.
            expanded = jnp.where(slots < capacity, expanded, 0)
        expanded = expanded.astype(dtype)
        rope = values_ref[0, 0, :, rank:] if k_rope_ref is None else k_rope_ref[0, 0]
        rope = rope.astype(dtype)
        factor = scale
        if logit_scale_ref is not None:
            factor = scale * logit_scale_ref[0, 0, pl.ds(jax.lax.div(h, jnp.int32(per_group)), 1), :]
        block_q = query_ref.shape[1]
        for start in range(0, block_q, step):
            part = pl.ds(start, min(step, block_q - start))
            logits = _dot(query_ref[0, part, :nope], expanded[:nope], (1, 0))
            logits += _dot(query_ref[0, part, nope:], rope, (1, 1))
            logits = jnp.where(slots <= slots_ref[0, part, :], logits * factor, -jnp.inf)
            old = highest_ref[part, :]
            new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new)
            shrink = jnp.exp(old - new)
            highest_ref[part, :] = new
            total_ref[part, :] = total_ref[part, :] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            seen = _dot(weights.astype(dtype), expanded[nope:], (1, 1))
            sum_ref[part, :] = sum_ref[part, :] * shrink + seen

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        total = total_ref[...]
        out_ref[0] = (sum_ref[...] / jnp.where(total == 0, 1, total)).astype(out_ref.dtype)
        # As a row: a column of one number a query would take 128 times its bytes in HBM.
        lse = jnp.broadcast_to(highest_ref[...] + jnp.log(total), (total.shape[0], _LANES))
        lse_ref[0, 0] = lse.T[:1]


def latent_prefill_tpu(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array,
    kernel: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None = None,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `latent_prefill.ops`."""
    rows, tokens, heads, width = query.shape
    _, both, rank = kernel.shape
    values, scales, k_rope = latents
    rope_dim = values.shape[-1] - rank if k_rope is None else k_rope.shape[-1]
    nope = width - rope_dim
    value_dim, capacity = both - nope, latents.capacity
    key = f"heads{heads} rank{rank} tokens{tokens} {values.dtype.name} {query.dtype.name}"
    narrow = query.dtype == jnp.float32
    heuristic = {"q": 1024 if narrow else 2048, "k": 256 if narrow else 512, "step": 512}
    sizes = pick("latent_prefill", key, heuristic)
    count = pl.cdiv(tokens, sizes["q"])
    # Queries in blocks of equal size, whole lanes each: the log-sum-exps of a block are a row.
    block_q = tokens if count == 1 else pl.cdiv(pl.cdiv(tokens, count), _LANES) * _LANES
    count = pl.cdiv(tokens, block_q)
    block_k = min(sizes["k"], capacity)

    slots = jnp.minimum(query_slots.astype(jnp.int32), capacity - 1)
    by_block = jnp.pad(slots, [(0, 0), (0, count * block_q - tokens)], constant_values=-1)
    newest = by_block.reshape(rows, count, block_q).max(axis=2)
    last = jnp.where(newest < 0, -1, newest // block_k)
    # A step that does nothing takes its time too: no more steps than the longest row needs.
    steps = jnp.maximum(jnp.max(last) + 1, 1)

    def block(b: Any, i: Any, j: Any, last: Any) -> Any:
        """Past the last visible block the index stays, and nothing is fetched."""
        return jnp.clip(j, 0, jnp.maximum(last[b, i], 0))

    def by_slot(b: Any, h: Any, i: Any, j: Any, layer: Any, last: Any) -> tuple:
        return layer[0], b, block(b, i, j, last), 0

    def by_lane(b: Any, h: Any, i: Any, j: Any, layer: Any, last: Any) -> tuple:
        return layer[0], b, 0, block(b, i, j, last)

    def slots_last(x: jax.Array | None) -> pl.BlockSpec | None:
        return None if x is None else pl.BlockSpec((1, 1, x.shape[2], block_k), by_lane)

    out, lse = pl.pallas_call(
        partial(
            _kernel,
            nope=nope,
            rank=rank,
            capacity=capacity,
            scale=width**-0.5,
            per_group=1 if logit_scale is None else heads // logit_scale.shape[2],
            step=sizes["step"],
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, heads, count, steps),
            in_specs=[
                pl.BlockSpec((1, block_q, width), lambda b, h, i, j, *_: (b, i, h)),
                pl.BlockSpec((1, both, rank), lambda b, h, i, j, *_: (h, 0, 0)),
                pl.BlockSpec((1, block_q, 1), lambda b, h, i, j, *_: (b, i, 0)),
                pl.BlockSpec((1, 1, block_k, values.shape[-1]), by_slot),
                slots_last(scales),
                None if k_rope is None else pl.BlockSpec((1, 1, block_k, rope_dim), by_slot),
                slots_last(logit_scale),
            ],
            out_specs=[
                pl.BlockSpec((1, block_q, value_dim), lambda b, h, i, j, *_: (b, i, h)),
                pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, 1), jnp.float32),
                pltpu.VMEM((block_q, value_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, tokens, heads * value_dim), query.dtype),
            jax.ShapeDtypeStruct((rows, heads, 1, tokens), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="latent_prefill",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        last,
        query.reshape(rows, tokens, heads * width),
        kernel.astype(query.dtype),
        slots[..., None],
        values,
        scales,
        k_rope,
        logit_scale,
    )
    return out.reshape(rows, tokens, heads, value_dim), lse[:, :, 0].swapaxes(1, 2)
