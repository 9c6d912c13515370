"""Rewards: what a rollout is worth, part by part, and the parsers that read an answer.

All of it runs on the host. What a question is, is data/tasks/task.py's business, and how
an answer is judged that is a number or a start and end is data/tasks/judge.py's.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from iv3jax.data.tasks.episode import Span
from iv3jax.data.tasks.judge import parse_times, score
from iv3jax.data.tasks.task import Question
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError, did_you_mean
from iv3jax.mcr.language import ANSWER, TOOLS
from iv3jax.mcr.trajectories import OBSERVATION, Trajectories

PARTS = {
    "iou": "temporal IoU, for a question that asks for a start and end",
    "choice": "1 for the right option, for a question with options",
    "exact": "1 for the right answer, for any other question",
    "format": "1 for an answer that can be read as what was asked for",
    "evidence": "the share of the true spans that were looked at or named",
    "step": "minus the number of steps, so that its weight is the cost of one",
}
"""What a reward is made of. Of the first three, a question has one; the others are 0 there."""


@dataclass(frozen=True)
class RewardConfig:
    """weights: of PARTS, by name; a part that is not named counts nothing.

    Raises:
        UserError: an unknown part (the nearest is suggested), a weight that is no number, or none above 0.
    """

    # Not hashed, being a mapping; it counts where two are compared.
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"iou": 1.0, "choice": 1.0, "exact": 1.0, "format": 0.1}, hash=False
    )

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in PARTS:
                raise UserError(f"reward: unknown part {name!r}{did_you_mean(name, PARTS)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UserError(f"reward.{name}: the weight is {weight!r}, not a number")
        if not any(weight > 0 for weight in self.weights.values()):
            raise UserError(f"reward: no weight is above 0; name one of {', '.join(PARTS)}")


@dataclass(frozen=True)
class Facts:
    """What a rollout did.

    Attributes:
        answer: the text of its answer, without its end token; None if it gave none.
        steps: calls made, the answer among them.
        seen: windows that were looked at, in seconds. Give the frames shown (`frames_seen`), each from its
            time to the same time, if a zoom over the whole video must not count as having seen all of it.
    """

    answer: str | None
    steps: int
    seen: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Reward:
    """total: the weighted sum of parts. parts: every one of PARTS, not weighted."""

    total: float
    parts: dict[str, float]


def reward(config: RewardConfig, question: Question, facts: Facts, options: Sequence[str] = ()) -> Reward:
    """What a rollout is worth.

    Args:
        question: what was asked; its answer is one of the options' letters or texts where there are options.
        options: of a multiple choice, in order; the first is A.

    Raises:
        ValueError: the question's own answer is none of the options.
    """
    answer = facts.answer
    kind = "iou" if question.span is not None else "choice" if options else "exact"
    parts = dict.fromkeys(PARTS, 0.0)
    if kind == "choice":
        right = parse_choice(question.answer, options)
        if right is None:
            raise ValueError(f"{question.answer!r} is none of the options {options}")
        picked = None if answer is None else parse_choice(answer, options)
        parts["choice"], parts["format"] = float(picked == right), float(picked is not None)
    elif answer is not None:
        parts[kind] = score(question, answer)
        parts["format"] = float(len(parse_times(answer)) >= 2 if kind == "iou" else bool(answer.strip()))
    parts["evidence"] = evidence_seen(question, facts)
    parts["step"] = -float(facts.steps)
    return Reward(sum(weight * parts[name] for name, weight in config.weights.items()), parts)


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """Which option a text names, from 0; None where it names none or several.

    Either the option's own text, or its letter: alone ("B", "(b)", "B."), before its text ("B. a dog"), after
    the word answer ("The answer is B"), or in brackets.
    """
    plain = _plain(text)
    same = [i for i, option in enumerate(options) if _plain(option) == plain]
    if len(same) == 1:
        return same[0]
    found = {
        ord(letter.upper()) - ord("A")
        for pattern in _LETTERS
        for letter in pattern.findall(text.strip())
        if ord(letter.upper()) - ord("A") < len(options)
    }
    return found.pop() if len(found) == 1 else None


def evidence_seen(question: Question, facts: Facts) -> float:
    """The share of the question's evidence, 0 of none, that overlaps a window seen, or the one answered."""
    windows = list(facts.seen)
    if question.span is not None and facts.answer is not None:
        times = parse_times(facts.answer)[:2]
        if len(times) == 2 and max(times) <= question.duration:
            windows.append((times[0], times[1]))
    hit = [any(overlaps(window, span) for window in windows) for span in question.evidence]
    return sum(hit) / len(hit) if hit else 0.0


def overlaps(window: Span, span: Span) -> bool:
    """Whether a window has a part of a span, whose end is not part of it; a window may be a single moment."""
    start, end = max(window[0], span[0]), min(window[1], span[1])
    return start < end or span[0] <= window[0] == window[1] < span[1]


def frames_seen(times: np.ndarray, visual: np.ndarray, per_patch: int) -> tuple[Span, ...]:
    """The moments that a rollout's observations showed, in seconds, each from its time to the same time.

    Args:
        times: (F,) tenths of a second, a row of `World.times`.
        visual: (n,) indices into the F·M vision tokens, −1 for text.
        per_patch: M.
    """
    patches = np.unique(visual[visual >= 0] // per_patch)
    return tuple((at, at) for at in (times[patches] / 10).tolist())


def make_facts(
    tokenizer: Tokenizer, trajectories: Trajectories, row: int, times: Sequence[np.ndarray], per_patch: int
) -> Facts:
    """What one rollout did; what it has seen are the frames its tools showed.

    Args:
        times: of each of the prompts (F,), tenths of a second, as `World.times` has them. per_patch: M.
    """
    calls, record = trajectories.calls, trajectories.record
    tools = np.asarray(calls.tools[row])
    answer = None
    if len(said := np.flatnonzero(tools == TOOLS.index(ANSWER))):
        text = np.asarray(calls.text[row, said[-1]])[: int(calls.length[row, said[-1]])]
        # Its tokens begin with the space after the name.
        answer = tokenizer.decode(text.tolist()).removeprefix(" ")
    shown = np.asarray(record.visual[row])[np.asarray(record.kinds[row]) == OBSERVATION]
    seen = frames_seen(np.asarray(times[int(trajectories.prompt[row])]), shown, per_patch)
    return Facts(answer, int(np.sum(tools >= 0)), seen)


_LETTERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"^\(?([A-Za-z])\)?[.:,)]?$",
        r"^\(?([A-Z])[.:)]+\s",
        r"(?i:answer)(?:\s+(?i:is))?\s*:?\s*\(?([A-Z])\b(?!\s+[a-z])",
        r"\(([A-Z])\)",
    )
)


def _plain(text: str) -> str:
    """A text without case, outer space and final stop."""
    return text.strip().rstrip(".").strip().lower()
