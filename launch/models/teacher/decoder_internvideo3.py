"""The decoder of InternVideo3 in PyTorch for transformers, with DeepStack, and as a language model by itself.

The feed-forward and the norms are transformers' own of Qwen3-VL. Attention is in attention_internvideo3.py;
the model with vision is in modeling_internvideo3.py.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm
from transformers.utils import can_return_tuple

from .attention_internvideo3 import InternVideo3Attention, Rope, mrope_angles
from .configuration_internvideo3 import InternVideo3TextConfig
from .positions_internvideo3 import text_positions


class InternVideo3DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each pre-norm and residual."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = InternVideo3Attention(config, layer_idx)
        self.mlp = Qwen3VLTextMLP(config)
        self.input_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        vision: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, mask, past_key_values, vision)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class InternVideo3PreTrainedModel(PreTrainedModel):
    """What all parts share."""

    config_class = InternVideo3TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVideo3DecoderLayer", "Qwen3VLVisionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def with_logits(
        self,
        out: BaseModelOutputWithPast,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """What follows the last layer of a model with an `lm_head`: logits, and the loss where labels are."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


class Visual(NamedTuple):
    """The vision tokens of a batch, in the order of their positions.

    Attributes:
        mask: (B, T) bool, where they stand.
        tokens: (N, D).
        levels: (N, D) for each DeepStack level.
    """

    mask: torch.Tensor
    tokens: torch.Tensor
    levels: list[torch.Tensor]


class InternVideo3TextModel(InternVideo3PreTrainedModel):
    """The decoder: embeddings, layers with DeepStack, the final norm."""

    def __init__(self, config: InternVideo3TextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InternVideo3DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = Qwen3VLTextRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        visual: Visual | None = None,
        vision: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """(B, T) ids or (B, T, D) embeddings at (3, B, T) or (B, T) positions → (B, T, D).

        `visual` is what DeepStack adds; vision (B, T) is True where an embedding is an image's or a video's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _following(inputs_embeds, attention_mask, past_key_values)
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        rope = mrope_angles(self.config, position_ids)
        hidden = inputs_embeds
        states = [hidden]
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, mask, vision, past_key_values=past_key_values)
            if visual is not None and number < len(visual.levels):
                hidden = hidden.clone()
                hidden[visual.mask] += visual.levels[number].to(hidden)
            if output_hidden_states:
                states.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
        )


def _following(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor:
    """(B, T) positions of text after what is cached."""
    past, (rows, length) = 0 if cache is None else int(cache.get_seq_length()), inputs_embeds.shape[:2]
    if attention_mask is None:
        attention_mask = torch.ones((rows, past + length), dtype=torch.long, device=inputs_embeds.device)
    if attention_mask.ndim != 2:
        raise ValueError("an attention_mask of four axes needs position_ids beside it")
    return text_positions(attention_mask)[:, past : past + length]


class InternVideo3ForCausalLM(InternVideo3PreTrainedModel, GenerationMixin):
    """A decoder without vision, with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InternVideo3TextConfig) -> None:
        super().__init__(config)
        self.model = InternVideo3TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token, or of the last `logits_to_keep`; as in any causal language model."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return self.with_logits(out, labels, logits_to_keep, **kwargs)
