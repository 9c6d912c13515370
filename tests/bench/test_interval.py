"""Intervals of mean scores."""

import numpy as np
import pytest

from iv3jax.bench.interval import interval


def test_right_or_wrong_is_wilson():
    # Brown, Cai and DasGupta (2001): 0 of 10 and 8 of 10.
    assert interval(np.zeros(10)) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_other_scores_are_normal_and_stay_scores():
    low, high = interval(np.array([0.2, 0.4, 0.6]))
    assert (low + high) / 2 == pytest.approx(0.4) and high - low == pytest.approx(2 * 1.96 * 0.2 / 3**0.5)
    assert interval(np.array([0.9, 1.0, 0.5, 1.0]))[1] == 1.0
