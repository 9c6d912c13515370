"""The two attentions of the decoder, GQA and M²LA, with one call signature."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv3jax import ops
from iv3jax.models.cache import write
from iv3jax.models.config import TextConfig
from iv3jax.models.layers import Execution, Linear, RMSNorm
from iv3jax.models.rope import Rope, rotate, rotate_interleaved
from iv3jax.sharding import constrain
from iv3jax.typing import Array, DType, Params
from kernels_pallas.latents import Latents

Entries = dict[str, Array]

MATRICES = frozenset({"q_expand", "kv_adapters"})
"""Modules whose kernel is a matrix for each head or modality, and no Linear's."""


class Tokens(NamedTuple):
    """What attention knows of the tokens besides their hidden states.

    Attributes:
        rope: angles of each token.
        segment_ids: (B, T), 0 for padding. Over a cache a row's tokens come first, its padding after them.
        order: (B, T) places of tokens that lie in another order than their own, or None.
        slots: (B, T) cache slots the tokens go to, or None without a cache.
        length: (B,) tokens of the rows in the cache before these, or None without one.
        modality: (B, T) int32, 0 for text and 1 for vision, where latents have adapters; else None.
    """

    rope: Rope
    segment_ids: Array
    order: Array | None
    slots: Array | None
    length: Array | None
    modality: Array | None = None

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


class LatentAdapters(nn.Module):
    """The affine maps of a written latent, for text and for vision tokens; new ones change nothing."""

    rank: int
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self) -> ops.Affine:
        def identities(key: Array, shape: tuple[int, ...], dtype: DType) -> Array:
            del key
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

        def param(name: str, init: nn.initializers.Initializer, *shape: int) -> Array:
            axes = ("modality", *["latent"] * (len(shape) - 1))
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.run.param_dtype)
            return value.astype(self.run.dtype)

        return ops.Affine(
            param("kernel", identities, 2, self.rank, self.rank),
            param("bias", nn.initializers.zeros, 2, self.rank),
        )


class QueryExpansion(nn.Module):
    """A fixed product for each query head: (B, T, H, inputs) → (B, T, H, outputs)."""

    heads: int
    inputs: int
    outputs: int
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, query: Array) -> Array:
        init = nn.initializers.normal(self.inputs**-0.5)
        axes = ("heads", "head_dim", "head_dim")
        shape = (self.heads, self.outputs, self.inputs)
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, axes), shape, self.run.param_dtype
        ).astype(self.run.dtype)
        return jnp.einsum("bthd,hkd->bthk", query, kernel)


