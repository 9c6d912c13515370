"""`iv3 bench tasks` on a model that knows nothing."""

from pathlib import Path

import pytest

from iv3jax.bench.tasks import bench_tasks, format_table, most_frames
from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.data.config import SourceConfig
from iv3jax.errors import UserError

MODEL = load("tiny", random_weights=True)
ASKED = SourceConfig("task:chase", name="chase1", options=("seconds=96", "shown=1"))


@pytest.mark.slow
def test_a_model_that_knows_nothing_is_right_by_chance_only(tmp_path: Path):
    export("tiny", tmp_path / "model", random_weights=True)
    result = bench_tasks({"none": str(tmp_path / "model")}, videos=5, row="chase1")
    (row,) = result["rows"]
    assert row["loop"] == row["control"] == 0 and result["eyes"]["chase1"]["oracle"] == 1
    assert row["cache_bytes"] == pytest.approx(768 * row["tokens"])
    assert 0 < row["ceiling"] < 1 <= row["calls"]
    assert most_frames(MODEL.processor, ASKED, row["tokens"], 1) == row["frames"]
    assert "chase1" in format_table(result)


def test_a_single_look_has_as_many_tokens_and_not_two_frames_more():
    for tokens in (150.0, 201.5):
        frames = most_frames(MODEL.processor, ASKED, tokens, 1)
        assert frames < most_frames(MODEL.processor, ASKED, tokens + 20, 1)
    assert most_frames(MODEL.processor, ASKED, 0.0, 1) == 4


def test_an_unknown_row_is_refused():
    with pytest.raises(UserError, match="--row chase3: there are chase1, chase2"):
        bench_tasks({}, row="chase3")
