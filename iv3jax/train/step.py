"""One optimiser step as one program: gradients, accumulated over parts of the batch, and the update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from iv3jax.models.batch import LOGICAL_AXES, Batch
from iv3jax.sharding import constrain
from iv3jax.train.objective import Objective
from iv3jax.train.state import TrainState
from iv3jax.train.trainable import join
from iv3jax.typing import Array, Params


class Metrics(NamedTuple):
    """Of one step, fp32 scalars.

    Attributes:
        loss: the objective. grad_norm: before clipping.
        weight: Σ weights, the trained tokens where each counts one.
        applied: 1, or 0 where loss or gradients were not finite: then parameters and moments stay as they
            were.
    """

    loss: Array
    grad_norm: Array
    weight: Array
    applied: Array


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(
    optimizer: optax.GradientTransformation,
    objective: Objective,
    accumulate: int = 1,
    shardings: Params | None = None,
) -> Step:
    """(state, frozen parameters, batch) → (state, metrics), to be compiled.

    Args:
        accumulate: into how many parts the rows are split, computed one after the other. The loss's
            denominator is that of the whole batch, so the result is the one of all rows at once.
        shardings: where the gradients are to lie, which is where the parameters lie.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        weight = jnp.sum(objective.weights(batch))

        def loss(params: Params, part: Batch, key: Array) -> Array:
            losses = objective.losses(join(params, frozen), part, key)
            return jnp.sum(losses * objective.weights(part)) / jnp.maximum(weight, 1e-30)

        def gradients(part: Batch, key: Array) -> tuple[Array, Params]:
            value, found = jax.value_and_grad(loss)(state.params, part, key)
            if shardings is not None:
                found = jax.lax.with_sharding_constraint(found, shardings)
            return value, found

        if accumulate == 1:
            value, gradient = gradients(batch, key)
        else:

            def add(
                total: tuple[Array, Params], part: tuple[Batch, Array]
            ) -> tuple[tuple[Array, Params], None]:
                batch, key = part
                return jax.tree.map(jnp.add, total, gradients(batch, key)), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
            if shardings is not None:
                zeros = jax.lax.with_sharding_constraint(zeros, shardings)
            given = (_parts(batch, accumulate), jax.random.split(key, accumulate))
            (value, gradient), _ = jax.lax.scan(add, (jnp.float32(0), zeros), given)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        return TrainState(params, opt_state, state.step + 1, state.rng), Metrics(
            value, norm, weight, finite.astype(jnp.float32)
        )

    return step


def _parts(batch: Batch, count: int) -> Batch:
    """Every field with an axis of `count` parts in front. Neighbouring rows go to different parts, so that
    each device keeps the rows it holds.
    """

    def split(x: Array | None, axes: tuple[str | None, ...]) -> Array | None:
        if x is None:
            return None
        at = axes.index("batch")
        rows = x.shape[at] // count
        x = x.reshape(*x.shape[:at], rows, count, *x.shape[at + 1 :])
        return constrain(jnp.moveaxis(x, at + 1, 0), None, *axes)

    return Batch(*(split(x, axes) for x, axes in zip(batch, LOGICAL_AXES, strict=True)))
