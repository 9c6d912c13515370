"""Scripted traces: conversations in which a faultless reader answers a task's question, look by look.

They are the cold start of the loop (iv3jax/mcr): an overview and the question, then steps as the loop's
grammar has them, a thought on one line and one call, each with what the call shows as the next user turn.
Only the assistant's turns are trained on, as in any conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from iv3jax.data.digits import Split
from iv3jax.data.record import Record
from iv3jax.data.tasks.chase import Chase
from iv3jax.data.tasks.episode import Episode, Span, dense_times
from iv3jax.data.tasks.ground import Ground
from iv3jax.data.tasks.judge import parse_times
from iv3jax.data.tasks.reading import At, Read
from iv3jax.data.tasks.source import parse_options
from iv3jax.data.tasks.task import Question, Task
from iv3jax.errors import UserError

SCRIPTED = (Read, At, Chase, Ground)
"""Tasks (and those derived from them) for which there is a script."""

_TRACE = 2
"""Sets the random numbers of traces apart from those of samples and of a loop's questions."""

_TRIES = 1000


@dataclass(frozen=True)
class Script:
    """Options of every source of traces.

    Attributes:
        split: whose clips, handwriting and random numbers.
        count: how many traces. seed: of all of them.
        overview: temporal patches that the prompt shows, `collect.frames` of a stage that goes on from here.
        zoom: temporal patches that a zoom shows at most, its `rollout.tools.frames`.
        half: seconds before and after a time that is zoomed to.
        looks: zooms at most; the answer is the right one even where it was not looked for, so with 0 a model
            learns to guess at once.
    """

    split: Split = "train"
    count: int = 100_000
    seed: int = 0
    overview: int = 8
    zoom: int = 4
    half: float = 1.0
    looks: int = 12

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise UserError(f"split: {self.split!r} is not one of {', '.join(get_args(Split))}")
        for key, least in (
            ("count", 1),
            ("seed", 0),
            ("overview", 1),
            ("zoom", 1),
            ("half", 0.5),
            ("looks", 0),
        ):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)} must be {least} or more")


