"""What each task's scores must be compared with, measured on episodes without drawing a pixel.

A model's score means something above `chance` and `blind`, its looking again something above `uniform`.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from iv3jax.data.digits import Split
from iv3jax.data.tasks.episode import Episode, dense_times, uniform_times, window_times
from iv3jax.data.tasks.judge import score
from iv3jax.data.tasks.task import Question, Task


@dataclass(frozen=True)
class Baselines:
    """Mean scores on the test split.

    Attributes:
        chance: of an answer drawn from the task's fixed ones, all as likely.
        blind: of the fixed one that is best on the training split.
        uniform: of a perfect reader of `frames` frames of the whole video, once.
        error: standard error of `uniform`.
        ceiling: what `uniform` must be, from formulas.
        window: of a perfect reader of `frames` frames of the windows on the evidence; None: too few of them.
        oracle: of a perfect reader of the dense video.
    """

    chance: float
    blind: float
    uniform: float
    error: float
    ceiling: float
    window: float | None
    oracle: float


def baselines(task: Task, frames: int, episodes: int = 2000, seed: int = 0) -> Baselines:
    """The task's baselines for a budget of `frames` frames, on the first question of each episode."""
    test, train = _cases(task, "test", episodes, seed), _cases(task, "train", episodes, seed)
    fixed = _fixed(task, test)
    uniform, oracle, window = [], [], []
    rng = np.random.default_rng([seed, 2])
    for episode, question in test:
        duration = episode.duration
        uniform.append(score(question, task.read(episode, question, uniform_times(duration, frames))))
        oracle.append(score(question, task.read(episode, question, dense_times(duration))))
        if frames >= 4 * len(question.evidence):
            times = window_times(rng, duration, question.evidence, frames)
            window.append(score(question, task.read(episode, question, times)))
    return Baselines(
        chance=float(fixed.mean()),
        blind=float(fixed[_fixed(task, train).argmax()]),
        uniform=float(np.mean(uniform)),
        error=float(np.std(uniform, ddof=1)) / sqrt(episodes),
        ceiling=task.ceiling(frames),
        window=float(np.mean(window)) if window else None,
        oracle=float(np.mean(oracle)),
    )


def _cases(task: Task, split: Split, count: int, seed: int) -> list[tuple[Episode, Question]]:
    made = []
    for i in range(count):
        episode, questions = task.make(np.random.default_rng([seed, int(split == "test"), i]), split)
        made.append((episode, questions[0]))
    return made


def _fixed(task: Task, cases: list[tuple[Episode, Question]]) -> np.ndarray:
    """(strategies,): the mean score of each of the task's fixed answers."""
    return np.mean(
        [[score(question, text) for text in task.fixed(question)] for _, question in cases], axis=0
    )
