"""Checkpoints of converted models: ranks by layer, adapters, cached norms, RoPE components, and text alone.

Loaded, written and loaded again, and computed by the PyTorch code of their exports. fp32, 1e-4 on logits of
order 1; about 1e-6 is seen.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.remote import add_code, modules  # noqa: F401
from models.peers import (
    conversation,
    difference,
    even_config,
    forward,
    random_tensors,
    tiny_config,
    torch_inputs,
    write_folder,
)
from safetensors.numpy import load_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.files import SINGLE
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.shapes import model_shapes
from iv3jax.checkpoint.verify import verify
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.sharding import make_mesh
from iv3jax.typing import Array, Params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
RANKS = (9, 13, 5)
HEADS = dict(num_attention_heads=6, num_key_value_heads=2)
FEATURES = dict(
    ranks=dict(kv_lora_rank_list=RANKS),
    adapters=dict(latent_adapters=True),
    norms=dict(use_qk_norm=True, **HEADS),
    components=dict(rope_components=2, qk_rope_head_dim=16),
)
ALL = {key: value for changes in FEATURES.values() for key, value in changes.items()}
FEATURES["frequencies"] = dict(rope_frequency_list=((0, 0, 1, 3), (2, 1, 1, 0), (3, 3, 3, 3)))
CASES = {
    "text": [19],
    "long text": [90],
    "video": [3, ("video", 3, 4, 6), 4],
    "image": [2, ("image", 1, 4, 8), 3],
}
LENGTH = 96


def text_only(**changes) -> ModelConfig:
    """The tiny decoder alone, over one position."""
    text = replace(tiny_config(**changes).text_config, mrope_section=None)
    return ModelConfig("internvideo3_text", text)


CONFIGS = {
    **{name: tiny_config(**changes) for name, changes in FEATURES.items()},
    "all": tiny_config(**ALL, attention_bias=False),
    "text alone": text_only(**ALL, tie_word_embeddings=True),
}


def model(folder: Path, config: ModelConfig, **run) -> LoadedModel:
    """Random weights that never name a placeholder, in a folder and loaded from there."""
    values = random_tensors(config)
    if "lm_head.weight" in values:
        values["lm_head.weight"][config.image_token_id :] = 0
    return load(write_folder(folder, config, values), run=Execution(**run))


def torch_model(folder: Path, auto: str = "AutoModelForCausalLM", **options):
    """The model of a folder, which must hold exactly the tensors it needs."""
    found = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(found[1].values()), found[1]
    return found[0].eval()


@pytest.fixture(
    scope="module",
    params=["all", "text alone", *(pytest.param(name, marks=pytest.mark.slow) for name in FEATURES)],
)
def pair(request, tmp_path_factory):
    """Ours, and its export in torch."""
    root = tmp_path_factory.mktemp("converted")
    ours = model(root / "in", CONFIGS[request.param])
    export(ours, root / "out")
    return ours, torch_model(root / "out")


def cases(config: ModelConfig) -> dict:
    return {n: c for n, c in CASES.items() if config.vision_config is not None or "text" in n}


@pytest.mark.medium
def test_logits(pair):
    """Without a cache; over both kinds of cache, expanded and absorbed, the last tokens one by one."""
    ours, theirs = pair
    config = ours.config
    samples = {n: conversation(config, items, i) for i, (n, items) in enumerate(cases(config).items())}
    batch = collate([[sample] for sample in samples.values()], config, length=LENGTH)
    expected = np.asarray(forward(ours.model, ours.params, batch)["logits"])
    for row, (name, sample) in enumerate(samples.items()):
        wanted, inputs = expected[row, : len(sample)], torch_inputs(config, sample)
        inputs.pop("mm_token_type_ids", None)
        ids = inputs.pop("input_ids")
        text = theirs.config.get_text_config()
        with torch.no_grad():
            assert (
                difference(theirs(input_ids=ids, **inputs, use_cache=False).logits[0], wanted) <= TOLERANCE
            ), name
            fixed = transformers.StaticCache(config=text, max_cache_len=len(sample) + 3)
            for cache in (transformers.DynamicCache(), fixed):
                got = [theirs(input_ids=ids[:, :-3], **inputs, past_key_values=cache).logits]
                for i in range(ids.shape[1] - 3, ids.shape[1]):
                    got.append(theirs(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
                assert difference(torch.cat(got, dim=1)[0], wanted) <= TOLERANCE, (name, type(cache))


@pytest.mark.medium
@pytest.mark.parametrize("pair", ["all", "text alone"], indirect=True)
def test_generate(pair):
    """Greedy tokens are ours, with each cache; beams are those of a model without a cache."""
    ours, theirs = pair
    config = ours.config
    samples = {n: conversation(config, items, i) for i, (n, items) in enumerate(cases(config).items())}
    batch = collate([[sample] for sample in samples.values()], config, length=LENGTH)
    expected = generate(ours.model, ours.params, batch, max_new_tokens=6, stop_ids=[]).tokens
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    for tokens, (name, sample) in zip(expected, samples.items(), strict=True):
        inputs = torch_inputs(config, sample)
        inputs.pop("mm_token_type_ids", None)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            got = theirs.generate(**inputs, **options, **cache)[0, len(sample) :].tolist()
            assert got == tokens, (name, cache)
        beams = [
            theirs.generate(**inputs, **options, num_beams=3, use_cache=cached).tolist()
            for cached in (True, False)
        ]
        assert beams[0] == beams[1], name


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", ["adapters", "norms", "all", "text alone"])
def test_round_trip(tmp_path, name, scan_layers):
    """Bit for bit through parameters that are stacked, and padded, or stand alone, and are exact."""
    config = CONFIGS[name]
    values = {k: v.astype(jnp.bfloat16) for k, v in random_tensors(config).items()}
    loaded = load(write_folder(tmp_path / "in", config, values), run=Execution(scan_layers=scan_layers))
    export(loaded, tmp_path / "out")
    written = load_file(tmp_path / "out" / SINGLE)
    assert written.keys() == values.keys()
    for key, value in values.items():
        assert written[key].shape == value.shape and written[key].tobytes() == value.tobytes(), key
    assert load(tmp_path / "out").config == config
    shapes = model_shapes(tmp_path / "out")
    assert shapes.tensors == {key: value.shape for key, value in values.items()}
    assert shapes.weight_bytes == sum(value.nbytes for value in values.values())
    text = config.text_config
    ranks = text.kv_lora_rank_list or [text.kv_lora_rank] * text.num_hidden_layers
    width = 2 * text.qk_rope_head_dim + (4 * text.num_key_value_heads if text.use_qk_norm else 0)
    assert shapes.cache_bytes_per_token == sum(2 * rank + width for rank in ranks)


def test_ranks_in_a_stack(tmp_path):
    """Zeros lie between a layer's latent and the RoPE key; other numbers there are refused, not lost."""
    config = CONFIGS["all"]
    loaded = model(tmp_path / "in", config)
    attention = loaded.params["language_model"]["layers"]["self_attn"]
    kernel = np.array(attention["kv_a_proj_with_mqa"]["kernel"])
    name = "model.language_model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
    theirs = load_file(tmp_path / "in" / SINGLE)[name]
    np.testing.assert_array_equal(kernel[2, :5], theirs[:5])
    np.testing.assert_array_equal(kernel[2, 5:13], 0)
    np.testing.assert_array_equal(kernel[2, 13:], theirs[5:])
    np.testing.assert_array_equal(np.array(attention["kv_adapters"]["kernel"])[2, :, 5:], 0)
    np.testing.assert_array_equal(np.array(attention["kv_b_proj"]["kernel"])[2, ..., 5:], 0)
    kernel[2, 7, 3] = 1e-3
    attention["kv_a_proj_with_mqa"]["kernel"] = jnp.asarray(kernel)
    with pytest.raises(UserError, match="1 numbers beyond its layer's rank 5 are not zero") as caught:
        export(loaded, tmp_path / "out")
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_rank_that_is_not_the_files(tmp_path):
    config = CONFIGS["ranks"]
    folder = write_folder(tmp_path, config, random_tensors(config))
    written = json.loads((folder / "config.json").read_text())
    written["text_config"]["kv_lora_rank_list"] = [9, 13, 6]
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError) as caught:
        load(folder)
    text, name = str(caught.value), "model.language_model.layers.2.self_attn.kv_b_proj.weight"
    assert f"{name} is (48, 5) instead of (48, 6) (rank 6 in kv_lora_rank_list)" in text
    assert str(folder) in text and "\n" not in text and "layers.1." not in text


