"""`iv3 bench kernels`: what M²LA's kernels read and send at the 8B's sizes, and XLA's forms on this machine.

Three tables. (1) Bytes a decoded token moves in one layer on a v5p. XLA's programs are compiled for that chip
and their own count is taken, a program of two layers minus one of one layer; a kernel's bytes are counted by
walking its grid through its block index maps. Nothing is run. (2) Bytes that a device receives for a token
and layer under context parallelism, from the compiled program. (3) Milliseconds of one layer here.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from rich.table import Table

from iv3jax import ops
from iv3jax.bench.table import as_text
from iv3jax.chips import compile_for, compile_on, devices
from iv3jax.compiles import Stopwatch
from iv3jax.hlo import collective_bytes
from iv3jax.models.cache import write
from iv3jax.sharding import make_mesh
from iv3jax.typing import Array, DType
from kernels_pallas.latent_compress.xla import write as write_latents
from kernels_pallas.latent_decode.reference import latent_decode_reference
from kernels_pallas.latent_decode.traffic import bytes_moved
from kernels_pallas.latents import Latents, one_layer, scale_rows
from kernels_pallas.mask import AttentionMask

HEADS, GROUPS, DIM = 32, 8, 128
RANK, ROPE, NOPE, VALUE = 896, 128, 128, 128
SCALE = (NOPE + ROPE) ** -0.5

GQA_ONCE = 2 * GROUPS * DIM * 2
"""Bytes of keys and values a cached token and layer, bf16: what a GQA that reads its cache once moves."""

CHIP = "v5p"
CONTEXTS = (32 << 10, 128 << 10, 512 << 10)
CPU_CONTEXTS = (2 << 10, 8 << 10, 32 << 10)
ROUNDS = 7


@dataclass(frozen=True)
class Traffic:
    """Bytes one decoded token moves in one layer.

    Attributes:
        ratio: times `GQA_ONCE` a cached token.
        fair_ratio: times what XLA's in-place GQA moves at this context.
    """

    name: str
    context: int
    bytes: int
    ratio: float
    fair_ratio: float


@dataclass(frozen=True)
class Exchange:
    """Bytes a device receives for one token of the sequence and layer, under context parallelism.

    Attributes:
        limit: (r+e)·2 bytes and 5 %.
        expanded: what the same exchange takes with keys and values instead of latents.
    """

    chip: str
    tokens: int
    devices: int
    forward: float
    limit: float
    expanded: float


@dataclass(frozen=True)
class Time:
    """One layer's attention of one new token on this machine, fp32: median milliseconds.

    Attributes:
        ratio: times the fair GQA's at this context.
    """

    name: str
    context: int
    milliseconds: float
    ratio: float


def bench_kernels() -> dict[str, Any]:
    """All three tables.

    Raises:
        UserError: the compilers of the `chips` extra are missing.
    """
    devices(CHIP)
    return {
        "chip": CHIP,
        "traffic": [asdict(row) for context in CONTEXTS for row in traffic(context)],
        "exchange": [asdict(exchange(CHIP, 256 << 10, 4))],
        "times": [asdict(row) for context in CPU_CONTEXTS for row in times(context)],
    }


# --- bytes of one decoded token


def traffic(context: int) -> list[Traffic]:
    """The rows of one context, batch 1."""
    counted = {
        "GQA as in PyTorch": _counted(torch_like_gqa, _gqa_cache(context)),
        "GQA in place": _counted(fair_gqa, _gqa_cache(context)),
        "M²LA absorbed, plain": _counted(plain_absorbed, _latent_cache(context)),
        "M²LA expanded": _counted(expanded, _expanded_cache(context)),
    }
    for name, dtype in (("bf16", "bfloat16"), ("int8", "int8")):
        moved = bytes_moved(
            [context], context, RANK, ROPE, HEADS, kind=dtype, chip=CHIP, scale_groups=scale_rows(RANK)
        )
        counted[f"M²LA kernel, {name}"] = moved.total
    fair = counted["GQA in place"]
    return [
        Traffic(name, context, size, size / (GQA_ONCE * context), size / fair)
        for name, size in counted.items()
    ]


def _counted(layer: Callable[..., Any], cache: dict[str, Any]) -> int:
    """Bytes of the second of two layers, as the compiler counts them."""

    def of(layers: int) -> float:
        def step(x: Array, slot: Array, caches: list[dict[str, Array]]) -> Any:
            written = []
            for own in caches:
                x, own = layer(x, slot, own)
                written.append(own)
            return x, written

        x = jax.ShapeDtypeStruct((1, 1, HEADS, DIM), jnp.bfloat16)
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        program = compile_for(CHIP, step, x, slot, [cache] * layers, donate=(2,))
        return program.cost_analysis()["bytes accessed"]

    return round(of(2) - of(1))


def _gqa_cache(context: int, dtype: DType = jnp.bfloat16) -> dict[str, Any]:
    shape = jax.ShapeDtypeStruct((1, 1, GROUPS, context, DIM), dtype)
    return {"key": shape, "value": shape}


def _latent_cache(context: int, dtype: DType = jnp.bfloat16) -> dict[str, Any]:
    return {"latent": jax.ShapeDtypeStruct((1, 1, context, RANK + ROPE), dtype)}


def _expanded_cache(context: int, dtype: DType = jnp.bfloat16) -> dict[str, Any]:
    kernel = jax.ShapeDtypeStruct((HEADS, NOPE + VALUE, RANK), dtype)
    return _latent_cache(context, dtype) | {"kernel": kernel}


def torch_like_gqa(x: Array, slot: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """A cache that grows by concatenation, keys and values repeated for every head, as in plain PyTorch."""
    new = x[None, :, 0, :GROUPS, None]
    cache = {name: jnp.concatenate([old[:, :, :, 1:], new], axis=3) for name, old in cache.items()}
    key, value = (jnp.repeat(x[0], HEADS // GROUPS, axis=1) for x in cache.values())
    # Materialised, as eager PyTorch does; XLA would fuse the repetition away.
    key, value = jax.lax.optimization_barrier((key, value))
    logits = jnp.einsum("bthk,bhsk->bhts", x, key, preferred_element_type=jnp.float32) * DIM**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    return jnp.einsum("bhts,bhsk->bthk", weights, value), cache


def fair_gqa(x: Array, slot: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """A preallocated cache written in place and read by groups: this project's own GQA."""
    new = x[:, :, :GROUPS]
    cache = {name: write(old, jnp.int32(0), slot[None, None], new) for name, old in cache.items()}
    mask = AttentionMask(jnp.ones((1, 1), jnp.int32), None, slot[None, None])
    return ops.attention_over_cache(x, cache["key"][0], cache["value"][0], mask), cache


