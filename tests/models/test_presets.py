"""The 8B presets: SPEC §1's count and SPEC §9's names and shapes, written out by hand; shapes only."""

import math

import jax
import pytest

from iv3jax.checkpoint.names import tensors
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import PRESETS, preset
from iv3jax.sharding import unbox

D, VOCAB, MLP, HEADS = 4096, 151936, 12288, 32
RANK, NOPE, ROPE, VALUE = 896, 128, 128, 128
VISION, VISION_MLP = 1152, 4304
LAYER = "model.language_model.layers.{i}."
BLOCK = "model.visual.blocks.{i}."

M2LA = {
    "self_attn.q_proj.weight": (HEADS * (NOPE + ROPE), D),
    "self_attn.q_proj.bias": (HEADS * (NOPE + ROPE),),
    "self_attn.kv_a_proj_with_mqa.weight": (RANK + ROPE, D),
    "self_attn.kv_a_proj_with_mqa.bias": (RANK + ROPE,),
    "self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), RANK),
    "self_attn.o_proj.weight": (D, HEADS * VALUE),
}
GQA = {
    "self_attn.q_proj.weight": (32 * 128, D),
    "self_attn.k_proj.weight": (8 * 128, D),
    "self_attn.v_proj.weight": (8 * 128, D),
    "self_attn.o_proj.weight": (D, 32 * 128),
    "self_attn.q_norm.weight": (128,),
    "self_attn.k_norm.weight": (128,),
}


def spec_9(attention: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Every tensor name of SPEC §9 with its shape."""
    named = {
        "lm_head.weight": (VOCAB, D),
        "model.language_model.embed_tokens.weight": (VOCAB, D),
        "model.language_model.norm.weight": (D,),
        "model.visual.patch_embed.proj.weight": (VISION, 3, 2, 16, 16),
        "model.visual.patch_embed.proj.bias": (VISION,),
        "model.visual.pos_embed.weight": (48 * 48, VISION),
    }
    for i in range(36):
        prefix = f"model.language_model.layers.{i}."
        named[f"{prefix}input_layernorm.weight"] = (D,)
        named[f"{prefix}post_attention_layernorm.weight"] = (D,)
        named[f"{prefix}mlp.gate_proj.weight"] = (MLP, D)
        named[f"{prefix}mlp.up_proj.weight"] = (MLP, D)
        named[f"{prefix}mlp.down_proj.weight"] = (D, MLP)
        named |= {prefix + name: shape for name, shape in attention.items()}

    def linear(name: str, out: int, inner: int) -> None:
        named[f"model.visual.{name}.weight"] = (out, inner)
        named[f"model.visual.{name}.bias"] = (out,)

    def norm(name: str, width: int) -> None:
        named[f"model.visual.{name}.weight"] = named[f"model.visual.{name}.bias"] = (width,)

    for i in range(27):
        norm(f"blocks.{i}.norm1", VISION)
        norm(f"blocks.{i}.norm2", VISION)
        linear(f"blocks.{i}.attn.qkv", 3 * VISION, VISION)
        linear(f"blocks.{i}.attn.proj", VISION, VISION)
        linear(f"blocks.{i}.mlp.linear_fc1", VISION_MLP, VISION)
        linear(f"blocks.{i}.mlp.linear_fc2", VISION, VISION_MLP)
    for merger, width in [
        ("merger", VISION),
        *((f"deepstack_merger_list.{i}", 4 * VISION) for i in range(3)),
    ]:
        norm(f"{merger}.norm", width)
        linear(f"{merger}.linear_fc1", 4 * VISION, 4 * VISION)
        linear(f"{merger}.linear_fc2", D, 4 * VISION)
    return named


@pytest.mark.parametrize(("name", "attention"), [("internvideo3_8b", M2LA), ("qwen3_vl_8b", GQA)])
def test_tensors_of_spec_9(name, attention):
    found = tensors(preset(name))
    assert {t.name: t.shape for t in found} == spec_9(attention)
    assert len({t.name for t in found}) == len(found) == 750
    assert sum(math.prod(t.shape) for t in found) == parameters(name)


def parameters(name: str) -> int:
    """Numbers in the preset's own arrays, shapes only."""
    return sum(x.size for x in jax.tree.leaves(unbox(boxed_params(InternVideo3(preset(name))))))


def test_parameters_of_internvideo3_8b():
    assert parameters("internvideo3_8b") == 9_484_672_240


def test_half_is_half():
    assert parameters("tiny_half") <= parameters("tiny") / 2


def test_unknown_preset():
    with pytest.raises(
        UserError,
        match=r"^huge: no such preset; there are internvideo3_8b, qwen3_vl_8b, tiny, tiny_half, tiny_gqa$",
    ):
        preset("huge")


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_its_own_config_json(name):
    """What `to_dict` writes reads back as the same config; SPEC §9's fields are there under their names."""
    config = preset(name)
    written = config.to_dict()
    assert ModelConfig.from_dict(written) == config
    if name != "internvideo3_8b":
        return
    spec = dict(
        kv_lora_rank=896, q_lora_rank=None, qk_rope_head_dim=128, qk_nope_head_dim=128, v_head_dim=128
    )
    spec |= dict(attention_bias=True, qk_latent_layernorm=False, rope_interleave=True, rope_theta=5e6)
    spec |= dict(max_position_embeddings=262144, num_hidden_layers=36, num_key_value_heads=8, head_dim=128)
    assert {k: written["text_config"][k] for k in spec} == spec
    scaling = written["text_config"]["rope_scaling"]
    assert scaling["mrope_section"] == [24, 20, 20] and scaling["mrope_interleaved"] is True
    tower = dict(depth=27, hidden_size=1152, num_heads=16, intermediate_size=4304, patch_size=16)
    tower |= dict(temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=2304)
    tower |= dict(deepstack_visual_indexes=[8, 16, 24], out_hidden_size=4096)
    assert {k: written["vision_config"][k] for k in tower} == tower
    assert written["model_type"] == "internvideo3"
