"""`sharding.gradients_first`: what it is given comes back, and only what needs a gradient has one made."""

import jax
import jax.numpy as jnp
import pytest

from iv3jax.sharding import gradients_first

AXES = [("vocab", "embed"), ("embed", "vocab")]


def loss(first, second, x, ordered):
    """Of (7, 5), (5, 7) and (3, 5)."""
    y = jnp.tanh(x)
    if ordered:
        (first, second), y = gradients_first([first, second], AXES, y)
    return jnp.sum(jnp.sin(jnp.sin(y @ first.T) @ second.T) * y)


def given():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, ((7, 5), (5, 7), (3, 5)), strict=True)]


def gradients(moving: tuple[int, ...], ordered: bool):
    function = jax.value_and_grad(lambda *xs: loss(*xs, ordered), argnums=moving)
    return jax.jit(function).lower(*given()).compile()


@pytest.mark.parametrize("moving", [(0, 1, 2), (0, 1), (1, 2), (0,), (2,)])
def test_values_and_gradients_are_the_same_and_none_is_made_in_vain(moving):
    plain, ordered = gradients(moving, False), gradients(moving, True)
    for a, b in zip(*(jax.tree.leaves(f(*given())) for f in (plain, ordered)), strict=True):
        assert jnp.array_equal(a, b) and jnp.any(a != 0)
    products = [f.as_text().count(" dot(") for f in (plain, ordered)]
    assert products[0] == products[1] > 2


def test_a_weight_that_nothing_reads_has_a_gradient_of_zero():
    def unread(first, second, x):
        (first, _), x = gradients_first([first, second], AXES, x)
        return jnp.sum(first) + 0 * jnp.sum(jax.lax.stop_gradient(x))

    by_first, by_second, by_x = jax.jit(jax.grad(unread, argnums=(0, 1, 2)))(*given())
    assert jnp.all(by_first == 1) and not jnp.any(by_second) and not jnp.any(by_x)


def test_x_waits_for_the_weights():
    """In what the compiler is given: the gradients go through one barrier together."""
    text = jax.jit(jax.grad(lambda *xs: loss(*xs, True), argnums=(0, 1, 2))).lower(*given()).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert [line.count("%") for line in barriers].count(barriers[0].count("%")) == 2 == len(barriers)
