"""Absorbed M²LA attention in plain jnp (SPEC §2)."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.latents import Latents, one_layer


def latent_decode_reference(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latents: Latents,
    layer: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None,
    page_table: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The whole context at once; arguments as of `ops.latent_decode`.

    Returns:
        (1, B, T, H, r) and (1, B, T, H) fp32: the context is one part. Logits and softmax are fp32.
    """
    rows, tokens, heads, rank = q_latent.shape
    exact = jax.lax.Precision.HIGHEST if q_latent.dtype == jnp.float32 else None
    cached = one_layer(latents, layer, page_table).astype(q_latent.dtype)
    # Tokens and heads are one axis, and values are cut to r numbers last: otherwise XLA copies the cache.
    query = jnp.concatenate([q_latent, q_rope], axis=-1).reshape(rows, tokens * heads, -1)
    dot = partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    logits = dot("bqw,bsw->bqs", query, cached).reshape(rows, tokens, heads, -1) * scale
    if logit_scale is not None:
        factor = logit_scale[layer]
        if page_table is not None:
            factor = jnp.moveaxis(factor[page_table], 1, 2).reshape(rows, factor.shape[1], -1)
        logits *= jnp.repeat(factor, heads // factor.shape[1], axis=1)[:, None]
    seen = jnp.arange(cached.shape[1], dtype=jnp.int32) <= query_slots[:, :, None, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))[..., 0]
    weights = (weights / jnp.where(total == 0, 1, total)).astype(cached.dtype)
    out = dot("bqs,bsw->bqw", weights.reshape(rows, tokens * heads, -1), cached)
    return out.reshape(1, rows, tokens, heads, -1)[..., :rank], lse[None]