def absorbed(x: Array, slot: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """M²LA over the latent cache in XLA, as this project runs it on a CPU."""
    latent, q_latent = _written(x, slot, cache), jnp.tile(x, (1, 1, 1, RANK // DIM))
    zero = jnp.int32(0)
    out = ops.latent_decode(q_latent, x, Latents(latent), zero, slot[None, None], SCALE, "xla")
    return out[..., :DIM].astype(x.dtype), {"latent": latent}


def plain_absorbed(x: Array, slot: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The same in plain jnp, the whole cache at once: XLA reads it for scores and again for values."""
    latent, q_latent = _written(x, slot, cache), jnp.tile(x, (1, 1, 1, RANK // DIM))
    given = (Latents(latent), jnp.int32(0), slot[None, None], None, None)
    out, _ = latent_decode_reference(q_latent, x, *given, scale=SCALE)
    return out[0, ..., :DIM].astype(x.dtype), {"latent": latent}


def expanded(x: Array, slot: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """M²LA with keys and values of the whole cache expanded at every step."""
    latent, kernel = _written(x, slot, cache), cache["kernel"]
    layer = one_layer(Latents(latent), 0)
    kv = jnp.einsum("bsr,hkr->bhsk", layer[..., :RANK], kernel)
    logits = jnp.einsum("bthk,bhsk->bhts", x, kv[..., :NOPE], preferred_element_type=jnp.float32)
    logits += jnp.einsum("bthe,bse->bhts", x, layer[..., RANK:], preferred_element_type=jnp.float32)
    seen = jnp.arange(layer.shape[1]) <= slot
    weights = jax.nn.softmax(jnp.where(seen, logits * SCALE, -jnp.inf), axis=-1).astype(x.dtype)
    out = jnp.einsum("bhts,bhsk->bthk", weights, kv[..., NOPE:])
    return out, {"latent": latent, "kernel": kernel}


def _written(x: Array, slot: Array, cache: dict[str, Array]) -> Array:
    """The cache with a latent made of x in its slot, put there as the model does it in XLA."""
    new = jnp.tile(x[:, :, 0], (1, 1, (RANK + ROPE) // DIM)).astype(jnp.float32)
    one = jnp.ones(1, jnp.int32)
    return write_latents(Latents(cache["latent"]), jnp.int32(0), slot[None], one, new).values


# --- bytes between devices


def exchange(chip: str, tokens: int, parts: int) -> Exchange:
    """One layer's attention of `tokens` tokens over `parts` devices, its forward pass."""
    topology = {"v5p": "2x2x1", "v5e": "2x2", "h100": f"1x1x{parts}"}[chip]
    mesh = make_mesh(devices(chip, topology), context=parts, fsdp=1)

    def attend(query: Array, latent: Array, kernel: Array, segments: Array, order: Array) -> Array:
        mask = AttentionMask(segments, segments, order, order)
        return ops.latent_attention(query, latent, kernel, mask)

    shapes = (
        jax.ShapeDtypeStruct((1, tokens, HEADS, NOPE + ROPE), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, tokens, RANK + ROPE), jnp.bfloat16),
        jax.ShapeDtypeStruct((HEADS, NOPE + VALUE, RANK), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )
    by_token = PartitionSpec(None, "context")
    specs = (by_token, by_token, PartitionSpec(), by_token, by_token)
    program = compile_on(chip, mesh, attend, specs, *shapes)
    received = sum(collective_bytes(program.as_text()).values())
    expanded = (HEADS * (NOPE + VALUE) + ROPE) * 2
    return Exchange(chip, tokens, parts, received / tokens, (RANK + ROPE) * 2 * 1.05, expanded)


# --- time on this machine


def times(context: int) -> list[Time]:
    """One layer of one new token, interleaved, fp32."""
    layers: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "GQA in place": (fair_gqa, _gqa_cache(context, jnp.float32)),
        "M²LA absorbed, plain": (plain_absorbed, _latent_cache(context, jnp.float32)),
        "M²LA absorbed, in blocks": (absorbed, _latent_cache(context, jnp.float32)),
        "M²LA expanded": (expanded, _expanded_cache(context, jnp.float32)),
    }
    x = jax.random.normal(jax.random.key(0), (1, 1, HEADS, DIM))
    slot = jnp.int32(context - 1)
    steps = {name: jax.jit(layer, donate_argnums=2) for name, (layer, _) in layers.items()}
    caches = {
        name: jax.tree.map(lambda s: jax.random.normal(jax.random.key(1), s.shape, s.dtype), shapes)
        for name, (_, shapes) in layers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            watch = Stopwatch()
            out, caches[name] = step(x, slot, caches[name])
            jax.block_until_ready(out)
            # The first turn compiles.
            if turn:
                seconds[name].append(watch.seconds)
    medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    fair = medians["GQA in place"]
    return [Time(name, context, ms, ms / fair) for name, ms in medians.items()]


def format_table(result: dict[str, Any]) -> str:
    """The three tables for people."""
    moved = Table(title=f"bytes one decoded token moves in one layer, batch 1, {result['chip']} (compiled)")
    for head in ("", "context", "MB", "× GQA read once", "× GQA in place"):
        moved.add_column(head, justify="left" if not head else "right")
    for row in result["traffic"]:
        moved.add_row(
            row["name"],
            f"{row['context'] >> 10} K",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['ratio']:.3f}",
            f"{row['fair_ratio']:.3f}",
        )
    sent = Table(title="bytes a device receives for a token and layer under context parallelism (compiled)")
    for head in ("chip", "tokens", "devices", "latents", "limit", "keys and values"):
        sent.add_column(head, justify="right")
    for row in result["exchange"]:
        figures = (f"{row[key]:,.0f}" for key in ("forward", "limit", "expanded"))
        sent.add_row(row["chip"], f"{row['tokens'] >> 10} K", str(row["devices"]), *figures)
    took = Table(title="one layer's attention of one new token on this machine, fp32, medians")
    for head in ("", "context", "ms", "× GQA in place"):
        took.add_column(head, justify="left" if not head else "right")
    for row in result["times"]:
        ms = f"{row['milliseconds']:.1f}"
        took.add_row(row["name"], f"{row['context'] >> 10} K", ms, f"{row['ratio']:.2f}")
    return "\n".join(as_text(table, 100) for table in (moved, sent, took))
