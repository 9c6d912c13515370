"""latent_decode for a TPU (Mosaic): each block of the cache comes to VMEM once, for scores and for values.

The grid is (rows, splits, blocks of a split). What a step fetches is said by `Plan`, in plain functions
of the grid's position, which `traffic.py` walks to count bytes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import pick
from kernels_pallas.choice import chip
from kernels_pallas.latents import GROUP, Latents

MOST_QUERIES = 512
"""Queries times heads of one row of the batch: their accumulators stay in VMEM."""

MOST_PAGES = 1 << 17
"""Entries of a page table: it lies in scalar memory, of which there is 1 MiB."""

_LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where a running maximum starts: from −inf, a row that sees nothing would become NaN."""

_BUFFERS = 8 << 20
"""Bytes of VMEM for the two buffers of a block of the cache."""

_VMEM = (16 << 20, 64 << 20)
"""Bytes of scoped VMEM by default, and the most that is asked for."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the grid walks over the cache; its methods take numbers, numpy arrays or traced scalars.

    A row of the batch has `pages` runs of `page` slots (one run without a page table), each cut into blocks,
    the last of them partial. Blocks with a slot that some query of the row sees are shared out to the splits.

    Attributes:
        rows: B.
        pages: runs of slots of a row.
        page: slots of a run.
        block: slots fetched at a time.
        chunk: slots of a block worked on at a time.
        splits: parts of a row's blocks that are worked on independently.
    """

    rows: int
    pages: int
    page: int
    block: int
    chunk: int
    splits: int = 1

    @property
    def blocks_of_page(self) -> int:
        return pl.cdiv(self.page, self.block)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows, self.splits, pl.cdiv(self.pages * self.blocks_of_page, self.splits)

    def part(self, split: Any, length: Any) -> tuple[Any, Any]:
        """The blocks start … stop−1 that a split works on, of a row of which `length` slots are seen."""
        whole, rest = _divided(length, self.page)
        seen = whole * self.blocks_of_page + _divided(rest + self.block - 1, self.block)[0]
        each, _ = _divided(seen + self.splits - 1, self.splits)
        return split * each, jnp.minimum((split + 1) * each, seen)

    def place(self, row: Any, split: Any, step: Any, lengths: Any, table: Any) -> tuple[Any, Any]:
        """The page and its block that a step has in VMEM.

        After its last block a split stays there: what does not change is not fetched again. A row that sees
        nothing fetches its first block.
        """
        start, stop = self.part(split, lengths[row])
        block = jnp.maximum(jnp.minimum(start + step, stop - 1), 0)
        if table is None:
            return row, block
        page, of_page = _divided(block, self.blocks_of_page)
        return table[row * self.pages + page], of_page


