"""M²LA, multimodal multi-head latent attention, and its interleaved M-RoPE.

The cache holds one latent and one rotated RoPE key for each token and layer; with `use_qk_norm` also one
number for each group of heads.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from .configuration_internvideo3 import InternVideo3TextConfig

ABSORBED_QUERIES = 64
"""Up to this many new tokens, attention over a cache stays in latent space; beyond, keys and values are
expanded from the latents, which is less work per query."""


class Rope(NamedTuple):
    """Cosines and sines of each token's angles, fp32 (B, T, e/2)."""

    cos: torch.Tensor
    sin: torch.Tensor


def mrope_angles(config: InternVideo3TextConfig, position_ids: torch.Tensor) -> Rope:
    """Angles from (3, B, T) positions: frequency i turns by height where i % 3 == 1 and i < 3·s_h, by width
    where i % 3 == 2 and i < 3·s_w, else by time. Each of `rope_components` runs of pairs has them all, or a
    layer takes of them what `rope_frequency_list` names."""
    count, rope = config.rope_frequencies, config.rope_parameters
    index = torch.arange(count, device=position_ids.device)
    axes = torch.zeros_like(index)
    section = rope.get("mrope_section") or [count, 0, 0]
    for axis in (1, 2):
        axes[(index % 3 == axis) & (index < 3 * section[axis])] = axis
    frequencies = 1.0 / rope["rope_theta"] ** (index.float() / count)
    angles = position_ids.float()[axes].permute(1, 2, 0) * frequencies
    angles = angles.repeat(1, 1, config.rope_components)
    return Rope(angles.cos(), angles.sin())


