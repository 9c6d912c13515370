"""convert, folder to folder: exact where nothing is cut, and everything that can be asked for.

Random weights show that a conversion is right, not that it is good: `iv3 bench conversion` measures that.
"""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from models.peers import conversation, difference, even_config, forward, random_tensors, write_folder

import iv3jax
from iv3jax import ConvertConfig
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.verify import verify
from iv3jax.conversion.calibration import Calibration, from_samples, text_sample
from iv3jax.conversion.config import plan
from iv3jax.conversion.convert import Converted
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.models.config import ModelConfig

LENGTH = 40
VISION = even_config("gqa", num_hidden_layers=2)
"""Four key heads of 8 dims: RoPE keys of 8 to 32, content of 24 to 0, values of 32."""
PLAIN = replace(VISION.text_config, mrope_section=None)
SOURCES = {
    "vision": VISION,
    "llama": ModelConfig("llama", replace(PLAIN, use_qk_norm=False, tie_word_embeddings=True)),
    "qwen2": ModelConfig("qwen2", replace(PLAIN, use_qk_norm=False, attention_bias=True)),
    "qwen3": ModelConfig("qwen3", PLAIN),
}
ITEMS = {
    "text": [30],
    "image": [5, ("image", 1, 4, 4), 9],
    "video": [4, ("video", 2, 4, 4), 7],
}


def samples(config: ModelConfig, seed: int) -> list:
    """A conversation of each kind that the model takes."""
    kinds = ITEMS if config.vision_config else ["text"]
    return [conversation(config, ITEMS[kind], seed + i) for i, kind in enumerate(kinds)]


