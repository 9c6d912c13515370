"""`iv3 bench tune`: block sizes of M²LA's kernels, measured on the TPU or GPU at hand.

From what an operation would choose, one block size after the other is halved or doubled for as long as that
is faster by more than NOISE. What it prints are rows for the table in kernels_pallas/blocks.py.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from iv3jax.bench.kernels import HEADS, NOPE, RANK, ROPE, SCALE, VALUE
from iv3jax.bench.table import as_text
from iv3jax.compiles import Stopwatch
from iv3jax.errors import UserError
from kernels_pallas import blocks
from kernels_pallas.choice import chip
from kernels_pallas.latent_attention.ops import latent_attention
from kernels_pallas.latent_compress.ops import latent_compress, latent_compress_into
from kernels_pallas.latent_decode.ops import latent_decode
from kernels_pallas.latent_prefill.ops import latent_prefill
from kernels_pallas.latents import Latents
from kernels_pallas.mask import AttentionMask

NOISE = 0.03
"""A change counts from here on."""

ROUNDS = 5
HIDDEN = 4096


@dataclass(frozen=True)
class Row:
    """The best block sizes found for one operation at one shape.

    Attributes:
        before: milliseconds with the sizes it would choose. after: with the best ones.
        tried: how many were measured; those that do not compile are not among them.
    """

    chip: str
    op: str
    key: str
    blocks: dict[str, int]
    before: float
    after: float
    tried: int


def bench_tune() -> dict[str, Any]:
    """Every operation at the 8B's sizes.

    Raises:
        UserError: this machine has no TPU or GPU.
    """
    if chip().platform == "cpu":
        raise UserError(
            "block sizes are measured on a TPU or GPU, and this machine has neither; what is used without "
            "measuring is in kernels_pallas/blocks.py and in each kernel's heuristic"
        )
    return {"rows": [asdict(row) for call in operations() for row in tune(call)]}


def operations(tokens: int = 8192, slots: int = 131072) -> list[Callable[[], Any]]:
    """A call of each operation at the 8B's sizes."""
    random = partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
    few, many = (1, 1), (1, min(1024, slots))
    x = random((1, tokens, HIDDEN))
    kernel = random((RANK + ROPE, HIDDEN))
    angles = jnp.ones((1, tokens, ROPE // 2))
    latents = Latents(random((1, 1, slots, RANK + ROPE)))
    up = random((HEADS, NOPE + VALUE, RANK))
    ones = jnp.ones((1, tokens), jnp.int32)
    order = jnp.arange(tokens, dtype=jnp.int32)[None]
    mask = AttentionMask(ones, ones, order)
    last = jnp.full(few, slots - 1, jnp.int32)
    chunk = slots - many[1] + jnp.arange(many[1], dtype=jnp.int32)[None]

    def attend(query: jax.Array, kv: jax.Array, k_rope: jax.Array) -> jax.Array:
        return jnp.sum(latent_attention(query, kv, k_rope, mask).astype(jnp.float32))

    whole = (
        random((1, tokens, HEADS, NOPE + ROPE)),
        random((1, tokens, HEADS, NOPE + VALUE)),
        random((1, tokens, ROPE)),
    )
    zero = jnp.int32(0)
    new = (x[:, : many[1]], kernel, None, angles[:, : many[1]], angles[:, : many[1]])
    into = (latents, zero, jnp.zeros(1, jnp.int32), jnp.full(1, many[1], jnp.int32), *new)
    decode = (random((*few, HEADS, RANK)), random((*few, HEADS, ROPE)), latents, zero, last, SCALE)
    prefill = (random((*many, HEADS, NOPE + ROPE)), latents, zero, up, chunk)
    return [
        lambda: jax.jit(latent_compress)(x, kernel, None, angles, angles),
        lambda: jax.jit(latent_compress_into)(*into),
        lambda: jax.jit(latent_decode, static_argnums=5)(*decode),
        lambda: jax.jit(latent_prefill)(*prefill),
        lambda: jax.jit(jax.grad(attend, (0, 1, 2)))(*whole),
    ]


def tune(call: Callable[[], Any]) -> list[Row]:
    """A row for each kernel that asks for block sizes in a call, traced anew when jax has forgotten it."""
    blocks.asked.clear()
    jax.clear_caches()
    call()

    def seconds(op: str, sizes: Mapping[str, int]) -> float:
        jax.clear_caches()
        with blocks.override(op, **sizes):
            try:
                jax.block_until_ready(call())
            except Exception:  # a size that the compiler refuses, in one of its many ways
                return math.inf
            taken = []
            for _ in range(ROUNDS):
                watch = Stopwatch()
                jax.block_until_ready(call())
                taken.append(watch.seconds)
        return statistics.median(taken)

    rows = []
    for op, (key, start) in dict(blocks.asked).items():
        best, before, after, tried = descend(start, partial(seconds, op))
        rows.append(Row(chip().name, op, key, best, 1e3 * before, 1e3 * after, tried))
    return rows


def descend(
    start: Mapping[str, int], seconds: Callable[[Mapping[str, int]], float]
) -> tuple[dict[str, int], float, float, int]:
    """Halves and doubles one size after the other → the best, seconds before and after, how many it tried."""
    best, before = dict(start), seconds(start)
    least, tried = before, 1
    for name in start:
        for factor in (2.0, 0.5):
            while (size := int(best[name] * factor)) >= 1:
                taken = seconds(best | {name: size})
                tried += math.isfinite(taken)
                if not taken < least * (1 - NOISE):
                    break
                best[name], least = size, taken
    return best, before, least, tried


def format_table(result: dict[str, Any]) -> str:
    """The rows for people, and for the table."""
    table = Table(title="block sizes, medians in milliseconds")
    for head in ("operation", "before", "after", "tried"):
        table.add_column(head, justify="left" if head == "operation" else "right")
    lines = []
    for row in result["rows"]:
        table.add_row(row["op"], f"{row['before']:.3f}", f"{row['after']:.3f}", str(row["tried"]))
        lines.append(f"{row['chip']}: {(row['op'], row['key'])!r}: {row['blocks']!r},")
    return as_text(table, 80) + "\n" + "\n".join(lines)
