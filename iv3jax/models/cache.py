"""The decoding cache: a plain pytree, argument in and value out. M²LA and GQA differ in entries only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.models.config import TextConfig
from iv3jax.typing import Array, DType


class Cache(NamedTuple):
    """What each layer remembers of each row's tokens.

    Attributes:
        entries: name → (L, B, S, …). M²LA: `latent` (…, r+e). GQA: `key`, `value` (…, G, head_dim).
            Where layers are not scanned, name → a tuple of L arrays (1, B, S, …).
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
        return jax.tree.leaves(self.entries)[0].shape[2]

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
        widths: dict[str, tuple[int, ...]] = {
            k: (config.num_key_value_heads, config.head_dim) for k in ("key", "value")
        }
    else:
        widths = {"latent": (config.cache_width,)}
    layers = config.num_hidden_layers

    def zeros(width: tuple[int, ...]) -> Any:
        if scan_layers:
            return jnp.zeros((layers, rows, capacity, *width), dtype)
        return tuple(jnp.zeros((1, rows, capacity, *width), dtype) for _ in range(layers))

    return Cache(
        {name: zeros(width) for name, width in widths.items()},
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), bool),
    )


def write(entry: Array, layer: Array, slots: Array, values: Array) -> Array:
    """entry[layer, row, slots] = values, where slots past the end write nothing.

    A scatter, because `dynamic_update_slice` would clamp such a slot onto the last one.
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    return entry.at[layer, rows, slots].set(values.astype(entry.dtype), mode="drop")
