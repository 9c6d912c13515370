"""A light distillation of a converted text model: its attention learns the source's next-token probabilities.

End to end, so that a layer makes up for what those before it lose, and short, so that what is compared is how
good a start a conversion is.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax

from iv3jax.bench.conversion_lab import with_attention
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.distill import reverse_kl
from iv3jax.typing import Array, Params

RATES = {"transmla": 1e-3, "iv3": 2e-4}
"""Adam's learning rate, by method. After the smaller one TransMLA's loses more on the judge's windows; the
larger one tears ours apart, whose latents' directions differ in size (docs/conversion.md)."""

WARMUP = 0.125
"""Share of the steps in which the rate rises; then it falls to 0."""

_ADAM = optax.scale_by_adam()


def distilled(
    converted: LoadedModel, source: LoadedModel, batches: Sequence[Batch], rate: float
) -> tuple[LoadedModel, list[float]]:
    """One pass over calibration tokens, a batch a step; the forward KL, mean over tokens, fp32.

    Args:
        converted, source: text models of one vocabulary, whose layers stand alone.
        batches: packed rows; padding is not counted.

    Returns:
        The model, and the KL(source ‖ converted) before each step, in nats a token.
    """
    decoder = converted.params["language_model"]
    layers = [name for name in decoder if name.startswith("layers_")]
    attention = {name: decoder[name]["self_attn"] for name in layers}
    missed, rise = [], max(1, round(WARMUP * len(batches)))
    with jax.set_mesh(converted.mesh):
        state = _ADAM.init(attention)
        for step, batch in enumerate(batches):
            now = rate * min(1, (step + 1) / rise) * (1 - step / len(batches))
            models = (converted.model, source.model)
            given = (converted.params, source.params, jax.tree.map(jnp.asarray, batch))
            attention, state, kl = _step(*models, attention, state, jnp.float32(now), *given)
            missed.append(float(kl))
    return replace(converted, params=with_attention(converted.params, attention)), missed


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    student: InternVideo3,
    teacher: InternVideo3,
    attention: Params,
    state: optax.OptState,
    rate: Array,
    params: Params,
    teachers: Params,
    batch: Batch,
) -> tuple[Params, optax.OptState, Array]:
    wanted = _logits(teacher, teachers, batch)
    real = batch.segment_ids != 0

    def missed(attention: Params) -> Array:
        found = _logits(student, with_attention(params, attention), batch)
        # The reverse KL of the teacher beside the student is the student's forward one.
        kl = reverse_kl(wanted, found, jnp.ones(wanted.shape, bool))
        return jnp.sum(jnp.where(real, kl, 0.0)) / jnp.sum(real)

    loss, gradients = jax.value_and_grad(missed)(attention)
    updates, state = _ADAM.update(gradients, state)
    return jax.tree.map(lambda x, u: x - rate * u, attention, updates), state, loss


def _logits(model: InternVideo3, params: Params, batch: Batch) -> Array:
    """(B, T, V) fp32."""
    hidden = model.apply({"params": params}, batch).hidden
    logits: Array = model.apply({"params": params}, hidden, method="logits")
    return logits.astype(jnp.float32)
