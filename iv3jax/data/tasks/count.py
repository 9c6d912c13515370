"""Count: how many times is a number shown?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from iv3jax.data.tasks.ceilings import how_many, visible
from iv3jax.data.tasks.episode import Episode, Span
from iv3jax.data.tasks.task import Question, Task, draw_numbers
from iv3jax.errors import UserError


@dataclass(frozen=True)
class Count(Task):
    """A number is shown 1 … `most` times, all as likely, among others that are shown once.

    A question's `parts` are the events with the asked number.

    Attributes:
        events: how many are shown in all.
        most: how many times at most.
    """

    seconds: tuple[float, float] = (64.0, 64.0)
    shown: tuple[float, float] = (1.0, 2.0)
    events: int = 6
    most: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.most <= self.events:
            raise UserError(f"most: {self.most} must be from 1 to {self.events}, the number of events")
        super().__post_init__()

    @property
    def cells(self) -> int:
        return self.events

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        times = int(rng.integers(1, self.most + 1))
        same = sorted(rng.permutation(self.events)[:times].tolist())
        number, *others = draw_numbers(rng, 1 + self.events - times)
        numbers = [number if i in same else others.pop() for i in range(self.events)]
        # All must be looked at to know that there are no more.
        question = Question(
            f"How many times is the number {number} shown?",
            f"{times}",
            (tuple(same),),
            tuple(spans),
            duration,
        )
        return numbers, [question]

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        seen = episode.seen(times)
        return f"{self._likeliest(int(seen[list(question.parts[0])].sum()), int(seen.sum()))}"

    def fixed(self, question: Question) -> Sequence[str]:
        return tuple(f"{times}" for times in range(1, self.most + 1))

    def ceiling(self, frames: int) -> float:
        value = [
            sum(self._chance(self._likeliest(asked, seen), asked, seen) for asked in range(seen + 1))
            / self.most
            for seen in range(self.events + 1)
        ]
        laws = [how_many(visible(d, frames, self.cells, self.shown)) for d in self.durations]
        return float(np.mean(laws, axis=0) @ np.array(value))

    def _likeliest(self, asked: int, seen: int) -> int:
        """How many there are, where `asked` of the `seen` events have the asked number."""
        return max(range(1, self.most + 1), key=lambda times: self._chance(times, asked, seen))

    def _chance(self, times: int, asked: int, seen: int) -> float:
        """The hypergeometric probability to see that, with `times` of them in all the events."""
        ways = comb(times, asked) * comb(self.events - times, seen - asked)
        return ways / comb(self.events, seen)
