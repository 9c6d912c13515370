"""A task as a source of samples: options from text, random access, and the view of an episode that is fed."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from iv3jax.data.digits import Split
from iv3jax.data.record import Record
from iv3jax.data.tasks.episode import Episode, uniform_times, window_times
from iv3jax.data.tasks.task import Question, Task
from iv3jax.errors import UserError, did_you_mean

T = TypeVar("T")
Look = Literal["uniform", "window"]

_TRIES = 100
"""Episodes among which a view must find one that it can answer, to be taken at all."""


@dataclass(frozen=True)
class View:
    """Options of every task's source.

    Attributes:
        split: whose clips, handwriting and random numbers.
        count: how many samples. seed: of all of them.
        view: "uniform" looks at the whole video, "window" around what must be seen for the answer.
        frames: how many are looked at, at most.
        questions: how many at most about one video, as turns of one conversation.
    """

    split: Split = "train"
    count: int = 100_000
    seed: int = 0
    view: Look = "uniform"
    frames: int = 32
    questions: int = 1

    def __post_init__(self) -> None:
        for key, kind in (("split", Split), ("view", Look)):
            if getattr(self, key) not in get_args(kind):
                raise UserError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(get_args(kind))}")
        for key, least in (("count", 1), ("seed", 0), ("frames", 4), ("questions", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)} must be {least} or more")


@dataclass(frozen=True)
class Case:
    """One episode, what is asked about it, and the (n,) times in seconds at which it is looked at."""

    task: Task
    episode: Episode
    questions: tuple[Question, ...]
    times: np.ndarray

    def messages(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """The conversation. A start and end are answered as well as the frames let one read them."""
        turns: list[dict[str, Any]] = []
        for question in self.questions:
            content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
            if not turns:
                frames = self.episode.frames(self.times)
                content.insert(0, {"type": "video", "frames": frames, "times": self.times})
            turns.append({"role": "user", "content": content})
            if answered:
                exact = question.span is None
                answer = question.answer if exact else self.task.read(self.episode, question, self.times)
                turns.append({"role": "assistant", "content": answer})
        return turns


class TaskSource:
    """Sample i of a task is the same for the same options on any machine; it can be pickled for workers.

    In training, only questions are asked whose evidence the view shows: such episodes are drawn until one is
    found. The test split asks whatever comes, so that a view can miss its answer, as the ceilings have it.

    Raises:
        UserError: the view almost never shows what is asked about.
    """

    def __init__(self, name: str, task: Task, view: View):
        self._name, self.task, self.view = name, task, view
        # Whether a view is refused is the options' doing, not the seed's.
        self._draw(np.random.default_rng(0), _TRIES)

    def __len__(self) -> int:
        return self.view.count

    def __getitem__(self, index: int) -> Record:
        return Record(self.name(index), self.case(index).messages())

    def name(self, index: int) -> str:
        """`TASK/SPLIT:NUMBER`."""
        return f"{self._name}/{self.view.split}:{index}"

    def case(self, index: int) -> Case:
        """Sample `index` before it is drawn; a judge needs its questions.

        Raises:
            IndexError: the source is shorter.
        """
        if not 0 <= index < self.view.count:
            raise IndexError(f"{self._name} has {self.view.count} samples, there is no {index}")
        split = get_args(Split).index(self.view.split)
        return self._draw(np.random.default_rng([self.view.seed, split, index]), 100 * _TRIES)

    def _draw(self, rng: np.random.Generator, tries: int) -> Case:
        view = self.view
        for _ in range(tries):
            episode, questions = self.task.make(rng, view.split)
            questions = questions[: view.questions if view.view == "uniform" else 1]
            times = self._times(rng, episode, questions[0])
            if view.split == "train":
                questions = tuple(q for q in questions if _shows(times, q))
            if questions:
                return Case(self.task, episode, questions, times)
        raise UserError(
            f"{self._name}: {view.frames} frames almost never show what is asked about; raise frames, "
            "shorten seconds, or set view=window"
        )

    def _times(self, rng: np.random.Generator, episode: Episode, question: Question) -> np.ndarray:
        if self.view.view == "uniform":
            return uniform_times(episode.duration, self.view.frames)
        least = 4 * len(question.evidence)
        if self.view.frames < least:
            raise UserError(
                f"{self._name}: frames={self.view.frames} is too few for view=window; it needs {least}"
            )
        return window_times(rng, episode.duration, question.evidence, self.view.frames)


def _shows(times: np.ndarray, question: Question) -> bool:
    """Whether a frame lies in each span of the evidence."""
    return all(
        np.searchsorted(times, start) < np.searchsorted(times, end) for start, end in question.evidence
    )


def make_source(name: str, task: type[Task], options: tuple[str, ...]) -> TaskSource:
    """A source from `key=value` options, of the task's fields and of View's.

    Raises:
        UserError: see `parse_options`.
    """
    made, view = parse_options(name, options, task, View)
    return TaskSource(name, made, view)


def parse_options(name: str, options: tuple[str, ...], task: type[Task], kind: type[T]) -> tuple[Task, T]:
    """A task and what else a source is made of, from `key=value` options of the fields of both.

    Raises:
        UserError: an option that is unknown (the nearest is suggested), given twice, or of a wrong value.
    """
    fields = {f.name: f for cls in (task, kind) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option in options:
        key, sign, text = option.partition("=")
        if not sign:
            raise UserError(f"{name}: {option!r} is no option; write key=value")
        if key not in fields:
            raise UserError(f"{name}: unknown option {key!r}{did_you_mean(key, fields)}")
        if key in values:
            raise UserError(f"{name}: option {key} is given twice")
        values[key] = _value(f"{name}.{key}", fields[key].default, text)
    return _build(name, task, values), _build(name, kind, values)


def _build(name: str, kind: type[T], values: dict[str, Any]) -> T:
    mine = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{key: value for key, value in values.items() if key in mine})
    except UserError as error:
        raise UserError(f"{name}.{error}") from None


def _value(name: str, default: Any, text: str) -> Any:
    """A text as the kind of value that the default is; a pair may be written as one number for both."""
    try:
        if isinstance(default, tuple):
            low, *high = [float(part) for part in text.split(",")]
            (last,) = high or [low]
            return low, last
        return type(default)(text)
    except ValueError:
        wanted = "a number, or two with a comma" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{name}: {text!r} is no {wanted}") from None
