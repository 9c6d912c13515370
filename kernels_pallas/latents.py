"""The latent cache's arrays, quantised or not, in plain jnp: what every kernel that reads or writes it means.

Layers are stacked, and a kernel takes the stack and the layer's number: a slice of one layer would be a copy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP = 128
"""Numbers of a latent that share one scale; the last group may be smaller, a rank below it is one group."""

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The largest number of each quantised dtype, which the largest of a group becomes."""


class Latents(NamedTuple):
    """The cache of all layers. B rows of S slots; with a page table, B pages of S slots.

    Attributes:
        values: (L, B, S, r+e), [c ‖ rotated k_rope], in a float dtype; or, quantised, (L, B, S, r), c alone,
            in int8 or float8_e4m3fn.
        scale: (L, B, scale_rows(r), S) fp32 where quantised: c = values · scale of its group. Slots lie last
            because a TPU pads the last axis to 128.
        k_rope: (L, B, S, e) bfloat16 or float32 where quantised.
    """

    values: jax.Array
    scale: jax.Array | None = None
    k_rope: jax.Array | None = None

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return self.values.shape[2]

    def rank(self, rope_dim: int) -> int:
        """r, given e."""
        return self.values.shape[-1] - (0 if self.quantized else rope_dim)


def groups_of(rank: int) -> int:
    """Scales of one latent."""
    return -(-rank // GROUP)


def scale_rows(rank: int) -> int:
    """Rows that a cache keeps for the scales, the next power of two; what is too many is never looked at.

    A TPU's compiler lays 3, 5 or 7 rows out in another way, and would copy all of them for every kernel.
    """
    return 1 << (groups_of(rank) - 1).bit_length()


def quantize(latent: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """(…, r) floats → codes (…, r) of `dtype` and scales (…, groups) fp32, a group's absmax over LARGEST."""
    name = jnp.dtype(dtype).name
    rank = latent.shape[-1]
    padding = -rank % GROUP if rank > GROUP else 0
    x = jnp.pad(latent.astype(jnp.float32), [(0, 0)] * (latent.ndim - 1) + [(0, padding)])
    x = x.reshape(*latent.shape[:-1], groups_of(rank), -1)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST[name]
    codes = x / jnp.where(scale == 0, 1, scale)[..., None]
    if name == "int8":
        codes = jnp.round(codes)
    codes = jnp.clip(codes, -LARGEST[name], LARGEST[name]).astype(dtype)
    return codes.reshape(*latent.shape[:-1], rank + padding)[..., :rank], scale


def dequantize(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """codes (…, r) and scales (…, groups) → (…, r) fp32."""
    rank = codes.shape[-1]
    return codes.astype(jnp.float32) * jnp.repeat(scale, min(GROUP, rank), axis=-1)[..., :rank]


def one_layer(latents: Latents, layer: jax.Array | int, page_table: jax.Array | None = None) -> jax.Array:
    """A layer as (B, S, r+e) floats: fp32 where it was quantised. With pages, each row's pages in order."""
    values, scale, k_rope = (None if x is None else x[layer] for x in latents)
    assert values is not None
    if scale is not None and k_rope is not None:
        c = dequantize(values, jnp.swapaxes(scale, -1, -2))
        values = jnp.concatenate([c, k_rope.astype(c.dtype)], axis=-1)
    if page_table is not None:
        values = values[page_table].reshape(page_table.shape[0], -1, values.shape[-1])
    return values