class TraceSource:
    """Trace i is the same for the same options on any machine; it can be pickled for workers.

    Raises:
        UserError: a task without a script, or one whose evidence the overview almost never shows.
    """

    def __init__(self, name: str, task: Task, script: Script) -> None:
        if not isinstance(task, SCRIPTED):
            raise UserError(
                f"{name}: there is no script for this task; there are read, at, when, chase, ground"
            )
        self._name, self.task, self.script = name, task, script
        self.draw(np.random.default_rng(0), _TRIES)

    def __len__(self) -> int:
        return self.script.count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.script.count:
            raise IndexError(f"{self._name} has {self.script.count} traces, there is no {index}")
        split = get_args(Split).index(self.script.split)
        rng = np.random.default_rng([self.script.seed, split, index, _TRACE])
        return Record(self.name(index), self._messages(rng, *self.draw(rng)))

    def name(self, index: int) -> str:
        """`trace:TASK/SPLIT:NUMBER`."""
        return f"{self._name}/{self.script.split}:{index}"

    def draw(self, rng: np.random.Generator, tries: int = 100 * _TRIES) -> tuple[Episode, Question]:
        """An episode of the split and a question about it that can be answered by looking.

        Raises:
            UserError: none is found in so many tries.
        """
        for _ in range(tries):
            episode, (question, *_) = self.task.make(rng, self.script.split)
            # Where something is shown can be known from the question, or else from the overview.
            if not isinstance(self.task, Ground) or self._found(episode, question) is not None:
                return episode, question
        raise UserError(
            f"{self._name}: {self.script.overview} patches almost never show what is asked about; raise "
            "overview or shorten seconds"
        )

    def _found(self, episode: Episode, question: Question) -> float | None:
        """A time of the overview, in seconds, at which the asked event is shown; None if it is missed."""
        times = self._frame_times(episode, self._overview(episode))
        start, end = question.evidence[0]
        inside = times[(times >= start) & (times < end)]
        return None if not len(inside) else float(np.median(inside))

    def _messages(
        self, rng: np.random.Generator, episode: Episode, question: Question
    ) -> list[dict[str, Any]]:
        overview = self._overview(episode)
        messages = [_user(self._video(episode, overview), {"type": "text", "text": question.text})]
        shown = [overview]
        thought = ""
        for window, read in self.looks(rng, episode, question)[: self.script.looks]:
            messages.append(_assistant(thought, f"zoom {window[0]:.1f} {window[1]:.1f}"))
            patches = zoomed(patch_times(episode), window, self.script.zoom)
            messages.append(_user(self._video(episode, patches)))
            shown.append(patches)
            thought = read
        answer = question.answer
        if question.span is not None:
            times = self._frame_times(episode, np.unique(np.concatenate(shown)))
            answer = self.task.read(episode, question, times)
        messages.append(_assistant(thought, f"answer {answer}"))
        return messages

    def looks(self, rng: np.random.Generator, episode: Episode, question: Question) -> list[tuple[Span, str]]:
        """The windows that are zoomed into, one after the other, and what is thought of each.

        For a task that must find its evidence in the overview, the overview must show it.
        """
        if isinstance(self.task, Read):
            return []
        if isinstance(self.task, Ground):
            at = self._found(episode, question)
            assert at is not None, "the caller's business"
            reach = self.script.half + self.task.shown[1] * rng.uniform(0.75, 1.0)
            return [(_window(at, reach, episode.duration), "")]
        looks, at = [], parse_times(question.text)[0]
        for event in question.parts[0]:
            number = episode.events[event].number
            looks.append((_window(at, self.script.half, episode.duration), f"{number}"))
            at = float(number)
        return looks

    def times(self, episode: Episode, windows: Sequence[Span]) -> np.ndarray:
        """(n,) seconds, in order: the frames that the overview and zooms into these windows show."""
        dense = patch_times(episode)
        shown = [zoomed(dense, window, self.script.zoom) for window in windows]
        return self._frame_times(episode, np.unique(np.concatenate([self._overview(episode), *shown])))

    def _overview(self, episode: Episode) -> np.ndarray:
        return spread(len(patch_times(episode)), self.script.overview)

    def _frame_times(self, episode: Episode, patches: np.ndarray) -> np.ndarray:
        """(2n,) seconds of the frames of temporal patches (n,)."""
        return _pairs(episode)[patches].ravel()

    def _video(self, episode: Episode, patches: np.ndarray) -> dict[str, Any]:
        times = self._frame_times(episode, patches)
        return {"type": "video", "frames": episode.frames(times), "times": times}


def make_traces(name: str, task: type[Task], options: tuple[str, ...]) -> TraceSource:
    """A source from `key=value` options, of the task's fields and of Script's.

    Raises:
        UserError: see `source.parse_options` and TraceSource.
    """
    made, script = parse_options(name, options, task, Script)
    return TraceSource(name, made, script)


def spread(count: int, frames: int) -> np.ndarray:
    """Places of at most `frames` of `count` patches, evenly from first to last, as the loop shows them."""
    if count <= frames:
        return np.arange(count)
    if frames == 1:
        return np.array([(count - 1) // 2])
    return (2 * np.arange(frames) * (count - 1) + frames - 1) // (2 * (frames - 1))


def zoomed(times: np.ndarray, window: Span, frames: int) -> np.ndarray:
    """The patches that a zoom shows, as the loop shows them.

    Args:
        times: (n,) seconds of the patches, as they are written: whole tenths. window: within the video.
    """
    inside = np.flatnonzero((times >= window[0]) & (times < window[1]))
    if not len(inside):
        return np.array([int(np.argmin(np.abs(2 * times - sum(window))))])
    return inside[0] + spread(len(inside), frames)


def patch_times(episode: Episode) -> np.ndarray:
    """(n,) seconds of all temporal patches of an episode, rounded to tenths as they are written."""
    return np.array([float(f"{t:.1f}") for t in _pairs(episode).mean(axis=1)])


def _pairs(episode: Episode) -> np.ndarray:
    """(n, 2) seconds of the frames of every temporal patch; an odd last frame counts twice."""
    times = dense_times(episode.duration)
    return np.append(times, times[-1:])[: len(times) + len(times) % 2].reshape(-1, 2)


def _window(at: float, half: float, duration: float) -> Span:
    return round(max(at - half, 0.0), 1), round(min(at + half, duration), 1)


def _user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _assistant(thought: str, call: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"{thought}\n{call}"}
