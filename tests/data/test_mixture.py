"""The global order: every record once an epoch, weights kept, and a pure function of its arguments."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iv3jax.data.mixture import Mixture


# grain needs milliseconds for a place in a source of few records.
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_each_record_once_an_epoch(lengths, seed):
    mixture = Mixture(lengths, [float(n) for n in lengths], seed)
    whole = [(source, record) for source, n in enumerate(lengths) for record in range(n)]
    size = sum(lengths)
    for epoch in range(3):
        drawn = [mixture[i] for i in range(epoch * size, (epoch + 1) * size)]
        assert sorted(drawn) == whole


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=2, max_size=4), st.integers(0, 99))
def test_weights_and_epochs_of_each_source(sources, seed):
    lengths, weights = zip(*((n, tenths / 10) for n, tenths in sources), strict=True)
    mixture = Mixture(lengths, weights, seed)
    drawn = [mixture[i] for i in range(120)]
    for count in (10, 57, 120):
        counts = Counter(source for source, _ in drawn[:count])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - count * weight / sum(weights)) <= len(weights)
    for source, length in enumerate(lengths):
        own = [record for s, record in drawn if s == source]
        for start in range(0, len(own) - length + 1, length):
            assert sorted(own[start : start + length]) == list(range(length))


def test_order_is_looked_up_not_walked():
    lengths, weights = [50, 70], [3.0, 1.0]
    forward = [Mixture(lengths, weights, 5)[i] for i in range(200)]
    mixture = Mixture(lengths, weights, 5)
    assert [mixture[i] for i in reversed(range(200))] == forward[::-1]
    assert mixture[10**12] == Mixture(lengths, weights, 5)[10**12]


def test_shuffles_differ_by_seed_epoch_and_source():
    mixture = Mixture([64, 64], [1.0, 1.0], 0)
    first = [[r for s, r in (mixture[i] for i in range(128)) if s == source] for source in (0, 1)]
    second = [r for s, r in (mixture[i] for i in range(128, 256)) if s == 0]
    other = [r for s, r in (Mixture([64, 64], [1.0, 1.0], 1)[i] for i in range(128)) if s == 0]
    orders = [tuple(order) for order in (*first, second, other, range(64))]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("weights", [(0.1, 0.2), (1e-6, 1.0), (1 / 3, 2 / 3)])
def test_odd_weights(weights):
    mixture = Mixture([3, 3], weights, 0)
    counts = Counter(mixture[i][0] for i in range(100))
    assert abs(counts[1] - 100 * weights[1] / sum(weights)) <= 1
