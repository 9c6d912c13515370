"""Rotary positions: plain, interleaved M-RoPE over (time, height, width), and the tower's 2-D form."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from iv3jax.typing import Array


class Rope(NamedTuple):
    """Cosines and sines of the angles, fp32, (B, T, dims/2)."""

    cos: Array
    sin: Array


def mrope_axes(dims: int, section: tuple[int, int, int] | None) -> np.ndarray:
    """Which position (0 time, 1 height, 2 width) each of the dims/2 frequencies turns by (SPEC §2).

    Frequency i takes height when i % 3 == 1 and i < 3·s_h, width when i % 3 == 2 and i < 3·s_w.
    """
    index = np.arange(dims // 2)
    if section is None:
        return np.zeros_like(index)
    axes = np.zeros_like(index)
    for axis in (1, 2):
        axes[(index % 3 == axis) & (index < 3 * section[axis])] = axis
    return axes


def frequencies(dims: int, theta: float) -> np.ndarray:
    """theta^(-2i/dims) for i < dims/2, fp32."""
    return (1.0 / theta ** (np.arange(0, dims, 2, dtype=np.float32) / dims)).astype(np.float32)


def decoder_rope(
    positions: Array, dims: int, theta: float, section: tuple[int, int, int] | None, components: int = 1
) -> Rope:
    """Angles of every token from its (3, B, T) positions: dims/2 of them, repeated for each component."""
    per_frequency = positions.astype(jnp.float32)[mrope_axes(dims, section)]
    angles = jnp.moveaxis(per_frequency, 0, -1) * frequencies(dims, theta)
    angles = jnp.tile(angles, components)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def vision_rope(rows: Array, columns: Array, head_dim: int) -> Rope:
    """The tower's angles: [row · head_dim/4 frequencies ‖ column · the same], theta 1e4 (SPEC §4)."""
    inverse = frequencies(head_dim // 2, 1e4)
    angles = jnp.stack([rows, columns], axis=-1).astype(jnp.float32)[..., None] * inverse
    angles = angles.reshape(*angles.shape[:-2], -1)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Array, rope: Rope) -> Array:
    """Turns (B, T, heads, dims) or (B, T, dims) by rotate-half, in fp32; pair i is (i, i + dims/2)."""
    cos, sin = rope
    if x.ndim == cos.ndim + 1:
        cos, sin = cos[:, :, None], sin[:, :, None]
    # Halves one by one, so that the whole is in memory in x's dtype only.
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([half.astype(x.dtype) for half in turned], axis=-1)


def rotate_interleaved(x: Array, rope: Rope) -> Array:
    """The same for M²LA's stored order, where pair i is (2i, 2i+1); the result is in half order."""
    return rotate(jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), rope)