def rotate_interleaved(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turns (B, heads, T, e), stored as pairs (2i, 2i+1); the result holds all firsts, then all seconds."""
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class InternVideo3LatentAdapters(nn.Module):
    """Two affine maps of latents: the first for text, the second for vision."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(rank).repeat(2, 1, 1))
        self.bias = nn.Parameter(torch.zeros(2, rank))

    def forward(self, latent: torch.Tensor, vision: torch.Tensor | None) -> torch.Tensor:
        """(B, T, r) → (B, T, r); vision is (B, T) bool, None where all is text."""
        text = functional.linear(latent, self.weight[0], self.bias[0])
        if vision is None:
            return text
        return torch.where(vision[..., None], functional.linear(latent, self.weight[1], self.bias[1]), text)


class InternVideo3Attention(nn.Module):
    """M²LA. What is cached is (B, 1, T, r+e), `[latent r ‖ rotated RoPE key e]`, under the cache's keys; its
    values have no width. With `use_qk_norm` they hold the logits' factors, (B, 1, T, G) in fp32, their bits
    read as numbers of the cache's dtype: half as wide, it takes two for each."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        ranks = config.kv_lora_rank_list
        self.rank = config.kv_lora_rank if ranks is None else ranks[layer_idx]
        self.nope, self.rope, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scaling = (self.nope + self.rope) ** -0.5
        width, bias = config.hidden_size, config.attention_bias
        self.has_norms, dim, self.epsilon = config.use_qk_norm, config.head_dim, config.rms_norm_eps
        query_dim = dim if self.has_norms else self.nope + self.rope
        self.q_proj = nn.Linear(width, self.heads * query_dim, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=bias)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)
        listed = config.rope_frequency_list
        self.frequencies = None if listed is None else list(listed[layer_idx])
        self.kv_adapters = InternVideo3LatentAdapters(self.rank) if config.latent_adapters else None
        if self.has_norms:
            self.q_norm = Qwen3VLTextRMSNorm(dim, self.epsilon)
            self.q_expand = nn.Linear(dim, self.heads * (self.nope + self.rope), bias=False)
            self.k_norm_proj = nn.Linear(width, self.groups * dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: Cache | None,
        vision: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, T, D) → (B, T, D).

        mask is (B, 1, T, S), True or 0 where a query sees a key; None means causal. vision is (B, T), True
        where a token is an image's or a video's; None where all is text.
        """
        rows, length, _ = x.shape
        if self.frequencies is not None:
            rope = Rope(*(angles[..., self.frequencies] for angles in rope))
        query = self.q_proj(x).view(rows, length, self.heads, -1)
        scale = None
        if self.has_norms:
            query, scale = self._expand(self.q_norm(query)), self._logit_scale(x)
        query = query.transpose(1, 2)
        query = torch.cat(
            [query[..., : self.nope], rotate_interleaved(query[..., self.nope :], rope)], dim=-1
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        if self.kv_adapters is not None:
            latent = self.kv_adapters(latent, vision)
        fresh = torch.cat([latent[:, None], rotate_interleaved(k_rope[:, None], rope)], dim=-1)
        if cache is None:
            out = self._expanded(query, fresh, scale, mask)
        elif length <= ABSORBED_QUERIES:
            out = self._absorbed(query, *self._cached(cache, fresh, scale), mask)
        else:
            # A static cache returns all its slots: a first prompt needs none of them.
            first = not cache.get_seq_length(self.layer_idx)
            latent, all_scales = self._cached(cache, fresh, scale)
            if first:
                latent, all_scales, mask = fresh, scale, None if mask is None else mask[..., :length]
            out = self._expanded(query, latent, all_scales, mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))

    def _expand(self, query: torch.Tensor) -> torch.Tensor:
        """(B, T, H, head_dim) → (B, T, H, n+e) by each head's own matrix."""
        weight = self.q_expand.weight.view(self.heads, -1, query.shape[-1])
        return torch.einsum("bthd,hkd->bthk", query, weight)

    def _logit_scale(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, T, G), fp32: 1 / rms of the numbers that stand for a group's key."""
        key = self.k_norm_proj(x).unflatten(-1, (self.groups, -1)).float()
        return torch.rsqrt(key.square().mean(-1) + self.epsilon)[:, None]

    def _cached(
        self, cache: Cache, fresh: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds new tokens to the cache; all its latents (B, 1, S, r+e) and factors (B, 1, S, G), if any."""
        if scale is None:
            return cache.update(fresh, fresh[..., :0], self.layer_idx)[0], None
        # A cache of bf16 must not round them, and only some caches hold two dtypes.
        wide = torch.promote_types(fresh.dtype, torch.float32)
        latent, bits = cache.update(fresh, scale.to(wide).view(fresh.dtype), self.layer_idx)
        return latent, bits.view(wide).float()

    def _of_heads(self, scale: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, G) → (B, H, S)."""
        return scale[:, 0].transpose(1, 2).repeat_interleave(self.heads // self.groups, dim=1)

    def _expanded(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        scale: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Keys and values written out for each head: (B, H, T, n+e), (B, 1, S, r+e) → (B, H, T, v)."""
        kv = self.kv_b_proj(latent[:, 0, :, : self.rank])
        kv = kv.view(*kv.shape[:2], self.heads, -1).transpose(1, 2)
        k_rope = latent[..., self.rank :].expand(-1, self.heads, -1, -1)
        key, value = torch.cat([kv[..., : self.nope], k_rope], dim=-1), kv[..., self.nope :]
        if scale is not None:
            # It multiplies logits, so as well the keys.
            key = (key * self._of_heads(scale)[..., None]).to(key.dtype)
        # Kernels that never write out the T × S logits want one width for all three.
        value = functional.pad(value, (0, max(0, query.shape[-1] - self.value)))
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            scale=self.scaling,
        )
        return out[..., : self.value]

    def _absorbed(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        scale: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same function, the queries carried into latent space: every head reads the one latent."""
        rows, heads, length, _ = query.shape
        weight = self.kv_b_proj.weight.view(heads, self.nope + self.value, self.rank)
        q_latent = torch.matmul(query[..., : self.nope], weight[:, : self.nope])
        queries = torch.cat([q_latent, query[..., self.nope :]], dim=-1)
        latent = latent[:, 0]
        logits = torch.matmul(queries.flatten(1, 2), latent.transpose(1, 2)).float() * self.scaling
        logits = logits.view(rows, heads, length, -1)
        if scale is not None:
            logits = logits * self._of_heads(scale)[:, :, None]
        if mask is None and length > 1:
            # No mask comes only without padding and with an empty cache, so that T = S.
            mask = torch.ones(length, logits.shape[-1], dtype=torch.bool, device=logits.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        elif mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1).to(query.dtype)
        context = torch.matmul(weights.flatten(1, 2), latent[..., : self.rank])
        context = context.view(rows, heads, length, self.rank)
        return torch.matmul(context, weight[:, self.nope :].transpose(1, 2))
