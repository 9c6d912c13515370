"""`sampling.choose` picks what jax's own argmax and categorical pick."""

import jax
import jax.numpy as jnp

from iv3jax.generate.sampling import Sampling, choose


def test_the_first_of_equals_and_never_what_is_forbidden():
    logits = jnp.array(
        [[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, 0.5], [0.0, -1.0, 0.0], [jnp.inf, 2.0, jnp.inf]]
    )
    keys = jax.random.split(jax.random.key(0), 4)
    assert choose(logits, keys, Sampling()).tolist() == [1, 2, 0, 0]
    assert choose(logits[1:2], keys[:1], Sampling(temperature=1.0)).tolist() == [2]


def test_random_choices_are_jaxs():
    logits = jax.random.normal(jax.random.key(1), (200, 37)) * 3
    keys = jax.random.split(jax.random.key(2), 200)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    assert jnp.array_equal(choose(logits, keys, Sampling(temperature=1.0)), expected)
