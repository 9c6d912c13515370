"""The two-way table of names: a bit-exact round trip for every tensor of every model type."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from models.peers import tiny_config, to_ours, to_theirs

from iv3jax.checkpoint.names import entries, tensors
from iv3jax.models.config import ModelConfig, TextConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import unbox


def text_only(kind: str, **changes) -> ModelConfig:
    text = TextConfig(
        vocab_size=17,
        hidden_size=10,
        intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
    )
    return ModelConfig(kind, dataclasses.replace(text, **changes))


CONVERTED = dict(
    **dict(num_attention_heads=6, num_key_value_heads=2, qk_rope_head_dim=16, rope_components=2),
    **dict(kv_lora_rank=13, kv_lora_rank_list=(9, 13, 5), latent_adapters=True, use_qk_norm=True),
)

CONFIGS = {
    "internvideo3": tiny_config("m2la"),
    "internvideo3, no biases": tiny_config("m2la", attention_bias=False),
    "qwen3_vl": tiny_config("gqa"),
    "qwen3_vl, tied": tiny_config("gqa", tie_word_embeddings=True),
    "qwen3_vl, no DeepStack": dataclasses.replace(
        tiny_config("gqa"),
        vision_config=dataclasses.replace(tiny_config("gqa").vision_config, deepstack_visual_indexes=()),
    ),
    "qwen3": text_only("qwen3", use_qk_norm=True),
    "qwen3, tied": text_only("qwen3", use_qk_norm=True, tie_word_embeddings=True),
    "qwen2": text_only("qwen2", attention_bias=True),
    "llama": text_only("llama"),
    "converted": tiny_config(**CONVERTED),
    "internvideo3_text": text_only(
        "internvideo3_text",
        **CONVERTED | dict(qk_nope_head_dim=6, v_head_dim=10),
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "llama, biases": text_only("llama", attention_bias=True, attention_output_bias=True),
}


def numbered(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor with numbers, none of them 0, that occur nowhere else in the checkpoint."""
    start, values = 1, {}
    for tensor in tensors(config):
        size = math.prod(tensor.shape)
        values[tensor.name] = np.arange(start, start + size, dtype=np.int32).reshape(tensor.shape)
        start += size
    return values


@pytest.fixture(params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


def test_round_trip(config):
    """Theirs → ours → theirs, every number: nothing lost, moved, or used twice, nothing but zeros added."""
    values = numbered(config)
    params = to_ours(values, config)
    back = to_theirs(params, config)
    assert back.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    held = np.sort(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    np.testing.assert_array_equal(held[held != 0], 1 + np.arange(sum(v.size for v in values.values())))


def test_the_table_is_the_model(config):
    """Ours → theirs → ours: the table fills exactly the arrays that the modules ask for."""
    wanted = jax.tree.map(lambda x: x.shape, unbox(boxed_params(InternVideo3(config))))
    got = jax.tree.map(lambda x: x.shape, to_ours(numbered(config), config))
    assert got == wanted
    names = [entry.name for entry in entries(config)]
    assert len(set(names)) == len(names) == len({entry.path for entry in entries(config)})


def test_bits_survive():
    """NaN payloads, infinities, negative zeros and subnormals: axes are moved, numbers are not touched."""
    config = CONFIGS["internvideo3"]
    rng = np.random.default_rng(0)
    for tensor in tensors(config):
        bits = rng.integers(0, 2**32, tensor.shape, dtype=np.uint32)
        back = tensor.to_theirs(tensor.to_ours(bits.view(np.float32)))
        np.testing.assert_array_equal(back.view(np.uint32), bits, err_msg=tensor.name)


def test_layout_of_heads():
    """Where single numbers go (SPEC §2): heads outermost, inside one `[nope ‖ rope]`, `[k_nope ‖ value]`."""
    config = CONFIGS["internvideo3"]
    text = config.text_config
    n, e, v = text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
    values = numbered(config)
    attention = to_ours(values, config)["language_model"]["layers"]["self_attn"]
    theirs = {k.split("layers.1.self_attn.")[1]: x for k, x in values.items() if "layers.1.self_attn." in k}
    ours = {k: {p: np.asarray(x[1]) for p, x in leaf.items()} for k, leaf in attention.items()}
    head, inner, width = 2, 3, 4
    assert (
        ours["q_proj"]["kernel"][head, n + inner, width]
        == theirs["q_proj.weight"][head * (n + e) + n + inner, width]
    )
    assert ours["q_proj"]["bias"][head, inner] == theirs["q_proj.bias"][head * (n + e) + inner]
    assert (
        ours["kv_b_proj"]["kernel"][head, n + inner, 5]
        == theirs["kv_b_proj.weight"][head * (n + v) + n + inner, 5]
    )
    assert ours["o_proj"]["kernel"][width, head, inner] == theirs["o_proj.weight"][width, head * v + inner]
