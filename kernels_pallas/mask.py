"""Who may attend to whom, said once for every kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttentionMask(NamedTuple):
    """A query at slot s of segment g sees the keys of segment g at slots ≤ s.

    Attributes:
        query_segments: (B, T) int32; 0 is padding, which sees nothing.
        key_segments: (B, S) int32, or None where all keys are of one sample (a cache).
        query_slots: (B, T) int32, or None where attention is not causal.
        key_slots: (B, S) int32, or None where keys lie in slots 0 … S−1.
    """

    query_segments: jax.Array
    key_segments: jax.Array | None = None
    query_slots: jax.Array | None = None
    key_slots: jax.Array | None = None

    def dense(self, keys: int) -> jax.Array:
        """(B, T, S) bool, True where the query may see the key."""
        allowed = jnp.broadcast_to((self.query_segments != 0)[:, :, None], (*self.query_segments.shape, keys))
        if self.key_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.query_slots is not None:
            slots = jnp.arange(keys, dtype=jnp.int32) if self.key_slots is None else self.key_slots[:, None]
            allowed &= slots <= self.query_slots[:, :, None]
        return allowed

    def block(self, start: jax.Array, size: int) -> "AttentionMask":
        """The mask of queries start … start+size−1."""

        def cut(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        queries = jax.lax.dynamic_slice_in_dim(self.query_segments, start, size, axis=1)
        return AttentionMask(queries, self.key_segments, cut(self.query_slots), self.key_slots)


def masked_softmax(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax over the last axis in fp32; a row that may see nothing gives zeros, not NaN."""
    weights = jax.nn.softmax(jnp.where(allowed, logits.astype(jnp.float32), -1e30), axis=-1)
    return weights * jnp.any(allowed, axis=-1, keepdims=True)
