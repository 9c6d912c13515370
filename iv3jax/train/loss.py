"""The supervised objective: chunked cross-entropy in fp32 and its three reductions (SPEC §5)."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import compute_kernels
from iv3jax.models.parts import mapped
from iv3jax.sharding import MESH_AXES, gradients_first, with_weights
from iv3jax.typing import Array, Params

Reduction = Literal["token", "sample", "square"]

LOGIT_CHUNK = 512
"""Tokens of each row whose logits exist at one time."""


def cross_entropy(model: InternVideo3, params: Params, hidden: Array, labels: Array) -> Array:
    """−log p(label) of every token, zero where the label is ignored.

    Args:
        hidden: (B, T, D) from the model. labels: (B, T) int32.

    Returns:
        (B, T) fp32. Logits are made LOGIT_CHUNK tokens at a time, and again in the backward pass.
    """
    head, hidden = logit_inputs(model, params, hidden)
    tokens = ("batch", "sequence")
    # Tensor-parallel heads keep their part of the vocabulary.
    over = tuple(axis for axis in MESH_AXES if axis != "tensor")
    losses = partial(_cross_entropy, model)
    out: Array = with_weights(losses, head, [(*tokens, None), tokens], [tokens], hidden, labels, over=over)
    return out


def logit_inputs(model: InternVideo3, params: Params, hidden: Array) -> tuple[Params, Array]:
    """The parameters that logits are made of, in the dtype of computing, and the hidden states (B, T, D).

    The gradient of the vocabulary's matrix, 2.5 GB in fp32 at 8B, does not wait until the layers have theirs.
    """
    module, name = "lm_head", "kernel"
    if model.config.text_config.tie_word_embeddings:
        module, name = "embed_tokens", "embedding"
    head = compute_kernels(params[module], model.run.dtype)
    if name in head:
        (matrix,), hidden = gradients_first([head[name]], [("vocab", "embed")], hidden)
        head = {**head, name: matrix}
    return {module: head}, hidden


def _cross_entropy(model: InternVideo3, head: Params, hidden: Array, labels: Array) -> Array:
    """One device's tokens, with the parameters that logits are made of."""
    rows, length, width = hidden.shape
    chunk = min(LOGIT_CHUNK, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    padded = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE_LABEL)

    def one(head: Params, part: tuple[Array, Array]) -> Array:
        hidden, labels = part
        logits = model.apply({"params": head}, hidden, method="logits")
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.where(labels == IGNORE_LABEL, 0.0, loss)

    chunks = (
        hidden.reshape(rows, -1, chunk, width).swapaxes(0, 1),
        padded.reshape(rows, -1, chunk).swapaxes(0, 1),
    )
    return mapped(one, head, chunks).swapaxes(0, 1).reshape(rows, -1)[:, :length]


def token_weights(labels: Array, segment_ids: Array, reduction: Reduction) -> Array:
    """(B, T) fp32 weight of each trained token: 1, 1/n or 1/sqrt(n), n the trained tokens of its sample."""
    trained = (labels != IGNORE_LABEL).astype(jnp.float32)
    if reduction == "token":
        return trained
    length = labels.shape[1]

    def counts(trained: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(trained, segments, num_segments=length + 1)[segments]

    count = jnp.maximum(jax.vmap(counts)(trained, segment_ids), 1.0)
    return trained / (count if reduction == "sample" else jnp.sqrt(count))


def reduced(losses: Array, weights: Array) -> Array:
    """Σ w·CE / Σ w over the whole batch."""
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1e-30)
