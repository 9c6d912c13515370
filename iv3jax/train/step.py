"""One optimiser step as one program: gradients, accumulated over parts of the batch, and the update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from iv3jax.sharding import constrain
from iv3jax.train.objective import Objective
from iv3jax.train.policy_batch import each_field
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
        terms: means of the objective's other terms, by name.
    """

    loss: Array
    grad_norm: Array
    weight: Array
    applied: Array
    terms: Mapping[str, Array]


Step = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]


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

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        weight = jnp.sum(objective.weights(batch))

        def loss(params: Params, part: Any, key: Array) -> tuple[Array, dict[str, Array]]:
            losses, others = objective.all_terms(join(params, frozen), part, key)
            share = objective.weights(part) / jnp.maximum(weight, 1e-30)
            means = {name: jnp.sum(jax.lax.stop_gradient(x) * share) for name, x in others.items()}
            return jnp.sum(losses * objective.weights(part)) / jnp.maximum(weight, 1e-30), means

        def gradients(part: Any, key: Array) -> _Found:
            (value, means), found = jax.value_and_grad(loss, has_aux=True)(state.params, part, key)
            if shardings is not None:
                found = jax.lax.with_sharding_constraint(found, shardings)
            return _Found(value, means, found)

        if accumulate == 1:
            whole = gradients(batch, key)
        else:

            def add(total: _Found, part: tuple[Any, Array]) -> tuple[_Found, None]:
                batch, key = part
                return jax.tree.map(jnp.add, total, gradients(batch, key)), None

            given = (in_parts(batch, accumulate), jax.random.split(key, accumulate))
            shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], given))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
            if shardings is not None:
                placed = jax.lax.with_sharding_constraint(zeros.gradient, shardings)
                zeros = zeros._replace(gradient=placed)
            whole, _ = jax.lax.scan(add, zeros, given)
        value, means, gradient = whole
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        return TrainState(params, opt_state, state.step + 1, state.rng), Metrics(
            value, norm, weight, finite.astype(jnp.float32), means
        )

    return step


class _Found(NamedTuple):
    """Of a part of the rows: the loss, the means of other terms, and the gradient."""

    value: Array
    means: dict[str, Array]
    gradient: Params


def in_parts(batch: Any, count: int) -> Any:
    """Every field with an axis of `count` parts in front. Neighbouring rows go to different parts, so that
    each device keeps the rows it holds.
    """

    def split(x: Array, axes: tuple[str | None, ...]) -> Array:
        at = axes.index("batch")
        rows = x.shape[at] // count
        x = x.reshape(*x.shape[:at], rows, count, *x.shape[at + 1 :])
        return constrain(jnp.moveaxis(x, at + 1, 0), None, *axes)

    return each_field(split, batch)
