"""The decoder: scanned layers of either attention, with DeepStack after the first K."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv3jax.models.attention import Entries, GQAAttention, M2LAAttention, Tokens
from iv3jax.models.cache import Cache
from iv3jax.models.config import TextConfig
from iv3jax.models.layers import Execution, RMSNorm, SwiGLU
from iv3jax.models.rope import Rope, decoder_rope
from iv3jax.models.vision import VisualFeatures
from iv3jax.sharding import constrain
from iv3jax.typing import Array


def gather_visual(features: Array, visual_index: Array) -> Array:
    """(B, N, D) vision tokens → (B, T, D) at the positions that name them, zero at text."""
    features = constrain(features, "batch", None, "hidden")
    chosen = jnp.take_along_axis(features, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where(visual_index[..., None] >= 0, chosen, 0)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each pre-norm and residual, then DeepStack's level if there is one."""

    config: TextConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Entries | None],
        layer: Array,
        tokens: Tokens,
        deepstack: Array | None,
    ) -> tuple[tuple[Array, Entries | None], None]:
        """carry: hidden (B, T, D) and the cache entries of all layers. deepstack: (K, B, T, D)."""
        c, run = self.config, self.run
        hidden, entries = carry
        if c.rope_frequency_list is not None:
            turning = jnp.asarray(c.rope_frequency_list)[layer]
            tokens = tokens._replace(rope=Rope(*(x[..., turning] for x in tokens.rope)))
        attention = GQAAttention if c.kv_lora_rank is None else M2LAAttention
        y = RMSNorm(c.hidden_size, c.rms_norm_eps, run, name="input_layernorm")(hidden)
        y, entries = attention(c, run, name="self_attn")(y, tokens, entries, layer)
        hidden = constrain(hidden + y, "batch", "sequence", "hidden")
        y = RMSNorm(c.hidden_size, c.rms_norm_eps, run, name="post_attention_layernorm")(hidden)
        y = SwiGLU(c.hidden_size, c.intermediate_size, run, name="mlp")(y)
        hidden = constrain(hidden + y, "batch", "sequence", "hidden")
        if deepstack is not None:
            levels = deepstack.shape[0]
            hidden = jax.lax.cond(
                layer < levels,
                lambda: hidden + deepstack[jnp.minimum(layer, levels - 1)],
                lambda: hidden,
            )
        # Read by parity checks only: nothing is kept unless the caller makes `intermediates` mutable.
        self.sow("intermediates", "hidden", hidden)
        return (hidden, entries), None


class Place(NamedTuple):
    """Where tokens stand: positions (3, B, T), segment_ids (B, T), order (B, T) or None; see Batch."""

    positions: Array
    segment_ids: Array
    order: Array | None


class Decoder(nn.Module):
    """All layers and the final norm."""

    config: TextConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        place: Place,
        visual: VisualFeatures | None,
        visual_index: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """(B, T, D) embeddings → (B, T, D) after the final norm, and the cache with these tokens in it."""
        c, run = self.config, self.run
        turned = (c.rope_dim, c.rope_theta, c.mrope_section, c.rope_components)
        rope = decoder_rope(place.positions, *turned)
        slots = None if cache is None else cache.slots(place.segment_ids)
        length = None if cache is None else cache.length
        modality = None
        if c.latent_adapters:
            text = jnp.zeros_like(place.segment_ids)
            modality = text if visual_index is None else (visual_index >= 0).astype(jnp.int32)
        tokens = Tokens(rope, place.segment_ids, place.order, slots, length, modality)
        deepstack = None
        if visual is not None and visual_index is not None and visual.deepstack.shape[0]:
            # At their places before the layers: where a row is split, each device then keeps its own tokens'.
            # One level after the other, so that no more than one is whole at a time.
            deepstack = jax.lax.map(
                lambda level: constrain(gather_visual(level, visual_index), "batch", "sequence", "hidden"),
                visual.deepstack.astype(run.dtype),
            )
        hidden = constrain(hidden, "batch", "sequence", "hidden")
        entries = None if cache is None else cache.entries
        if run.scan_layers:
            layers = nn.scan(
                run.checkpointed(DecoderLayer),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, run, name="layers")
            indices = jnp.arange(c.num_hidden_layers)
            (hidden, entries), _ = layers((hidden, entries), indices, tokens, deepstack)
        else:
            hidden, entries = self._unrolled(hidden, entries, tokens, deepstack)
        hidden = RMSNorm(c.hidden_size, c.rms_norm_eps, run, name="norm")(hidden)
        return hidden, None if cache is None else cache.advanced(entries, place.segment_ids)

    def _unrolled(
        self,
        hidden: Array,
        entries: Any,
        tokens: Tokens,
        deepstack: Array | None,
    ) -> tuple[Array, Any]:
        """The layers one after the other; each sees its own part of the cache as a stack of one."""
        layer_type = self.run.checkpointed(DecoderLayer)
        levels = 0 if deepstack is None else deepstack.shape[0]
        written = []
        for i in range(self.config.num_hidden_layers):
            level = deepstack[i : i + 1] if deepstack is not None and i < levels else None
            own = None if entries is None else {name: parts[i] for name, parts in entries.items()}
            layer = layer_type(self.config.of_layer(i), self.run, name=f"layers_{i}")
            (hidden, own), _ = layer((hidden, own), jnp.zeros((), jnp.int32), tokens, level)
            written.append(own)
        if entries is None:
            return hidden, None
        return hidden, {name: tuple(own[name] for own in written) for name in entries}
