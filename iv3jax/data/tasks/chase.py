"""Pointer chase: a time is shown at a time; follow it, once or more, to the number at the end.

Chains of pointers are shown beside the asked one, all alike, so that nothing but the question's time says
which one counts. Everything is shown briefly: a uniform view misses most of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

import numpy as np

from iv3jax.data.tasks.ceilings import how_many, patterns, visible
from iv3jax.data.tasks.episode import Episode, Span
from iv3jax.data.tasks.task import NUMBERS, Question, Task, draw_numbers, every_number
from iv3jax.errors import UserError


@dataclass(frozen=True)
class Chase(Task):
    """Follow a time to a time.

    A question's `parts` are the chains, the asked one first, each from its first pointer to its number.

    Attributes:
        hops: how many times are shown before the number.
        chains: how many chains an episode has.
    """

    seconds: tuple[float, float] = (64.0, 64.0)
    shown: tuple[float, float] = (1.0, 1.0)
    hops: int = 1
    chains: int = 3

    def __post_init__(self) -> None:
        if self.hops < 1 or self.chains < 1 or self.cells > 12:
            raise UserError(
                f"hops: {self.hops} with {self.chains} chains; at least 1 of each, chains × (hops + 1) ≤ 12"
            )
        super().__post_init__()

    @property
    def cells(self) -> int:
        return self.chains * (self.hops + 1)

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        chains = rng.permutation(self.cells).reshape(self.chains, -1).tolist()
        whole = [_whole_second(span) for span in spans]
        numbers = [0] * self.cells
        for chain, number in zip(chains, draw_numbers(rng, self.chains), strict=True):
            for here, there in pairwise(chain):
                numbers[here] = whole[there]
            numbers[chain[-1]] = number
        then = ", then the time shown there" * (self.hops - 1)
        questions = []
        for chain in chains:
            text = f"Go to the time shown at {whole[chain[0]]} seconds{then}. Which number is shown?"
            parts = (tuple(chain), *(tuple(other) for other in chains if other is not chain))
            evidence = tuple(spans[i] for i in chain)
            questions.append(Question(text, f"{numbers[chain[-1]]}", parts, evidence, duration))
        return numbers, questions

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        """As far as the chain is seen; where it breaks off, the likeliest number: see `ends`."""
        seen = episode.seen(times)[np.array(question.parts)]
        chances = ends(seen)
        shown = {question.parts[c][-1]: float(chances[c]) for c in range(self.chains) if seen[c, -1]}
        # Of equal chances the earliest in time: the order of the parts would tell.
        likely = max(sorted(shown), key=lambda event: shown[event], default=None)
        rest = (1 - sum(shown.values())) / (len(NUMBERS) - len(shown))
        if likely is not None and shown[likely] >= rest:
            return f"{episode.events[likely].number}"
        numbers = {episode.events[event].number for event in shown}
        return f"{next(n for n in NUMBERS if n not in numbers)}"

    def fixed(self, question: Question) -> Sequence[str]:
        return every_number()

    def ceiling(self, frames: int) -> float:
        laws = [how_many(visible(d, frames, self.cells, self.shown)) for d in self.durations]
        return float(np.mean(laws, axis=0) @ _values(self.chains, self.hops))


def ends(seen: np.ndarray) -> np.ndarray:
    """(chains,): how likely each chain's last event is the end of chain 0, given what is seen.

    Pointers of one level and events of the next are matched at random. A pointer that is seen names its
    event; one that is missed leads to any event that no seen pointer names, all as likely.

    Args:
        seen: (chains, hops + 1) bool, each chain from its first pointer to its number.
    """
    chance = np.zeros(len(seen))
    chance[0] = 1
    for level in range(seen.shape[1] - 1):
        missed = ~seen[:, level]
        chance[missed] = chance[missed].sum() / max(missed.sum(), 1)
    return chance


@lru_cache
def _values(chains: int, hops: int) -> np.ndarray:
    """(cells + 1,): the expected score by how many events are seen, over all ways to see so many."""
    ways = patterns(chains * (hops + 1))
    total, count = np.zeros(ways.shape[1] + 1), np.zeros(ways.shape[1] + 1)
    for way in ways.reshape(len(ways), chains, hops + 1):
        shown = ends(way)[way[:, -1]]
        rest = (1 - shown.sum()) / (len(NUMBERS) - len(shown))
        total[way.sum()] += max(shown.max(initial=0), rest)
        count[way.sum()] += 1
    return total / count


def _whole_second(span: Span) -> int:
    """The whole second in the middle of a span of a second or more."""
    return ceil((span[0] + span[1]) / 2 - 0.5)
