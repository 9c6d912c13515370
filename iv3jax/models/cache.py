"""The decoding cache: a plain pytree, argument in and value out. M²LA and GQA differ in entries only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.models.config import TextConfig
from iv3jax.typing import Array, DType


class Cache(NamedTuple):
    """What each layer remembers of each row's tokens.

    Attributes:
        entries: name → array. M²LA: `latent` (L, B, S, r+e). GQA: `key`, `value` (L, B, G, S, head_dim),
            so that a head's keys lie together. Where layers are not scanned, name → a tuple of L arrays,
            each a stack of one.
        length: (B,) int32, tokens written to each row.
        overflow: (B,) bool, True once a token found no room. It was not written; the row's output
            from then on is meaningless.
    """

    entries: dict[str, Any]
    length: Array
    overflow: Array

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return jax.tree.leaves(self.entries)[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.entries))

    def slots(self, segment_ids: Array) -> Array:
        """(B, T): the slot each new token goes to; padding and overflow point past the end."""
        real = segment_ids != 0
        slots = self.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        return jnp.where(real, jnp.minimum(slots, self.capacity), self.capacity)

    def advanced(self, entries: dict[str, Any], segment_ids: Array) -> "Cache":
        """The cache after the new tokens were written into `entries`."""
        wanted = self.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return Cache(entries, jnp.minimum(wanted, self.capacity), self.overflow | (wanted > self.capacity))


def init_cache(
    config: TextConfig, rows: int, capacity: int, dtype: DType = jnp.bfloat16, scan_layers: bool = True
) -> Cache:
    """An empty cache of `rows` × `capacity` tokens, in the form that `Execution.scan_layers` asks for."""
    if config.kv_lora_rank is None:
        shape: tuple[int, ...] = (rows, config.num_key_value_heads, capacity, config.head_dim)
        names = ["key", "value"]
    else:
        shape, names = (rows, capacity, config.cache_width), ["latent"]
    layers = config.num_hidden_layers

    def zeros() -> Any:
        if scan_layers:
            return jnp.zeros((layers, *shape), dtype)
        return tuple(jnp.zeros((1, *shape), dtype) for _ in range(layers))

    return Cache(
        {name: zeros() for name in names},
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), bool),
    )


def write(entry: Array, layer: Array, slots: Array, values: Array) -> Array:
    """Puts each new token's values (B, T, …) into its slot of one layer; slots past the end write nothing.

    A scatter, because `dynamic_update_slice` would clamp such a slot onto the last one. One token a row is
    the exception: there XLA would copy the whole cache to choose between the old one and the new one, so each
    row's slot is read, kept where nothing is to be written, and put back, which it does in place.
    """
    values = values.astype(entry.dtype)
    if slots.shape[1] > 1:
        heads = [slice(None)] * (entry.ndim - 4)
        return entry.at[layer, jnp.arange(slots.shape[0])[:, None], *heads, slots].set(values, mode="drop")

    def one(row: Array | int, entry: Array) -> Array:
        slot = slots[row, 0]
        start = (layer, row, *[0] * (entry.ndim - 4), slot, 0)
        old = jax.lax.dynamic_slice(entry, start, (1, 1, *entry.shape[2:-2], 1, entry.shape[-1]))
        new = jnp.where(slot < entry.shape[-2], values[row, 0].reshape(old.shape), old)
        return jax.lax.dynamic_update_slice(entry, new, start)

    # The bound is no constant, so that the loop stays a loop: unrolled, the updates would be fused, and so
    # copied, into each thing that reads them.
    any_row = jnp.any(slots < entry.shape[-2])
    return jax.lax.fori_loop(0, jnp.where(any_row, slots.shape[0], 0), one, entry)
