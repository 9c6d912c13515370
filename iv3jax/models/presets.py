"""The model shapes that have a name. No weights: a preset is a config, nothing more."""

from dataclasses import replace
from typing import Any

from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig, TextConfig, VisionConfig

_TOWER_8B = VisionConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    out_hidden_size=4096,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(8, 16, 24),
)

_DECODER_8B: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=262144,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
)

_TINY_TOWER = VisionConfig(
    depth=2,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    out_hidden_size=128,
    num_position_embeddings=64,
    deepstack_visual_indexes=(0,),
)

_TINY_DECODER: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=32,
    max_position_embeddings=8192,
    rope_theta=1e4,
    mrope_section=(8, 4, 4),
)

_TINY_LATENTS: dict[str, Any] = dict(
    num_key_value_heads=4, attention_bias=True, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
)

_TINY_TOKENS: dict[str, Any] = dict(
    image_token_id=508, video_token_id=509, vision_start_token_id=510, vision_end_token_id=511
)

PRESETS: dict[str, ModelConfig] = {
    "internvideo3_8b": ModelConfig(
        "internvideo3",
        TextConfig(
            **_DECODER_8B,
            attention_bias=True,
            kv_lora_rank=896,
            qk_nope_head_dim=128,
            qk_rope_head_dim=128,
            v_head_dim=128,
        ),
        _TOWER_8B,
    ),
    "qwen3_vl_8b": ModelConfig("qwen3_vl", TextConfig(**_DECODER_8B, use_qk_norm=True), _TOWER_8B),
    "tiny": ModelConfig(
        "internvideo3",
        TextConfig(
            **_TINY_DECODER,
            **_TINY_LATENTS,
            kv_lora_rank=96,
        ),
        _TINY_TOWER,
        **_TINY_TOKENS,
    ),
    # Half the parameters of tiny, for distillation into a smaller one.
    "tiny_half": ModelConfig(
        "internvideo3",
        TextConfig(
            **_TINY_DECODER | dict(hidden_size=80, intermediate_size=160, num_hidden_layers=2),
            **_TINY_LATENTS,
            kv_lora_rank=64,
        ),
        replace(_TINY_TOWER, hidden_size=48, intermediate_size=192, num_heads=3, out_hidden_size=80),
        **_TINY_TOKENS,
    ),
    "tiny_gqa": ModelConfig(
        "qwen3_vl",
        TextConfig(**_TINY_DECODER, num_key_value_heads=2, use_qk_norm=True),
        _TINY_TOWER,
        **_TINY_TOKENS,
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of that name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"{name}: no such preset; there are {', '.join(PRESETS)}")
    return PRESETS[name]
