"""latent_decode for a GPU (Triton): a program reads its part of one row's context once, for up to 32 queries.

Keys are the long side of both products, logitsᵀ = cache · queryᵀ and outᵀ += cacheᵀ · weightsᵀ, and the
latent goes in groups of 128 columns, because Triton's arrays are powers of two long.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.blocks import pick
from kernels_pallas.choice import chip
from kernels_pallas.latents import GROUP, Latents

_LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where a running maximum starts: from −inf, a row that sees nothing would become NaN."""

_PROCESSORS = 132
"""Of an H100 and an H200; a program takes most of one's shared memory."""

_LEAST_PART = 256
"""Slots that are worth a program of their own."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of the kernel.

    Attributes:
        rows: T·H. heads: H. rank: r. rope: e.
        block: slots worked on at a time. queries: rows of a program.
        pages: runs of slots of a row of the batch. page: slots of a run. splits: programs a row of the batch.
        scale: of the softmax.
    """

    rows: int
    heads: int
    rank: int
    rope: int
    block: int
    queries: int
    pages: int
    page: int
    splits: int
    scale: float

    @property
    def blocks_of_page(self) -> int:
        return pl.cdiv(self.page, self.block)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Of the latent: the first column of each array and how many it has."""
        return _powers_of_two(0, self.rank)

    @property
    def rope_groups(self) -> list[tuple[int, int]]:
        """Of the RoPE key."""
        return _powers_of_two(0, self.rope)


def refusal(
    latents: Latents, rope_dim: int, queries: tuple[int, int, int], page_table: jax.Array | None
) -> str | None:
    """Why the kernel cannot take these arguments."""
    if chip().platform != "gpu":
        return None
    rank = latents.rank(rope_dim)
    if rank % 16 or rope_dim % 16:
        return f"latents have rank {rank} and RoPE dim {rope_dim}; multiples of 16 are accepted"
    # Triton's offsets in arrays up to 2³² bytes are signed 32-bit numbers of elements.
    if latents.values.dtype.itemsize == 1 and 2**31 < latents.values.size <= 2**32:
        return f"latents.values has {latents.values.size} bytes; between 2 and 4 GiB are not accepted"
    return None


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
    splits: int | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The kernel; arguments as of `ops.latent_decode`, queries in the dtype that products are taken in.

    Returns:
        (splits, B, T, H, r) and (splits, B, T, H) fp32, of each part of the context.
    """
    batch, tokens, heads, rank = q_latent.shape
    rows, rope, dtype = tokens * heads, q_rope.shape[-1], q_latent.dtype
    pages = 1 if page_table is None else page_table.shape[1]
    # Three tiles of 64 KiB, in flight at once, fit a program's 227 KiB of shared memory. With larger ones, or
    # with the codes of 32 slots beside their bf16 form, registers spill (seen in the compiler's report).
    fitting = (64 << 10) // ((rank + rope) * dtype.itemsize) // (2 if latents.quantized else 1)
    stages = {"bfloat16": 3, "float16": 3, "int8": 4}.get(latents.values.dtype.name, 2)
    heuristic = {
        "block": min(32, max(16, 1 << max(fitting, 1).bit_length() - 1)),
        "queries": 32,
        "warps": 8,
        "stages": stages if dtype.itemsize == 2 else 2,
    }
    key = f"queries{rows} rank{rank} rope{rope} {latents.values.dtype.name}"
    sizes = pick("latent_decode", key, heuristic)
    block = min(sizes["block"], max(16, pl.next_power_of_2(latents.capacity)))
    queries = min(sizes["queries"], max(16, pl.next_power_of_2(rows)))
    parts = pl.cdiv(rows, queries)
    if splits is None:
        splits = min(_PROCESSORS // (batch * parts), pages * latents.capacity // _LEAST_PART)
    splits = max(1, min(splits, pages * pl.cdiv(latents.capacity, block)))
    static = Sizes(rows, heads, rank, rope, block, queries, pages, latents.capacity, splits, scale)
    arrays = {
        "layer": layer.reshape(1),
        "lengths": jnp.max(query_slots, axis=1) + 1,
        "last": jnp.repeat(query_slots, heads, axis=1),
        "q_latent": q_latent.reshape(batch, rows, rank),
        "q_rope": q_rope.reshape(batch, rows, rope),
        "values": latents.values,
        "codes_scale": latents.scale,
        "k_rope": latents.k_rope,
        "logit_scale": logit_scale,
        "page_table": page_table,
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    out, lse = pl.pallas_call(
        functools.partial(_kernel, static, tuple(arrays)),
        grid=(splits, parts, batch),
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, rows, rank), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=sizes["warps"], num_stages=sizes["stages"]),
        interpret=interpret,
        name="latent_decode",
    )(*arrays.values())
    shape = (splits, batch, tokens, heads)
    return out.reshape(*shape, rank), lse.reshape(shape)