def calibration(config: ModelConfig) -> Calibration:
    """Two batches of eight rows, or one of text and three with vision."""
    rng = np.random.default_rng(0)
    texts = [text_sample(rng.integers(0, 90, LENGTH)) for _ in range(8 if config.vision_config else 16)]
    seen = [s for i in range(12) for s in samples(config, 10 * i)[1:]]
    return from_samples(texts + seen, config, length=LENGTH, rows=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources with random weights."""
    made = tmp_path_factory.mktemp("sources")
    return {
        name: write_folder(made / name, config, random_tensors(config)) for name, config in SOURCES.items()
    }


def converted(folders, name, out, **asked) -> Converted:
    config = ConvertConfig(tokens=640, length=LENGTH, **asked)
    return iv3jax.convert(folders[name], out, config, calibration(SOURCES[name]))


def logits(loaded: LoadedModel, config: ModelConfig) -> list[np.ndarray]:
    """Of the tokens of one row for each kind, which calibration did not see."""
    rows = samples(config, 1000)
    found = forward(loaded.model, loaded.params, collate([[row] for row in rows], config, length=LENGTH))
    return [np.asarray(found["logits"][i, : len(row)]) for i, row in enumerate(rows)]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("vision", dict(qk_norm="cached")),
        ("vision", dict(qk_norm="cached", rope_pairs="even", rope_components=4)),
        ("qwen3", dict(qk_norm="cached")),
        ("llama", dict(rope_pairs="even", rope_components=4)),
        ("qwen2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_with_nothing_cut_the_logits_are_the_source_s(folders, tmp_path, name, asked):
    """All components keep RoPE, the latent holds all values, norms are kept or there are none.

    1e-3 is allowed on text, an image and a video; 1e-5 to 4e-5 is seen.
    """
    width = {} if "rope_components" in asked else dict(rope_dim=32)
    done = converted(folders, name, tmp_path / "out", rank=32, **width, **asked)
    before, after = (logits(load(folder), SOURCES[name]) for folder in (folders[name], tmp_path / "out"))
    assert len(before) == (3 if name == "vision" else 1)
    for kind, wanted, got in zip(ITEMS, before, after, strict=False):
        assert difference(got, wanted) <= 1e-3, kind
    assert abs(done.report.log_perplexity - done.report.log_perplexity_source) < 1e-4
    assert all(layer.output_error < 1e-6 for layer in done.report.layers)


@pytest.mark.medium
def test_all_that_a_converted_model_can_have_at_once(folders, tmp_path):
    """Adapters, cached norms, chosen frequencies and ranks by layer: config, cache, PyTorch."""
    asked = dict(cache_fraction=0.75, rope_dim=16, qk_norm="cached", adapters=True, budget="dynamic")
    done = converted(folders, "vision", tmp_path / "out", **asked)
    loaded = load(tmp_path / "out")
    text, ranks = loaded.config.text_config, done.report.ranks
    assert text.kv_lora_rank_list == (ranks if len(set(ranks)) > 1 else None)
    assert text.kv_lora_rank == max(ranks) and sum(ranks) <= 2 * (0.75 * 64 - 16 - 8)
    assert text.latent_adapters and text.use_qk_norm
    frequencies = text.rope_frequency_list
    assert [len(own) for own in frequencies] == [8, 8] and all(
        own == tuple(sorted(own)) for own in frequencies
    )
    assert loaded.config.model_type == "internvideo3" and text.qk_rope_head_dim == 16
    if len(set(ranks)) == 1:
        assert done.report.cache_bytes <= 0.75 * done.report.cache_bytes_source

    row = samples(VISION, 1000)[2]
    batch = collate([[row]], VISION, length=LENGTH)
    new = generate(loaded.model, loaded.params, batch, max_new_tokens=5, stop_ids=[]).tokens[0]
    whole = conversation(VISION, [*ITEMS["video"], 5], 1002)
    whole.input_ids[len(row) :] = new
    after = np.asarray(
        forward(loaded.model, loaded.params, collate([[whole]], VISION, length=LENGTH))["logits"]
    )
    assert new == after[0, len(row) - 1 : len(row) + 4].argmax(-1).tolist()

    assert all(line.passed for line in verify(tmp_path / "out"))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("vision", dict(method="iv3", rank=16, qk_norm="dropped")),
        ("vision", dict(method="transmla", rank=16)),
        ("vision", dict(method="care", rank=16)),
        ("vision", dict(method="svd", rank=16)),
        ("qwen3", dict(method="iv3", rank=16)),
        ("qwen2", dict(method="transmla", rank=16, rope_dim=4, freqfold=4)),
        ("llama", dict(method="iv3", rank=16, rope_dim=4, budget="dynamic")),
        ("llama", dict(method="care", rank=16, budget="dynamic")),
        ("llama", dict(method="svd", rank=16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_method_makes_a_model(folders, tmp_path, name, asked):
    """It loads, its logits are nearer the source's than chance, and the report says what was done."""
    done = converted(folders, name, tmp_path / "out", **asked)
    loaded = load(tmp_path / "out")
    assert loaded.config.model_type == ("internvideo3" if name == "vision" else "internvideo3_text")
    wanted = logits(load(folders[name]), SOURCES[name])
    for got, there in zip(logits(loaded, SOURCES[name]), wanted, strict=True):
        assert np.isfinite(got).all()
        # Unrelated ones would be √2 of their spread apart.
        assert np.sqrt(np.mean((got - there) ** 2)) < 1.2 * there.std()
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report == json.loads(json.dumps(asdict(done.report)))
    assert report["method"] == asked["method"] and report["settings"]["rank"] == 16
    assert report["cache_bytes"] < report["cache_bytes_source"]
    assert all(math.isfinite(layer["output_error"]) for layer in report["layers"])
    normed = name in ("vision", "qwen3") and asked.get("qk_norm") != "dropped"
    assert all((layer["key_norm_residual"] is not None) == normed for layer in report["layers"])
    assert "<svg" in (tmp_path / "out" / "conversion.html").read_text()
    assert not (tmp_path / "out.converting").exists()


@pytest.mark.medium
def test_heads_that_are_zero(tmp_path):
    """A key head, its values and some of its queries that pruning has taken out leave nothing singular."""
    values = random_tensors(VISION)
    for name, value in values.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            value[:8] = 0
        elif name.endswith("self_attn.q_proj.weight"):
            value[:4] = 0
    folder = write_folder(tmp_path / "vision", VISION, values)
    done = converted({"vision": folder}, "vision", tmp_path / "out", rank=16, adapters=True)
    assert all(layer.output_error < 0.5 for layer in done.report.layers)
    assert all(np.isfinite(found).all() for found in logits(load(tmp_path / "out"), VISION))


def test_a_fraction_and_a_rank_together():
    """The fraction is the layers' mean, the rank the most that one may get."""
    asked = dict(cache_fraction=0.5, budget="dynamic", length=LENGTH)
    found = plan(ConvertConfig(**asked), VISION)
    assert (found.rank, found.most) == (24, found.largest) == (24, 56)
    found = plan(ConvertConfig(**asked, rank=30), VISION)
    assert (found.rank, found.most) == (24, 30)
    found = plan(ConvertConfig(rank=30, budget="dynamic", length=LENGTH), VISION)
    assert (found.rank, found.most) == (30, 56)
    with pytest.raises(UserError, match="mean rank of 24, above --rank 20"):
        plan(ConvertConfig(**asked, rank=20), VISION)
    with pytest.raises(UserError, match="rank 57: the source has 56 dims besides the RoPE key's 8"):
        plan(ConvertConfig(**asked, rank=57), VISION)
    with pytest.raises(UserError, match="name one of them, or give --budget dynamic"):
        ConvertConfig(cache_fraction=0.5, rank=30)
