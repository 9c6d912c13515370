"""The decoding cache: a plain pytree, argument in and value out. M²LA and GQA differ in entries only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.models.config import TextConfig
from iv3jax.sharding import constrain, whole_parts
from iv3jax.typing import Array, DType
from kernels_pallas.choice import chip
from kernels_pallas.latents import LARGEST, scale_rows

_AXES: dict[str, tuple[str | None, ...]] = {
    "latent": ("layers", "batch", "slots", None),
    "scale": ("layers", "batch", None, "slots"),
    "k_rope": ("layers", "batch", "slots", None),
    "logit_scale": ("layers", "batch", "act_heads", "slots"),
    "key": ("layers", "batch", "act_heads", None, None),
    "value": ("layers", "batch", "act_heads", None, None),
}
"""The logical axes of each entry."""


class Cache(NamedTuple):
    """What each layer remembers of each row's tokens.

    Attributes:
        entries: name → array. M²LA: `latent` (L, B, S, r+e); quantised, `latent` (L, B, S, r) with `scale`
            and `k_rope` as kernels_pallas.latents has them; with q/k norm also `logit_scale` (L, B, G, S)
            fp32. GQA: `key`, `value` (L, B, G, S, head_dim), so that a head's keys lie together. Where layers
            are not scanned, name → a tuple of L arrays, each a stack of one, with the layer's own rank in
            place of the largest.
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
        # The first by name, k_rope, latent or key; only the scales after them have their slots last.
        return jax.tree.leaves(self.entries)[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.entries))

    def row(self, index: Array) -> "Cache":
        """One row (index () int32), as a cache of one; rows are the second axis of all entries."""
        entries = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1), self.entries)
        return Cache(entries, self.length[index][None], self.overflow[index][None])

    def with_row(self, index: Array, row: "Cache") -> "Cache":
        """The cache with that row in place of its own; slots after a shorter row's stay as they are."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)

        return Cache(
            jax.tree.map(put, self.entries, row.entries),
            self.length.at[index].set(row.length[0]),
            self.overflow.at[index].set(row.overflow[0]),
        )

    def slots(self, segment_ids: Array) -> Array:
        """(B, T): the slot each new token goes to; padding and overflow point past the end."""
        real = segment_ids != 0
        slots = self.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        return jnp.where(real, jnp.minimum(slots, self.capacity), self.capacity)

    def advanced(self, entries: dict[str, Any], segment_ids: Array) -> "Cache":
        """The cache after the new tokens were written into `entries`."""
        wanted = self.length + jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return Cache(entries, jnp.minimum(wanted, self.capacity), self.overflow | (wanted > self.capacity))


CACHE_DTYPES = ("float32", "bfloat16", "float16", *LARGEST)
"""What a cache can hold; the last are quantised, for M²LA only."""


_TILE = 128
"""Slots in a tile of a chip's memory, whichever way an entry lies."""


def init_cache(
    config: TextConfig, rows: int, capacity: int, dtype: DType = jnp.bfloat16, scan_layers: bool = True
) -> Cache:
    """An empty cache of `rows` × `capacity` tokens, in the form that `Execution.scan_layers` asks for.

    The capacity is rounded up: under a mesh with a context axis, over which slots are split, and for a TPU or
    GPU, whose kernels take whole tiles.

    Raises:
        UserError: a dtype that is not one of CACHE_DTYPES, or a quantised one for GQA.
    """
    name = jnp.dtype(dtype).name
    if name not in CACHE_DTYPES:
        raise UserError(f"cache dtype {name} is not one of {', '.join(CACHE_DTYPES)}")
    tile = 1 if chip().platform == "cpu" else _TILE
    capacity = whole_parts("slots", -(-capacity // tile)) * tile
    layers = config.num_hidden_layers
    if scan_layers:
        entries: dict[str, Any] = {
            key: constrain(jnp.zeros((layers, *shape), kind), *_AXES[key])
            for key, (shape, kind) in _shapes(config, rows, capacity, dtype).items()
        }
    else:
        alone = [_shapes(config.of_layer(i), rows, capacity, dtype) for i in range(layers)]
        entries = {
            key: tuple(constrain(jnp.zeros((1, *own[key][0]), own[key][1]), *_AXES[key]) for own in alone)
            for key in alone[0]
        }
    return Cache(entries, jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), bool))


def _shapes(
    config: TextConfig, rows: int, capacity: int, dtype: DType
) -> dict[str, tuple[tuple[int, ...], DType]]:
    """Shape and dtype of a layer's entries."""
    name = jnp.dtype(dtype).name
    groups, rank = config.num_key_value_heads, config.kv_lora_rank
    shapes: dict[str, tuple[tuple[int, ...], DType]]
    if rank is None:
        if name in LARGEST:
            raise UserError(f"a cache of {name} is for latents, and this model has keys and values (GQA)")
        return {key: ((rows, groups, capacity, config.head_dim), dtype) for key in ("key", "value")}
    if name in LARGEST:
        shapes = {
            "latent": ((rows, capacity, rank), dtype),
            "scale": ((rows, scale_rows(rank), capacity), jnp.float32),
            "k_rope": ((rows, capacity, config.qk_rope_head_dim), jnp.bfloat16),
        }
    else:
        shapes = {"latent": ((rows, capacity, config.cache_width), dtype)}
    if config.use_qk_norm:
        shapes["logit_scale"] = ((rows, groups, capacity), jnp.float32)
    return shapes


def write(entry: Array, layer: Array, slots: Array, values: Array) -> Array:
    """Puts each new token's keys or values (B, T, G, head_dim) into its slot of one layer of (L, B, G, S, …).

    Slots past the end write nothing: a scatter, because `dynamic_update_slice` would clamp such a slot onto
    the last one. One token a row on a CPU is the exception: there XLA would copy the whole cache to choose
    between the old one and the new one, so each row's slot is read, kept where nothing is to be written, and
    put back, which it does in place. (On a TPU that loop would have the cache laid out anew.)
    """
    values = values.astype(entry.dtype)
    if slots.shape[1] > 1 or chip().platform != "cpu":
        rows = jnp.arange(slots.shape[0])[:, None]
        return entry.at[layer, rows, :, slots].set(values, mode="drop")

    def one(row: Array | int, entry: Array) -> Array:
        slot = slots[row, 0]
        start = (layer, row, 0, slot, 0)
        old = jax.lax.dynamic_slice(entry, start, (1, 1, entry.shape[2], 1, entry.shape[-1]))
        new = jnp.where(slot < entry.shape[-2], values[row, 0].reshape(old.shape), old)
        return jax.lax.dynamic_update_slice(entry, new, start)

    # The bound is no constant, so that the loop stays a loop: unrolled, the updates would be fused, and so
    # copied, into each thing that reads them.
    any_row = jnp.any(slots < entry.shape[-2])
    return jax.lax.fori_loop(0, jnp.where(any_row, slots.shape[0], 0), one, entry)
