"""What the TPU kernels of latent_attention share: sizes, block lists, the mask and the moves of a tile.

A statistic of a row of logits lies in fast memory as a column of 128 equal lanes, in HBM as a plain row.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import Blocks, pick
from kernels_pallas.choice import chip
from kernels_pallas.latent_attention.visible import MaskRows, Visible, mask_rows, visible_keys, wholly_visible
from kernels_pallas.mask import AttentionMask

LANES = 128

LOWEST = -1e30
"""The logit of what may not be seen: finite, because −inf − −inf of a row that sees nothing is NaN."""

VMEM_LIMIT = 48 * 2**20
"""Bytes of fast memory a kernel may take; tiles of 1024 × 512 fp32 logits pass the default of 16 MiB."""

_WHOLE = 1 << 30

_MOST_PAIRS = 240_000
"""Entries that a kernel's lists may have in the 1 MiB of scalar memory."""

Interpret = bool | pltpu.InterpretParams
Index = Any
"""A number of a grid, traced."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a call (letters as in ops.py); groups is 0 without a logit scale."""

    rows: int
    tokens: int
    keys: int
    heads: int
    groups: int
    n: int
    e: int
    v: int
    dtype: Any

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return 1 / math.sqrt(self.n + self.e)

    @property
    def heads_per_group(self) -> int:
        """Heads that share a row of the logit scale."""
        return self.heads // max(self.groups, 1)

    def group(self, head: jax.Array) -> jax.Array:
        """The row of the logit scale of a head, for index maps."""
        return jax.lax.div(head, self.heads_per_group)

    def blocks(self) -> Blocks:
        """Block sizes of the three kernels, in tokens; `compute` is what is worked on at a time."""
        key = f"heads{self.heads} n{self.n} e{self.e} v{self.v} {jnp.dtype(self.dtype).name}"
        heuristic = {
            f"{kernel}_{part}": 512 if part == "compute" else 1024
            for kernel in ("forward", "dq", "dkv")
            for part in ("queries", "keys", "compute")
        }
        return pick("latent_attention_tpu", key, heuristic)


def sizes_of(query: jax.Array, kv: jax.Array, k_rope: jax.Array, logit_scale: jax.Array | None) -> Sizes:
    """Sizes of checked arguments."""
    rows, tokens, heads, both = query.shape
    e = k_rope.shape[-1]
    n = both - e
    groups = 0 if logit_scale is None else logit_scale.shape[1]
    return Sizes(rows, tokens, kv.shape[1], heads, groups, n, e, kv.shape[-1] - n, query.dtype)


def refusal(query: jax.Array, kv: jax.Array, k_rope: jax.Array) -> str | None:
    """Why a TPU cannot take these arguments, or None if it can. Interpreted, the kernels take everything."""
    if chip().platform != "tpu":
        return None
    sizes = sizes_of(query, kv, k_rope, None)
    for name, size in (("n", sizes.n), ("e", sizes.e), ("v", sizes.v)):
        if size % LANES:
            return f"{name} is {size}; accepted are multiples of {LANES}"
    chosen = sizes.blocks()
    for kernel in ("forward", "dq", "dkv"):
        blocks = pl.cdiv(sizes.tokens, chosen[f"{kernel}_queries"]) * pl.cdiv(
            sizes.keys, chosen[f"{kernel}_keys"]
        )
        if sizes.rows * blocks > _MOST_PAIRS:
            return (
                f"query and kv are {sizes.rows} rows of {sizes.tokens} and {sizes.keys} tokens, "
                f"{sizes.rows * blocks} pairs of blocks; accepted are {_MOST_PAIRS}"
            )
    return None


