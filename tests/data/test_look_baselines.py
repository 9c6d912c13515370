"""Perfect eyes with other looks."""

import numpy as np
import pytest

from iv3jax.data.tasks import TRACES
from iv3jax.data.tasks.look_baselines import look_baselines

SHOWN = ("split=test", "overview=4", "zoom=4")


@pytest.mark.parametrize(
    ("name", "options"),
    [("at", ("seconds=64",)), ("chase", ("seconds=64",)), ("chase", ("seconds=64", "hops=2"))],
)
def test_only_looks_at_all_evidence_answer_every_question(name: str, options: tuple[str, ...]):
    found = look_baselines(TRACES[name]((*options, *SHOWN)), episodes=200)
    assert found.oracle == 1
    # Where one look is all that is needed it is the oracle's.
    assert found.one_look == 1 if name == "at" else found.one_look < 0.2
    assert found.blind < 0.1 and found.at_random < 0.5


def test_times_are_those_of_the_overview_and_of_every_zoom():
    source = TRACES["chase"](("seconds=64", "split=test", "overview=3", "zoom=2"))
    episode, question = source.draw(np.random.default_rng(0))
    windows = [window for window, _ in source.looks(np.random.default_rng(0), episode, question)]
    times = source.times(episode, windows)
    assert (np.diff(times) > 0).all() and len(times) == 2 * (3 + 2 * len(windows))
    for start, end in windows:
        assert ((times >= start) & (times < end)).sum() == 4
