"""The two attentions of the decoder, GQA and M²LA, with one call signature."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from iv3jax import ops
from iv3jax.models.cache import write
from iv3jax.models.config import TextConfig
from iv3jax.models.layers import Execution, Linear, RMSNorm
from iv3jax.models.rope import Rope, rotate, rotate_interleaved
from iv3jax.sharding import constrain
from iv3jax.typing import Array
from kernels_pallas.latents import Latents

Entries = dict[str, Array]


class Tokens(NamedTuple):
    """What attention knows of the tokens besides their hidden states.

    Attributes:
        rope: angles of each token.
        segment_ids: (B, T), 0 for padding. Over a cache a row's tokens come first, its padding after them.
        order: (B, T) places of tokens that lie in another order than their own, or None.
        slots: (B, T) cache slots the tokens go to, or None without a cache.
        length: (B,) tokens of the rows in the cache before these, or None without one.
    """

    rope: Rope
    segment_ids: Array
    order: Array | None
    slots: Array | None
    length: Array | None

    def mask(self) -> ops.AttentionMask:
        """Causal inside each sample; over a cache, all slots up to the token's own."""
        if self.slots is not None:
            return ops.AttentionMask(self.segment_ids, None, self.slots)
        order = self.order
        if order is None:
            order = jnp.arange(self.segment_ids.shape[1], dtype=jnp.int32)
            order = jnp.broadcast_to(order, self.segment_ids.shape)
        return ops.AttentionMask(self.segment_ids, self.segment_ids, order, self.order)

    def counts(self) -> Array:
        """(B,) tokens of each row that are not padding."""
        return jnp.sum(self.segment_ids != 0, axis=1, dtype=jnp.int32)


class GQAAttention(nn.Module):
    """Grouped-query attention, with q/k norm where the config says so (Qwen3)."""

    config: TextConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    def setup(self) -> None:
        c, run = self.config, self.run

        def projection(heads: int, axis: str) -> Linear:
            return Linear(
                (c.hidden_size,), (heads, c.head_dim), ("embed",), (axis, "head_dim"), c.attention_bias, run
            )

        self.q_proj = projection(c.num_attention_heads, "heads")
        self.k_proj = projection(c.num_key_value_heads, "kv_heads")
        self.v_proj = projection(c.num_key_value_heads, "kv_heads")
        self.o_proj = Linear(
            (c.num_attention_heads, c.head_dim),
            (c.hidden_size,),
            ("heads", "head_dim"),
            ("embed",),
            c.attention_output_bias,
            run,
        )
        if c.use_qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, run)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, run)

    def __call__(
        self, x: Array, tokens: Tokens, entries: Entries | None, layer: Array
    ) -> tuple[Array, Entries | None]:
        """(B, T, D) → (B, T, D) and the cache entries with this layer's keys and values written."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, tokens.rope), rotate(key, tokens.rope)
        query = constrain(query, "batch", "sequence", "act_heads", None)
        if entries is not None and tokens.slots is not None:
            entries = {
                "key": write(entries["key"], layer, tokens.slots, key),
                "value": write(entries["value"], layer, tokens.slots, value),
            }
            key, value = entries["key"][layer], entries["value"][layer]
            return self.o_proj(ops.attention_over_cache(query, key, value, tokens.mask())), entries
        return self.o_proj(ops.attention(query, key, value, tokens.mask())), entries


def _rank(config: TextConfig) -> int:
    if config.kv_lora_rank is None:
        raise ValueError("M²LA needs a kv_lora_rank")
    return config.kv_lora_rank


class M2LAAttention(nn.Module):
    """Multimodal multi-head latent attention (SPEC §2)."""

    config: TextConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    def setup(self) -> None:
        c, run = self.config, self.run
        width, heads, rank = c.hidden_size, c.num_attention_heads, _rank(c)
        n, e, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        head = ("heads", "head_dim")
        # A new model starts with biases that are not zero: turned by RoPE they make heads that look at fixed
        # distances, which the tiny model would otherwise spend much of its few minutes to find.
        bias = (c.attention_bias, run, 0.5)
        self.q_proj = Linear((width,), (heads, n + e), ("embed",), head, *bias)
        self.kv_a_proj_with_mqa = Linear((width,), (rank + e,), ("embed",), ("latent",), *bias)
        self.kv_b_proj = Linear((rank,), (heads, n + v), ("latent",), head, False, run)
        self.o_proj = Linear((heads, v), (width,), head, ("embed",), False, run)

    def __call__(
        self, x: Array, tokens: Tokens, entries: Entries | None, layer: Array
    ) -> tuple[Array, Entries | None]:
        """(B, T, D) → (B, T, D) and the cache entries with this layer's latents written.

        Without a cache, or with many new tokens, keys and values are expanded from the latents; with few
        over a cache, the query is carried into latent space instead. Both are the same function.
        """
        n, how = self.config.qk_nope_head_dim, self.run.implementation
        query = constrain(self.q_proj(x), "batch", "sequence", "act_heads", None)
        query = jnp.concatenate([query[..., :n], rotate_interleaved(query[..., n:], tokens.rope)], axis=-1)
        down = (x, *self.kv_a_proj_with_mqa.dense(x), *tokens.rope)
        kernel, _ = self.kv_b_proj.dense(x)
        if entries is None or tokens.slots is None or tokens.length is None:
            latent = ops.latent_compress(*down, implementation=how)
            return self.o_proj(ops.latent_attention(query, latent, kernel, tokens.mask(), how)), None
        latents = Latents(entries["latent"], entries.get("scale"), entries.get("k_rope"))
        latents = ops.latent_compress_into(
            latents, layer, tokens.length, tokens.counts(), *down, implementation=how
        )
        slots = jnp.where(tokens.segment_ids != 0, jnp.minimum(tokens.slots, latents.capacity - 1), -1)
        attend = ops.latent_prefill if x.shape[1] > ops.few_queries(query.shape[2]) else self._absorbed
        out = attend(query, latents, layer, kernel, slots, how)
        names = ("latent", "scale", "k_rope")
        written = {name: x for name, x in zip(names, latents, strict=True) if x is not None}
        return self.o_proj(out), written

    def _absorbed(
        self, query: Array, latents: Latents, layer: Array, kernel: Array, slots: Array, how: str | None
    ) -> Array:
        c, n = self.config, self.config.qk_nope_head_dim
        # The kernel is used whole, with zeros for the half that is not meant: a cut would copy it.
        padded = jnp.pad(query[..., :n], [(0, 0)] * 3 + [(0, c.v_head_dim)])
        q_latent = jnp.einsum("bthk,hkr->bthr", padded, kernel)
        scale = (n + c.qk_rope_head_dim) ** -0.5
        context = ops.latent_decode(q_latent, query[..., n:], latents, layer, slots, scale, how)
        return jnp.einsum("bthr,hkr->bthk", context.astype(kernel.dtype), kernel)[..., n:]
