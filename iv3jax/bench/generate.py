"""`iv3 bench generate`: prefill and decode of a model of about 100 M parameters, beside PyTorch.

One process, fp32, one row of text, as many threads each as the machine has cores. Everyone takes turns: in
each round each one feeds the same prompt and then decodes a few tokens, and the machine's read rate is
measured; the figures are medians over the rounds. The two models have the same shape but for their attention,
whose ratio is the 8B's: the latent cache is half of GQA's. PyTorch runs the folders that `export` writes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from iv3jax.bench.table import as_text
from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.verify import require_torch, torch_model
from iv3jax.compiles import Stopwatch
from iv3jax.generate.generate import DecodeState, decode_block, prefill
from iv3jax.generate.sampling import Sampling
from iv3jax.models.batch import Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig, TextConfig, VisionConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.layers import Execution
from iv3jax.sharding import make_mesh, param_shardings

NEW_TOKENS = 16
"""Tokens decoded in a round."""

_READ_SHAPE = (8192, 16384)
"""The matrix whose product with a vector measures the read rate: 512 MiB in fp32, far more than any cache."""

OURS = "iv3jax"
PEER_GQA = ("transformers GQA, dynamic cache", "transformers GQA, static cache")


def bench_configs() -> dict[str, ModelConfig]:
    """The two models, "m2la" and "gqa": 12 layers of width 768, 12 heads of 64 (3 for GQA's keys)."""
    text = TextConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=65536,
        rope_theta=5e6,
        mrope_section=(12, 10, 10),
    )
    latent: dict[str, Any] = dict(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    tower = VisionConfig(
        depth=1,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=768,
        num_position_embeddings=64,
    )
    ids: dict[str, Any] = dict(
        image_token_id=16380,
        video_token_id=16381,
        vision_start_token_id=16382,
        vision_end_token_id=16383,
    )
    return {
        "m2la": ModelConfig("internvideo3", replace(text, attention_bias=True, **latent), tower, **ids),
        "gqa": ModelConfig("qwen3_vl", replace(text, use_qk_norm=True), tower, **ids),
    }


class Contender(Protocol):
    """One model in one library."""

    def prefill(self, ids: np.ndarray) -> tuple[float, np.ndarray]:
        """Feeds a prompt (T,) into a new cache → seconds and the logits (V,) that follow it."""
        ...

    def decode(self) -> float:
        """Goes on by NEW_TOKENS tokens → seconds."""
        ...


class _Ours:
    """A model of ours, its layers standing alone."""

    def __init__(self, loaded: LoadedModel, capacity: int) -> None:
        self._loaded, self._capacity = loaded, capacity
        self._state: DecodeState | None = None

    def prefill(self, ids: np.ndarray) -> tuple[float, np.ndarray]:
        self._state = None
        model, count = self._loaded.model, len(ids)
        positions = np.broadcast_to(np.arange(count, dtype=np.int32), (3, 1, count))
        batch = Batch(ids[None].astype(np.int32), positions, np.ones((1, count), np.int32))
        text = model.config.text_config
        watch = Stopwatch()
        cache = init_cache(text, 1, self._capacity, model.run.dtype, model.run.scan_layers)
        self._state = jax.block_until_ready(prefill(model, self._loaded.params, batch, cache))
        return watch.seconds, np.asarray(self._state.logits[0])

    def decode(self) -> float:
        assert self._state is not None
        watch = Stopwatch()
        self._state, tokens = decode_block(
            self._loaded.model,
            Sampling(),
            NEW_TOKENS,
            self._loaded.params,
            self._state,
            jnp.zeros(0, jnp.int32),
            jax.random.key(0),
            jnp.int32(NEW_TOKENS),
        )
        jax.block_until_ready(tokens)
        return watch.seconds


class _Torch:
    """A folder in transformers. Its forward is called directly, which is faster than its `generate`."""

    def __init__(self, model: Any, static: int | None = None) -> None:
        self._model, self._static = model, static
        self._cache: Any = None
        self._logits: Any = None

    def prefill(self, ids: np.ndarray) -> tuple[float, np.ndarray]:
        import torch
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        self._cache = DynamicCache(config=config)
        if self._static is not None:
            self._cache = StaticCache(config=config, max_cache_len=self._static)
        self._position = 0
        start = time.perf_counter()
        self._feed(torch.from_numpy(ids[None].astype(np.int64)))
        return time.perf_counter() - start, self._logits[0].numpy().copy()

    def decode(self) -> float:
        start = time.perf_counter()
        for _ in range(NEW_TOKENS):
            self._feed(self._logits.argmax(-1, keepdim=True))
        return time.perf_counter() - start

    def _feed(self, ids: Any) -> None:
        import torch

        count = ids.shape[1]
        positions = torch.arange(self._position, self._position + count)
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                position_ids=positions.expand(3, 1, count),
                past_key_values=self._cache,
                cache_position=positions,
                use_cache=True,
                logits_to_keep=1,
            )
        self._position += count
        self._logits = out.logits[:, -1]


