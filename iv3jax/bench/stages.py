"""`iv3 bench stages`: what stages 1 and 2 teach a converted model, and what it costs to leave one out.

A source of the tiny shape with grouped keys learns to read numbers, is converted to half its cache, and goes
through the tiny twins of continued pretraining, short and long fine-tuning (configs/cpt.py, sft.py). After
each it is asked about held-out clips and handwriting, by the length of the video. Runs and figures are kept
as they are made; the same command goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from iv3jax.bench.cells import Cells
from iv3jax.bench.conversion import FOLDER as CONVERSIONS
from iv3jax.bench.conversion_video import RECOVERED, calibration_of, trained_source, variants
from iv3jax.bench.digits import answers
from iv3jax.bench.interval import interval
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import load
from iv3jax.conversion.convert import convert
from iv3jax.conversion.source import Source
from iv3jax.data.tasks import TASKS
from iv3jax.data.tasks.judge import score
from iv3jax.data.tasks.source import Case, TaskSource
from iv3jax.errors import UserError
from iv3jax.train.config import experiment
from iv3jax.train.run import run

FOLDER = Path("runs/bench_stages")
SECONDS = (8, 16, 64)
"""Lengths of the videos that are asked about, at two frames a second."""

ASKED = ("at", "when")
"""The tasks: exact match, and mean temporal IoU. One number is shown for a while in a video of any length."""

STAGES = {"stage 1": "cpt:tiny", "short": "sft:tiny_short", "long": "sft:tiny_long"}

CHAINS = (
    ("stage 1",),
    ("stage 1", "short"),
    ("stage 1", "short", "long"),
    ("short",),
    ("short", "long"),
    ("stage 1", "long"),
    ("long",),
)
"""Stages that follow the conversion: first the whole way step by step, then without one."""


@dataclass(frozen=True)
class Asked:
    """Questions of one task about videos of one length."""

    task: str
    seconds: int
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """Its column."""
        return f"{self.task} {self.seconds} s"


def bench_stages(
    model: str | None = None,
    videos: int = 100,
    seed: int = 1,
    folder: Path = FOLDER,
    part: str | None = None,
) -> dict[str, Any]:
    """Trains what `folder` does not hold yet, and asks.

    Args:
        model: the source's folder; None takes the one that `iv3 bench conversion` trains, and trains it
            where it is missing.
        videos: held-out questions of each task and length, the same ones for every row and for the same seed.
        seed: of these.
        folder: for the runs and the figures.
        part: "whole" leaves out the rows without a stage.

    Raises:
        UserError: an unknown part; `load`'s, `convert`'s or `run`'s.
    """
    if part not in (None, "whole"):
        raise UserError(f"--part {part}: stages has only the part whole, the rows without a stage left out")
    # Progress must not stand among what is printed as JSON.
    with redirect_stdout(sys.stderr):
        source = model or str(trained_source(CONVERSIONS / "source"))
        asked = questions(videos, seed)
        folder = folder / Source.open(source).fingerprint()[:8]
        cells = Cells(folder / f"asked-{videos}-{seed}")

        def row(name: str, place: str, steps: int) -> dict[str, Any]:
            return {"name": name, "model": place, "steps": steps} | cells(name, lambda: measure(place, asked))

        start = folder / "converted"
        if not start.exists():
            # Not the pairs that layers would choose, with which there is little for a stage to bring back.
            even = variants()[f"{RECOVERED:.1%} iv3, even pairs"]
            convert(source, start, even, calibration_of(source))
        rows = [row("source", source, 0), row("converted", str(start), 0)]
        for chain in CHAINS[: len(STAGES) if part else None]:
            place, steps = str(start), 0
            for number, stage in enumerate(chain):
                out = folder / "-".join(chain[: number + 1]).replace(" ", "")
                config = experiment(STAGES[stage], [f"init={place}"])
                if not (out / "model").exists():
                    run(config, out)
                place, steps = str(out / "model"), steps + config.steps
            rows.append(row(" → ".join(chain), place, steps))
    ceilings = {a.name: a.cases[0].task.ceiling(2 * a.seconds) for a in asked}
    return {"videos": videos, "seed": seed, "ceilings": ceilings, "rows": rows}


def questions(videos: int, seed: int) -> list[Asked]:
    """`videos` held-out questions of each task and length."""
    found = []
    for task in ASKED:
        for seconds in SECONDS:
            options = (
                "split=test",
                f"seconds={seconds}",
                "shown=2,7" if seconds > 8 else "shown=1.5,3.5",
                f"frames={2 * seconds}",
                "events=1",
                f"seed={seed}",
            )
            source: TaskSource = TASKS[task](options)
            found.append(Asked(task, seconds, tuple(map(source.case, range(videos)))))
    return found


def measure(folder: str, asked: Sequence[Asked]) -> dict[str, Any]:
    """Column → mean score of a model's answers, and low and high of its 95 % interval."""
    model = load(folder)
    found = {}
    for part in asked:
        texts = answers(model, (case.messages(answered=False) for case in part.cases))
        scores = np.array(
            [score(case.questions[0], text) for case, text in zip(part.cases, texts, strict=True)]
        )
        found[part.name] = [float(scores.mean()), *interval(scores)]
    return {"scores": found}


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(
        title=f"after each stage, {result['videos']} held-out questions a column: exact match for at, "
        "mean temporal IoU for when",
        caption="steps: optimiser steps after the conversion. Below each score its 95 % interval",
    )
    table.add_column("model")
    table.add_column("steps", justify="right")
    for name in result["ceilings"]:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        shown = [f"{mean:.2f}\n{low:.2f}–{high:.2f}" for mean, low, high in row["scores"].values()]
        table.add_row(row["name"], str(row["steps"]), *shown, end_section=row["name"] == "converted")
    table.add_section()
    table.add_row("perfect eyes", "", *(f"{value:.2f}" for value in result["ceilings"].values()))
    return as_text(table, 130)
