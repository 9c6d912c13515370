"""Foundation's digit questions as tasks: read the number, read the one at a time, say when one is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iv3jax.data.digits import EVENT_SECONDS
from iv3jax.data.tasks.ceilings import how_many, visible
from iv3jax.data.tasks.episode import Episode, Span
from iv3jax.data.tasks.ground import Ground
from iv3jax.data.tasks.task import NUMBERS, Question, Task, draw_numbers, every_number


@dataclass(frozen=True)
class Read(Task):
    """A short video shows one number throughout; the dense reading that must stay in every mixture."""

    seconds: tuple[float, float] = (2.0, 3.0)
    shown: tuple[float, float] = (1.0, 1.0)

    @property
    def cells(self) -> int:
        return 1

    def spans(self, rng: np.random.Generator, duration: float) -> tuple[Span, ...]:
        return ((0.0, duration),)

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        numbers = draw_numbers(rng, 1)
        question = Question("Which number is shown?", f"{numbers[0]}", ((0,),), tuple(spans), duration)
        return numbers, [question]

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        return f"{episode.events[0].number}"

    def fixed(self, question: Question) -> Sequence[str]:
        return every_number()

    def ceiling(self, frames: int) -> float:
        return 1.0


@dataclass(frozen=True)
class At(Task):
    """Numbers are shown one after another; which one is shown at a time?

    Attributes:
        events: how many numbers.
    """

    seconds: tuple[float, float] = (10.0, 16.0)
    shown: tuple[float, float] = EVENT_SECONDS
    events: int = 2

    @property
    def cells(self) -> int:
        return self.events

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        numbers = draw_numbers(rng, len(spans))
        questions = []
        for i, (start, end) in enumerate(spans):
            text = f"Which number is shown at {rng.uniform(start + 0.1, end - 0.1):.1f} seconds?"
            questions.append(Question(text, f"{numbers[i]}", ((i,),), (spans[i],), duration))
        return numbers, questions

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        seen = episode.seen(times)
        shown = {event.number for event, yes in zip(episode.events, seen, strict=True) if yes}
        asked = question.parts[0][0]
        if seen[asked]:
            return f"{episode.events[asked].number}"
        return f"{next(n for n in NUMBERS if n not in shown)}"

    def fixed(self, question: Question) -> Sequence[str]:
        return every_number()

    def ceiling(self, frames: int) -> float:
        """Seen, or one of the numbers that were not."""
        seen = np.arange(self.cells + 1)
        share = seen / self.cells
        value = share + (1 - share) / (len(NUMBERS) - seen)
        laws = [how_many(visible(d, frames, self.cells, self.shown)) for d in self.durations]
        return float(np.mean(laws, axis=0) @ value)


@dataclass(frozen=True)
class When(Ground):
    """Numbers are shown for some seconds each, one after another; when is this one shown?"""

    seconds: tuple[float, float] = (10.0, 16.0)
    shown: tuple[float, float] = EVENT_SECONDS