@pytest.mark.medium
@pytest.mark.parametrize("scan_layers", [True, False])
def test_over_eight_devices(tmp_path, scan_layers):
    """No part of a padded parameter is lost."""
    config = even_config(
        **{**ALL, "num_attention_heads": 4, "kv_lora_rank": 16, "kv_lora_rank_list": (8, 16, 4)}
    )
    values = random_tensors(config)
    mesh = make_mesh(fsdp=4, tensor=2)
    loaded = load(
        write_folder(tmp_path / "in", config, values), mesh=mesh, run=Execution(scan_layers=scan_layers)
    )
    export(loaded, tmp_path / "out")
    for key, value in load_file(tmp_path / "out" / SINGLE).items():
        np.testing.assert_array_equal(value, values[key], err_msg=key)


@pytest.mark.medium
@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantised(tmp_path, weights):
    """Linear layers become codes, zeros stay zeros: padded and exact layers compute the same."""
    config = CONFIGS["all"]
    model(tmp_path, config)
    batch = collate([[conversation(config, CASES["video"])]], config, length=LENGTH)

    @partial(jax.jit, static_argnums=0)
    def logits(module: InternVideo3, params: Params) -> Array:
        hidden = module.apply({"params": params}, batch).hidden
        return module.apply({"params": params}, hidden, method="logits")

    full, stacked, alone = (
        load(tmp_path, weights=how, run=Execution(scan_layers=scan_layers))
        for how, scan_layers in ((None, True), (weights, True), (weights, False))
    )
    attention = stacked.params["language_model"]["layers"]["self_attn"]
    assert attention["kv_a_proj_with_mqa"].keys() == {"kernel_codes", "kernel_scale"}
    assert attention["kv_adapters"].keys() == {"kernel", "bias"}
    assert model_shapes(tmp_path, weights).weight_bytes < model_shapes(tmp_path).weight_bytes
    expected, got, other = (np.asarray(logits(m.model, m.params)) for m in (full, stacked, alone))
    assert difference(got, other) <= TOLERANCE
    # Few and random weights lose much with 4 bits; the bound says that nothing is in a wrong place.
    bound = 0.05 if weights == "int8" else 0.5
    assert np.abs(got - expected).mean() <= bound * np.abs(expected).mean()


