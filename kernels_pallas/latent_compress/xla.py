"""The latent compressor in XLA: a product, and a write that is in place on a CPU too."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kernels_pallas.latent_compress.reference import Affine, rotate_key
from kernels_pallas.latents import Latents, quantize
from kernels_pallas.product import product

Written = TypeVar("Written")

_TILE = 128


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
    tokens, width = latent.shape[1:]
    capacity = latents.capacity
    if latents.scale is None:
        new = Latents(latent.astype(latents.values.dtype))
    else:
        rank = latents.rank(width)
        codes, scale = quantize(latent[..., :rank], latents.values.dtype)
        k_rope = latent[..., rank:].astype(jnp.bfloat16 if latents.k_rope is None else latents.k_rope.dtype)
        new = Latents(codes, jnp.swapaxes(scale, 1, 2), k_rope)

    def one(row: jax.Array, latents: Latents) -> Latents:
        stretch = _stretch(offsets[row], counts[row], min(tokens, capacity), tokens, capacity)
        values = _put(latents.values, layer, row, stretch, new.values[row], 0)
        if latents.scale is None or latents.k_rope is None or new.scale is None or new.k_rope is None:
            return Latents(values)
        scale = _put(latents.scale, layer, row, stretch, new.scale[row], 1)
        return Latents(values, scale, _put(latents.k_rope, layer, row, stretch, new.k_rope[row], 0))

    return _over_rows(counts, one, latents)


def write_factors(
    entry: jax.Array, layer: jax.Array, offsets: jax.Array, counts: jax.Array, factors: jax.Array
) -> jax.Array:
    """Puts the tokens' factors (B, T, G) into a layer of (L, B, G, S) fp32, in the slots of their latents.

    offsets and counts as of `write`, and row by row like there, but a tile of slots at least: to write one
    alone a TPU's compiler would lay the whole entry out anew, its slots not last.
    """
    tokens, capacity = factors.shape[1], entry.shape[-1]
    size = min(max(tokens, _TILE), capacity)
    new = jnp.swapaxes(factors, 1, 2).astype(entry.dtype)

    def one(row: jax.Array, entry: jax.Array) -> jax.Array:
        stretch = _stretch(offsets[row], counts[row], size, tokens, capacity)
        return _put(entry, layer, row, stretch, new[row], 1)

    return _over_rows(counts, one, entry)


class _Stretch(NamedTuple):
    """Neighbouring slots of a row: the first, whether each is written, and by which token."""

    start: jax.Array
    real: jax.Array
    source: jax.Array


def _stretch(offset: jax.Array, count: jax.Array, size: int, tokens: int, capacity: int) -> _Stretch:
    """As many slots as `size`, all that the row's tokens go to among them."""
    start = jnp.clip(offset, 0, capacity - size)
    token = start - offset + jnp.arange(size, dtype=jnp.int32)
    return _Stretch(start, (token >= 0) & (token < count), jnp.clip(token, 0, tokens - 1))


def _put(
    array: jax.Array, layer: jax.Array, row: jax.Array, stretch: _Stretch, new: jax.Array, axis: int
) -> jax.Array:
    """The stretch of a row of (L, B, …), its slots on axis 0 or 1 of what is left, with `new` where real."""
    value = jnp.take(new, stretch.source, axis=axis)[None, None]
    corner = (layer, row, stretch.start, 0) if axis == 0 else (layer, row, 0, stretch.start)
    old = jax.lax.dynamic_slice(array, corner, value.shape)
    value = jnp.where(jnp.expand_dims(stretch.real, 1 - axis), value, old)
    return jax.lax.dynamic_update_slice(array, value, corner)


def _over_rows(counts: jax.Array, one: Callable[[jax.Array, Written], Written], cache: Written) -> Written:
    # The bound is no constant, so that the loop stays a loop: unrolled, the updates would be fused, and so
    # copied, into each thing that reads them.
    written = jnp.where(jnp.any(counts > 0), len(counts), 0)
    return jax.lax.fori_loop(0, written, one, cache)
