"""Task: how episodes of one kind are made, asked about, read by perfect eyes, and how well one can do blind.

The tasks are in files of their own; a view of an episode as a training sample is `source.py`'s.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from iv3jax.data.digits import EVENT_GAP, Event, Split
from iv3jax.data.tasks.episode import Episode, Span, spread
from iv3jax.errors import UserError

NUMBERS = tuple(range(10, 100))
"""What is shown and asked for; times may be any number from 0."""


@dataclass(frozen=True)
class Question:
    """A question about an episode, and what judges its answer.

    Attributes:
        text: what is asked.
        answer: the right one.
        parts: numbers of the events that play a part, grouped as the task says. A perfect reader is told
            these, but of an event's number and time only what the frames it looks at show.
        evidence: the spans that must be looked at.
        span: the answer where it is a start and end, else None.
        duration: the episode's, seconds.
    """

    text: str
    answer: str
    parts: tuple[tuple[int, ...], ...]
    evidence: tuple[Span, ...]
    duration: float
    span: Span | None = None


@dataclass(frozen=True)
class Task(ABC):
    """Options that every task has; a task is a frozen dataclass of its options.

    Attributes:
        seconds: shortest and longest video; durations are whole seconds, all as likely.
        shown: shortest and longest time that something is shown, in seconds.
        varied: how much handwriting is varied at random, in the training split only; 0: not at all.
    """

    seconds: tuple[float, float]
    shown: tuple[float, float]
    varied: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        (low, high), (short, long) = self.seconds, self.shown
        if not (1 <= low <= high <= 999 and low == int(low) and high == int(high)):
            raise UserError(f"seconds: {low:g},{high:g} must be whole numbers, in order, from 1 to 999")
        if not 1 <= short <= long:
            raise UserError(f"shown: {short:g},{long:g} must be at least 1, in order")
        if self.varied < 0:
            raise UserError(f"varied: {self.varied:g} must be 0 or more")
        least = self.cells * (short + EVENT_GAP)
        if self.cells < 1 or low < least:
            raise UserError(
                f"seconds: {self.cells} events of {short:g} seconds need {least:g} or more, not {low:g}"
            )

    @property
    @abstractmethod
    def cells(self) -> int:
        """How many events an episode has."""

    @abstractmethod
    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        """The number shown in each of the spans, and all that may be asked."""

    @abstractmethod
    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        """The best answer of a faultless reader of the frames at `times` who knows how episodes are made."""

    @abstractmethod
    def fixed(self, question: Question) -> Sequence[str]:
        """What may be answered without looking, always in the same order: each is a strategy of its own."""

    @abstractmethod
    def ceiling(self, frames: int) -> float:
        """The mean score that `read` expects of a uniform view of at most `frames` frames, from formulas."""

    @property
    def durations(self) -> range:
        """Whole seconds, all as likely."""
        return range(int(self.seconds[0]), int(self.seconds[1]) + 1)

    def make(self, rng: np.random.Generator, split: Split) -> tuple[Episode, tuple[Question, ...]]:
        """An episode and the questions about it, in random order."""
        duration = float(rng.choice(self.durations))
        spans = self.spans(rng, duration)
        numbers, questions = self.ask(rng, duration, spans)
        events = tuple(Event(n, start, end) for n, (start, end) in zip(numbers, spans, strict=True))
        rng.shuffle(questions)
        varied = self.varied if split == "train" else 0.0
        return Episode(duration, events, split, int(rng.integers(2**62)), varied), tuple(questions)

    def spans(self, rng: np.random.Generator, duration: float) -> tuple[Span, ...]:
        """When something is shown, one span for each cell."""
        return spread(rng, duration, self.cells, self.shown)


def draw_numbers(rng: np.random.Generator, count: int) -> list[int]:
    """Different numbers of NUMBERS, in random order."""
    return rng.choice(NUMBERS, count, replace=False).tolist()


def every_number() -> tuple[str, ...]:
    """The fixed answers where any number may be asked for."""
    return tuple(map(str, NUMBERS))


def span_text(start: float, end: float) -> str:
    """How a start and end are answered."""
    return f"From {start:.1f} to {end:.1f} seconds."
