"""recall and verify: the memory told to the model. What is kept in it is in memory.py."""

import jax.numpy as jnp

from iv3jax.mcr.memory import CROP, EMPTY, NOTE, ZOOM, Memory
from iv3jax.mcr.tools.strip import STEP_DIGITS, Strip, chosen, join, laid_out, number, only, piece, span, text
from iv3jax.mcr.wording import Wording
from iv3jax.typing import Array


def recall(words: Wording, memory: Memory) -> Strip:
    """All entries, the oldest first, a line each, and how many had to give way."""
    rows, slots = memory.kinds.shape
    entries = _entries(memory)
    both = [_evidence(words, entries), _note(words, words.note, entries)]
    lines = chosen(both, [entries.evidence, entries.kinds == NOTE], rows * slots)
    lost = memory.dropped > 0
    return join(
        piece(words.no_memory, memory.kinds[:, 0] == EMPTY),
        laid_out(lines, rows),
        number(words, memory.dropped, STEP_DIGITS, lost),
        piece(words.dropped, lost),
    )


def verify(words: Wording, memory: Memory) -> Strip:
    """The newest note, which is the hypothesis; the windows seen; whether one was seen after it was noted."""
    rows, slots = memory.kinds.shape
    place = jnp.arange(slots)
    newest = jnp.max(jnp.where(memory.kinds == NOTE, place, -1), axis=1)
    noted = newest >= 0
    supported = noted & jnp.any(memory.evidence & (place > newest[:, None]), axis=1)
    entries = _entries(memory)
    at = jnp.arange(rows) * slots + jnp.maximum(newest, 0)
    hypothesis = Memory(*(x[at] for x in entries))
    return join(
        piece(words.no_hypothesis, ~noted),
        only(_note(words, words.hypothesis, hypothesis), noted),
        laid_out(_evidence(words, entries), rows),
        piece(words.supported, supported),
        piece(words.unseen, ~supported),
    )


def _entries(memory: Memory) -> Memory:
    """The B·N slots side by side: each array without the axis of slots."""
    rows, slots = memory.kinds.shape
    each = memory._replace(dropped=jnp.broadcast_to(memory.dropped[:, None], (rows, slots)))
    return Memory(*(x.reshape(rows * slots, *x.shape[2:]) for x in each))


def _evidence(words: Wording, entry: Memory) -> Strip:
    """`zoom <12.0-20.0 seconds> (step 2)` of each of n slots that holds a window: (n, …)."""
    present = entry.evidence
    return join(
        piece(words.zoom, entry.kinds == ZOOM),
        piece(words.crop, entry.kinds == CROP),
        span(words, entry.windows, present),
        piece(words.close_step, present),
        number(words, entry.steps, STEP_DIGITS, present),
        piece(words.step_end, present),
    )


def _note(words: Wording, label: Array, entry: Memory) -> Strip:
    """The label, and the text and the step of each of n slots: (n, …)."""
    everywhere = jnp.ones_like(entry.kinds, bool)
    return join(
        piece(label, everywhere),
        text(entry.texts, jnp.arange(entry.texts.shape[1]) < entry.lengths[:, None]),
        piece(words.step, everywhere),
        number(words, entry.steps, STEP_DIGITS, everywhere),
        piece(words.step_end, everywhere),
    )
