"""M²LA of many new tokens over a cache of latents, in plain jnp (SPEC §2): expand everything, one softmax."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.latents import Latents, one_layer
from kernels_pallas.mask import masked_softmax


def latent_prefill_reference(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array | int,
    kernel: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `latent_prefill.ops`; everything in fp32 at full precision.

    Returns:
        (B, T, H, v) in query's dtype and lse (B, T, H). Rows that see nothing are 0 and −inf.
    """
    heads, _, rank = kernel.shape
    rope_dim = one_layer(latents, layer).shape[-1] - rank
    n = query.shape[-1] - rope_dim
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    q, latent, w = (x.astype(jnp.float32) for x in (query, one_layer(latents, layer), kernel))
    expanded = exact("bsr,hkr->bshk", latent[..., :rank], w)
    logits = exact("bthn,bshn->bhts", q[..., :n], expanded[..., :n])
    logits += exact("bthe,bse->bhts", q[..., n:], latent[..., rank:])
    logits *= query.shape[-1] ** -0.5
    if logit_scale is not None:
        by_group = logit_scale[layer]
        logits *= jnp.repeat(by_group, heads // by_group.shape[1], axis=1)[:, :, None]
    seen = jnp.arange(latents.capacity) <= query_slots[:, None, :, None]
    out = exact("bhts,bshv->bthv", masked_softmax(logits, seen), expanded[..., n:])
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return out.astype(query.dtype), lse.swapaxes(1, 2)
