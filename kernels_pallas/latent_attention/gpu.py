"""Flash attention of M²LA on a GPU (Triton): what its kernels share, and the forward one.

A program owns a block of queries of one head and walks the blocks of keys that they can see. The dims of a
head are two halves, logits = q_nope·k_nopeᵀ + q_rope·k_ropeᵀ, so that the RoPE key of all heads is read where
it lies. The backward kernels are in `gpu_backward.py`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.blocks import pick
from kernels_pallas.choice import chip
from kernels_pallas.latent_attention.visible import MaskRows, mask_rows, visible_keys
from kernels_pallas.mask import AttentionMask

Tokens = tuple[jax.Array, jax.Array | None]
"""Segments and slots of a block of queries or keys; no slots where attention is not causal."""

LOWEST = -1e30
"""Where a running maximum starts: finite, or a row that sees nothing would be exp(−inf − −inf), NaN."""


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes that every kernel knows.

    Attributes:
        queries, keys: T and S.
        nope, rope, value: n, e and v of a head.
        scale: (n+e)^-½.
    """

    queries: int
    keys: int
    nope: int
    rope: int
    value: int
    scale: float


def dims_of(query: jax.Array, kv: jax.Array, k_rope: jax.Array) -> Dims:
    rope = k_rope.shape[-1]
    nope = query.shape[-1] - rope
    scale = query.shape[-1] ** -0.5
    return Dims(query.shape[1], kv.shape[1], nope, rope, kv.shape[-1] - nope, scale)


def refusal(query: jax.Array, kv: jax.Array, k_rope: jax.Array) -> str | None:
    """Why a GPU cannot take these arguments, or None if it can. Interpreted, the kernels take everything."""
    dims = dims_of(query, kv, k_rope)
    return refused_dims(dims.nope, dims.rope, dims.value)


def refused_dims(nope: int, rope: int, value: int) -> str | None:
    """`refusal`, of n, e and v alone."""
    if chip().platform != "gpu":
        return None
    for name, size in (("n", nope), ("e", rope), ("v", value)):
        if size < 16 or size & (size - 1):
            return f"{name} is {size}; a GPU takes powers of two from 16"
    return None


def block_sizes(query: jax.Array, dims: Dims) -> dict[str, int]:
    """Rows of the blocks of each kernel, and warps of each: see the kernels for what lies in registers."""
    narrow = query.dtype == jnp.float32
    heuristic = {
        "forward_q": 64 if narrow else 128,
        "forward_k": 32 if narrow else 64,
        "dq_q": 64,
        "dq_k": 32 if narrow else 64,
        "dkv_q": 32 if narrow else 64,
        "dkv_k": 64,
    }
    key = f"n{dims.nope} e{dims.rope} v{dims.value} {query.dtype.name}"
    return pick("latent_attention_gpu", key, heuristic)


def load(ref: Any, inside: jax.Array | None) -> jax.Array:
    """A tile whose rows outside of the array are 0: what lies there could be NaN, and 0 · NaN is NaN."""
    if inside is None:
        return triton.load(ref)
    mask = inside.reshape(-1, *[1] * (len(ref.shape) - 1))
    return triton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Any, x: jax.Array, inside: jax.Array | None) -> None:
    mask = None if inside is None else inside.reshape(-1, *[1] * (x.ndim - 1))
    triton.store(ref, x.astype(ref.dtype), mask=mask)


def rows_inside(start: jax.Array, size: int, total: int) -> jax.Array | None:
    """Which rows of a block lie inside of the array; None where every block lies inside whole."""
    return None if total % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < total


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The product over a's and b's axes `contract`, in fp32; fp32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision, preferred_element_type=jnp.float32
    )


class MaskRefs(NamedTuple):
    """`MaskRows` as a kernel sees them: (T',) and (S',) of one row of the batch."""

    query_segments: Any
    key_segments: Any
    query_slots: Any
    key_slots: Any

    def queries(self, start: jax.Array, size: int) -> Tokens:
        return _tokens(self.query_segments, self.query_slots, start, size)

    def keys(self, start: jax.Array, size: int) -> Tokens:
        return _tokens(self.key_segments, self.key_slots, start, size)


def _tokens(segments: Any, slots: Any, start: jax.Array, size: int) -> Tokens:
    rows = pl.ds(start, size)
    return segments[rows], None if slots is None else slots[rows]


def allowed(queries: Tokens, keys: Tokens) -> jax.Array:
    """(query rows, key rows) bool."""
    (query_segments, query_slots), (key_segments, key_slots) = queries, keys
    seen = query_segments[:, None] == key_segments[None, :]
    if query_slots is not None and key_slots is not None:
        seen &= key_slots[None, :] <= query_slots[:, None]
    return seen


