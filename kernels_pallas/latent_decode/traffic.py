"""Bytes that latent_decode's TPU kernel fetches and writes, counted by walking its grid. Runs nothing.

Each input's index map is followed from step to step; a block that did not change is not fetched again.
The kernel's own cost declaration is not used, for it has none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.choice import Chip, target
from kernels_pallas.latent_decode import tpu
from kernels_pallas.latents import LARGEST, Latents, groups_of


class Traffic(NamedTuple):
    """Bytes between HBM and the kernel in one call.

    Attributes:
        cache: latents, or codes and RoPE keys.
        scales: of a quantised cache.
        queries: with the last slot that each sees.
        outputs: sums and log-sum-exps of all splits, written.
        merged: what joining the splits reads and writes again; 0 for one split.
    """

    cache: int
    scales: int
    queries: int
    outputs: int
    merged: int

    @property
    def total(self) -> int:
        return sum(self)


def bytes_moved(
    lengths: Sequence[int],
    capacity: int,
    rank: int,
    rope_dim: int,
    heads: int,
    *,
    tokens: int = 1,
    kind: str = "bfloat16",
    chip: str = "v5p",
    splits: int | None = None,
    scale_groups: int | None = None,
    page_table: np.ndarray | None = None,
) -> Traffic:
    """What one call over one layer moves.

    Args:
        lengths: slots that each row of the batch sees.
        capacity: S, slots of a row; of a page with a page table.
        kind: "float32", "bfloat16", "int8" or "float8_e4m3fn". Quantised, queries and RoPE keys are bf16.
        chip: "v5e" or "v5p", for block sizes and splits.
        scale_groups: groups that the scales have room for; None for as few as the rank needs.
        page_table: (B, P) int32.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("float32", "bfloat16", *LARGEST):
        raise ValueError(f"kind is {kind!r}; accepted are 'float32', 'bfloat16', 'int8', 'float8_e4m3fn'")
    rows, quantized = len(lengths), kind in LARGEST
    groups = scale_groups or groups_of(rank)
    owners = rows if page_table is None else int(page_table.max()) + 1

    def cached(*shape: int, dtype: str) -> jax.Array:
        return jax.ShapeDtypeStruct((1, owners, *shape), jnp.dtype(dtype))  # type: ignore[return-value]

    if quantized:
        latents = Latents(
            cached(capacity, rank, dtype=kind),
            cached(groups, capacity, dtype="float32"),
            cached(capacity, rope_dim, dtype="bfloat16"),
        )
    else:
        latents = Latents(cached(capacity, rank + rope_dim, dtype=kind))
    pages = None if page_table is None else page_table.shape[1]
    with target(Chip("tpu", chip)):
        walk = tpu.plan(latents, rope_dim, (rows, tokens, heads), pages, splits)

    row, split, step = (x.reshape(-1) for x in np.indices(walk.grid, dtype=np.int32))
    table = None if page_table is None else page_table.reshape(-1)
    page, block = (np.asarray(x) for x in walk.place(row, split, step, np.asarray(lengths, np.int32), table))
    new = np.ones(len(row), bool)
    new[1:] = (page[1:] != page[:-1]) | (block[1:] != block[:-1])
    slots = int(np.minimum(walk.block, walk.page - block[new] * walk.block).sum())

    queries = tokens * heads
    query_bytes = 4 if kind == "float32" else 2
    part = rows * queries * (rank + 1) * 4
    return Traffic(
        cache=slots * tpu.slot_bytes(latents),
        scales=slots * groups * 4 if quantized else 0,
        # The last slots are a column, of which each number takes a line of 128.
        queries=rows * queries * ((rank + rope_dim) * query_bytes + 512),
        outputs=walk.splits * part,
        merged=(walk.splits + 1) * part if walk.splits > 1 else 0,
    )
