"""Absorbed M²LA attention in plain jnp (SPEC §2)."""

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask, masked_softmax


def latent_decode(
    q_latent: jax.Array, q_rope: jax.Array, latent: jax.Array, mask: AttentionMask, scale: float
) -> jax.Array:
    """softmax((q_latent·c + q_rope·k_rope) · scale) · c: scores and values from the same latents.

    Args:
        q_latent: (B, T, H, r), the content query carried into latent space.
        q_rope: (B, T, H, e), rotated.
        latent: (B, S, r+e), the cache of one layer: [c ‖ rotated k_rope].
        scale: 1/sqrt(n+e); n cannot be seen from these shapes.

    Returns:
        (B, T, H, r) in latent's dtype; logits and softmax in fp32. Rows that see nothing are 0.
    """
    rank = q_latent.shape[-1]
    query = jnp.concatenate([q_latent, q_rope], axis=-1)
    rows, tokens, heads, width = query.shape
    # Tokens and heads are one axis, and values are cut to r numbers last: otherwise XLA copies the cache.
    query = query.reshape(rows, tokens * heads, width)
    logits = jnp.einsum("bqw,bsw->bqs", query, latent, preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, tokens, heads, -1) * scale
    weights = masked_softmax(logits, mask.dense(latent.shape[1])[:, :, None]).astype(latent.dtype)
    out = jnp.einsum("bqs,bsw->bqw", weights.reshape(rows, tokens * heads, -1), latent)
    return out.reshape(rows, tokens, heads, width)[..., :rank]