def _kernel(static: Sizes, names: tuple[str, ...], *refs: Any) -> None:
    """One program: a part of one row's context for some of its queries."""
    inputs = dict(zip(names, refs, strict=False))
    out_ref, lse_ref = refs[-2:]
    split, part, batch = (pl.program_id(axis) for axis in range(3))
    row = part * static.queries
    here = pl.ds(row, static.queries)
    mine = jnp.arange(static.queries) + row < static.rows
    length, dtype = inputs["lengths"][batch], inputs["q_latent"].dtype

    def query(name: str, columns: tuple[int, int]) -> jax.Array:
        """(queries, columns)."""
        return plgpu.load(inputs[name].at[batch, here, pl.ds(*columns)], mask=mine[:, None], other=0.0)

    q_latent = [query("q_latent", group) for group in static.groups]
    q_rope = [query("q_rope", group) for group in static.rope_groups]
    last = plgpu.load(inputs["last"].at[batch, here], mask=mine, other=-1)

    def over(block: Any, state: tuple) -> tuple:
        top, total, sums = state
        page, of_page = jax.lax.div(block, static.blocks_of_page), jax.lax.rem(block, static.blocks_of_page)
        first = of_page * static.block
        owner = inputs["page_table"][batch, page] if "page_table" in inputs else batch
        place = (inputs["layer"][0], owner)
        slots = jnp.arange(static.block)
        before = page * static.page + first
        inside = slots < jnp.minimum(length - before, static.page - first)

        def rows_of(name: str, at: int, size: int) -> jax.Array:
            """(slots, columns) in the dtype of products; 0 where nothing is seen."""
            ref = inputs[name].at[*place, pl.ds(first, static.block), pl.ds(at, size)]
            return plgpu.load(ref, mask=inside[:, None], other=jnp.zeros((), ref.dtype)).astype(dtype)

        def line_of(name: str, line: int) -> jax.Array:
            """(slots, 1)."""
            ref = inputs[name].at[*place, jnp.int32(line), pl.ds(first, static.block)]
            return plgpu.load(ref, mask=inside, other=0.0)[:, None]

        quantized = "codes_scale" in inputs
        values = [rows_of("values", at, size) for at, size in static.groups]
        ropes, start = ("k_rope", 0) if quantized else ("values", static.rank)
        rope = [rows_of(ropes, start + at, size) for at, size in static.rope_groups]
        scales = [line_of("codes_scale", at // GROUP) if quantized else None for at, _ in static.groups]
        logits = jnp.zeros((static.block, static.queries), jnp.float32)
        for q, k in zip(q_rope, rope, strict=True):
            logits += _dot(k, q, (1, 1))
        for q, c, s in zip(q_latent, values, scales, strict=True):
            product = _dot(c, q, (1, 1))
            logits += product if s is None else product * s
        if "logit_scale" in inputs:
            groups = inputs["logit_scale"].shape[2]
            head = jax.lax.rem(row + jnp.arange(static.queries), static.heads)
            group = jax.lax.div(head, static.heads // groups)[None, :]
            factor = jnp.zeros_like(logits)
            for g in range(groups):
                factor = jnp.where(group == g, line_of("logit_scale", g), factor)
            logits *= factor
        seen = inside[:, None] & ((slots + before)[:, None] <= last[None, :])
        logits = jnp.where(seen, logits * static.scale, -jnp.inf)
        new = jnp.maximum(top, jnp.max(logits, axis=0))
        weights, shrink = jnp.exp(logits - new[None, :]), jnp.exp(top - new)
        total = total * shrink + jnp.sum(weights, axis=0)
        sums = tuple(
            x * shrink[None, :] + _dot(c, (weights if s is None else weights * s).astype(dtype), (0, 0))
            for x, c, s in zip(sums, values, scales, strict=True)
        )
        return new, total, sums

    whole, rest = jax.lax.div(length, static.page), jax.lax.rem(length, static.page)
    seen = whole * static.blocks_of_page + pl.cdiv(rest, static.block)
    each = pl.cdiv(seen, static.splits)
    state = (
        jnp.full((static.queries,), _LOWEST),
        jnp.zeros((static.queries,)),
        tuple(jnp.zeros((size, static.queries)) for _, size in static.groups),
    )
    stop = jnp.minimum((split + 1) * each, seen)
    top, total, sums = jax.lax.fori_loop(split * each, stop, over, state)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    plgpu.store(lse_ref.at[split, batch, here], lse, mask=mine)
    for x, columns in zip(sums, static.groups, strict=True):
        plgpu.store(
            out_ref.at[split, batch, here, pl.ds(*columns)], (x / total[None, :]).T, mask=mine[:, None]
        )


def _powers_of_two(start: int, stop: int) -> list[tuple[int, int]]:
    """Cuts columns into arrays that Triton takes, none of them of two scales."""
    cuts = []
    while start < stop:
        size = GROUP
        while size > stop - start:
            size //= 2
        cuts.append((start, size))
        start += size
    return cuts


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """a · b over these axes, summed in fp32 and exact to fp32 where they are."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)
