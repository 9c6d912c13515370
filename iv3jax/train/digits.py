"""The digit task's mixture, which changes from step to step: what a first model learns from."""

from collections.abc import Iterator

import numpy as np

from iv3jax.data.collate import collate
from iv3jax.data.digits import Event, Task, ask_about, conversation, make_events, make_video, most_events
from iv3jax.data.feed import Feed
from iv3jax.data.packing import pack_rows
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.models.batch import Batch
from iv3jax.train.config import DigitsConfig, TrainConfig
from iv3jax.train.feeds import StepFeed


def digit_feed(
    config: TrainConfig, processor: Processor, state: np.ndarray | None, group: int, groups: int
) -> Feed:
    """The mixture's batches, which depend on the step alone, or one of `groups` equal parts of their rows."""
    rows = config.rows * config.accumulate

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng([config.seed, step])
        stream = samples(rng, processor, config.digits, step / config.steps)
        packed = pack_rows(stream, rows, config.length, config.chunks)
        part = packed[group * rows // groups : (group + 1) * rows // groups]
        return collate(
            part,
            processor.config,
            length=config.length,
            chunks=config.chunks,
            chunk_patches=config.chunk_patches,
        )

    return StepFeed(batch_at, state)


def samples(
    rng: np.random.Generator, processor: Processor, config: DigitsConfig, progress: float
) -> Iterator[Sample]:
    """An endless stream of training samples, as the mixture stands at this share of the run."""
    while True:
        if progress < config.reading_only or rng.random() < config.reading:
            yield processor(_reading(rng))
        else:
            yield processor(_finding(rng, config, progress))


def _reading(rng: np.random.Generator) -> list[dict]:
    """A short video that shows one number throughout."""
    duration = float(rng.choice([1.5, 2.0, 3.0]))
    events = (Event(int(rng.integers(10, 100)), 0.0, duration),)
    video = make_video(rng, "train", duration=duration, events=events)
    return conversation(video, [ask_about(rng, video, "read", events[0])], answered=True)


def _finding(rng: np.random.Generator, config: DigitsConfig, progress: float) -> list[dict]:
    """A longer video with some numbers, and questions about which is when."""
    shortest, longest = config.seconds
    longest = shortest + (longest - shortest) * min(progress / config.growth, 1.0)
    duration = float(rng.uniform(shortest, longest))
    most = min(config.events, most_events(duration, config.shown[0])) if progress > config.alone else 1
    events = make_events(rng, int(rng.integers(1, most + 1)), duration, config.shown)
    video = make_video(rng, "train", duration=duration, events=events)
    # No question twice: its answer would only be copied from the turn before.
    kinds: list[tuple[Task, Event]] = [("when", event) for event in events]
    kinds += [("read" if len(events) == 1 and rng.random() < 0.5 else "at", event) for event in events]
    count = int(rng.integers(1, min(config.questions, len(kinds)) + 1))
    chosen = rng.permutation(len(kinds))[:count]
    questions = [ask_about(rng, video, *kinds[i]) for i in chosen]
    return conversation(video, questions, answered=True)
