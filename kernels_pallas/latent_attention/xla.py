"""latent_attention in XLA's own operations: whole for short sequences, else block of queries by block."""

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask, masked_softmax
from kernels_pallas.query_blocks import in_query_blocks


def latent_attention(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in ops.py; jax differentiates it.

    Returns:
        out (B, T, H, v) in query's dtype, lse (B, T, H) fp32, which costs nothing where it is not used.
    """
    heads, both = query.shape[2:]
    n = both - k_rope.shape[-1]
    k_nope, value = kv[..., :n], kv[..., n:]
    factor = jnp.float32(both**-0.5)
    if logit_scale is not None:
        factor *= jnp.repeat(logit_scale, heads // logit_scale.shape[1], axis=1)[:, :, None]

    def block(mask: AttentionMask, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bthn,bshn->bhts", query[..., :n], k_nope, preferred_element_type=jnp.float32)
        logits += jnp.einsum("bthe,bse->bhts", query[..., n:], k_rope, preferred_element_type=jnp.float32)
        logits *= factor
        allowed = mask.dense(kv.shape[1])[:, None]
        weights = masked_softmax(logits, allowed)
        out = jnp.einsum("bhts,bshv->bthv", weights.astype(value.dtype), value)
        lse = jax.nn.logsumexp(jnp.where(allowed, logits, -1e30), axis=-1)
        return out, jnp.where(jnp.any(allowed, axis=-1), lse, -jnp.inf).swapaxes(1, 2)

    return in_query_blocks(block, mask, query)
