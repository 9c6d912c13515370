"""What a collector does on the devices: rollouts become rows to learn from, groups change, models read.

Everything is pure and jitted, and stays on the devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

from iv3jax.mcr.prompts import Prompts
from iv3jax.mcr.trajectories import FREE, Trajectories, as_batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.sharding import constrain
from iv3jax.train.policy import Rules, chosen, read
from iv3jax.train.policy_batch import PolicyBatch, each_field, policy_batch
from iv3jax.train.step import in_parts
from iv3jax.typing import Array, Params


@jax.jit
def rows_of(trajectories: Trajectories, prompts: Prompts) -> PolicyBatch:
    """R rollouts as R rows, without advantages; `old` is the sampler's."""
    record = trajectories.record
    batch = as_batch(trajectories, prompts)
    return _placed(policy_batch(batch, record.kinds == FREE, record.states, record.logprobs))


@jax.jit
def regrouped(old: PolicyBatch, new: PolicyBatch, rows: Array) -> PolicyBatch:
    """Rows (R,) of the old and the new ones, those numbered on from the old."""

    def take(pair: tuple[Array, Array], axis: int) -> Array:
        return jnp.take(jnp.concatenate(pair, axis=axis), rows, axis=axis)

    fresh = iter(jax.tree.leaves(new))
    return _placed(each_field(lambda x, axes: take((x, next(fresh)), axes.index("batch")), old))


@partial(jax.jit, static_argnums=1)
def part_of(batch: PolicyBatch, rows: int, start: Array) -> PolicyBatch:
    """`rows` rows from `start` on."""

    def cut(x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, rows, axes.index("batch"))

    return _placed(each_field(cut, batch))


@partial(jax.jit, static_argnums=(0, 1, 3))
def logprobs(model: InternVideo3, rules: Rules, params: Params, parts: int, batch: PolicyBatch) -> Array:
    """(R, T) fp32 log-probabilities of the labels as the trainer sees them, in `parts` parts of the rows."""

    def one(part: PolicyBatch) -> Array:
        return chosen(read(model, params, part.batch), part.labels, part.states, rules).logprob

    found = jax.lax.map(one, in_parts(batch, parts))
    return constrain(jnp.moveaxis(found, 0, 1).reshape(batch.states.shape), "batch", "sequence")


def _placed(batch: PolicyBatch) -> PolicyBatch:
    placed: PolicyBatch = each_field(lambda x, axes: constrain(x, *axes), batch)
    return placed
