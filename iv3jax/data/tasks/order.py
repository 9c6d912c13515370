"""Order: which of two numbers is shown first?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iv3jax.data.tasks.ceilings import pattern_law, patterns, visible
from iv3jax.data.tasks.episode import Episode, Span
from iv3jax.data.tasks.task import Question, Task, draw_numbers
from iv3jax.errors import UserError


@dataclass(frozen=True)
class Order(Task):
    """Which of two numbers is shown first, among others?

    A question's `parts` are the two events, in the order in which the question names them.

    Attributes:
        events: how many numbers are shown.
    """

    seconds: tuple[float, float] = (64.0, 64.0)
    shown: tuple[float, float] = (1.0, 2.0)
    events: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.events <= 12:
            raise UserError(f"events: {self.events} must be from 2 to 12")
        super().__post_init__()

    @property
    def cells(self) -> int:
        return self.events

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        numbers = draw_numbers(rng, self.events)
        named = rng.permutation(self.events).tolist()
        questions = []
        for one, other in zip(named[0::2], named[1::2], strict=False):
            text = f"Which number is shown first, {numbers[one]} or {numbers[other]}?"
            evidence = (spans[one], spans[other])
            answer = f"{numbers[min(one, other)]}"
            questions.append(Question(text, answer, ((one, other),), evidence, duration))
        return numbers, questions

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        """Events are in order of time; one that is missed is in any of the unseen cells, all as likely."""
        one, other = question.parts[0]
        seen = episode.seen(times)
        if seen[one] and seen[other]:
            first = min(one, other)
        elif seen[one]:
            first = one if _later(seen, one) else other
        elif seen[other]:
            first = other if _later(seen, other) else one
        else:
            first = one
        return f"{episode.events[first].number}"

    def fixed(self, question: Question) -> Sequence[str]:
        """The one that is named first, or the other."""
        named = question.text.removesuffix("?").split(", ")[1]
        return tuple(named.split(" or "))

    def ceiling(self, frames: int) -> float:
        """Over all that can be seen and all ordered pairs: both seen 1, one its better side, none 1/2."""
        value = []
        for way in patterns(self.events):
            missed = np.flatnonzero(~way)
            pairs = way.sum() * (way.sum() - 1) + len(missed) * (len(missed) - 1) / 2
            for one in np.flatnonzero(way):
                pairs += 2 * max((missed > one).sum(), (missed < one).sum())
            value.append(pairs / (self.events * (self.events - 1)))
        laws = [pattern_law(visible(d, frames, self.cells, self.shown)) for d in self.durations]
        return float(np.mean(laws, axis=0) @ np.array(value))


def _later(seen: np.ndarray, one: int) -> bool:
    """Whether most of the unseen cells come after this one."""
    missed = np.flatnonzero(~seen)
    return bool((missed > one).sum() >= (missed < one).sum())
