"""What the calibration tokens do in one layer of the source: its parts, its output, its gradients (JAX).

Hidden states are (B, T, D), parameters those of one `DecoderLayer` as nested dicts. Products are fp32.
Axes as in layer.py; Z = 2·G·d, the numbers of [keys ‖ values].
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.models.config import TextConfig
from iv3jax.models.decoder import gather_visual
from iv3jax.models.layers import RMSNorm, SwiGLU
from iv3jax.models.rope import Rope, rotate
from iv3jax.typing import Array, Params


class Rows(NamedTuple):
    """What a layer knows of the tokens besides their hidden states.

    Attributes:
        rope: source angles (B, T, d/2).
        segment_ids: (B, T), 0 for padding.
        visual_index: (B, T), −1 for text, or None.
        deepstack: (levels, B, N, D) or None.
    """

    rope: Rope
    segment_ids: Array
    visual_index: Array | None
    deepstack: Array | None

    def mask(self) -> Array:
        """(B, T, T): who sees whom."""
        ids, order = self.segment_ids, jnp.arange(self.segment_ids.shape[1])
        same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0)
        return same & (order[:, None] >= order)


class Parts(NamedTuple):
    """Queries, keys and values of the source before RoPE.

    Attributes:
        raw_query: (B, T, H, d) as q_proj gives it, query: after its norm.
        raw_key: (B, T, G, d) as k_proj gives it, key: after its norm.
        key_scale: (B, T, G), what the norm multiplied a key by besides its weight; 1 without norms.
        value: (B, T, G, d).
    """

    raw_query: Array
    query: Array
    raw_key: Array
    key: Array
    key_scale: Array
    value: Array

    @property
    def raw_key_value(self) -> Array:
        """[keys as k_proj gives them ‖ values] (B, T, Z)."""
        return jnp.concatenate([flat(self.raw_key), flat(self.value)], axis=-1)


def flat(x: Array) -> Array:
    """(B, T, heads, d) → (B, T, heads·d)."""
    return x.reshape(*x.shape[:2], -1)


def _project(x: Array, params: Params) -> Array:
    y = jnp.einsum("btd,hkd->bthk", x, params["kernel"].astype(jnp.float32))
    return y + params["bias"].astype(jnp.float32) if "bias" in params else y


def parts(config: TextConfig, params: Params, hidden: Array) -> Parts:
    """The source layer's queries, keys and values."""
    attention = params["self_attn"]
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    x = norm.apply({"params": params["input_layernorm"]}, hidden)
    query, key, value = (_project(x, attention[f"{name}_proj"]) for name in "qkv")
    if not config.use_qk_norm:
        return Parts(query, query, key, key, jnp.ones(key.shape[:3]), value)
    head_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
    normed = [
        head_norm.apply({"params": attention[name]}, y) for name, y in (("q_norm", query), ("k_norm", key))
    ]
    scale = jax.lax.rsqrt(jnp.mean(key * key, axis=-1) + config.rms_norm_eps)
    return Parts(query, normed[0], key, normed[1], scale, value)


def attend(logits: Array, mask: Array, value: Array) -> Array:
    """(B, G, h, T, S) logits, values (B, S, G, d) → (B, T, H, d)."""
    probabilities = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30), axis=-1)
    probabilities = jnp.where(mask[:, None, None], probabilities, 0)
    out = jnp.einsum("bghts,bsgk->btghk", probabilities, value)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def source_logits(config: TextConfig, p: Parts, rope: Rope) -> Array:
    """(B, G, H/G, T, S), scaled."""
    query = rotate(p.query, rope)
    query = query.reshape(*query.shape[:2], config.num_key_value_heads, -1, config.head_dim)
    return jnp.einsum("btghk,bsgk->bghts", query, rotate(p.key, rope)) * config.head_dim**-0.5


def feed_forward(config: TextConfig, params: Params, hidden: Array, layer: Array, rows: Rows) -> Array:
    """Everything of a layer after its attention was added."""
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    y = norm.apply({"params": params["post_attention_layernorm"]}, hidden)
    hidden = hidden + SwiGLU(config.hidden_size, config.intermediate_size).apply({"params": params["mlp"]}, y)
    if rows.deepstack is None or rows.visual_index is None:
        return hidden
    levels = rows.deepstack.shape[0]
    level = rows.deepstack[jnp.minimum(layer, levels - 1)]
    return hidden + jnp.where(layer < levels, gather_visual(level, rows.visual_index), 0)


def project_out(params: Params, context: Array) -> Array:
    """(B, T, H, d) → (B, T, D)."""
    return jnp.einsum("bthk,dhk->btd", context, params["self_attn"]["o_proj"]["kernel"].astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def source_layer(config: TextConfig, params: Params, hidden: Array, layer: Array, rows: Rows) -> Array:
    """The source layer's output."""
    p = parts(config, params, hidden)
    context = attend(source_logits(config, p, rows.rope), rows.mask(), p.value)
    return feed_forward(config, params, hidden + project_out(params, context), layer, rows)


class Gradients(NamedTuple):
    """hidden: (B, T, D), of the layer's input; latent: (B, T, c + G·d), of [content ‖ values]."""

    hidden: Array
    latent: Array


@partial(jax.jit, static_argnums=(0, 1))
def source_gradients(
    config: TextConfig,
    cached: bool,
    params: Params,
    hidden: Array,
    layer: Array,
    rows: Rows,
    content_up: Array,
    output_gradient: Array,
) -> Gradients:
    """Back through a source layer, whose content is not turned where it is disturbed.

    Args:
        cached: whether a key norm stays, so that what is disturbed is a key before it.
        content_up: (H, d, c), from content to what a head's query meets (`layer.Split`).
        output_gradient: (B, T, D).
    """
    content = content_up.shape[-1]
    width = config.num_key_value_heads * config.head_dim

    def disturbed(hidden: Array, change: Array) -> Array:
        p = parts(config, params, hidden)
        logits = source_logits(config, p, rows.rope)
        met = jnp.einsum("bthk,hkc->bthc", p.query, content_up) * config.head_dim**-0.5
        added = jnp.einsum("bthc,bsc->bhts", met, change[..., :content])
        added = added.reshape(logits.shape)
        if cached:
            added = added * jnp.moveaxis(p.key_scale, 1, 2)[:, :, None, None]
        value = p.value + change[..., content:].reshape(p.value.shape)
        context = attend(logits + added, rows.mask(), value)
        return feed_forward(config, params, hidden + project_out(params, context), layer, rows)

    change = jnp.zeros((*hidden.shape[:2], content + width))
    _, back = jax.vjp(disturbed, hidden, change)
    return Gradients(*back(output_gradient))
