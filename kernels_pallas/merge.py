"""Attention over a context from attention over its parts: splits of a kernel, stretches, devices."""

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over the whole context from attention over its parts, exactly.

    Args:
        outs: (N, …, r) fp32, of each of N parts.
        lses: (N, …) fp32, their log-sum-exps; −inf where a part saw nothing.

    Returns:
        out (…, r) and lse (…), as of one part.
    """
    if outs.shape[0] == 1:
        return outs[0], lses[0]
    top = jnp.max(lses, axis=0)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.sum(outs * weights[..., None], axis=0) / total[..., None]
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))
