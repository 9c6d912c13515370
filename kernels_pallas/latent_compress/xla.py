"""The latent compressor in XLA: a product, and a write that is in place on a CPU too."""

import jax
import jax.numpy as jnp

from kernels_pallas.latent_compress.reference import Affine, rotate_key
from kernels_pallas.latents import Latents, quantize
from kernels_pallas.product import product


def latent_compress(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> jax.Array:
    """As `ops.latent_compress`, in fp32 from the product on."""
    rank = kernel.shape[0] - 2 * cos.shape[-1]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    z = product(x, kernel, jnp.float32, precision)
    if bias is not None:
        z += bias.astype(jnp.float32)
    c, k_rope = z[..., :rank], z[..., rank:]
    if affine is not None and modality is not None:
        c = c.astype(x.dtype)
        matrices = (affine.matrix[m].astype(x.dtype) for m in (0, 1))
        text, vision = (
            product(c, matrix, jnp.float32, precision) + bias
            for matrix, bias in zip(matrices, affine.bias, strict=True)
        )
        c = jnp.where((modality == 0)[..., None], text, vision)
    return jnp.concatenate([c, rotate_key(k_rope, cos, sin)], axis=-1)


def write(
    latents: Latents, layer: jax.Array, offsets: jax.Array, counts: jax.Array, latent: jax.Array
) -> Latents:
    """Puts latent (B, T, r+e) fp32 into a layer of the cache; arguments as `ops.latent_compress_into`.

    Row by row, the stretch of slots is read, kept where nothing is to be written, and put back. For a
    scatter, or a choice between the cache before and after, XLA would copy the whole cache on a CPU; for
    bfloat16 and float8 arrays it does there in any case, since it updates them as fp32.
    """
    rows, tokens, width = latent.shape
    capacity = latents.capacity
    size = min(tokens, capacity)
    if latents.scale is None:
        new = Latents(latent.astype(latents.values.dtype))
    else:
        rank = latents.rank(width)
        codes, scale = quantize(latent[..., :rank], latents.values.dtype)
        k_rope = latent[..., rank:].astype(jnp.bfloat16 if latents.k_rope is None else latents.k_rope.dtype)
        new = Latents(codes, jnp.swapaxes(scale, 1, 2), k_rope)

    def one(row: jax.Array, latents: Latents) -> Latents:
        start = jnp.clip(offsets[row], 0, capacity - size)
        token = start - offsets[row] + jnp.arange(size, dtype=jnp.int32)
        real = (token >= 0) & (token < counts[row])
        source = jnp.clip(token, 0, tokens - 1)

        def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            value = jnp.take(new[row], source, axis=axis)[None, None]
            corner = (layer, row, start, 0) if axis == 0 else (layer, row, 0, start)
            old = jax.lax.dynamic_slice(array, corner, value.shape)
            value = jnp.where(jnp.expand_dims(real, 1 - axis), value, old)
            return jax.lax.dynamic_update_slice(array, value, corner)

        values = put(latents.values, new.values, 0)
        if latents.scale is None or latents.k_rope is None or new.scale is None or new.k_rope is None:
            return Latents(values)
        return Latents(values, put(latents.scale, new.scale, 1), put(latents.k_rope, new.k_rope, 0))

    # The bound is no constant, so that the loop stays a loop: unrolled, the updates would be fused, and so
    # copied, into each thing that reads them.
    written = jnp.where(jnp.any(counts > 0), rows, 0)
    return jax.lax.fori_loop(0, written, one, latents)
