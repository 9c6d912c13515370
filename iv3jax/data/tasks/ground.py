"""Fine grounding: report start and end of what is shown for less time than lies between two frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from iv3jax.data.digits import EVENT_GAP
from iv3jax.data.tasks.ceilings import lengths, pattern_law, patterns, visible
from iv3jax.data.tasks.episode import Episode, Span, longest, seen_frames, uniform_times
from iv3jax.data.tasks.task import Question, Task, draw_numbers, span_text

_STARTS = 256


@dataclass(frozen=True)
class Ground(Task):
    """When is this number shown?

    Attributes:
        events: how many numbers.
    """

    seconds: tuple[float, float] = (64.0, 64.0)
    shown: tuple[float, float] = (1.0, 2.0)
    events: int = 2

    @property
    def cells(self) -> int:
        return self.events

    def ask(
        self, rng: np.random.Generator, duration: float, spans: Sequence[Span]
    ) -> tuple[list[int], list[Question]]:
        numbers = draw_numbers(rng, len(spans))
        questions = [
            Question(f"When is the number {n} shown?", span_text(*span), ((i,),), (span,), duration, span)
            for i, (n, span) in enumerate(zip(numbers, spans, strict=True))
        ]
        return numbers, questions

    def read(self, episode: Episode, question: Question, times: np.ndarray) -> str:
        """As exact as the frames allow: see `estimate`. Unseen, the best place among the unseen cells."""
        event = episode.events[question.parts[0][0]]
        first, last = seen_frames(times, np.array([event.start]), np.array([event.end]))
        if first < last:
            found = estimate(times, first, last, episode.duration, self._lengths(episode.duration))
            return span_text(found[0].item(), found[1].item())
        table = _gaps(tuple(times.tolist()), episode.duration, self.cells, self.shown)
        best = np.where(episode.seen(times), -1, table.missed).argmax()
        return span_text(*table.guess[best].tolist())

    def fixed(self, question: Question) -> Sequence[str]:
        """Intervals between tenths of the video."""
        edges = np.linspace(0, question.duration, 11).tolist()
        return tuple(span_text(start, end) for start, end in combinations(edges, 2))

    def ceiling(self, frames: int) -> float:
        """The asked event is seen, or the best of the unseen cells is guessed and is right once in M.

        Within a cell the integrals over places and lengths are sums over a fine grid.
        """
        found = []
        for duration in self.durations:
            table = _gaps(
                tuple(uniform_times(duration, frames).tolist()), float(duration), self.cells, self.shown
            )
            ways = patterns(self.cells)
            value = np.where(ways, table.seen, 0).sum(axis=1) + np.where(ways, 0, table.missed).max(axis=1)
            law = pattern_law(visible(duration, frames, self.cells, self.shown))
            found.append(law @ value / self.cells)
        return float(np.mean(found))

    def _lengths(self, duration: float) -> Span:
        return self.shown[0], longest(duration, self.cells, self.shown)


def estimate(
    times: np.ndarray, first: np.ndarray, last: np.ndarray, duration: float, shown: Span
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of what frames first … last − 1 show and their neighbours don't.

    Its length is between that of these frames and that of their neighbours, and within `shown`: the middle of
    what remains is taken, spread over both ends. In tenths, as answers are written.
    """
    padded = np.concatenate([[0.0], times, [duration]])
    start, end = times[first], times[last - 1]
    before, after = start - padded[first], padded[last + 1] - end
    inner = end - start
    length = (np.maximum(inner, shown[0]) + np.clip(inner + before + after, *shown)) / 2
    more = np.maximum(length - inner, 0) / np.maximum(before + after, 1e-9)
    return (start - more * before).round(1), (end + more * after).round(1)


@dataclass(frozen=True)
class _Gaps:
    """For each of M cells: the mean IoU where its event is seen; the best guess where not, with its own."""

    seen: np.ndarray
    missed: np.ndarray
    guess: np.ndarray


@lru_cache
def _gaps(times: tuple[float, ...], duration: float, cells: int, shown: Span) -> _Gaps:
    frames, top = np.array(times), longest(duration, cells, shown)
    size = np.repeat(lengths(duration, cells, shown), _STARTS)
    room = duration / cells - EVENT_GAP - size
    place = EVENT_GAP / 2 + np.tile((np.arange(_STARTS) + 0.5) / _STARTS, len(size) // _STARTS) * room
    # The longest guess fits in a gap between two frames, or it would claim what has been looked at.
    edges = np.concatenate([[0.0], frames, [duration]])
    seen, missed, guess = np.zeros(cells), np.zeros(cells), np.zeros((cells, 2))
    for cell in range(cells):
        low = duration / cells * cell
        starts, ends = low + place, low + place + size
        first, last = seen_frames(frames, starts, ends)
        shows = first < last
        if shows.any():
            found = estimate(frames, first[shows], last[shows], duration, (shown[0], top))
            seen[cell] = _ious(*found, starts[shows], ends[shows]).mean()
        lows = np.maximum(edges[:-1], low + EVENT_GAP / 2)
        highs = np.minimum(edges[1:], low + duration / cells - EVENT_GAP / 2)
        for a, b in zip(lows.tolist(), highs.tolist(), strict=True):
            half = min((shown[0] + top) / 4, (b - a) / 2)
            if half <= 0:
                continue
            middle = (a + b) / 2
            value = _ious(np.array(middle - half), np.array(middle + half), starts[~shows], ends[~shows])
            if len(value) and value.mean() > missed[cell]:
                missed[cell], guess[cell] = value.mean(), (middle - half, middle + half)
    return _Gaps(seen, missed, guess)


def _ious(a: np.ndarray, b: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`digits.interval_iou` of many intervals."""
    shared = np.clip(np.minimum(b, end) - np.maximum(a, start), 0, None)
    return shared / ((b - a) + (end - start) - shared)
