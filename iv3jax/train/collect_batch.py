"""What a collector does on the devices: rollouts become rows to learn from, groups change, models read.

Everything is pure and jitted, and stays on the devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

from iv3jax.mcr.prompts import Prompts
from iv3jax.mcr.trajectories import FREE, Trajectories, after_others, as_batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.sharding import constrain
from iv3jax.train.distill import Teacher, TopK, teacher_top_k
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
def with_view(
    batch: PolicyBatch, trajectories: Trajectories, prompts: Prompts, others: Prompts
) -> PolicyBatch:
    """The rows of `rows_of` with what a teacher reads, who was asked by other prompts."""
    moved = after_others(trajectories, prompts, others)
    shift = (moved.length - trajectories.length)[:, None]
    places = jnp.arange(batch.states.shape[1], dtype=jnp.int32) + shift
    index = jnp.where(batch.free, places, 0)
    return _placed(batch._replace(teacher=as_batch(moved, others), teacher_index=index))


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

    return _rows(jax.lax.map(one, in_parts(batch, parts)), "sequence")


@partial(jax.jit, static_argnums=(0, 1, 3))
def teachers_logprobs(
    teacher: Teacher, rules: Rules, params: Params, parts: int, batch: PolicyBatch
) -> Array:
    """(R, T) fp32 log-probabilities of the labels as a teacher sees them, as `logprobs`."""

    def one(part: PolicyBatch) -> Array:
        return chosen(teacher.read(params, part), part.labels, part.states, rules).logprob

    return _rows(jax.lax.map(one, in_parts(batch, parts)), "sequence")


@partial(jax.jit, static_argnums=(0, 1, 2, 4))
def teachers_tokens(
    teacher: Teacher, rules: Rules, top: int, params: Params, parts: int, batch: PolicyBatch
) -> TopK:
    """(R, T, top) most likely tokens of a teacher."""

    def one(part: PolicyBatch) -> TopK:
        return teacher_top_k(teacher.read(params, part), part.labels, part.states, rules, top)

    found = jax.lax.map(one, in_parts(batch, parts))
    return TopK(*(_rows(x, "sequence", None) for x in found))


def _rows(parts: Array, *axes: str | None) -> Array:
    """What `in_parts` has split, (parts, rows, …), together again, in the order of the rows."""
    found = jnp.moveaxis(parts, 0, 1)
    return constrain(found.reshape(-1, *parts.shape[2:]), "batch", *axes)


def _placed(batch: PolicyBatch) -> PolicyBatch:
    placed: PolicyBatch = each_field(lambda x, axes: constrain(x, *axes), batch)
    return placed
