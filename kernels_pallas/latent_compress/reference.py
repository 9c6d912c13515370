"""The latent compressor in plain jnp (SPEC §2), returned or written into a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.latents import Latents, quantize


class Affine(NamedTuple):
    """The map of a written latent by its token's modality m (0 text, 1 vision): c ← matrix[m]·c + bias[m].

    Attributes:
        matrix: (2, r, r), output first.
        bias: (2, r).
    """

    matrix: jax.Array
    bias: jax.Array


def rotate_key(k_rope: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns (…, e) fp32 keys, pair i at (2i, 2i+1) as in the checkpoint; the result is in half order."""
    even, odd = k_rope[..., 0::2], k_rope[..., 1::2]
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1)


def latent_compress_reference(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> jax.Array:
    """(B, T, r+e) fp32, [c ‖ rotated k_rope], computed in fp32; arguments as `ops.latent_compress`."""
    rank = kernel.shape[0] - 2 * cos.shape[-1]
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    z = jnp.einsum("btd,wd->btw", x, kernel, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        z += bias.astype(jnp.float32)
    c, k_rope = z[..., :rank], z[..., rank:]
    if affine is not None and modality is not None:
        matrix, shift = (a.astype(jnp.float32) for a in affine)
        both = jnp.einsum("btr,msr->mbts", c, matrix, precision=jax.lax.Precision.HIGHEST)
        both += shift[:, None, None]
        c = jnp.where((modality == 0)[..., None], both[0], both[1])
    return jnp.concatenate([c, rotate_key(k_rope, cos, sin)], axis=-1)


def write_reference(
    latents: Latents, layer: jax.Array | int, offsets: jax.Array, counts: jax.Array, latent: jax.Array
) -> Latents:
    """Puts latent (B, T, r+e) into a layer of the cache; arguments as `ops.latent_compress_into`."""
    rows, tokens, width = latent.shape
    token = jnp.arange(tokens, dtype=jnp.int32)
    slots = offsets[:, None] + token
    real = (token < counts[:, None]) & (slots >= 0)
    # A slot past the end is dropped; a negative one would count from the end.
    slots = jnp.where(real, slots, latents.capacity)
    row = jnp.arange(rows)[:, None]
    if latents.scale is None or latents.k_rope is None:
        latent = latent.astype(latents.values.dtype)
        return Latents(latents.values.at[layer, row, slots].set(latent, mode="drop"))
    rank = latents.rank(width)
    codes, scale = quantize(latent[..., :rank], latents.values.dtype)
    k_rope = latent[..., rank:].astype(latents.k_rope.dtype)
    return Latents(
        latents.values.at[layer, row, slots].set(codes, mode="drop"),
        latents.scale.at[layer, row, :, slots].set(scale, mode="drop"),
        latents.k_rope.at[layer, row, slots].set(k_rope, mode="drop"),
    )
