"""What tests of rollouts share: a random grammar, and targets that it allows. Nothing here asserts."""

from typing import Any, NamedTuple

import numpy as np

from iv3jax.models.batch import IGNORE_LABEL

CLASSES, STATES = 5, 4


class Table(NamedTuple):
    """What `mcr.grammar.mask` reads of a grammar."""

    token_class: Any
    allowed: Any


def random_table(vocab: int, seed: int = 0) -> Table:
    """Classes of tokens, of which every state allows some but not all."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((STATES, CLASSES)) < 0.5
    allowed[np.arange(STATES), np.arange(STATES)] = True
    allowed[:, -1] = False
    return Table(rng.integers(0, CLASSES, vocab).astype(np.int32), allowed)


def random_targets(table: Table, shape: tuple[int, int], rng, free: float = 0.6):
    """Targets that their states allow, or IGNORE_LABEL beside any state."""
    states = rng.integers(0, STATES, shape).astype(np.int32)
    targets = np.full(shape, IGNORE_LABEL, np.int32)
    for at in np.ndindex(shape):
        if rng.random() < free:
            targets[at] = rng.choice(np.flatnonzero(table.allowed[states[at]][table.token_class]))
    return targets, states