def fitted(block: int, length: int) -> int:
    """The block for a sequence that may be shorter: no longer than the next multiple of 128."""
    return min(block, -(-length // LANES) * LANES)


def listed(visible: Visible, whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lists and counts as kernels prefetch them: flat, blocks that need no mask marked.

    Args:
        whole: (B, own blocks, other blocks) bool.
    """
    marks = jnp.where(jnp.take_along_axis(whole, visible.blocks, axis=-1), _WHOLE, 0)
    return (visible.blocks | marks).reshape(-1), visible.counts.reshape(-1)


def block_of(entry: Index) -> Index:
    """The block that an entry of a list stands for."""
    return entry & (_WHOLE - 1)


def look(entry: Index, body: Callable[[bool], None]) -> None:
    """Runs body(masked) for an entry of a list."""
    pl.when(entry >= _WHOLE)(partial(body, False))
    pl.when(entry < _WHOLE)(partial(body, True))


def parts(block: int, compute: int) -> list[tuple[int, int]]:
    """(start, size) of the parts of a block that are worked on one after the other."""
    size = compute if block % compute == 0 else block
    return [(start, size) for start in range(0, block, size)]


def mask_specs(
    masks: MaskRows,
    query_block: int,
    key_block: int,
    query_index: Callable[..., tuple[Any, ...]],
    key_index: Callable[..., tuple[Any, ...]],
) -> list[pl.BlockSpec | None]:
    """Block specs of `mask_arguments`."""
    queries = pl.BlockSpec((None, 1, query_block), query_index)
    keys = pl.BlockSpec((None, 1, key_block), key_index)
    causal = masks.query_slots is not None
    return [queries, keys, queries if causal else None, keys if causal else None]


def mask_arguments(masks: MaskRows) -> list[jax.Array | None]:
    """The mask's rows as (B, 1, T'), (B, 1, S'): a block must span the last but one axis or hold 8 of it."""
    return [None if x is None else x[:, None] for x in masks]


class Walk(NamedTuple):
    """How the kernels that hold a block of queries go through the keys it can see.

    Attributes:
        grid: (rows, heads, query blocks, most key blocks that any of them sees).
        listed: lists' and counts' numbers, prefetched.
        most: length of a list.
        in_specs: of query, kv, k_rope, logit_scale and mask.
        arguments: logit_scale and mask as the specs take them.
        own: spec of an array (B, T, H·width), from width.
        own_row: spec of an array (B, H, 1, T').
    """

    grid: tuple[Any, ...]
    listed: tuple[jax.Array, jax.Array]
    most: int
    in_specs: list[Any]
    arguments: tuple[Any, Any]
    own: Callable[[int], pl.BlockSpec]
    own_row: pl.BlockSpec


def walk(sizes: Sizes, mask: AttentionMask, logit_scale: jax.Array | None, bq: int, bk: int) -> Walk:
    """Blocks of bq queries, of bk keys."""
    visible, masks = visible_keys(mask, sizes.keys, bq, bk), mask_rows(mask, sizes.keys, bq, bk)
    _, blocks, most = visible.blocks.shape

    def met(b: Index, i: Index, j: Index, lists: Any) -> Index:
        return block_of(lists[(b * blocks + i) * most + j])

    def own(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, bq, width), lambda b, h, i, j, *_: (b, i, h))

    kv = pl.BlockSpec((None, bk, sizes.n + sizes.v), lambda b, h, i, j, lists, _: (b, met(b, i, j, lists), h))
    rope = pl.BlockSpec((None, bk, sizes.e), lambda b, h, i, j, lists, _: (b, met(b, i, j, lists), 0))
    scale = pl.BlockSpec(
        (None, None, 1, bk), lambda b, h, i, j, lists, _: (b, sizes.group(h), 0, met(b, i, j, lists))
    )
    masked = mask_specs(
        masks,
        bq,
        bk,
        lambda b, h, i, j, *_: (b, 0, i),
        lambda b, h, i, j, lists, _: (b, 0, met(b, i, j, lists)),
    )
    return Walk(
        grid=(sizes.rows, sizes.heads, blocks, jnp.maximum(visible.counts.max(), 1)),
        listed=listed(visible, wholly_visible(mask, sizes.keys, bq, bk)),
        most=most,
        in_specs=[own(sizes.n + sizes.e), kv, rope, scale if sizes.groups else None, masked],
        arguments=(None if logit_scale is None else padded_rows(logit_scale, bk), mask_arguments(masks)),
        own=own,
        own_row=pl.BlockSpec((None, None, 1, bq), lambda b, h, i, j, *_: (b, h, 0, i)),
    )


def padded_rows(x: jax.Array, block: int) -> jax.Array:
    """(B, H, T) → (B, H, 1, T'), zeros up to whole blocks."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % block)])[:, :, None]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over one axis of each, in fp32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=exact, preferred_element_type=jnp.float32)


def column(row: jax.Array) -> jax.Array:
    """(1, N) → (N, 128), each number in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def column_of(numbers: jax.Array) -> jax.Array:
    """(N, 1) → (N, 128), each number in all lanes."""
    return jnp.broadcast_to(numbers, (numbers.shape[0], LANES))


def row(column: jax.Array) -> jax.Array:
    """(N, 128) → (1, N)."""
    return column.T[:1]


def across(column: jax.Array, width: int) -> jax.Array:
    """(N, 128) of equal lanes → something that broadcasts to (N, width)."""
    if width % LANES == 0:
        return jnp.tile(column, (1, width // LANES))
    return column[:, :1]


def inside(x: jax.Array, start: jax.Array, length: int, block: int) -> jax.Array:
    """x with zeros in the rows start + i ≥ length: what lies after an array's end may be NaN."""
    if length % block == 0:
        return x
    index = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(index < length, x, jnp.zeros_like(x))


def allowed(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_slots: jax.Array | None,
    key_slots: jax.Array | None,
) -> jax.Array:
    """Who sees whom; queries and keys broadcast against each other."""
    equal = query_segments == key_segments
    if query_slots is None or key_slots is None:
        return equal
    return equal & (key_slots <= query_slots)
