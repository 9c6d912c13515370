"""The first trained model: the digit task's mixture, step by step, and the run that learns it."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.save import save
from iv3jax.data.collate import collate
from iv3jax.data.digits import Event, Task, ask_about, conversation, make_events, make_video, most_events
from iv3jax.data.packing import pack_rows
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.models.presets import preset
from iv3jax.paths import AnyPath, PathArgument, make_path
from iv3jax.sharding import make_mesh
from iv3jax.train.config import DigitsConfig, TrainConfig
from iv3jax.train.loop import train


def train_digits(config: TrainConfig, out: PathArgument) -> AnyPath:
    """Trains a model on the digit task and writes it to OUT/model, which it returns.

    Raises:
        UserError: `load`'s for `config.init`, or a loss that is not finite.
    """
    run = Execution(remat=config.remat)
    if config.init:
        start = load(config.init, dtype=jnp.float32, run=run)
        model, given, folder = start.model, start.params, start.folder
    else:
        model, given, folder = InternVideo3(preset(config.preset), run), None, TINY_FOLDER
    assert folder is not None, "only presets have none"
    processor = Processor.from_dir(folder, model.config)

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng([config.seed, step])
        stream = samples(rng, processor, config.digits, step / config.steps)
        rows = pack_rows(stream, config.rows, config.length, config.chunks)
        return collate(rows, model.config, length=config.length, chunks=config.chunks, chunk_patches=4)

    title = "training on handwritten numbers in video"
    params = train(model, config, batch_at, title, params=given)
    return save(LoadedModel(model, params, folder, make_mesh()), make_path(out) / "model")


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
