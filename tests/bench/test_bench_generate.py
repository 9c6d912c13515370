"""`iv3 bench generate` on the smallest models: what it counts, and that both libraries compute the same."""

from dataclasses import replace

import pytest
from checkpoint.remote import modules  # noqa: F401 (a fixture for the whole file)
from models.peers import random_model, random_tensors, tiny_config

from iv3jax.bench import generate
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.sharding import make_mesh


@pytest.fixture(scope="module")
def result():
    """One round at two lengths of context."""

    def configs():
        tower = replace(tiny_config().vision_config, out_hidden_size=20)
        return {kind: replace(tiny_config(kind), vision_config=tower) for kind in ("m2la", "gqa")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "bench_configs", configs)
        patch.setattr(generate, "_READ_SHAPE", (64, 128))
        yield generate.bench_generate((24, 70), rounds=1)


@pytest.mark.slow
def test_both_libraries_compute_the_same(result):
    assert [row["context"] for row in result["rows"]] == [24] * 5 + [70] * 5
    assert all(row["logits_difference"] <= 2e-4 for row in result["rows"])
    assert len({row["name"] for row in result["rows"]}) == 5


@pytest.mark.slow
def test_ratios_are_to_the_faster_transformers_gqa(result):
    for context in (24, 70):
        rows = [row for row in result["rows"] if row["context"] == context]
        peers = [row for row in rows if row["name"] in generate.PEER_GQA]
        assert len(peers) == 2
        for ratio, rate in (("prefill_ratio", "prefill_rate"), ("decode_ratio", "decode_rate")):
            assert max(row[ratio] for row in peers) == 1
            best = max(row[rate] for row in peers)
            assert all(row[ratio] == pytest.approx(row[rate] / best) for row in rows)
        assert all(row["decode_ms"] == pytest.approx(1e3 / row["decode_rate"]) for row in rows)
        assert all(row["floor_share"] == pytest.approx(row["floor_ms"] / row["decode_ms"]) for row in rows)


@pytest.mark.parametrize(("kind", "width"), [("m2la", 13 + 8), ("gqa", 2 * 2 * 8)])
def test_the_floor_counts_what_a_token_reads(kind, width):
    """Every weight but tower and embedding table, and 3 layers of the cache for each token: fp32."""
    model, params = random_model(tiny_config(kind))
    values = random_tensors(model.config)
    read = [v.size for n, v in values.items() if "visual" not in n and "embed_tokens" not in n]
    loaded = LoadedModel(model, params, None, make_mesh())
    for context in (0, 70):
        assert generate._bytes_a_token(loaded, context) == 4 * (sum(read) + context * 3 * width)


@pytest.mark.slow
def test_the_table_has_every_row(result):
    table = generate.format_table(result)
    assert table.count("iv3jax M²LA") == 2 and "read rate" in table
