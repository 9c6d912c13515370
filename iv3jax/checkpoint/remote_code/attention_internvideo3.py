"""M²LA, multimodal multi-head latent attention, and its interleaved M-RoPE.

The cache holds one latent and one rotated RoPE key for each token and layer.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

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
    where i % 3 == 2 and i < 3·s_w, else by time."""
    dims, rope = config.qk_rope_head_dim, config.rope_parameters
    index = torch.arange(dims // 2, device=position_ids.device)
    axes = torch.zeros_like(index)
    for axis in (1, 2):
        axes[(index % 3 == axis) & (index < 3 * rope["mrope_section"][axis])] = axis
    frequencies = 1.0 / rope["rope_theta"] ** (2 * index.float() / dims)
    angles = position_ids.float()[axes].permute(1, 2, 0) * frequencies
    return Rope(angles.cos(), angles.sin())


def rotate_interleaved(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turns (B, heads, T, e), stored as pairs (2i, 2i+1); the result holds all firsts, then all seconds."""
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class InternVideo3Attention(nn.Module):
    """M²LA. What is cached is (B, 1, T, r+e), `[latent r ‖ rotated RoPE key e]`, under the cache's keys; its
    values have no width."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scaling = (self.nope + self.rope) ** -0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.heads * (self.nope + self.rope), bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=bias)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(
        self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """(B, T, D) → (B, T, D).

        mask is (B, 1, T, S), True or 0 where a query sees a key; None means causal.
        """
        rows, length, _ = x.shape
        query = self.q_proj(x).view(rows, length, self.heads, -1).transpose(1, 2)
        query = torch.cat(
            [query[..., : self.nope], rotate_interleaved(query[..., self.nope :], rope)], dim=-1
        )
        latent = self.kv_a_proj_with_mqa(x)[:, None]
        fresh = torch.cat(
            [latent[..., : self.rank], rotate_interleaved(latent[..., self.rank :], rope)], dim=-1
        )
        if cache is None:
            out = self._expanded(query, fresh, mask)
        elif length <= ABSORBED_QUERIES:
            latent, _ = cache.update(fresh, fresh[..., :0], self.layer_idx)
            out = self._absorbed(query, latent, mask)
        else:
            # A static cache returns all its slots: a first prompt needs none of them.
            first = not cache.get_seq_length(self.layer_idx)
            latent, _ = cache.update(fresh, fresh[..., :0], self.layer_idx)
            if first:
                latent, mask = fresh, None if mask is None else mask[..., :length]
            out = self._expanded(query, latent, mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))

    def _expanded(self, query: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Keys and values written out for each head: (B, H, T, n+e), (B, 1, S, r+e) → (B, H, T, v)."""
        kv = self.kv_b_proj(latent[:, 0, :, : self.rank])
        kv = kv.view(*kv.shape[:2], self.heads, -1).transpose(1, 2)
        k_rope = latent[..., self.rank :].expand(-1, self.heads, -1, -1)
        key, value = torch.cat([kv[..., : self.nope], k_rope], dim=-1), kv[..., self.nope :]
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

    def _absorbed(self, query: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The same function, the queries carried into latent space: every head reads the one latent."""
        rows, heads, length, _ = query.shape
        weight = self.kv_b_proj.weight.view(heads, self.nope + self.value, self.rank)
        q_latent = torch.matmul(query[..., : self.nope], weight[:, : self.nope])
        queries = torch.cat([q_latent, query[..., self.nope :]], dim=-1)
        latent = latent[:, 0]
        logits = torch.matmul(queries.flatten(1, 2), latent.transpose(1, 2)).float() * self.scaling
        logits = logits.view(rows, heads, length, -1)
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
