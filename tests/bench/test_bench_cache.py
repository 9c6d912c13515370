"""The table of cache dtypes: the reference against itself, and dtypes in the order of their error."""

import pytest

from iv3jax.bench.cache import DTYPES, bench_cache, format_table
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save


@pytest.mark.slow
def test_rows(tmp_path):
    folder = save(load("tiny", random_weights=True), tmp_path / "tiny")
    result = bench_cache(str(folder), 2)
    rows = {row["name"]: row for row in result["rows"]}
    assert tuple(rows) == DTYPES
    same = rows["bfloat16"]
    assert (
        same["attention_error"] == same["answer_kl"] == 0 and same["text_top1"] == same["same_answers"] == 1
    )
    errors = [rows[name]["attention_error"] for name in ("int8", "float8_e4m3fn")]
    assert 0 < errors[0] < errors[1] < 0.2
    sizes = [rows[name]["bytes_per_token"] for name in DTYPES]
    assert sizes[0] == 2 * sizes[1] and sizes[1] > sizes[2] == sizes[3]
    table = format_table(result)
    assert "bytes a" in table and all(name[:8] in table for name in DTYPES)
