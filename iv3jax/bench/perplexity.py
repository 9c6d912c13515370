"""How well a text model predicts windows of tokens: the mean of −log p, the log of the perplexity."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iv3jax.checkpoint.load import LoadedModel
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.loss import cross_entropy
from iv3jax.typing import Array, Params


def log_perplexity(loaded: LoadedModel, windows: np.ndarray, rows: int = 1, title: str = "") -> float:
    """Mean −log p in nats over all tokens of all windows but each window's first.

    Arguments as `token_losses`.
    """
    return float(token_losses(loaded, windows, rows, title).mean(dtype=np.float64))


def token_losses(loaded: LoadedModel, windows: np.ndarray, rows: int = 1, title: str = "") -> np.ndarray:
    """−log p of every token given those before it in its window, with progress shown on a terminal.

    Args:
        loaded: computes in the dtype it was loaded with; fp32 ones at full matmul precision.
        windows: (N, T) int token ids; every window stands alone.
        rows: windows computed at a time. Logits exist for LOGIT_CHUNK tokens of each.
        title: what the progress line says.

    Returns:
        (N, T − 1) fp32, in nats.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeRemainingColumn(),
    )
    out = []
    with (
        jax.set_mesh(loaded.mesh),
        jax.default_matmul_precision("highest"),
        Progress(*columns, disable=not sys.stdout.isatty()) as progress,
    ):
        for start in progress.track(range(0, len(windows), rows), description=title):
            part = windows[start : start + rows]
            # A last group of another size would be compiled for itself.
            ids = np.zeros((rows, windows.shape[1]), np.int32)
            ids[: len(part)] = part
            out.append(np.asarray(_losses(loaded.model, loaded.params, ids))[: len(part), :-1])
    return np.concatenate(out)


@partial(jax.jit, static_argnums=0)
def _losses(model: InternVideo3, params: Params, ids: Array) -> Array:
    """(B, T) ids → (B, T) fp32 loss of the next token, 0 at the last."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, rows, length))
    labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_LABEL)
    hidden = model.apply({"params": params}, Batch(ids, positions, jnp.ones_like(ids))).hidden
    return cross_entropy(model, params, hidden, labels)
