"""M²LA of many new tokens over a cache of latents on a GPU.

Stretch by stretch of the cache: XLA expands the latents of a bounded number of slots, `latent_attention`'s
Triton kernel looks at them, and the parts are merged by their log-sum-exps. Expanding inside the kernel would
do it anew for each block of queries: registers hold 128 of them, so for a chunk of 1024 that is eight times
r·(n+v) multiplications a key and head, more than the attention itself. Expanded once, a key and head cost
2·(n+v) numbers written and read, about a fifth of the time that the products take (a model, not measured).
"""

import jax
import jax.numpy as jnp

from kernels_pallas.blocks import pick
from kernels_pallas.latent_attention import gpu as attention
from kernels_pallas.latent_prefill.xla import cut, floats
from kernels_pallas.latents import Latents
from kernels_pallas.mask import AttentionMask
from kernels_pallas.merge import merge

EXPANDED = 256 * 2**20
"""Bytes of expanded keys and values that lie in memory at a time."""


def refusal(query: jax.Array, kernel: jax.Array, rope_dim: int) -> str | None:
    """Why a GPU cannot take these arguments, or None if it can. Interpreted, the kernel takes everything."""
    nope = query.shape[-1] - rope_dim
    return attention.refused_dims(nope, rope_dim, kernel.shape[1] - nope)


def latent_prefill_gpu(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array,
    kernel: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None = None,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `latent_prefill.ops`."""
    rows, tokens, heads, width = query.shape
    _, both, rank = kernel.shape
    capacity, dtype = latents.capacity, query.dtype
    kernel = kernel.astype(dtype)
    fits = EXPANDED // (rows * heads * both * dtype.itemsize) // 512 * 512
    key = f"rows{rows} heads{heads} {dtype.name}"
    stretch = min(pick("latent_prefill_gpu", key, {"stretch": max(fits, 512)})["stretch"], capacity)
    slots = jnp.minimum(query_slots.astype(jnp.int32), capacity - 1)
    sees = (slots >= 0).astype(jnp.int32)

    def one(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The last stretch is moved back to end at the capacity; its first slots were seen before.
        start = jnp.minimum(j * stretch, capacity - stretch)
        key_slots = jnp.broadcast_to(start + jnp.arange(stretch, dtype=jnp.int32), (rows, stretch))
        part = floats(latents, layer, start, stretch, dtype)
        expanded = jnp.einsum("bsr,hkr->bshk", part[..., :rank], kernel)
        by_slot = None if logit_scale is None else cut(logit_scale, layer, start, stretch, 3)
        mask = AttentionMask(sees, (key_slots >= j * stretch).astype(jnp.int32), slots, key_slots)
        out, lse = attention.forward(
            query, expanded, part[..., rank:], by_slot, mask, interpret=interpret, out_dtype=jnp.float32
        )
        return merge(jnp.stack([state[0], out]), jnp.stack([state[1], lse.swapaxes(1, 2)]))

    rope_dim = latents.values.shape[-1] - rank if latents.k_rope is None else latents.k_rope.shape[-1]
    value_dim = both - (width - rope_dim)
    nothing = (
        jnp.zeros((rows, tokens, heads, value_dim), jnp.float32),
        jnp.full((rows, tokens, heads), -jnp.inf),
    )
    out, lse = jax.lax.fori_loop(0, jnp.max(slots) // stretch + 1, one, nothing)
    return out.astype(dtype), lse
