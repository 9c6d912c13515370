"""The rollouts' bench: both loops answer the same questions, and what is said of them."""

import pytest

from iv3jax.bench.rollout import bench_rollout, format_table


@pytest.mark.slow
def test_both_loops_answer():
    small = ("collect.prompts=4", "collect.group=8", "rollout.slots=4")
    found = bench_rollout(rounds=1, overrides=small)
    ours, theirs = found["rows"]
    assert found["rollouts"] == 32
    assert found["ratio"] == pytest.approx(ours["rollouts_per_second"] / theirs["rollouts_per_second"])
    for row in (ours, theirs):
        assert 1 <= row["calls"] <= 4 and row["tokens"] > 10 and 0 < row["useful"] <= 1
    # The same random policy, by other random numbers.
    assert ours["calls"] == pytest.approx(theirs["calls"], rel=0.3)
    assert "host loop" in format_table(found)
