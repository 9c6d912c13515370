"""Expanded M²LA attention in plain jnp (SPEC §2)."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask, masked_softmax


def latent_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
) -> jax.Array:
    """softmax((q_nope·k_nope + q_rope·k_rope) / sqrt(n+e)) · value, per head.

    Args:
        q_nope: (B, T, H, n). q_rope: (B, T, H, e), rotated.
        k_nope: (B, S, H, n). k_rope: (B, S, e), rotated, one for all heads.
        value: (B, S, H, v).

    Returns:
        (B, T, H, v) in value's dtype; logits and softmax in fp32. Rows that see nothing are 0.
    """
    scale = 1 / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    logits = jnp.einsum("bthn,bshn->bhts", q_nope, k_nope, preferred_element_type=jnp.float32)
    logits += jnp.einsum("bthe,bse->bhts", q_rope, k_rope, preferred_element_type=jnp.float32)
    weights = masked_softmax(logits * scale, mask.dense(k_rope.shape[1])[:, None])
    return jnp.einsum("bhts,bshv->bthv", weights.astype(value.dtype), value)
