"""InternVideo3 in PyTorch for transformers: the whole model, with vision, and generation.

The vision tower is transformers' own of Qwen3-VL. The decoder is in decoder_internvideo3.py, positions are in
positions_internvideo3.py.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.utils import can_return_tuple

from .configuration_internvideo3 import InternVideo3Config
from .decoder_internvideo3 import InternVideo3PreTrainedModel, InternVideo3TextModel, Visual
from .positions_internvideo3 import mrope_positions, repeated, text_positions


class InternVideo3VisionPreTrainedModel(InternVideo3PreTrainedModel):
    """What the parts with vision share."""

    config_class = InternVideo3Config
    input_modalities = ("image", "video", "text")


class InternVideo3Model(InternVideo3VisionPreTrainedModel):
    """Tower and decoder, without the head."""

    def __init__(self, config: InternVideo3Config) -> None:
        super().__init__(config)
        self.visual = Qwen3VLVisionModel._from_config(config.vision_config)
        self.language_model = InternVideo3TextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `InternVideo3ForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is None and (pixel_values is not None or pixel_values_videos is not None):
            raise ValueError("pixels need input_ids, which tell where their vision tokens stand")
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        vision = None
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        elif mm_token_type_ids is not None:
            vision = mm_token_type_ids != 0
        elif self.config.text_config.latent_adapters:
            raise ValueError(
                "inputs_embeds need mm_token_type_ids: latent_adapters tell vision from text by them"
            )
        visual = self._encode(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if visual is not None:
            vision = visual.mask
            tokens = visual.tokens.to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(visual.mask[..., None], tokens)
        if position_ids is None:
            position_ids = self.positions(
                input_ids,
                inputs_embeds.shape[1],
                attention_mask,
                past_key_values,
                image_grid_thw,
                video_grid_thw,
            )
        elif position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        if past_key_values is not None and inputs_embeds.shape[1] > 1:
            past_key_values.rope_deltas = _rope_deltas(position_ids, attention_mask, past_key_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=bool(output_hidden_states),
            visual=visual,
            vision=vision,
        )

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        pixel_values_videos: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
    ) -> Visual | None:
        """Runs the tower over images and videos and puts their tokens into the order of the text."""
        if input_ids is None or (pixel_values is None and pixel_values_videos is None):
            return None
        places = {
            "image": (input_ids == self.config.image_token_id, pixel_values, image_grid_thw),
            "video": (input_ids == self.config.video_token_id, pixel_values_videos, video_grid_thw),
        }
        mask = places["image"][0] | places["video"][0]
        found = []
        for kind, (where, pixels, grid) in places.items():
            if pixels is None:
                tokens, levels = None, []
            elif grid is None:
                raise ValueError(f"pixels of {kind}s need {kind}_grid_thw")
            else:
                out = self.visual(pixels.to(self.visual.dtype), grid_thw=grid, return_dict=True)
                tokens, levels = out.pooler_output, list(out.deepstack_features)
            wanted, there = int(where.sum()), 0 if tokens is None else len(tokens)
            if wanted != there:
                raise ValueError(
                    f"the text holds {wanted} {kind} tokens, but the {kind}s given make {there}; "
                    "prepare both with one call of the processor"
                )
            if tokens is not None:
                found.append((where[mask], [tokens, *levels]))
        joined = [torch.empty_like(x[:1]).expand(int(mask.sum()), -1).clone() for x in found[0][1]]
        for where, features in found:
            for out, feature in zip(joined, features, strict=True):
                out[where] = feature
        return Visual(mask, joined[0], joined[1:])

    def positions(
        self,
        input_ids: torch.Tensor | None,
        length: int,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
    ) -> torch.Tensor:
        """(3, B, T) positions of the T tokens that follow a cache, or of a whole prompt.

        Vision moves positions ahead of the count of tokens or behind it; a cache remembers by how much.
        """
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None:
            rows = 1 if input_ids is None else len(input_ids)
            attention_mask = torch.ones((rows, past + length), dtype=torch.long, device=self.device)
        if attention_mask.ndim != 2:
            raise ValueError("an attention_mask of four axes needs position_ids beside it")
        deltas = getattr(cache, "rope_deltas", 0) if past else 0
        if input_ids is not None and (image_grid_thw is not None or video_grid_thw is not None):
            start = attention_mask[:, :past].long().sum(-1, keepdim=True) + deltas
            new = attention_mask[:, past : past + length]
            return start + mrope_positions(self.config, input_ids, new, image_grid_thw, video_grid_thw)
        positions = text_positions(attention_mask)[:, past : past + length] + deltas
        return positions[None].expand(3, -1, -1)


def _rope_deltas(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
) -> torch.Tensor:
    """(B, 1): a row's next position less the number of its tokens, cached ones included."""
    if attention_mask is None:
        real = int(cache.get_seq_length()) + position_ids.shape[-1]
    elif attention_mask.ndim == 2:
        real = attention_mask.long().sum(-1, keepdim=True)
    else:
        last = attention_mask[:, 0, -1:]
        real = (last if last.dtype == torch.bool else last == 0).sum(-1)
    return position_ids.amax((0, 2))[:, None] + 1 - real


class InternVideo3ForConditionalGeneration(InternVideo3VisionPreTrainedModel, GenerationMixin):
    """The whole model with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InternVideo3Config) -> None:
        super().__init__(config)
        self.model = InternVideo3Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every token, or of the last `logits_to_keep`.

        Args:
            input_ids: (B, T), every vision token written out.
            attention_mask: (B, T and what is cached), 0 for padding.
            position_ids: (3, B, T) time, height and width; computed where not given.
            past_key_values: any transformers cache; the latents lie in its keys.
            inputs_embeds: (B, T, D) instead of input_ids, for text.
            labels: (B, T), the token itself where a loss is taken, else -100.
            pixel_values, image_grid_thw: (patches, 3·2·16·16) of all images; (images, 3) in patches.
            pixel_values_videos, video_grid_thw: the same of all videos.
            mm_token_type_ids: (B, T), 0 for text, where inputs_embeds hold vision tokens and the model has
                adapters; else not needed: the ids tell which token is an image's or a video's.

        Raises:
            ValueError: images or videos that do not fit the tokens that stand for them.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return self.with_logits(out, labels, logits_to_keep, **kwargs)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The (3, B, T) positions of the prompt; `generate` counts on from the last by itself."""
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or not ids.shape[1] else ids
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        positions = self.model.positions(
            ids[:, past:] if ids.ndim == 2 else None,
            ids.shape[1] - past,
            model_kwargs.get("attention_mask"),
            cache,
            model_kwargs.get("image_grid_thw"),
            model_kwargs.get("video_grid_thw"),
        )
        # What is cached already is not read again.
        return functional.pad(positions, (past, 0))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats every row; pixels and grids are cut by row first, since they have no batch axis."""
        if expand_size == 1 or input_ids is None:
            return super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
        merge = self.config.vision_config.spatial_merge_size**2
        vision: dict[str, torch.Tensor] = {}
        for token, names in (
            (self.config.image_token_id, ("pixel_values", "image_grid_thw")),
            (self.config.video_token_id, ("pixel_values_videos", "video_grid_thw")),
        ):
            pixels, grid = (model_kwargs.pop(name, None) for name in names)
            if pixels is not None and grid is not None:
                patches = (input_ids == token).sum(1) * merge
                vision |= zip(names, repeated(pixels, grid, patches, expand_size), strict=True)
        ids, expanded = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, {**expanded, **vision}