def plan(
    latents: Latents, rope_dim: int, queries: tuple[int, int, int], pages: int | None, splits: int | None
) -> Plan:
    """The walk over this cache.

    Args:
        queries: B, T, H.
        pages: pages of a row, or None without a page table.
        splits: None lets v5p's two cores share a row where there are few.
    """
    rows, tokens, heads = queries
    dtype = latents.values.dtype
    key = f"queries{tokens * heads} rank{latents.rank(rope_dim)} rope{rope_dim} {dtype.name}"
    fitting = _BUFFERS // (2 * slot_bytes(latents))
    heuristic = {
        "block": min(4096, 1 << fitting.bit_length() - 1),
        "chunk": 512 if tokens * heads <= 128 else 256,
    }
    sizes = pick("latent_decode", key, heuristic)
    # No larger than the capacity asks for; scales and logits have slots on lanes, 128 at a time.
    lanes = min(128, sizes["chunk"])
    chunk = min(sizes["chunk"], pl.cdiv(latents.capacity, lanes) * lanes)
    block = min(max(sizes["block"] // chunk, 1), pl.cdiv(latents.capacity, chunk)) * chunk
    walk = Plan(rows, pages or 1, latents.capacity, block, chunk)
    if splits is None:
        splits = 2 if chip().name == "v5p" and rows < 4 else 1
    return dataclasses.replace(walk, splits=min(splits, walk.grid[2]))


def refusal(
    latents: Latents, rope_dim: int, queries: tuple[int, int, int], page_table: jax.Array | None
) -> str | None:
    """Why the kernel cannot take these arguments; `queries` are B, T, H."""
    rank, (_, tokens, heads) = latents.rank(rope_dim), queries
    if tokens * heads > MOST_QUERIES:
        return f"q_latent has {tokens} queries × {heads} heads a row; at most {MOST_QUERIES} are accepted"
    if page_table is not None and page_table.size > MOST_PAGES:
        return f"page_table has {page_table.size} entries; at most {MOST_PAGES} are accepted"
    if chip().platform != "tpu":
        return None
    if latents.quantized and (rank % GROUP or rope_dim % 128):
        return f"latents have rank {rank} and RoPE dim {rope_dim}; quantised, multiples of 128 are accepted"
    if (rank + rope_dim) % 128:
        return f"latents are {rank}+{rope_dim} numbers wide; multiples of 128 are accepted"
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
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The kernel; arguments as of `ops.latent_decode`, queries in the dtype that products are taken in.

    Returns:
        (splits, B, T, H, r) and (splits, B, T, H) fp32, of each part of the context.
    """
    rows, tokens, heads, rank = q_latent.shape
    rope_dim, queries = q_rope.shape[-1], tokens * heads
    pages = None if page_table is None else page_table.shape[1]
    walk = plan(latents, rope_dim, (rows, tokens, heads), pages, splits)
    # Whole tiles of 128 lanes are summed and the numbers past r dropped at the end.
    summed = rank if latents.quantized else min(pl.cdiv(rank, 128) * 128, rank + rope_dim)
    query = jnp.concatenate([q_latent, q_rope], axis=-1).reshape(rows, queries, rank + rope_dim)
    last = jnp.repeat(query_slots, heads, axis=1)[..., None]
    scalars = [layer.reshape(1), jnp.max(query_slots, axis=1) + 1, jnp.min(query_slots, axis=1) + 1]
    if page_table is not None:
        scalars.append(page_table.reshape(-1))

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, s, i, *_: (b, *[0] * len(shape)))

    def of_split(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, s, i, *_: (s, b, *[0] * len(shape)))

    def cached(index: Callable[..., tuple[Any, ...]], *shape: int) -> pl.BlockSpec:
        def place(b: Any, s: Any, i: Any, layer: Any, lengths: Any, _: Any, table: Any = None) -> Any:
            return layer[0], *index(*walk.place(b, s, i, lengths, table))

        return pl.BlockSpec((None, None, *shape), place)

    def slots_first(page: Any, block: Any) -> tuple[Any, ...]:
        return page, block, 0

    def slots_last(page: Any, block: Any) -> tuple[Any, ...]:
        return page, 0, block

    arrays: dict[str, tuple[jax.Array, pl.BlockSpec]] = {
        "last": (last, of_row(queries, 1)),
        "query": (query, of_row(queries, rank + rope_dim)),
        "values": (latents.values, cached(slots_first, walk.block, latents.values.shape[-1])),
    }
    if latents.scale is not None and latents.k_rope is not None:
        arrays["codes_scale"] = (latents.scale, cached(slots_last, latents.scale.shape[2], walk.block))
        arrays["k_rope"] = (latents.k_rope, cached(slots_first, walk.block, rope_dim))
    if logit_scale is not None:
        arrays["logit_scale"] = (logit_scale, cached(slots_last, logit_scale.shape[2], walk.block))

    out, lse = pl.pallas_call(
        functools.partial(_kernel, walk, tuple(arrays), len(scalars), heads, rank, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=walk.grid,
            in_specs=[spec for _, spec in arrays.values()],
            out_specs=[of_split(queries, summed), of_split(1, queries)],
            scratch_shapes=[pltpu.VMEM((queries, 1), jnp.float32)] * 2,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((walk.splits, rows, queries, summed), jnp.float32),
            jax.ShapeDtypeStruct((walk.splits, rows, 1, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem(walk, latents, query, logit_scale),
        ),
        interpret=interpret,
        name="latent_decode",
    )(*scalars, *[x for x, _ in arrays.values()])
    shape = (walk.splits, rows, tokens, heads)
    return out[..., :rank].reshape(*shape, rank), lse.reshape(shape)


def slot_bytes(latents: Latents) -> int:
    """Bytes of a slot in VMEM, scales aside."""
    parts = [latents.values] + ([] if latents.k_rope is None else [latents.k_rope])
    return sum(x.shape[-1] * x.dtype.itemsize for x in parts)


def _vmem(walk: Plan, latents: Latents, query: jax.Array, logit_scale: jax.Array | None) -> int | None:
    """Scoped VMEM to ask for; None where the default is enough."""
    _, queries, width = query.shape
    scales = sum(pl.cdiv(x.shape[2], 8) * 32 for x in (latents.scale, logit_scale) if x is not None)
    buffers = 2 * walk.block * (slot_bytes(latents) + scales)
    # Of a chunk: the tile in fp32 and in the products' dtype, logits and weights; of the queries: themselves
    # and the sums, twice each, and the columns of 128 lanes of which one is used.
    work = walk.chunk * width * 8 + 6 * 4 * queries * walk.chunk
    needed = buffers + work + queries * (width * (2 * query.dtype.itemsize + 12) + 6 * 512)
    return None if needed <= _VMEM[0] else min(needed + needed // 4, _VMEM[1])


def _kernel(
    walk: Plan, names: tuple[str, ...], prefetched: int, heads: int, rank: int, scale: float, *refs: Any
) -> None:
    """One step: a block of one row's cache, chunk by chunk, into the running softmax and sums."""
    lengths, shortest = refs[1:3]
    inputs = dict(zip(names, refs[prefetched:], strict=False))
    out, lse, top, total = refs[-4:]
    row, split, step = (pl.program_id(axis) for axis in range(3))
    start, stop = walk.part(split, lengths[row])
    block = start + step

    @pl.when(step == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _LOWEST)
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    @pl.when(block < stop)
    def _() -> None:
        page, of_page = _divided(block, walk.blocks_of_page)
        first = of_page * walk.block
        before = page * walk.page + first
        # Slots of the block that are seen by a query, and chunks all of whose slots are seen by every query.
        inside = jnp.minimum(walk.block, walk.page - first)
        seen = jnp.minimum(lengths[row] - before, inside)
        by_all, _ = _divided(jnp.clip(shortest[row] - before, 0, inside), walk.chunk)

        def over(masked: bool) -> Callable[[Any, None], None]:
            def chunk(c: Any, _: None) -> None:
                at = pl.multiple_of(c * walk.chunk, walk.chunk)
                visible = (seen - at, before + at) if masked else None
                parts = _Chunk(inputs, pl.ds(at, walk.chunk), walk.chunk, rank, visible)
                _add(parts, heads, scale, out, top, total)

            return chunk

        jax.lax.fori_loop(0, by_all, over(masked=False), None)
        jax.lax.fori_loop(by_all, _divided(seen + walk.chunk - 1, walk.chunk)[0], over(masked=True), None)

    @pl.when(step == walk.grid[2] - 1)
    def _() -> None:
        empty = total[...] == 0
        out[...] = out[...] / jnp.where(empty, 1.0, total[...])
        column = jnp.where(empty, -jnp.inf, top[...] + jnp.log(jnp.where(empty, 1.0, total[...])))
        # As a line: the column would take 128 lanes a number in memory.
        square = (column.shape[0], column.shape[0])
        diagonal = jax.lax.broadcasted_iota(jnp.int32, square, 0) == jax.lax.broadcasted_iota(
            jnp.int32, square, 1
        )
        lse[...] = jnp.sum(jnp.where(diagonal, column, 0.0), axis=0, keepdims=True)


class _Chunk:
    """Part of a block: its logits, and what weights make of its values.

    With `visible` = (slots before the end of what is seen, first slot of the chunk), what no query sees is
    taken as 0, because past the end of an array it may be NaN.
    """

    def __init__(self, inputs: dict[str, Any], at: Any, size: int, rank: int, visible: Any) -> None:
        self.inputs, self.at, self.size, self.rank, self.visible = inputs, at, size, rank, visible
        self.dtype = inputs["query"].dtype

    def rows_of(self, name: str, columns: slice) -> jax.Array:
        """(slots, columns) in the dtype of products."""
        x = self.inputs[name][self.at, columns].astype(self.dtype)
        if self.visible is None:
            return x
        return jnp.where(_iota((self.size, 1), 0) < self.visible[0], x, jnp.zeros_like(x))

    def lines_of(self, name: str, line: int) -> jax.Array:
        """(1, slots) of an array that has slots last."""
        x = self.inputs[name][line : line + 1, self.at]
        return x if self.visible is None else jnp.where(_iota((1, self.size), 1) < self.visible[0], x, 0.0)

    def groups(self) -> Sequence[tuple[int, slice]]:
        """Columns of the latent that share a scale."""
        return [(g, slice(at, min(at + GROUP, self.rank))) for g, at in enumerate(range(0, self.rank, GROUP))]

    def logits(self, heads: int) -> jax.Array:
        """(T·H, slots) fp32, not scaled by the softmax's scale yet."""
        query = self.inputs["query"]
        if "codes_scale" not in self.inputs:
            logits = _dot(query[...], self.rows_of("values", slice(None)), (1, 1))
        else:
            logits = _dot(query[:, self.rank :], self.rows_of("k_rope", slice(None)), (1, 1))
            for g, columns in self.groups():
                part = _dot(query[:, columns], self.rows_of("values", columns), (1, 1))
                logits += part * self.lines_of("codes_scale", g)
        if "logit_scale" in self.inputs:
            groups = self.inputs["logit_scale"].shape[0]
            _, head = _divided(_iota((logits.shape[0], 1), 0), heads)
            mine, _ = _divided(head, heads // groups)
            factor = self.lines_of("logit_scale", 0)
            for g in range(1, groups):
                factor = jnp.where(mine == g, self.lines_of("logit_scale", g), factor)
            logits *= factor
        return logits

    def values(self, weights: jax.Array, out: Any, shrink: jax.Array) -> None:
        """out · shrink + weights · values, in place."""
        if "codes_scale" not in self.inputs:
            values = self.rows_of("values", slice(0, out.shape[-1]))
            out[...] = out[...] * shrink + _dot(weights.astype(self.dtype), values, (1, 0))
            return
        for g, columns in self.groups():
            scaled = (weights * self.lines_of("codes_scale", g)).astype(self.dtype)
            part = _dot(scaled, self.rows_of("values", columns), (1, 0))
            out[:, columns] = out[:, columns] * shrink + part


def _add(chunk: _Chunk, heads: int, scale: float, out: Any, top: Any, total: Any) -> None:
    """One chunk into the running softmax: its maximum, its total and the weighted sums."""
    logits = chunk.logits(heads) * scale
    if chunk.visible is not None:
        left, first = chunk.visible
        slots = _iota((1, chunk.size), 1)
        seen = (slots < left) & (slots + first <= chunk.inputs["last"][...])
        logits = jnp.where(seen, logits, -jnp.inf)
    new = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    weights, shrink = jnp.exp(logits - new), jnp.exp(top[...] - new)
    top[...] = new
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    chunk.values(weights, out, shrink)


def _divided(n: Any, by: int) -> tuple[Any, Any]:
    """n // by and n % by, n ≥ 0. jax's own operators ask the machine what TPU it has, which may be none."""
    divisor = jnp.full_like(n, by)
    return jax.lax.div(n, divisor), jax.lax.rem(n, divisor)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """a · b over these axes, summed in fp32 and exact to fp32 where they are."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)
