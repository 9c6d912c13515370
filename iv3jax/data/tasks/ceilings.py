"""What a uniform view can see, from formulas: the law of which events it shows.

One event lies in each of M equal cells of the video, anywhere in it (`episode.spread`), so they are seen or
missed independently, event i with probability P_i. Who plays which part is drawn apart from the places:
given how many are seen, all sets of parts are as likely. A task's ceiling is its reader's expected score
under this.
"""

from functools import lru_cache
from itertools import product

import numpy as np

from iv3jax.data.digits import EVENT_GAP
from iv3jax.data.tasks.episode import Span, longest, uniform_times

_LENGTHS = 16


def visible(duration: float, frames: int, cells: int, shown: Span) -> np.ndarray:
    """(cells,) float64: P_i, exact in an event's place, at the middles of 16 equal parts of its length.

    A frame at t sees an event of length ℓ that starts in (t − ℓ, t]; P_i is the share of the cell's starts
    that lies in the union of these.
    """
    times = uniform_times(duration, frames)
    before = np.append(-np.inf, times[:-1])
    edges = np.arange(cells)[:, None] * (duration / cells) + EVENT_GAP / 2
    found = np.zeros(cells)
    for length in lengths(duration, cells, shown):
        # A cell that an event just fills has one start; any small room stands for it.
        room = max(duration / cells - EVENT_GAP - length, 1e-6)
        low, high = np.maximum(times - length, before), times
        covered = np.minimum(high, edges + room) - np.maximum(low, edges)
        found += np.clip(covered, 0, None).sum(axis=1) / room
    return found / _LENGTHS


def lengths(duration: float, cells: int, shown: Span) -> np.ndarray:
    """(16,): the middles of equal parts of the lengths that an event can have."""
    top = longest(duration, cells, shown)
    return shown[0] + (top - shown[0]) * (np.arange(_LENGTHS) + 0.5) / _LENGTHS


def how_many(seen: np.ndarray) -> np.ndarray:
    """(M + 1,): probabilities that 0 … M events are seen, from P of shape (M,); they are independent."""
    law = np.ones(1)
    for p in seen:
        law = np.append(law * (1 - p), 0) + np.append(0, law * p)
    return law


@lru_cache
def patterns(cells: int) -> np.ndarray:
    """(2^M, M) bool: every way that events can be seen or missed."""
    return np.array(list(product((False, True), repeat=cells)))


def pattern_law(seen: np.ndarray) -> np.ndarray:
    """(2^M,): the probability of each of the patterns, from P of shape (M,)."""
    return np.where(patterns(len(seen)), seen, 1 - seen).prod(axis=1)
