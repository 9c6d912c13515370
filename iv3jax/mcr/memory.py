"""Memory: what a rollout has seen and noted, in fixed slots. How it is told to the model is in tools."""

from typing import NamedTuple

import jax.numpy as jnp

from iv3jax.typing import Array

EMPTY, ZOOM, CROP, NOTE = range(4)
"""Kinds of slots. The two between are evidence: a window that was looked at."""


class Memory(NamedTuple):
    """N slots a row, the used ones first, the oldest of them first.

    Attributes:
        kinds: (B, N) int32, EMPTY, ZOOM, CROP or NOTE.
        windows: (B, N, 2) int32 tenths of a second, start and end of evidence; 0 for a note.
        texts: (B, N, K) int32, the tokens of a note. lengths: (B, N) int32, how many; 0 for evidence.
        steps: (B, N) int32, the step of the rollout that wrote the slot.
        dropped: (B,) int32, how many entries had to give way.
    """

    kinds: Array
    windows: Array
    texts: Array
    lengths: Array
    steps: Array
    dropped: Array

    @property
    def evidence(self) -> Array:
        """(B, N) bool: the slots that hold a window."""
        return (self.kinds == ZOOM) | (self.kinds == CROP)


def empty_memory(rows: int, slots: int, text_tokens: int) -> Memory:
    """The memory of rollouts that begin: `slots` slots, notes of up to `text_tokens` tokens."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros((rows, *shape), jnp.int32)

    return Memory(
        zeros(slots), zeros(slots, 2), zeros(slots, text_tokens), zeros(slots), zeros(slots), zeros()
    )


def remember(
    memory: Memory, write: Array, kind: Array, window: Array, text: Array, length: Array, step: Array
) -> Memory:
    """Adds an entry to the rows of `write`, as the newest.

    In a full row the oldest evidence gives way, or the oldest note where there is no evidence.
    Args:
        write: (B,) bool; other rows stay as they are.
        kind: (B,) int32. window: (B, 2) int32. text: (B, K) int32. length, step: (B,) int32; see `Memory`.
    """
    slots = memory.kinds.shape[1]
    used = jnp.sum(memory.kinds != EMPTY, axis=1)
    full = used == slots
    # Of no evidence at all, argmax is 0: the oldest note.
    gone = jnp.where(full, jnp.argmax(memory.evidence, axis=1), slots)
    slot = jnp.arange(slots)
    # What stood behind the one that is gone moves up.
    source = jnp.minimum(slot + (slot >= gone[:, None]), slots - 1)
    at = (slot == jnp.where(full, slots - 1, used)[:, None]) & write[:, None]

    def put(old: Array, new: Array) -> Array:
        extra = (1,) * (old.ndim - 2)
        moved = jnp.take_along_axis(old, source.reshape(*source.shape, *extra), axis=1)
        kept = jnp.where(write.reshape(-1, 1, *extra), moved, old)
        return jnp.where(at.reshape(*at.shape, *extra), new[:, None], kept)

    return Memory(
        put(memory.kinds, kind),
        put(memory.windows, window),
        put(memory.texts, text),
        put(memory.lengths, length),
        put(memory.steps, step),
        memory.dropped + (write & full),
    )
