"""Which pairs keep RoPE where layers choose: against least squares written out, and where it is known."""

import numpy as np
import pytest

from iv3jax.conversion.choose import most_turned
from iv3jax.conversion.logits import Samples

HEADS, M, ROWS = 3, 7, 400


def samples_of(turned: np.ndarray, still: np.ndarray, target: np.ndarray) -> Samples:
    """Of complex features (H, rows, M) and targets (H, rows)."""
    z = np.concatenate([turned, still], axis=-1)
    x = np.concatenate([z.real, -z.imag], axis=-1)
    moment = np.einsum("hrn,hrm->hnm", x, x)
    return Samples(moment, np.einsum("hrn,hr->hn", x, target), np.sum(target**2, axis=1))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Still features, which are correlated, and the same turned by random angles, some of them little."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(HEADS, M, M)) + 1j * rng.normal(size=(HEADS, M, M))
    still = (rng.normal(size=(HEADS, ROWS, M)) + 1j * rng.normal(size=(HEADS, ROWS, M))) @ mixed
    angles = rng.normal(size=(HEADS, ROWS, M)) * np.geomspace(3, 0.03, M)
    return still * np.exp(1j * angles), still


def left_over(samples: Samples, turned: list[int], ridge: float) -> float:
    """What ridge least squares with all still components and these turned ones leaves, over all heads."""
    n = samples.target.shape[1]
    m = n // 4
    used = [*range(m, 2 * m), *range(3 * m, n), *turned, *(2 * m + i for i in turned)]
    total = 0.0
    for moment, target, energy in zip(*samples, strict=True):
        inner = moment[np.ix_(used, used)] + ridge * np.trace(moment) / n * np.eye(len(used))
        total += energy - target[used] @ np.linalg.solve(inner, target[used])
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [1e-9, 3e-2])
def test_each_time_the_one_that_leaves_least(seed, ridge):
    turned, still = draw(seed)
    rng = np.random.default_rng(100 + seed)
    weights = rng.normal(size=(HEADS, 1, M)) + 1j * rng.normal(size=(HEADS, 1, M))
    samples = samples_of(turned, still, np.sum(weights * turned, axis=-1).real)
    expected: list[int] = []
    for count in range(1, M + 1):
        others = [j for j in range(M) if j not in expected]
        expected.append(min(others, key=lambda j: left_over(samples, [*expected, j], ridge)))
        assert list(most_turned(samples, count, ridge)) == sorted(expected)


def test_those_that_the_logits_are_made_of():
    turned, still = draw(7)
    target = (2 * turned[..., 1] + turned[..., 4] + still[..., 0] - 3 * still[..., 5]).real
    assert list(most_turned(samples_of(turned, still, target), 2, 1e-9)) == [1, 4]


def test_heads_that_say_nothing_are_no_trouble():
    turned, still = draw(8)
    turned[1], still[1] = 0, 0
    target = turned[..., 2].real
    assert list(most_turned(samples_of(turned, still, target), 1)) == [2]
