"""The latent in any metric, the fits beside it, and the budget: on planted data, in float64."""

import numpy as np
import pytest
from conversion.draws import positive, random
from models.peers import difference

from iv3jax.conversion.budget import spend
from iv3jax.conversion.factorise import adapters, factorise
from iv3jax.conversion.measure import affine_fit, residual
from iv3jax.errors import UserError

TOLERANCE = 1e-10
CONTENT, VALUES, INPUTS, RANK = 4, 6, 9, 5


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_at_full_rank_no_metric_changes_anything(spread):
    """Balance (step 5) is such a metric: a weight for content and one for values."""
    size, inputs = 12, 17
    regression, features = random(size, inputs), positive(inputs, seed=1)
    weights = np.exp(spread * random(size, seed=2))
    metrics = [np.diag(weights), weights[:, None] * positive(size, seed=3) * weights]
    for metric in metrics:
        factors = factorise(regression, features, metric)
        assert difference(factors.up(size) @ factors.down(size), regression) <= TOLERANCE


def test_what_is_lost_is_the_error_in_the_metric():
    """And no other map of that rank loses less: the one by plain PCA does not."""
    size, inputs, rank = 12, 17, 5
    regression, features, metric = random(size, inputs), positive(inputs, seed=1), positive(size, seed=2)
    factors = factorise(regression, features, metric)
    cost = factors.root @ factors.root
    assert difference(cost, metric) <= 1e-3

    def error(of):
        wrong = regression - of.up(rank) @ of.down(rank)
        return np.trace(cost @ wrong @ features @ wrong.T)

    assert abs(error(factors) - factors.lost[rank]) <= TOLERANCE * factors.lost[0]
    assert (np.diff(factors.energies) <= 0).all() and factors.lost[size] == 0
    assert error(factors) < error(factorise(regression, features, np.eye(size)))


def adapter_data(alike):
    """Features (2, T, 9) of text and of vision, the last a constant, their moments, and a latent for both."""
    x = random(2, 300, INPUTS, seed=1)
    x[1] = x[0] if alike else 0.8 * x[1] + 0.2
    x[..., -1] = 1
    regression = random(CONTENT + VALUES, INPUTS, seed=2) / INPUTS
    # The content's mean is nothing to the softmax, and not in the latent.
    regression[:CONTENT, -1] -= regression[:CONTENT] @ x.mean(axis=(0, 1))
    features = np.einsum("mtx,mtz->mxz", x, x) / 600
    return x, features, factorise(regression, features.sum(axis=0), positive(CONTENT + VALUES, seed=3))


def test_adapters_of_tokens_that_are_alike_change_nothing():
    _, features, factors = adapter_data(alike=True)
    kernel, bias = adapters(factors.regression @ features, features, factors, RANK, CONTENT)
    assert np.abs(kernel - np.eye(RANK)).max() <= TOLERANCE and np.abs(bias).max() <= TOLERANCE


def test_planted_adapters_come_back():
    """But for the pull towards no change; a content that is moved for all tokens changes nothing."""
    x, features, factors = adapter_data(alike=False)
    kernel, bias = np.eye(RANK) + 0.3 * random(2, RANK, RANK, seed=4), random(2, RANK, seed=5)
    latent = np.einsum("mrs,mts->mtr", kernel, x @ factors.down(RANK).T) + bias[:, None]
    y = latent @ factors.up(RANK).T
    mean = np.where(np.arange(CONTENT + VALUES) < CONTENT, y.mean(axis=(0, 1)), 0)

    def found(y):
        return adapters(np.einsum("mty,mtx->myx", y, x) / 600, features, factors, RANK, CONTENT)

    # What is wanted of the latent is its projection, from which the content's mean is taken out.
    shift = factors.left[:, :RANK].T @ factors.root @ mean
    for got, expected in zip(found(y), (kernel, bias - shift), strict=True):
        assert difference(got, expected) <= 2e-2
    for got, moved in zip(found(y), found(y + 3 * mean), strict=True):
        assert difference(moved, got) <= TOLERANCE


def test_affine_fits_of_planted_maps():
    """Exact without a pull, the prior with a strong one; the residual is what noise was added."""
    x = random(2, 500, 5)
    x = np.concatenate([x @ random(5, 5, seed=1) + 1, np.ones((2, 500, 1))], axis=-1)
    maps, prior = random(2, 4, 6, seed=2), random(2, 4, 6, seed=3)
    noise = random(2, 500, 4, seed=4)
    noise -= x @ np.linalg.pinv(x) @ noise
    features = np.einsum("htx,htz->hxz", x, x) / 500
    for add in (0, 1):
        y = np.einsum("hkx,htx->htk", maps, x) + add * noise
        cross, energy = np.einsum("hty,htx->hyx", y, x) / 500, np.sum(y * y, axis=(1, 2)) / 500
        found = affine_fit(cross, features, prior, 0.0)
        assert difference(found, maps) <= TOLERANCE
        missed = np.sum(add * noise**2) / np.sum(y * y)
        assert abs(residual(found, cross, features, energy) - missed) <= TOLERANCE
        assert difference(affine_fit(cross, features, prior, 1e9), prior) <= 1e-6


def test_a_budget_is_spent_where_it_saves_the_most():
    steep, flat = 0.5 ** np.arange(64), 0.03 * 0.99 ** np.arange(64)
    ranks = spend([steep, flat, 10 * flat], 96, 8, 64)
    assert sum(ranks) == 96 and all(rank % 8 == 0 and rank >= 8 for rank in ranks)
    assert ranks[0] < ranks[1] < ranks[2] <= 64

    # No exchange of a step would save more.
    def kept(ranks):
        return sum(x[:rank].sum() for x, rank in zip((steep, flat, 10 * flat), ranks, strict=True))

    for i in range(3):
        for j in range(3):
            other = [r + 8 * ((k == i) - (k == j)) for k, r in enumerate(ranks)]
            if i != j and 8 <= min(other) and max(other) <= 64:
                assert kept(other) <= kept(ranks) + 1e-12


def test_what_all_layers_can_hold_is_the_most():
    assert spend([np.ones(20)] * 2, 1000, 8, 20) == (16, 16)
    assert spend([np.ones(64)] * 3, 31, 8, 64) == (8, 8, 8)


def test_a_budget_below_one_step_for_each_layer():
    with pytest.raises(
        UserError, match="a budget of 23 ranks is less than 8 for each of 3 layers; ask for more"
    ):
        spend([np.ones(64)] * 3, 23, 8, 64)
