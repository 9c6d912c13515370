"""Expanded M²LA attention in plain jnp (SPEC §2)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.mask import AttentionMask


def latent_attention_reference(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    mask: AttentionMask,
    logit_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(logit_scale · (q_nope·k_nope + q_rope·k_rope) / sqrt(n+e)) · value, per head, all in fp32.

    Args:
        query: (B, T, H, n+e), [q_nope ‖ rotated q_rope].
        kv: (B, S, H, n+v), [k_nope ‖ value].
        k_rope: (B, S, e), rotated, one for all heads.
        mask: who sees whom.
        logit_scale: (B, G, S), for head h its row h // (H/G); None is 1.

    Returns:
        out (B, T, H, v) in query's dtype and the logits' log-sum-exp (B, T, H) fp32. Rows that see nothing
        are 0 and −inf.
    """
    heads, n = query.shape[2], query.shape[-1] - k_rope.shape[-1]
    scale = 1 / math.sqrt(query.shape[-1])
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    q, k_and_v, rope = (x.astype(jnp.float32) for x in (query, kv, k_rope))
    logits = exact("bthn,bshn->bhts", q[..., :n], k_and_v[..., :n])
    logits = (logits + exact("bthe,bse->bhts", q[..., n:], rope)) * scale
    if logit_scale is not None:
        logits *= jnp.repeat(logit_scale, heads // logit_scale.shape[1], axis=1)[:, :, None]
    allowed = mask.dense(kv.shape[1])[:, None]
    sees = jnp.any(allowed, axis=-1)
    logits = jnp.where(allowed, logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.where(allowed, jnp.exp(logits - lse[..., None]), 0)
    out = exact("bhts,bshv->bthv", weights, k_and_v[..., n:])
    return out.astype(query.dtype), jnp.where(sees, lse, -jnp.inf).swapaxes(1, 2)
