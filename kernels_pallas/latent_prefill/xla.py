"""M²LA of many new tokens over a cache of latents, in XLA: each block is expanded when it is looked at."""

import jax
import jax.numpy as jnp

from kernels_pallas.cached_attention import cached_attention
from kernels_pallas.latents import Latents, dequantize
from kernels_pallas.mask import AttentionMask


def cut(x: jax.Array, layer: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """Slots start … start+size−1 (along `axis` of x) of one layer of a stack, and nothing else, is read."""
    starts = [jnp.int32(0)] * x.ndim
    sizes = [1, *x.shape[1:]]
    starts[0], starts[axis], sizes[axis] = jnp.asarray(layer, jnp.int32), start, size
    return jax.lax.dynamic_slice(x, starts, sizes)[0]


def floats(
    latents: Latents, layer: jax.Array, start: jax.Array, size: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """(B, size, r+e) of one layer in `dtype`, dequantised."""
    part = cut(latents.values, layer, start, size, 2)
    if latents.scale is None or latents.k_rope is None:
        return part.astype(dtype)
    scale = jnp.swapaxes(cut(latents.scale, layer, start, size, 3), -1, -2)
    k_rope = cut(latents.k_rope, layer, start, size, 2)
    return jnp.concatenate([dequantize(part, scale).astype(dtype), k_rope.astype(dtype)], axis=-1)


def latent_prefill_xla(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array,
    kernel: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Shapes as in `latent_prefill.ops`."""
    heads, both, rank = kernel.shape
    dtype = query.dtype
    rope_dim = latents.values.shape[-1] - rank if latents.k_rope is None else latents.k_rope.shape[-1]
    n = query.shape[-1] - rope_dim

    def block(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        part = floats(latents, layer, start, size, dtype)
        expanded = jnp.einsum("bsr,hkr->bhsk", part[..., :rank], kernel.astype(dtype))
        k_rope = jnp.broadcast_to(part[:, None, :, rank:], (*expanded.shape[:3], rope_dim))
        key = jnp.concatenate([expanded[..., :n], k_rope], axis=-1)
        if logit_scale is not None:
            # A factor of the logits is a factor of the keys.
            by_group = cut(logit_scale, layer, start, size, 3)
            by_head = jnp.repeat(by_group, heads // by_group.shape[1], axis=1)
            key = (key.astype(jnp.float32) * by_head[..., None]).astype(dtype)
        return key, expanded[..., n:]

    seen = AttentionMask((query_slots >= 0).astype(jnp.int32), None, query_slots)
    scale = query.shape[-1] ** -0.5
    return cached_attention(query, block, seen, latents.capacity, both - n, scale)