@dataclass
class _Times:
    """Seconds of every round, and the prompt's logits of the last."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one length of context. Rates are in tokens a second.

    Attributes:
        name: the contender.
        context: tokens of the prompt.
        prefill_rate, decode_rate: medians over the rounds.
        decode_ms: milliseconds a token.
        prefill_ratio, decode_ratio: times the rate of the faster transformers GQA in this row's context.
        floor_ms: time to read the weights and the cache once at the measured read rate.
        floor_share: floor_ms / decode_ms.
        logits_difference: largest difference from the same model in the other library.
    """

    name: str
    context: int
    prefill_rate: float
    decode_rate: float
    decode_ms: float
    prefill_ratio: float
    decode_ratio: float
    floor_ms: float
    floor_share: float
    logits_difference: float


def bench_generate(contexts: tuple[int, ...] = (1024, 8192), rounds: int = 3) -> dict[str, Any]:
    """Measures all contenders at all lengths of context.

    Raises:
        UserError: torch or transformers is missing.
    """
    require_torch(".")
    import torch

    torch.set_num_threads(_cores())
    with tempfile.TemporaryDirectory() as temporary:
        models = {kind: _model(kind, Path(temporary)) for kind in bench_configs()}
        peers = {kind: torch_model(Path(temporary) / kind, models[kind].config) for kind in models}
        read = _Reader()
        rows: list[Row] = []
        # The first round compiles and touches all memory once.
        _rounds(models, peers, min(contexts), 1, read)
        for context in contexts:
            times, rate = _rounds(models, peers, context, rounds, read)
            rows += _rows(context, times, rate, models)
    parameters = {k: sum(x.size for x in jax.tree.leaves(m.params)) for k, m in models.items()}
    return {
        "rounds": rounds,
        "threads": _cores(),
        "parameters": parameters,
        "read_rate": statistics.median(read.seen),
        "rows": [asdict(row) for row in rows],
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _model(kind: str, folder: Path) -> LoadedModel:
    """A model with random weights, written to folder/kind and loaded from there."""
    config = bench_configs()[kind]
    model, mesh = InternVideo3(config), make_mesh(jax.devices()[:1])
    params = init_params(model, jax.random.key(0), param_shardings(boxed_params(model), mesh))
    export(LoadedModel(model, params, None, mesh), folder / kind)
    return load(folder / kind, run=Execution(scan_layers=False))


class _Reader:
    """Bytes a second that a matrix-vector product reads."""

    def __init__(self) -> None:
        self._product = jax.jit(jnp.matmul)
        self._operands = jnp.ones((1, _READ_SHAPE[0])), jnp.ones(_READ_SHAPE)
        self._product(*self._operands).block_until_ready()
        self.seen: list[float] = []

    def __call__(self) -> float:
        start = time.perf_counter()
        self._product(*self._operands).block_until_ready()
        self.seen.append(4 * _READ_SHAPE[0] * _READ_SHAPE[1] / (time.perf_counter() - start))
        return self.seen[-1]


def _rounds(
    models: dict[str, LoadedModel],
    peers: dict[str, Any],
    context: int,
    rounds: int,
    read: Callable[[], float],
) -> tuple[dict[str, _Times], float]:
    """Everyone's times at one context, and the median read rate while they were taken."""
    capacity = context + 4 * NEW_TOKENS
    dynamic, static = PEER_GQA
    contenders: dict[str, Contender] = {
        dynamic: _Torch(peers["gqa"]),
        static: _Torch(peers["gqa"], capacity),
        "exported M²LA in PyTorch": _Torch(peers["m2la"]),
        f"{OURS} GQA": _Ours(models["gqa"], capacity),
        f"{OURS} M²LA": _Ours(models["m2la"], capacity),
    }
    text_tokens = models["m2la"].config.image_token_id  # the special ones come last
    ids = np.random.default_rng(0).integers(0, text_tokens, context)
    times = {name: _Times() for name in contenders}
    rates = []
    for _ in range(rounds):
        for name, contender in contenders.items():
            rates.append(read())
            seconds, times[name].logits = contender.prefill(ids)
            times[name].prefill.append(seconds)
            times[name].decode.append(contender.decode())
    return times, statistics.median(rates)


def _rows(context: int, times: dict[str, _Times], rate: float, models: dict[str, LoadedModel]) -> list[Row]:
    prefills = {name: context / statistics.median(t.prefill) for name, t in times.items()}
    decodes = {name: NEW_TOKENS / statistics.median(t.decode) for name, t in times.items()}
    best_prefill, best_decode = (max(rates[name] for name in PEER_GQA) for rates in (prefills, decodes))
    rows = []
    for name in times:
        kind = "gqa" if "GQA" in name else "m2la"
        floor = _bytes_a_token(models[kind], context) / rate
        pair = [t.logits for n, t in times.items() if ("GQA" in n) == (kind == "gqa")]
        difference = max(float(np.max(np.abs(x - pair[-1]))) for x in pair if x is not None)
        rows.append(
            Row(
                name,
                context,
                prefills[name],
                decodes[name],
                1e3 / decodes[name],
                prefills[name] / best_prefill,
                decodes[name] / best_decode,
                1e3 * floor,
                floor * decodes[name],
                difference,
            )
        )
    return rows


def _bytes_a_token(model: LoadedModel, context: int) -> int:
    """Bytes that one more token must read: every weight but tower and embedding table, and the cache."""
    params = {k: v for k, v in model.params.items() if k not in ("visual", "embed_tokens")}
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    text = model.config.text_config
    return (
        weights
        + context * text.num_hidden_layers * text.cache_width * jnp.dtype(model.model.run.dtype).itemsize
    )


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    sizes = ", ".join(f"{kind} {count / 1e6:.0f} M" for kind, count in result["parameters"].items())
    table = Table(
        title=f"fp32, {result['threads']} threads, medians of {result['rounds']} rounds; "
        f"parameters: {sizes}; read rate {result['read_rate'] / 1e9:.1f} GB/s"
    )
    names = (
        "context",
        "",
        "prefill tok/s",
        "×",
        "decode tok/s",
        "ms",
        "×",
        "floor ms",
        "of floor",
        "logits Δ",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "" else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["context"]),
            row["name"],
            f"{row['prefill_rate']:.0f}",
            f"{row['prefill_ratio']:.2f}",
            f"{row['decode_rate']:.1f}",
            f"{row['decode_ms']:.1f}",
            f"{row['decode_ratio']:.2f}",
            f"{row['floor_ms']:.1f}",
            f"{row['floor_share']:.0%}",
            f"{row['logits_difference']:.1e}",
        )
    return as_text(table, 120)
