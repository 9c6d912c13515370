"""From a place in the global order to a Sample, or to the reason why there is none.

`Read` is what the worker processes run; `Reader` hands the places out to them. What is packed with what is
lanes.py. The processes import this file, and so neither grain nor jax.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from iv3jax.data.config import DataConfig
from iv3jax.data.processor import Processor
from iv3jax.data.quarantine import Dropped, Quarantine
from iv3jax.data.record import Source
from iv3jax.data.sample import Sample
from iv3jax.data.workers import TaskDiedError, TaskTimeoutError, Workers
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL

LOG = logging.getLogger("iv3jax.data")

_MOST_CHARACTERS = 500


class Order(Protocol):
    """A `mixture.Mixture`."""

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Source and record of the sample with global number i."""


@dataclass(frozen=True)
class Read:
    """Reads a record of one of the sources into a Sample, or says why not. The result does not depend on
    when or in which process it is called.
    """

    sources: Sequence[Source]
    processor: Processor

    def __call__(self, place: tuple[int, int]) -> Sample | Dropped:
        source, number = self.sources[place[0]], place[1]
        name = source.name(number)
        try:
            record = source[number]
            processor = replace(
                self.processor,
                fps=record.fps or self.processor.fps,
                min_frames=record.min_frames or self.processor.min_frames,
                max_frames=record.max_frames or self.processor.max_frames,
            )
            sample = processor(record.messages)
        except UserError as error:
            return Dropped(name, "unreadable", _one_line(error))
        # The one place where an error that nobody foresaw must not end a run of weeks: it is named.
        except Exception as error:
            return Dropped(name, "failed", f"{type(error).__name__}: {_one_line(error)}")
        if not (sample.labels != IGNORE_LABEL).any():
            return Dropped(name, "unreadable", "no text of the assistant, so nothing to train on")
        return sample


class Reader:
    """Reads samples by their global number, ahead of their use and in other processes.

    Args:
        sources: those that `order` speaks of.
        order: the global order.
        processor: see `configured`.
        config: gives workers and timeout.
        quarantine: what it names is skipped; what fails is named in it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        processor: Processor,
        config: DataConfig,
        quarantine: Quarantine,
    ):
        self._sources, self._order, self._quarantine = sources, order, quarantine
        self._workers = Workers(Read(tuple(sources), processor), config.workers, config.timeout)

    def start(self, index: int) -> "Reading":
        """Begins to read the sample with this global number."""
        source, number = self._order[index]
        name = self._sources[source].name(number)
        entry = self._quarantine.find(name, index)
        if entry is not None:
            dropped = Dropped(name, "quarantined", f"{entry.kind} earlier: {entry.reason}")
            return Reading(name, source, partial(self._skipped, dropped))
        return Reading(
            name, source, partial(self._finish, name, index, self._workers.submit((source, number)))
        )

    def close(self) -> None:
        """Ends processes and threads; what is still being read fails."""
        self._workers.close()

    def save(self) -> None:
        """Brings the quarantine file up to date, once nothing is read any more."""
        self._quarantine.save()

    def _skipped(self, dropped: Dropped) -> Dropped:
        self._quarantine.met(dropped.name)
        return dropped

    def _finish(self, name: str, index: int, future: Future) -> Sample | Dropped:
        try:
            found = future.result()
        except TaskTimeoutError as error:
            found = Dropped(name, "timeout", str(error))
        except TaskDiedError as error:
            found = Dropped(name, "failed", str(error))
        if isinstance(found, Dropped):
            LOG.warning("%s: dropped, %s: %s", name, found.kind, found.reason)
            self._quarantine.add(found, index)
        return found


@dataclass(frozen=True)
class Reading:
    """A sample that is being read: its name, the number of its source, and `result`, which waits for it.

    `result` is called once, by one thread for all readings.
    """

    name: str
    source: int
    result: Callable[[], Sample | Dropped]


def configured(processor: Processor, config: DataConfig) -> Processor:
    """A model's processor with the limits of a data config."""
    return replace(
        processor,
        fps=config.fps,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        image_pixels=config.image_pixels,
        video_pixels=config.video_pixels,
        add_vision_id=config.add_vision_id,
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    half = _MOST_CHARACTERS // 2
    # Of a long text, a path most likely, what was wrong stands at the end.
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"
