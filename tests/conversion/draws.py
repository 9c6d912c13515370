"""Random numbers for the tests of a conversion's algebra, in float64. Nothing here asserts."""

import numpy as np


def random(*shape, seed=0):
    """Of a normal distribution."""
    return np.random.default_rng(seed).normal(size=shape)


def positive(size, seed=0):
    """A symmetric matrix whose eigenvalues are all above 0."""
    x = random(size, 2 * size, seed=seed)
    return x @ x.T / size
