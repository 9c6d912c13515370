"""`iv3 bench digits`: what a model has learned from one look, on clips and digit instances it never saw.

Every row stands beside its control, the same videos with the digits' pixels zeroed, and beside what can be
had without looking (chance, or the best fixed interval) and with perfect eyes (the trained answer itself).
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from iv3jax.bench.interval import interval
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.collate import collate, round_up_bucket
from iv3jax.data.digits import (
    DigitVideo,
    Question,
    Task,
    ask_about,
    conversation,
    interval_iou,
    make_events,
    make_video,
    write_video,
)
from iv3jax.data.sample import Sample
from iv3jax.generate.generate import generate
from iv3jax.models.batch import Batch
from iv3jax.typing import DType

SECONDS = (10.0, 16.0)
"""Shortest and longest video, as in training."""

BATCH = 100
FILES_SHARE = 10
"""One real file is written, read back and asked about for this many videos made in memory."""


@dataclass(frozen=True)
class Case:
    """One row: a task, on videos with this many numbers, in memory or as real mp4 files."""

    name: str
    task: Task
    events: int
    files: bool = False


CASES = (
    Case("read the number", "read", 1),
    Case("which of two, by time", "at", 2),
    Case("when, one number", "when", 1),
    Case("when, one of two", "when", 2),
    Case("read the number, mp4 file", "read", 1, files=True),
    Case("when, one number, mp4 file", "when", 1, files=True),
)


@dataclass(frozen=True)
class Result:
    """A row's figures. Scores are exact match, or mean temporal IoU for "when".

    Attributes:
        low, high: 95 % interval of the score.
        control: the score with the digits' pixels zeroed, None for files.
        blind: the best score without looking.
        perfect: the score of the answers that training asks for.
        recall: share of intervals with IoU of at least 0.5, None for exact match.
    """

    name: str
    videos: int
    score: float
    low: float
    high: float
    control: float | None
    blind: float
    perfect: float
    recall: float | None


def bench_digits(model: LoadedModel, videos: int, seed: int = 1) -> dict[str, Any]:
    """Asks `videos` held-out questions a row; the same ones for the same seed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            count = -(-videos // FILES_SHARE) if case.files else videos
            made = [make_case(case, [seed, number, i]) for i in range(count)]
            if case.files:
                texts = answers(model, _from_files(made, Path(folder), [seed, number]))
                control = None
            else:
                texts = answers(model, (conversation(v, [q], answered=False) for v, q in made))
                zeroed = [make_case(case, [seed, number, i], zeroed=True) for i in range(count)]
                blind_texts = answers(model, (conversation(v, [q], answered=False) for v, q in zeroed))
                control = float(np.mean(scores(zeroed, blind_texts)))
            rows.append(_result(case, made, scores(made, texts), control))
    return {"seed": seed, "rows": [asdict(row) for row in rows]}


def make_case(case: Case, seed: list[int], zeroed: bool = False) -> tuple[DigitVideo, Question]:
    """A held-out video and question; the control differs in its pixels only."""
    rng = np.random.default_rng(seed)
    duration = float(rng.uniform(*SECONDS))
    events = make_events(rng, case.events, duration)
    video = make_video(rng, "test", duration=duration, events=events, zeroed=zeroed)
    return video, ask_about(rng, video, case.task, events[rng.integers(len(events))])


def _from_files(
    made: list[tuple[DigitVideo, Question]], folder: Path, seed: list[int]
) -> Iterator[list[dict]]:
    """The same questions about freshly written mp4 files at the clip's own size and rate."""
    for i, (video, question) in enumerate(made):
        path = folder / f"{seed[-1]}-{i}.mp4"
        write_video(path, np.random.default_rng([*seed, i]), "test", video.duration, video.events)
        content = [{"type": "video", "video": str(path)}, {"type": "text", "text": question.text}]
        yield [{"role": "user", "content": content}]


def answers(
    model: LoadedModel, conversations: Iterable[list[dict]], cache_dtype: DType | None = None
) -> list[str]:
    """Greedy answers, in batches of one shape; the cache's dtype is the model's unless another is named."""
    samples = [model.processor(turns, generation=True) for turns in conversations]
    texts: list[str] = []
    for batch, count in batches(model, samples):
        stop_ids = model.processor.tokenizer.stop_ids
        result = generate(
            model.model,
            model.params,
            batch,
            max_new_tokens=20,
            stop_ids=stop_ids,
            cache_dtype=cache_dtype,
        )
        texts += [model.processor.tokenizer.decode(tokens) for tokens in result.tokens[:count]]
    return texts


def batches(model: LoadedModel, samples: Sequence[Sample]) -> Iterator[tuple[Batch, int]]:
    """One sample a row, in batches of one shape, each with how many of its rows count."""
    length = round_up_bucket(max(map(len, samples)), 64)
    chunks = round_up_bucket(max(_patches(sample) for sample in samples))
    for start in range(0, len(samples), BATCH):
        part = list(samples[start : start + BATCH])
        full = part + [part[-1]] * (min(BATCH, len(samples)) - len(part))
        batch = collate([[s] for s in full], model.config, length=length, chunks=chunks, chunk_patches=4)
        yield batch, len(part)


def _patches(sample: Sample) -> int:
    return sum(t for t, _, _ in sample.grids)


def scores(made: list[tuple[DigitVideo, Question]], texts: list[str]) -> np.ndarray:
    """1 or 0 for exact answers, the IoU with the true interval for "when"."""
    return np.array([score(question, text) for (_, question), text in zip(made, texts, strict=True)])


def score(question: Question, text: str) -> float:
    """How good one answer is: exact match, or for "when" the IoU of the first two numbers in it."""
    if question.task != "when":
        return float(text.strip() == question.answer)
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)[:2]]
    if len(numbers) < 2:
        return 0.0
    return interval_iou((numbers[0], numbers[1]), (question.event.start, question.event.end))


def _result(
    case: Case, made: list[tuple[DigitVideo, Question]], scores: np.ndarray, control: float | None
) -> Result:
    count, mean = len(scores), float(scores.mean())
    perfect = float(np.mean([score(question, question.answer) for _, question in made]))
    low, high = interval(scores)
    if case.task == "when":
        blind, recall = _best_fixed_interval(made), float((scores >= 0.5).mean())
    else:
        recall = None
        # "at" could guess one of the two numbers only if it could read them, so blind is 1 in 90.
        blind = 1 / 90
    return Result(case.name, count, mean, low, high, control, blind, perfect, recall)


def _best_fixed_interval(made: list[tuple[DigitVideo, Question]]) -> float:
    """Mean IoU of the one interval, as shares of the duration, that does best on these very videos."""
    edges = np.linspace(0, 1, 21)
    return max(
        float(
            np.mean(
                [
                    interval_iou((a * v.duration, b * v.duration), (q.event.start, q.event.end))
                    for v, q in made
                ]
            )
        )
        for i, a in enumerate(edges)
        for b in edges[i + 1 :]
    )


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(title="held-out clips and digit instances")
    for name in ("task", "videos", "score", "95 %", "zeroed", "blind", "perfect eyes", "IoU ≥ 0.5"):
        table.add_column(name, justify="left" if name == "task" else "right")
    show: Callable[[float | None], str] = lambda x: "–" if x is None else f"{x:.2f}"  # noqa: E731
    for row in result["rows"]:
        table.add_row(
            row["name"],
            str(row["videos"]),
            show(row["score"]),
            f"{row['low']:.2f}–{row['high']:.2f}",
            *(show(row[key]) for key in ("control", "blind", "perfect", "recall")),
        )
    return as_text(table, 110)
