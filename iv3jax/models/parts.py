"""Work done part by part, so that its memory does not grow with its size. What the parts are is elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mapped(function: Callable[[Any, Any], Any], weights: Any, parts: Any) -> Any:
    """`jax.lax.map(lambda part: function(weights, part), parts)`, with a backward pass of bounded memory.

    Nothing of a part is kept but itself: backwards it is computed again. Gradients of the weights are summed
    up in fp32 and become the weights' dtype at the end.

    Args:
        function: of weights and one part; it must not close over traced arrays.
        weights: a pytree of arrays.
        parts: a pytree of arrays with an axis of parts in front.
    """
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        out = function(weights, jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], out)
    return _mapped(function, weights, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mapped(function: Callable[[Any, Any], Any], weights: Any, parts: Any) -> Any:
    return jax.lax.map(partial(function, weights), parts)


def _forward(function: Callable[[Any, Any], Any], weights: Any, parts: Any) -> tuple[Any, Any]:
    return _mapped(function, weights, parts), (weights, parts)


def _backward(function: Callable[[Any, Any], Any], saved: Any, cotangents: Any) -> tuple[Any, Any]:
    weights, parts = saved
    floats, fixed = _halves(weights)

    def step(total: Any, given: Any) -> tuple[Any, Any]:
        part, cotangent = given
        moving, still = _halves(part)

        def of_floats(floats: list, moving: list) -> Any:
            return function(_whole(weights, floats, fixed), _whole(part, moving, still))

        _, pull = jax.vjp(of_floats, floats, moving)
        by_weights, by_part = pull(cotangent)
        return [t + g.astype(t.dtype) for t, g in zip(total, by_weights, strict=True)], by_part

    zeros = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in floats]
    total, by_parts = jax.lax.scan(step, zeros, (parts, cotangents))
    total = [t.astype(x.dtype) for t, x in zip(total, floats, strict=True)]
    none = partial(np.zeros, dtype=jax.dtypes.float0)
    return (
        _whole(weights, total, [none(x.shape) for x in fixed]),
        _whole(parts, by_parts, [none(x.shape) for x in _halves(parts)[1]]),
    )


_mapped.defvjp(_forward, _backward)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _halves(tree: Any) -> tuple[list, list]:
    """The leaves that have gradients, and the others."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if _is_float(x)], [x for x in leaves if not _is_float(x)]


def _whole(like: Any, floats: list, others: list) -> Any:
    """The tree again of its two halves."""
    leaves, structure = jax.tree.flatten(like)
    one, other = iter(floats), iter(others)
    return jax.tree.unflatten(structure, [next(one) if _is_float(x) else next(other) for x in leaves])
