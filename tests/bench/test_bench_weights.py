"""The table of quantised weights: the reference against itself, and formats in the order of their error."""

import pytest

from iv3jax.bench.agreement import TASKS
from iv3jax.bench.weights import bench_weights, format_table
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save


@pytest.mark.slow
def test_rows(tmp_path):
    folder = save(load("tiny", random_weights=True), tmp_path / "tiny")
    result = bench_weights(str(folder), 2)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8", "nf4"]
    for key in ("answer", "text"):
        assert rows["bf16"][f"{key}_kl"] == 0 and rows["bf16"][f"{key}_top1"] == 1
        assert 0 < rows["int8"][f"{key}_kl"] < rows["nf4"][f"{key}_kl"]
        assert 0 < rows["nf4"][f"{key}_top1"] <= 1
    sizes = [row["weight_bytes"] for row in result["rows"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 2 * sizes[1]
    for row in result["rows"]:
        assert list(row["scores"]) == [case.name for case in TASKS]
    table = format_table(result)
    assert "nf4" in table and "KL answer" in table
