"""Source: what is read piece by piece is the model; what cannot be converted is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import conversation, difference, even_config, forward, random_tensors, write_folder
from safetensors.numpy import load_file, save_file

from iv3jax.checkpoint.load import load
from iv3jax.conversion.source import Source
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.decoder import DecoderLayer, Tokens, gather_visual
from iv3jax.models.layers import RMSNorm
from iv3jax.models.rope import decoder_rope
from iv3jax.models.vision import VisionTower

pytestmark = pytest.mark.medium

CONFIG = even_config("gqa")
TEXT_ONLY = ModelConfig("llama", replace(CONFIG.text_config, mrope_section=None, use_qk_norm=False))
TIED = replace(TEXT_ONLY, text_config=replace(TEXT_ONLY.text_config, tie_word_embeddings=True))


def folder_of(config: ModelConfig, folder: Path) -> Path:
    return write_folder(folder, config, random_tensors(config))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Source.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [CONFIG, TEXT_ONLY, TIED], ids=["vision", "text only", "tied"])
def test_its_pieces_applied_one_by_one_are_the_model(config, tmp_path):
    folder = folder_of(config, tmp_path / "in")
    source, text = Source.open(folder), config.text_config
    items = [4, ("image", 1, 4, 4), 3, ("video", 2, 2, 4), 5] if config.vision_config else [11]
    batch = collate([[conversation(config, items)]], config, length=40)

    hidden = jnp.asarray(source.embedding())[batch.input_ids]
    index, deepstack = batch.visual_index, None
    if config.vision_config is not None:
        seen = VisionTower(config.vision_config).apply(
            {"params": source.tower()}, batch.patches, batch.patch_coords, batch.patch_segment_ids
        )
        hidden = jnp.where(index[..., None] >= 0, gather_visual(seen.tokens, index), hidden)
        deepstack = jnp.stack([gather_visual(level, index) for level in seen.deepstack])
    else:
        assert source.tower() is None
    rope = decoder_rope(batch.positions, text.rope_dim, text.rope_theta, text.mrope_section)
    tokens = Tokens(rope, batch.segment_ids, None, None, None)
    for i in range(text.num_hidden_layers):
        (hidden, _), _ = DecoderLayer(text).apply(
            {"params": source.layer(i)}, (hidden, None), jnp.int32(i), tokens, deepstack
        )
    hidden = RMSNorm(text.hidden_size, text.rms_norm_eps).apply({"params": source.final_norm()}, hidden)
    logits = hidden @ source.head().T

    model = load(folder)
    expected = forward(model.model, model.params, batch)["logits"]
    real = batch.segment_ids != 0
    assert difference(np.asarray(logits)[real], np.asarray(expected)[real]) <= 2e-5


def test_dtypes_and_what_a_conversion_leaves(tmp_path):
    source = Source.open(folder_of(CONFIG, tmp_path / "in"))
    kernel = source.layer(1)["self_attn"]["q_proj"]["kernel"]
    assert kernel.shape == (8, 8, 24) and kernel.dtype == np.float32
    assert source.layer(1, jnp.dtype("bfloat16"))["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    left = set(source.files.names) - set(source.kept)
    parts = [f"{m}_proj" for m in "qkvo"] + ["q_norm", "k_norm"]
    assert left == {
        f"model.language_model.layers.{i}.self_attn.{part}.weight" for i in range(3) for part in parts
    }
    assert source.target_type == "internvideo3"


def test_stacks_of_several_dtypes_are_widened(tmp_path):
    values = random_tensors(CONFIG)
    name = "model.visual.blocks.1.mlp.linear_fc1.weight"
    values |= {n: v.astype(jnp.bfloat16) for n, v in values.items() if n != name}
    source = Source.open(write_folder(tmp_path, CONFIG, values))
    tower = source.tower()
    assert tower is not None
    blocks = tower["tower"]["blocks"]
    assert blocks["linear_fc1"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(blocks["linear_fc1"]["kernel"][1], values[name])
    assert blocks["linear_fc2"]["kernel"].dtype == jnp.bfloat16


def test_refusals(tmp_path):
    m2la = folder_of(even_config("m2la"), tmp_path / "m2la")
    assert "is M²LA already" in refusal(m2la)
    assert "a preset is a shape without weights" in refusal(Path("tiny_gqa"))
    assert "neither a folder nor a preset" in refusal(tmp_path / "none")
    biased = replace(
        TEXT_ONLY.text_config, attention_bias=True, attention_output_bias=True, use_qk_norm=False
    )
    assert "attention_bias" in refusal(folder_of(replace(TEXT_ONLY, text_config=biased), tmp_path / "biased"))
    unknown = folder_of(TEXT_ONLY, tmp_path / "unknown")
    data = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(data | {"model_type": "mamba"}))
    assert "model_type 'mamba' is not one of" in refusal(unknown)
    lost = folder_of(TEXT_ONLY, tmp_path / "lost")
    values = load_file(lost / "model.safetensors")
    del values["model.layers.1.self_attn.k_proj.weight"]
    save_file(values, lost / "model.safetensors")
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in refusal(lost)
    untied = folder_of(TIED, tmp_path / "untied")
    values = load_file(untied / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1
    save_file(values, untied / "model.safetensors")
    assert "lm_head.weight differs" in refusal(untied)
