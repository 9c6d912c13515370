"""A product with a kernel stored output first, as fast for one token on a CPU as the memory allows."""

import jax
import jax.numpy as jnp

_CPU_PARTS = 4
"""Pieces of a kernel that a CPU's threads share when there is one token."""


def product(
    x: jax.Array,
    kernel: jax.Array,
    dtype: jax.typing.DTypeLike,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """x · kernelᵀ: (…, K) and (N, K) → (…, N) in `dtype`."""

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        axes = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, kernel, axes, precision, preferred_element_type=dtype)

    def shared(x: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = kernel.reshape(_CPU_PARTS, -1, x.shape[-1])
        rows = jnp.broadcast_to(x.reshape(-1), (_CPU_PARTS, x.shape[-1]))
        out = jax.lax.dot_general(parts, rows, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
        return out.reshape(*x.shape[:-1], -1)

    # One token on a CPU: XLA gives a matrix-vector product to one thread, several at once to all. Under a
    # mesh of several devices the reshape could cut across what is sharded.
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    if x.size == x.shape[-1] and kernel.shape[0] % _CPU_PARTS == 0 and one_device:
        return jax.lax.platform_dependent(x, kernel, cpu=shared, default=plain)
    return plain(x, kernel)
