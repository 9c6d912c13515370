"""`iv3 bench tasks`: the synthetic long-video tasks, looked at step by step beside looked at once.

Every column has as many tokens: those that the loop spends on a question, all counted equal (visual, thought,
call), are what a single look at the whole video may spend. Each stands beside its control, the same videos
with the numbers' pixels zeroed, and beside what perfect eyes could read with fewer or other looks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from iv3jax.bench.conversion_video import cache_bytes
from iv3jax.bench.digits import answers
from iv3jax.bench.interval import interval
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.data.config import SourceConfig
from iv3jax.data.processor import Processor
from iv3jax.data.tasks import TASKS, TRACES
from iv3jax.data.tasks.judge import score
from iv3jax.data.tasks.look_baselines import look_baselines
from iv3jax.data.tasks.source import TaskSource
from iv3jax.data.tasks.traces import TraceSource
from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling
from iv3jax.mcr.environment import Environment
from iv3jax.mcr.rewards import RewardConfig
from iv3jax.mcr.trajectories import Trajectories
from iv3jax.models.layers import Execution
from iv3jax.train.config import TrainConfig, experiment

EXPERIMENT = "rl:tiny"
"""Whose tasks, overview, tools and budget are taken."""

BATCH = 100


@dataclass(frozen=True)
class Row:
    """A model on a task.

    Attributes:
        loop, low, high: mean score of the closed loop, and its 95 % interval.
        control: the loop's on zeroed videos.
        once: of the same model asked once, about `frames` frames of the whole video.
        ceiling: of perfect eyes that look once at so many.
        tokens: of a rollout with its prompt, mean. calls: of a rollout, mean.
        cache_bytes: of so many tokens, in bf16.
        frames: the most for which a question asked once has no more tokens than that.
    """

    model: str
    task: str
    loop: float
    low: float
    high: float
    control: float
    once: float
    ceiling: float
    tokens: float
    calls: float
    cache_bytes: float
    frames: int


def bench_tasks(
    models: Mapping[str, str], videos: int = 1000, seed: int = 1, row: str | None = None
) -> dict[str, Any]:
    """Asks `videos` held-out questions of each task; the same ones for the same seed and for every model.

    Args:
        models: folders, by the name that their rows get.
        row: the only task to ask about, by its name in the experiment.

    Raises:
        UserError: there is no such row, or too few videos for an interval; `load`'s.
    """
    if videos < 2:
        raise UserError(f"--samples {videos}: an interval needs 2 or more")
    config = experiment(EXPERIMENT)
    names = [source.name for source in config.data.sources]
    if row is not None and row not in names:
        raise UserError(f"--row {row}: there are {', '.join(names)}")
    chosen = [source for source in config.data.sources if row in (None, source.name)]
    run = Execution(scan_layers=config.scan_layers)
    loaded = {name: load(folder, dtype=jnp.float32, run=run) for name, folder in models.items()}
    rows = [one for source in chosen for one in _rows(loaded, config, source, videos, seed)]
    eyes = {source.name: asdict(look_baselines(_script(config, source), seed=seed)) for source in chosen}
    return {
        "experiment": EXPERIMENT,
        "videos": videos,
        "seed": seed,
        "rows": [asdict(row) for row in rows],
        "eyes": eyes,
    }


@dataclass(frozen=True)
class Looped:
    """Of greedy rollouts: scores, tokens with the prompt, and calls, (videos,) each."""

    scores: np.ndarray
    tokens: np.ndarray
    calls: np.ndarray


def _rows(
    models: Mapping[str, LoadedModel], config: TrainConfig, asked: SourceConfig, videos: int, seed: int
) -> Iterator[Row]:
    found = looped(models, config, asked, videos, seed)
    zeroed = looped(models, config, asked, videos, seed, zeroed=True)
    for name, model in models.items():
        yield _row(name, model, found[name], zeroed[name], asked, seed)


def _row(name: str, model: LoadedModel, found: Looped, zeroed: Looped, asked: SourceConfig, seed: int) -> Row:
    mean, spent, videos = float(found.scores.mean()), float(found.tokens.mean()), len(found.scores)
    frames = most_frames(model.processor, asked, spent, seed)
    source = _once(asked, frames, videos, seed)
    cases = [source.case(i) for i in range(videos)]
    texts = answers(model, (case.messages(answered=False) for case in cases))
    once = [score(case.questions[0], text) for case, text in zip(cases, texts, strict=True)]
    low, high = interval(found.scores)
    return Row(
        model=name,
        task=asked.name,
        loop=mean,
        low=low,
        high=high,
        control=float(zeroed.scores.mean()),
        once=float(np.mean(once)),
        ceiling=source.task.ceiling(frames),
        tokens=spent,
        calls=float(found.calls.mean()),
        cache_bytes=spent * cache_bytes(model.config.text_config),
        frames=frames,
    )


def looped(
    models: Mapping[str, LoadedModel],
    config: TrainConfig,
    asked: SourceConfig,
    videos: int,
    seed: int,
    zeroed: bool = False,
) -> dict[str, Looped]:
    """Greedy rollouts of each model about held-out videos of one task; each video is drawn once for all."""
    held_out = replace(asked, options=(*asked.options, "split=test", f"seed={seed}", f"count={videos}"))
    count = min(BATCH, videos)
    environments = {
        name: Environment(
            replace(config.data, sources=(held_out,)),
            model.model,
            model.processor,
            replace(config.rollout, slots=count, sampling=Sampling()),
            frames=config.collect.frames,
            length=config.length - config.rollout.budget,
            seed=seed,
            zeroed=zeroed,
        )
        for name, model in models.items()
    }
    found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in models}
    # The last batch is as large as the others, so that nothing compiles again; its first ones may come twice.
    for first in range(0, videos, count):
        questions = next(iter(environments.values())).asked(first, count)
        for name, environment in environments.items():
            rolled = environment.roll(models[name].params, questions, jax.random.key(seed), group=1)
            ended: Trajectories = jax.device_get(rolled.trajectories)
            rewards = environment.rewards(RewardConfig(), questions, ended)
            scores = [max(one.parts["exact"], one.parts["iou"]) for one in rewards]
            calls = (ended.calls.tools >= 0).sum(axis=1)
            found[name] += zip(scores, ended.length.tolist(), calls.tolist(), strict=True)
    return {name: Looped(*np.array(rows[:videos]).T) for name, rows in found.items()}


def most_frames(processor: Processor, asked: SourceConfig, tokens: float, seed: int) -> int:
    """The most frames for which a question and its answer, asked once, have no more tokens."""
    frames = 4
    while len(processor(_once(asked, frames + 2, 1, seed).case(0).messages())) <= tokens:
        frames += 2
    return frames


def _once(asked: SourceConfig, frames: int, count: int, seed: int) -> TaskSource:
    name = asked.kind.removeprefix("task:")
    return TASKS[name]((*asked.options, f"frames={frames}", "split=test", f"seed={seed}", f"count={count}"))


def _script(config: TrainConfig, asked: SourceConfig) -> TraceSource:
    """The task's scripted looks, with the loop's overview and zooms."""
    shown = (f"overview={config.collect.frames}", f"zoom={config.rollout.tools.frames}")
    name = asked.kind.removeprefix("task:")
    return TRACES[name]((*asked.options, *shown, "split=test"))


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people, each score also as a bar."""
    table = Table(
        title=f"{result['videos']} held-out videos a task, exact match",
        caption="zeroed: the loop where nothing can be read. once: the model asked once, about as many "
        "frames of the whole video as have the loop's tokens, and perfect eyes that see as many. The others, "
        "after the overview: one look where the question points, as many at random, all of the evidence",
    )
    table.add_column("task")
    table.add_column("who")
    table.add_column("loop")
    for head in ("95 %", "zeroed", "once", "perfect eyes", "tokens", "cache kB", "calls"):
        table.add_column(head, justify="right")
    for task, eyes in result["eyes"].items():
        for row in result["rows"]:
            if row["task"] == task:
                table.add_row(
                    task,
                    row["model"],
                    _bar(row["loop"]),
                    f"{row['low']:.3f}–{row['high']:.3f}",
                    f"{row['control']:.3f}",
                    f"{row['once']:.3f}",
                    f"{row['ceiling']:.3f}",
                    f"{row['tokens']:.0f}",
                    f"{row['cache_bytes'] / 1e3:.0f}",
                    f"{row['calls']:.2f}",
                )
        for name, words in (("one_look", "one look"), ("at_random", "at random"), ("oracle", "oracle")):
            table.add_row(task, f"perfect eyes, {words}", _bar(eyes[name]))
        table.add_row(task, "blind", _bar(eyes["blind"]), end_section=True)
    return as_text(table, 130)


def _bar(score: float) -> str:
    return f"{score:.3f} {'█' * round(20 * score)}"