class M2LAAttention(nn.Module):
    """Multimodal multi-head latent attention (SPEC §2), with what the config says besides."""

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
        query = c.head_dim if c.use_qk_norm else n + e
        self.q_proj = Linear((width,), (heads, query), ("embed",), head, *bias)
        self.kv_a_proj_with_mqa = Linear((width,), (rank + e,), ("embed",), ("latent",), *bias)
        self.kv_b_proj = Linear((rank,), (heads, n + v), ("rank",), head, False, run)
        self.o_proj = Linear((heads, v), (width,), head, ("embed",), False, run)
        if c.use_qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, run)
            self.q_expand = QueryExpansion(heads, c.head_dim, n + e, run)
            key, keys = ("kv_heads", "head_dim"), (c.num_key_value_heads, c.head_dim)
            self.k_norm_proj = Linear((width,), keys, ("embed",), key, False, run)
        if c.latent_adapters:
            self.kv_adapters = LatentAdapters(rank, run)

    def __call__(
        self, x: Array, tokens: Tokens, entries: Entries | None, layer: Array
    ) -> tuple[Array, Entries | None]:
        """(B, T, D) → (B, T, D) and the cache entries with this layer's latents written.

        Without a cache, or with many new tokens, keys and values are expanded from the latents; with few
        over a cache, the query is carried into latent space instead. Both are the same function.
        """
        c, how = self.config, self.run.implementation
        query = self._query(x, tokens)
        down = (x, *self.kv_a_proj_with_mqa.dense(x), *tokens.rope)
        compress: dict[str, Any] = dict(implementation=how)
        if c.latent_adapters:
            compress |= dict(affine=self.kv_adapters(), modality=tokens.modality)
        kernel, _ = self.kv_b_proj.dense(x)
        factors = self._logit_scale(x) if c.use_qk_norm else None
        if entries is None or tokens.slots is None or tokens.length is None:
            latent = ops.latent_compress(*down, **compress)
            return self.o_proj(ops.latent_attention(query, latent, kernel, tokens.mask(), how, factors)), None
        latents = Latents(entries["latent"], entries.get("scale"), entries.get("k_rope"))
        offsets, counts = tokens.length, tokens.counts()
        latents = ops.latent_compress_into(latents, layer, offsets, counts, *down, **compress)
        if factors is not None:
            factors = ops.logit_scale_into(entries["logit_scale"], layer, offsets, counts, factors)
        slots = jnp.where(tokens.segment_ids != 0, jnp.minimum(tokens.slots, latents.capacity - 1), -1)
        few = ops.few_queries(query.shape[2], _rank(c), kernel.shape[1])
        attend = self._absorbed if x.shape[1] <= few else ops.latent_prefill
        out = attend(query, latents, layer, kernel, slots, how, factors)
        written = zip(("latent", "scale", "k_rope", "logit_scale"), (*latents, factors), strict=True)
        return self.o_proj(out), {name: x for name, x in written if x is not None}

    def _query(self, x: Array, tokens: Tokens) -> Array:
        """(B, T, H, n+e), [q_nope ‖ rotated q_rope]."""
        n, query = self.config.qk_nope_head_dim, self.q_proj(x)
        if self.config.use_qk_norm:
            query = self.q_expand(self.q_norm(query))
        query = constrain(query, "batch", "sequence", "act_heads", None)
        return jnp.concatenate([query[..., :n], rotate_interleaved(query[..., n:], tokens.rope)], axis=-1)

    def _logit_scale(self, x: Array) -> Array:
        """(B, T, G) fp32, one over each key's root mean square: its norm, whose weight is in the latents."""
        key = self.k_norm_proj.product(x, jnp.float32)
        factors = jax.lax.rsqrt(jnp.mean(key * key, axis=-1) + self.config.rms_norm_eps)
        return constrain(factors, "batch", "sequence", "act_heads")

    def _absorbed(
        self,
        query: Array,
        latents: Latents,
        layer: Array,
        kernel: Array,
        slots: Array,
        how: str | None,
        logit_scale: Array | None,
    ) -> Array:
        c, n = self.config, self.config.qk_nope_head_dim
        # The kernel is used whole, with zeros for the half that is not meant: a cut would copy it.
        padded = jnp.pad(query[..., :n], [(0, 0)] * 3 + [(0, c.v_head_dim)])
        q_latent = jnp.einsum("bthk,hkr->bthr", padded, kernel)
        scale = (n + c.qk_rope_head_dim) ** -0.5
        context = ops.latent_decode(q_latent, query[..., n:], latents, layer, slots, scale, how, logit_scale)
        return jnp.einsum("bthr,hkr->bthk", context.astype(kernel.dtype), kernel)[..., n:]


def zero_padding(config: TextConfig, weights: Params) -> Params:
    """The `self_attn` weights of scanned layers, zero wherever a layer of `kv_lora_rank_list` has no rank.

    Zeros have zero gradients, so they stay. Codes of quantised kernels stay as they are: only random ones are
    not zero there, and such a model computes nothing in particular.
    """
    if config.kv_lora_rank_list is None:
        return weights
    latent = jnp.arange(config.kv_lora_rank) < jnp.array(config.kv_lora_rank_list)[:, None]
    down = jnp.pad(latent, ((0, 0), (0, config.qk_rope_head_dim)), constant_values=True)
    masks = {
        ("kv_a_proj_with_mqa", "kernel"): down[:, :, None],
        ("kv_a_proj_with_mqa", "bias"): down,
        ("kv_a_proj_with_mqa", "lora_b"): down[:, :, None],
        ("kv_b_proj", "kernel"): latent[:, None, None],
        ("kv_b_proj", "lora_a"): latent[:, None],
        ("kv_adapters", "kernel"): (latent[:, :, None] & latent[:, None])[:, None],
        ("kv_adapters", "bias"): latent[:, None],
    }
    return {
        module: {
            name: x * masks[module, name].astype(x.dtype) if (module, name) in masks else x
            for name, x in own.items()
        }
        for module, own in weights.items()
    }
