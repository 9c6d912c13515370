"""The training bench compares the same thing: both libraries start with the same loss on the same batch."""

import pytest

from iv3jax.bench.train import bench_train, format_table


@pytest.mark.slow
def test_both_libraries_train_the_same_model():
    result = bench_train(rounds=1, steps=1)
    ours, theirs = result["rows"]
    assert (ours["name"], theirs["name"]) == ("iv3jax", "PyTorch")
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    assert result["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert 0 <= result["wait_share"] < 1
    table = format_table(result)
    assert "PyTorch" in table and "waiting for data" in " ".join(table.split())
