"""latent_attention in XLA's own operations: whole for short sequences, else block of queries by block."""

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask
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
    # One product of n+e numbers a key: a CPU takes longer for two, of n and of e.
    rope = jnp.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], k_rope.shape[-1]))
    key = jnp.concatenate([kv[..., :n], rope], axis=-1).swapaxes(1, 2)
    value = kv[..., n:].swapaxes(1, 2)
    factor = jnp.float32(both**-0.5)
    if logit_scale is not None:
        factor *= jnp.repeat(logit_scale, heads // logit_scale.shape[1], axis=1)[:, :, None]

    def block(mask: AttentionMask, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        query = query.swapaxes(1, 2)
        logits = jnp.einsum("bhtn,bhsn->bhts", query, key, preferred_element_type=jnp.float32)
        allowed = mask.dense(kv.shape[1])[:, None]
        sees = jnp.any(allowed, axis=-1)
        logits = jnp.where(allowed, logits * factor, -1e30)
        most = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - most[..., None])
        total = jnp.sum(weights, axis=-1)
        # Divided after the product, and zeros for who sees nothing there: B·H·T·v numbers, not B·H·T·S.
        out = jnp.einsum(
            "bhts,bhsv->bhtv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        out *= jnp.where(sees, 1 / total, 0)[..., None]
        lse = jnp.where(sees, most + jnp.log(total), -jnp.inf)
        return out.astype(query.dtype).swapaxes(1, 2), lse.swapaxes(1, 2)

    return in_query_blocks(block, mask, query)
