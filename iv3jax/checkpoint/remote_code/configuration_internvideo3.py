"""The configuration of InternVideo3 for transformers. Keys it does not know are kept and written back."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

# What the model code computes, where wider families have a choice; the first value means unsaid.
_SUPPORTED: dict[str, tuple] = {
    "q_lora_rank": (None,),
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

    From `kv_lora_rank_list` on they are of models converted from grouped-query attention.

    Args:
        kv_lora_rank: numbers of the latent that is cached for each token.
        qk_nope_head_dim: dims of a query or key head without rotary embedding.
        qk_rope_head_dim: dims with it; its key is one for all heads and cached beside the latent.
        v_head_dim: dims of a value head.
        attention_bias: whether `q_proj` and `kv_a_proj_with_mqa` have biases.
        kv_lora_rank_list: the latent's numbers in each layer, where they differ; `kv_lora_rank` is the most.
        latent_adapters: whether a latent is mapped before it is cached, by one affine map for text tokens and
            one for vision tokens: `kv_adapters`.
        use_qk_norm: whether query and key are normalised. A query is, over its `head_dim` numbers (`q_norm`),
            before a matrix for each head (`q_expand`) makes qk_nope_head_dim + qk_rope_head_dim of them. Of a
            key one number is cached for each of the num_key_value_heads groups, 1 / rms of the `head_dim`
            numbers that `k_norm_proj` makes, and multiplies the logits of the group's heads.
        rope_components: how many pairs turn by the same frequency. Of the qk_rope_head_dim / 2 pairs, pair j
            turns by frequency j mod (qk_rope_head_dim / 2 / rope_components).
        rope_frequency_list: instead, for each layer, by which of the head_dim / 2 frequencies each of its
            qk_rope_head_dim / 2 pairs turns.
        rope_parameters: `mrope_section` makes it interleaved M-RoPE over time, height and width; without it a
            text-only decoder counts tokens.
    """

    model_type = "internvideo3_text"
    default_theta = 5e6
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    kv_lora_rank: int = 896
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 128
    v_head_dim: int = 128
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    kv_lora_rank_list: list[int] | tuple[int, ...] | None = None
    latent_adapters: bool = False
    use_qk_norm: bool = False
    rope_components: int = 1
    rope_frequency_list: list[list[int]] | tuple[tuple[int, ...], ...] | None = None

    @property
    def rope_frequencies(self) -> int:
        """How many frequencies the rotary embedding has."""
        if self.rope_frequency_list is not None:
            return self.head_dim // 2
        return self.qk_rope_head_dim // self.rope_components // 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for key, values in _SUPPORTED.items():
            if getattr(self, key, None) not in values:
                raise ValueError(f"config.json: {key} = {getattr(self, key)!r} is not supported")
        if self.qk_rope_head_dim % (2 * self.rope_components):
            raise ValueError(
                f"config.json: qk_rope_head_dim {self.qk_rope_head_dim} must be a multiple of "
                f"2 x rope_components {self.rope_components}"
            )
        ranks = self.kv_lora_rank_list
        if ranks is not None and (len(ranks) != self.num_hidden_layers or max(ranks) != self.kv_lora_rank):
            raise ValueError(
                f"config.json: kv_lora_rank_list must hold a rank for each of the {self.num_hidden_layers} "
                f"layers, the largest of them kv_lora_rank {self.kv_lora_rank}, not {list(ranks)}"
            )
        listed, pairs = self.rope_frequency_list, self.qk_rope_head_dim // 2
        if listed is not None and (
            self.rope_components != 1
            or [len(own) for own in listed] != [pairs] * self.num_hidden_layers
            or not all(0 <= f < self.rope_frequencies for own in listed for f in own)
        ):
            raise ValueError(
                f"config.json: rope_frequency_list must hold for each of {self.num_hidden_layers} layers a "
                f"frequency from 0 to {self.rope_frequencies - 1} for each of the {pairs} pairs of "
                "qk_rope_head_dim, and rope_components be 1"
            )
        rope = self.rope_parameters
        if rope.get("mrope_section") is not None:
            self.use_mrope(rope["mrope_section"])
        if rope["rope_type"] not in ("default", "mrope") or not rope.get("mrope_interleaved", True):
            raise ValueError(f"config.json: only interleaved M-RoPE without scaling is supported, not {rope}")

    def use_mrope(self, section: list[int]) -> None:
        """Sets the sections of M-RoPE, where none are set.

        Raises:
            ValueError: they do not fit.
        """
        rope = self.rope_parameters
        section = rope.setdefault("mrope_section", section)
        rope.setdefault("mrope_interleaved", True)
        if sum(section) != self.rope_frequencies:
            raise ValueError(
                f"config.json: mrope_section {section} must sum to the {self.rope_frequencies} frequencies "
                f"of qk_rope_head_dim {self.qk_rope_head_dim}"
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
        self.text_config.use_mrope([24, 20, 20])
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
