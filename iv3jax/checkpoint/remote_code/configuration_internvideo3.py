"""The configuration of InternVideo3 for transformers. Keys it does not know are kept and written back."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

# What the model code computes, where wider families have a choice; the first value means unsaid.
_SUPPORTED: dict[str, tuple] = {
    "q_lora_rank": (None,),
    "kv_lora_rank_list": (None,),
    "qk_latent_layernorm": (None, False),
    "rope_interleave": (None, True),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
}


class InternVideo3VisionConfig(Qwen3VLVisionConfig):
    """The vision tower, which is Qwen3-VL's."""

    model_type = "internvideo3_vision"


class InternVideo3TextConfig(Qwen3VLTextConfig):
    """The decoder: Qwen3's fields and those of M²LA, multimodal multi-head latent attention.

    Args:
        kv_lora_rank: numbers of the latent that is cached for each token.
        qk_nope_head_dim: dims of a query or key head without rotary embedding.
        qk_rope_head_dim: dims with it; its key is one for all heads and cached beside the latent.
        v_head_dim: dims of a value head.
        attention_bias: whether `q_proj` and `kv_a_proj_with_mqa` have biases.
    """

    model_type = "internvideo3_text"
    default_theta = 5e6

    kv_lora_rank: int = 896
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 128
    v_head_dim: int = 128
    attention_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for key, values in _SUPPORTED.items():
            if getattr(self, key, None) not in values:
                raise ValueError(f"config.json: {key} = {getattr(self, key)!r} is not supported")
        rope = self.rope_parameters
        rope.setdefault("mrope_section", [24, 20, 20])
        rope.setdefault("mrope_interleaved", True)
        if rope["rope_type"] not in ("default", "mrope") or not rope["mrope_interleaved"]:
            raise ValueError(f"config.json: only interleaved M-RoPE without scaling is supported, not {rope}")
        if 2 * sum(rope["mrope_section"]) != self.qk_rope_head_dim:
            raise ValueError(
                f"config.json: mrope_section {rope['mrope_section']} must sum to half of "
                f"qk_rope_head_dim {self.qk_rope_head_dim}"
            )


class InternVideo3Config(PreTrainedConfig):
    """A whole model: decoder, vision tower, and the ids of the tokens that stand for vision.

    Args:
        text_config, vision_config: the two parts, dicts or configs.
        image_token_id, video_token_id: the ids that are replaced by vision tokens.
        vision_start_token_id, vision_end_token_id: the ids around them.
        tie_word_embeddings: whether the head is the embedding; unsaid, `text_config` decides.
    """

    model_type = "internvideo3"
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": InternVideo3TextConfig,
        "vision_config": InternVideo3VisionConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