def mask_specs(masks: MaskRows) -> list[Any]:
    """Each array of the mask whole, for the kernel's row of the batch (grid axis 0)."""
    return [None if x is None else pl.BlockSpec((None, x.shape[1]), lambda b, *_: (b, 0)) for x in masks]


def _forward_kernel(
    query_ref: Any,
    kv_ref: Any,
    k_rope_ref: Any,
    logit_scale_ref: Any,
    query_segments: Any,
    key_segments: Any,
    query_slots: Any,
    key_slots: Any,
    blocks_ref: Any,
    count_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    dims: Dims,
    block_q: int,
    block_k: int,
) -> None:
    masks = MaskRefs(query_segments, key_segments, query_slots, key_slots)
    first = pl.program_id(2) * block_q
    inside = rows_inside(first, block_q, dims.queries)
    q_nope = load(query_ref.at[:, : dims.nope], inside)
    q_rope = load(query_ref.at[:, dims.nope :], inside)
    of_queries = masks.queries(first, block_q)

    def one(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, out = state
        start = blocks_ref[j] * block_k
        rows = pl.ds(start, block_k)
        key_inside = rows_inside(start, block_k, dims.keys)
        logits = dot(q_nope, load(kv_ref.at[rows, : dims.nope], key_inside), (1, 1))
        logits += dot(q_rope, load(k_rope_ref.at[rows, :], key_inside), (1, 1))
        logits *= dims.scale
        if logit_scale_ref is not None:
            logits *= load(logit_scale_ref.at[rows], key_inside)[None, :]
        logits = jnp.where(allowed(of_queries, masks.keys(start, block_k)), logits, -jnp.inf)
        new = jnp.maximum(highest, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - new[:, None])
        shrink = jnp.exp(highest - new)
        value = load(kv_ref.at[rows, dims.nope :], key_inside)
        out = out * shrink[:, None] + dot(weights.astype(value.dtype), value, (1, 0))
        return new, total * shrink + jnp.sum(weights, axis=1), out

    state = (
        jnp.full((block_q,), LOWEST, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros((block_q, dims.value), jnp.float32),
    )
    highest, total, out = jax.lax.fori_loop(0, count_ref[...], one, state)
    sees = total > 0
    out = out / jnp.where(sees, total, 1.0)[:, None]
    store(out_ref, out, inside)
    lse = highest + jnp.log(jnp.where(sees, total, 1.0))
    store(lse_ref, jnp.where(sees, lse, -jnp.inf), inside)


def forward(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
    *,
    interpret: bool,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `latent_attention.ops`.

    Args:
        out_dtype: of the output, query's if None; whoever merges several parts wants float32.

    Returns:
        out (B, T, H, v) and lse (B, H, T) fp32.
    """
    rows, tokens, heads, _ = query.shape
    dims = dims_of(query, kv, k_rope)
    sizes = block_sizes(query, dims)
    block_q, block_k = sizes["forward_q"], sizes["forward_k"]
    blocks = pl.cdiv(tokens, block_q)
    visible = visible_keys(mask, dims.keys, block_q, block_k)
    masks = mask_rows(mask, dims.keys, block_q, block_k)
    per_group = 1 if logit_scale is None else heads // logit_scale.shape[1]
    return pl.pallas_call(
        partial(_forward_kernel, dims=dims, block_q=block_q, block_k=block_k),
        grid=(rows, heads, blocks),
        in_specs=[
            pl.BlockSpec((None, block_q, None, query.shape[-1]), lambda b, h, i: (b, i, h, 0)),
            pl.BlockSpec((None, dims.keys, None, kv.shape[-1]), lambda b, h, i: (b, 0, h, 0)),
            pl.BlockSpec((None, dims.keys, dims.rope), lambda b, h, i: (b, 0, 0)),
            None
            if logit_scale is None
            else pl.BlockSpec((None, None, dims.keys), lambda b, h, i: (b, h // per_group, 0)),
            *mask_specs(masks),
            pl.BlockSpec((None, None, visible.blocks.shape[-1]), lambda b, h, i: (b, i, 0)),
            pl.BlockSpec((None, None), lambda b, h, i: (b, i)),
        ],
        out_specs=[
            pl.BlockSpec((None, block_q, None, dims.value), lambda b, h, i: (b, i, h, 0)),
            pl.BlockSpec((None, None, block_q), lambda b, h, i: (b, h, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, tokens, heads, dims.value), out_dtype or query.dtype),
            jax.ShapeDtypeStruct((rows, heads, tokens), jnp.float32),
        ],
        # 8 warps: the output and the logits of a block take 96 of the 255 registers of a thread.
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="latent_attention_forward",
    )(query, kv, k_rope, logit_scale, *masks, *visible)