@pytest.mark.medium
def test_verify(tmp_path):
    """`iv3 export --verify`, tied and with all there is."""
    for name in ("all", "text alone"):
        export(model(tmp_path / name / "in", CONFIGS[name]), tmp_path / name / "out")
        rows = verify(tmp_path / name / "out")
        assert len(rows) == (1 if "text" in name else 3) and all(row.passed for row in rows), rows


@pytest.mark.medium
def test_text_alone_in_transformers(tmp_path):
    """Its own files, saved and loaded again, a base model, gradients, a left-padded batch, a loss."""
    config = CONFIGS["text alone"]
    ours = model(tmp_path / "in", config)
    done = export(ours, tmp_path / "out")
    assert not {"modeling_internvideo3.py", "processing_internvideo3.py"} & set(done.files)
    first = torch_model(tmp_path / "out")
    assert type(first).__name__ == "InternVideo3ForCausalLM"
    assert first.lm_head.weight is first.get_input_embeddings().weight
    first.save_pretrained(tmp_path / "second")
    again = torch_model(tmp_path / "second")
    assert load(tmp_path / "second").config == config
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(base).__name__ == "InternVideo3TextModel"
    samples = [conversation(config, [count], count) for count in (30, 70)]
    batch = collate([[sample] for sample in samples], config, length=LENGTH)
    expected = np.asarray(forward(ours.model, ours.params, batch)["logits"])
    ids = torch.zeros((2, 70), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, -len(sample) :] = torch.tensor(sample.input_ids)
    mask = (torch.arange(70)[None] >= torch.tensor([[40], [0]])).long()
    again.train().gradient_checkpointing_enable()
    out = again(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, -100), use_cache=False)
    for row, sample in enumerate(samples):
        assert difference(out.logits[row, -len(sample) :].detach(), expected[row, : len(sample)]) <= TOLERANCE
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters())
    with torch.no_grad():
        hidden = base(input_ids=ids[1:], use_cache=True).last_hidden_state
        assert difference(again.lm_head(hidden)[0], expected[1, :70]) <= TOLERANCE


