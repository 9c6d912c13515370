"""Baselines of the long-video tasks: what simulation gives, formulas and enumeration give as well."""

from itertools import permutations, product

import numpy as np
import pytest

from iv3jax.data.tasks.baselines import baselines
from iv3jax.data.tasks.ceilings import how_many, pattern_law, patterns, visible
from iv3jax.data.tasks.chase import Chase, ends
from iv3jax.data.tasks.count import Count
from iv3jax.data.tasks.episode import longest, spread, uniform_times
from iv3jax.data.tasks.ground import Ground, estimate
from iv3jax.data.tasks.order import Order
from iv3jax.data.tasks.reading import At, Read, When
from iv3jax.data.tasks.task import Task

CASES: list[tuple[Task, int]] = [
    (Read(), 8),
    (At(), 32),
    (At(seconds=(40.0, 60.0), shown=(1.0, 4.0), events=4), 8),
    (When(), 16),
    (Chase(), 16),
    (Chase(hops=2), 24),
    (Chase(seconds=(48.0, 64.0), shown=(1.0, 2.0), chains=2), 16),
    (Ground(), 16),
    (Ground(seconds=(40.0, 48.0), events=3), 12),
    (Count(), 16),
    (Count(seconds=(30.0, 40.0), events=8, most=3), 24),
    (Order(), 12),
    (Order(events=7), 24),
]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("task", "frames"), CASES, ids=lambda x: f"{type(x).__name__}" if isinstance(x, Task) else f"{x}"
)
def test_what_is_simulated_is_what_formulas_say(task: Task, frames: int):
    found = baselines(task, frames, episodes=1200)
    assert abs(found.uniform - found.ceiling) <= 2.576 * found.error + 1e-9
    exact = not isinstance(task, Ground)
    assert found.oracle == 1 if exact else found.oracle > 0.94
    assert found.window is None or (found.window == 1 if exact else found.window > 0.8)
    assert found.uniform <= found.oracle + 1e-9
    if exact:
        chance = {Count: 1 / getattr(task, "most", 1), Order: 0.5}.get(type(task), 1 / 90)
        assert found.chance == pytest.approx(chance)
        # The strategy is chosen on other episodes, so that it scores like any other here: by chance.
        assert abs(found.blind - chance) < 2.576 * np.sqrt(chance * (1 - chance) / 1200)


def test_the_blind_answer_to_a_span_is_the_best_of_all_fixed_ones():
    found = baselines(When(events=1), 32, episodes=1000)
    # In a plain way: the mean IoU of each interval between tenths with uniformly placed spans.
    rng = np.random.default_rng(1)
    length = rng.uniform(4, 7, 20_000)
    duration = rng.integers(10, 17, 20_000)
    start = 0.25 + rng.uniform(0, 1, 20_000) * (duration - 0.5 - length)
    best, every = 0.0, []
    for i, j in product(range(11), range(11)):
        if i < j:
            a, b = duration * i / 10, duration * j / 10
            shared = np.clip(np.minimum(b, start + length) - np.maximum(a, start), 0, None)
            every.append((shared / (b - a + length - shared)).mean())
    best = max(every)
    assert found.blind == pytest.approx(best, abs=0.03) and found.chance == pytest.approx(
        np.mean(every), abs=0.02
    )


@pytest.mark.parametrize(
    ("duration", "frames", "cells", "shown"), [(64, 16, 6, (1, 2)), (31, 40, 3, (1, 4)), (9, 4, 6, (1, 1))]
)
def test_visible_shares(duration, frames, cells, shown):
    rng = np.random.default_rng(0)
    times = uniform_times(duration, frames)
    seen = np.zeros(cells)
    for _ in range(4000):
        spans = np.array(spread(rng, duration, cells, shown))
        seen += [np.any((times >= start) & (times < end)) for start, end in spans]
    expected = visible(duration, frames, cells, shown)
    assert np.all(np.abs(seen / 4000 - expected) < 3.5 * np.sqrt(expected * (1 - expected) / 4000) + 0.01)


def test_the_laws_of_what_is_seen():
    seen = np.array([0.1, 0.5, 0.9, 0.3])
    law = pattern_law(seen)
    assert law.sum() == pytest.approx(1) and how_many(seen).sum() == pytest.approx(1)
    for k in range(5):
        assert how_many(seen)[k] == pytest.approx(law[patterns(4).sum(axis=1) == k].sum())


@pytest.mark.parametrize(("chains", "hops"), [(2, 1), (3, 1), (3, 2), (4, 2)])
def test_ends_of_a_broken_chain_are_as_likely_as_an_enumeration_says(chains: int, hops: int):
    rng = np.random.default_rng(0)
    every = list(product(permutations(range(chains)), repeat=hops))
    for _ in range(20):
        seen = rng.random((chains, hops + 1)) < rng.random()
        counts = np.zeros(chains)
        for links in every:
            # A pointer that is seen leads where it truly leads: to the next event of its own chain.
            if all(link[c] == c for level, link in enumerate(links) for c in range(chains) if seen[c, level]):
                at = 0
                for link in links:
                    at = link[at]
                counts[at] += 1
        np.testing.assert_allclose(ends(seen), counts / counts.sum(), atol=1e-12)


def test_chase_where_all_or_nothing_is_seen():
    assert Chase(seconds=(20.0, 20.0)).ceiling(768) == pytest.approx(1)
    # 4 frames of 900 seconds: what is left is to guess one of 90.
    assert Chase(seconds=(900.0, 900.0)).ceiling(4) == pytest.approx(1 / 90, abs=2e-3)


def test_counting_what_is_never_seen_is_chance_and_all_seen_is_certain():
    assert Count(seconds=(900.0, 900.0)).ceiling(4) == pytest.approx(1 / 4, abs=0.01)
    assert Count(seconds=(30.0, 30.0)).ceiling(768) == pytest.approx(1)
    assert Order(seconds=(900.0, 900.0)).ceiling(4) == pytest.approx(1 / 2, abs=0.01)
    assert Order(seconds=(30.0, 30.0)).ceiling(768) == pytest.approx(1)


@pytest.mark.parametrize(("shown", "frames"), [((1.0, 2.0), 16), ((1.0, 1.0), 16), ((1.0, 2.0), 32)])
def test_no_other_interval_around_the_frames_does_much_better(shown, frames):
    """So the ceiling of grounding, which is this estimate's, is one for any reader, to 0.015."""
    rng = np.random.default_rng(0)
    times, duration = uniform_times(64.0, frames), 64.0
    length = rng.uniform(*shown, 40_000)
    start = rng.uniform(5, 55, 40_000)
    first, last = np.searchsorted(times, start), np.searchsorted(times, start + length)
    for count in (1, 2):
        mine = last - first == count
        if mine.sum() < 100:
            continue
        a, b = estimate(times, first[mine], last[mine], duration, (shown[0], longest(duration, 2, shown)))
        ious = [
            iou(a - e, b + e, start[mine], start[mine] + length[mine]) for e in np.linspace(-0.6, 0.6, 49)
        ]
        assert max(ious) - ious[24] < 0.015


def iou(a: np.ndarray, b: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    shared = np.clip(np.minimum(b, end) - np.maximum(a, start), 0, None)
    return float((shared / (b - a + end - start - shared)).mean())
