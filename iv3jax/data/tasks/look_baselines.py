"""What a loop's scores must be compared with: perfect eyes that look elsewhere, or less often.

Measured on held-out episodes without drawing a pixel. All see the overview first; a look shows what a zoom
shows. A model's score means something above `blind`, its choice of where to look something above `at_random`,
and its looking again something above `one_look`.
"""

from dataclasses import dataclass

import numpy as np

from iv3jax.data.tasks.baselines import baselines
from iv3jax.data.tasks.episode import Episode, Span
from iv3jax.data.tasks.judge import score
from iv3jax.data.tasks.task import Question
from iv3jax.data.tasks.traces import TraceSource


@dataclass(frozen=True)
class LookBaselines:
    """Mean scores.

    Attributes:
        blind: of the fixed answer that is best on the training split.
        one_look: of retrieval in one shot, a single zoom to where the question itself points.
        at_random: of as many zooms as the script makes, as long as its, anywhere.
        oracle: of zooms to all of the evidence, which is what the script looks at.
    """

    blind: float
    one_look: float
    at_random: float
    oracle: float


def look_baselines(source: TraceSource, episodes: int = 2000, seed: int = 0) -> LookBaselines:
    """The baselines of a task's first questions, for its source's overview and zooms."""
    one, elsewhere, oracle = [], [], []
    for i in range(episodes):
        rng = np.random.default_rng([seed, 1, i])
        episode, question = source.draw(rng)
        windows = [window for window, _ in source.looks(rng, episode, question)]
        one.append(_read(source, episode, question, windows[:1]))
        elsewhere.append(_read(source, episode, question, [_anywhere(rng, episode, w) for w in windows]))
        oracle.append(_read(source, episode, question, windows))
    blind = baselines(source.task, 4, episodes, seed).blind
    return LookBaselines(blind, float(np.mean(one)), float(np.mean(elsewhere)), float(np.mean(oracle)))


def _read(source: TraceSource, episode: Episode, question: Question, windows: list[Span]) -> float:
    return score(question, source.task.read(episode, question, source.times(episode, windows)))


def _anywhere(rng: np.random.Generator, episode: Episode, window: Span) -> Span:
    length = window[1] - window[0]
    start = round(float(rng.uniform(0, episode.duration - length)), 1)
    return start, start + length
