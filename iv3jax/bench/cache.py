"""`iv3 bench cache`: what int8 or fp8 latent caches cost the digits' model, against the same one in bf16.

Nothing is timed here; `iv3 bench kernels` counts the bytes that a step reads.
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.table import Table

from iv3jax.bench.agreement import Asked, add_columns, agreement, cells, observe, questions
from iv3jax.bench.digits import batches
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.data.digits import conversation
from iv3jax.errors import UserError
from iv3jax.models.attention import M2LAAttention
from iv3jax.models.batch import Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, DType, Params

REFERENCE = "bfloat16"
DTYPES = ("float32", REFERENCE, "int8", "float8_e4m3fn")


def bench_cache(folder: str, videos: int = 100, seed: int = 1) -> dict[str, Any]:
    """`videos` held-out questions of each task, the same ones for every row and for the same seed.

    Computing is in bf16. `attention_error` is ‖attention − reference's‖ / ‖reference's‖ over all layers and
    tokens, what each layer adds to the hidden states; errors of earlier layers are in it.

    Raises:
        UserError: `load`'s, or a model that has no latents.
    """
    model = load(folder, dtype=jnp.bfloat16)
    text = model.config.text_config
    if text.kv_lora_rank is None:
        raise UserError(f"{folder}: has keys and values (GQA), not latents; there is nothing to compare")
    asked = questions(videos, seed)
    seen = {name: observe(model, asked, jnp.dtype(name)) for name in DTYPES}
    attended = {name: _attention(model, asked, jnp.dtype(name)) for name in DTYPES}
    exact = attended[REFERENCE]
    rows = []
    for name in DTYPES:
        size = jax.eval_shape(partial(init_cache, text, 1, 1, jnp.dtype(name))).nbytes
        error = float(np.linalg.norm(attended[name] - exact) / np.linalg.norm(exact))
        row = {"name": name, "bytes_per_token": size, "attention_error": error}
        rows.append(row | asdict(agreement(asked, seen[REFERENCE], seen[name])))
    return {"seed": seed, "videos": videos, "rows": rows}


def _attention(model: LoadedModel, asked: Asked, dtype: DType) -> np.ndarray:
    """What every layer's attention gives, all tokens of all prompts in one vector."""
    samples = [model.processor(conversation(video, [q], answered=True)) for video, q in asked]

    def parts() -> Iterable[np.ndarray]:
        for batch, count in batches(model, samples):
            out = np.asarray(_attention_of(model.model, dtype, model.params, batch), np.float32)
            real = np.asarray(batch.segment_ids)[:count] != 0
            yield out[:, :count][:, real].ravel()

    return np.concatenate(list(parts()))


@partial(jax.jit, static_argnums=(0, 1))
def _attention_of(model: InternVideo3, dtype: DType, params: Params, batch: Batch) -> Array:
    """(L, B, T, D)."""
    rows, length = batch.input_ids.shape
    cache = init_cache(model.config.text_config, rows, length, dtype, model.run.scan_layers)

    def of_attention(module: nn.Module, _: str) -> bool:
        return isinstance(module, M2LAAttention)

    given = {"capture_intermediates": of_attention, "mutable": ["intermediates"]}
    _, kept = model.apply({"params": params}, batch, None, cache, **given)
    out, _ = kept["intermediates"]["language_model"]["layers"]["self_attn"]["__call__"][0]
    return out


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(title=f"latent cache against {REFERENCE}, {result['videos']} held-out videos a task")
    table.add_column("cache")
    table.add_column("bytes a token", justify="right")
    table.add_column("attention error", justify="right")
    add_columns(table)
    for row in result["rows"]:
        error = f"{row['attention_error']:.2e}"
        table.add_row(row["name"], f"{row['bytes_per_token']:,}", error, *cells(row))
    return as_text(table, 165)