def test_half_precision_keeps_the_norms(tmp_path):
    """In bf16 a cached factor has all of its fp32 bits, on both kinds of cache."""
    config = CONFIGS["norms"]
    theirs = torch_model(
        add_code(write_folder(tmp_path, config, random_tensors(config))), dtype=torch.bfloat16
    )
    ids = torch.tensor(conversation(config, [40]).input_ids[None], dtype=torch.long)
    text = config.text_config
    for cache in (
        transformers.DynamicCache(),
        transformers.StaticCache(config=theirs.config.text_config, max_cache_len=50),
    ):
        with torch.no_grad():
            theirs(input_ids=ids, past_key_values=cache)
            held = cache.layers[1].values[:, :, :40]
            assert held.dtype == torch.bfloat16 and held.shape[-1] == 2 * text.num_key_value_heads
            factors = held.contiguous().view(torch.float32)
        # Not rounded to bf16, and of the size that random keys have.
        assert (factors != factors.bfloat16().float()).any()
        assert 0.3 < float(factors.min()) and float(factors.max()) < 3


@pytest.mark.medium
def test_embeddings_need_their_kind(tmp_path):
    """Where adapters tell vision from text, and no ids do."""
    config = CONFIGS["adapters"]
    ours = model(tmp_path / "in", config)
    export(ours, tmp_path / "out")
    theirs = torch_model(tmp_path / "out")
    inputs = torch_inputs(config, conversation(config, CASES["image"]))
    with torch.no_grad():
        whole = theirs(**inputs, output_hidden_states=True)
        embeds = whole.hidden_states[0]
        with pytest.raises(ValueError, match="inputs_embeds need mm_token_type_ids"):
            theirs(inputs_embeds=embeds)
        kinds = inputs["mm_token_type_ids"]
        got = theirs(inputs_embeds=embeds, mm_token_type_ids=kinds).logits
        text = theirs(inputs_embeds=embeds, mm_token_type_ids=torch.zeros_like(kinds)).logits
    first = int(kinds[0].argmax())
    # Before the image nothing differs; from its first token on it does (positions and DeepStack too).
    assert difference(got[0, :first], whole.logits[0, :first]) <= TOLERANCE
    assert difference(got[0, :first], text[0, :first]) == 0
    assert difference(got[0, first:], text[0, first:]) > 1e-2


def test_configs_that_torch_refuses(tmp_path):
    """Which key of config.json, and what it must be."""
    config = CONFIGS["text alone"]
    folder = add_code(write_folder(tmp_path, config, {}))
    data = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"kv_lora_rank_list": [9, 13]}, "kv_lora_rank_list must hold a rank for each of the 3 layers"),
        ({"kv_lora_rank_list": [9, 12, 5]}, "the largest of them kv_lora_rank 13"),
        (
            {"rope_components": 1, "rope_frequency_list": [[0]]},
            "frequency from 0 to 3 for each of the 8 pairs",
        ),
        ({"rope_components": 3}, "qk_rope_head_dim 16 must be a multiple of 2 x rope_components 3"),
    ):
        (folder / "config.json").write_text(json.dumps(data | changes))
        with pytest.raises(ValueError, match=words):
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
