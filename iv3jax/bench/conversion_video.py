"""`iv3 bench conversion`, the tiny model: a Qwen3-VL-shaped model that reads numbers in videos, converted.

The source has q/k norm and grouped keys, and is trained as the digits' experiment has it. Conversions see
videos that are made like its training videos; they are judged on held-out clips and digit instances
(bench/digits.py), by answers, and by the next-token distributions over the true answers.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from iv3jax.bench.agreement import Observed, add_columns, agreement, cells, observe, questions
from iv3jax.bench.cells import Cells
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import load
from iv3jax.conversion.calibration import Calibration, from_samples
from iv3jax.conversion.config import ConvertConfig
from iv3jax.conversion.convert import convert
from iv3jax.conversion.source import Source
from iv3jax.data.processor import Processor
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig, TextConfig
from iv3jax.train.config import DigitsConfig, experiment
from iv3jax.train.digits import samples
from iv3jax.train.run import run

SAMPLES, LENGTH, ROWS = 160, 240, 4
"""Of calibration: conversations about training videos, tokens of a row, rows of a batch."""

PEERS = ("svd", "transmla", "care")
FRACTIONS = (0.5, 0.375)
RECOVERED = 0.5
RECOVERY = ("optimizer.learning_rate=0.005", "optimizer.adam_learning_rate=0.0015")
"""What differs from that training in what follows a conversion."""


def variants() -> dict[str, ConvertConfig]:
    """Row → the conversion, by size; its cache is the size's, a cached norm's numbers included."""
    base = ConvertConfig(cache_fraction=1.0, tokens=SAMPLES * LENGTH, length=LENGTH)
    found: dict[str, ConvertConfig] = {}
    for fraction in FRACTIONS:
        size = replace(base, cache_fraction=fraction)
        own = {
            **{method: replace(size, method=method) for method in PEERS},
            "transmla, norms dropped": replace(size, method="transmla", qk_norm="dropped"),
            "iv3": size,
            "iv3, even pairs": replace(size, rope_pairs="even"),
            "iv3, norms dropped": replace(size, qk_norm="dropped"),
            "iv3, norms cached": replace(size, qk_norm="cached"),
            "iv3, adapters": replace(size, adapters=True),
            "iv3, ranks by layer": replace(size, budget="dynamic"),
        }
        found |= {f"{fraction:.1%} {name}": config for name, config in own.items()}
    return found


def bench_video(folder: Path, model: str | None, videos: int = 100, seed: int = 1) -> dict[str, Any]:
    """Measures everything that `folder` does not hold yet.

    Args:
        folder: for the figures and the converted models.
        model: the source's folder; None trains one into `folder`, in a few minutes.
        videos: held-out questions of each task, the same ones for every row and for the same seed.

    Raises:
        UserError: `load`'s or `convert`'s, for the folder.
    """
    # Progress must not stand among what is printed as JSON.
    with redirect_stdout(sys.stderr):
        source = model or str(trained_source(folder / "source"))
        bench = _Bench(folder / f"video-{Source.open(source).fingerprint()[:8]}", source, videos, seed)
        rows = [bench.row("source", bench.source)]
        for name, config in variants().items():
            rows.append(bench.row(name, bench.converted(name, config)))
        start = bench.converted(f"{RECOVERED:.1%} iv3", variants()[f"{RECOVERED:.1%} iv3"])
        for name, init in (("source", bench.source), (f"{RECOVERED:.1%} iv3", start)):
            rows.append(bench.row(f"{name}, trained on", bench.trained_on(name, init)))
    return {"videos": videos, "seed": seed, "recovery": list(RECOVERY), "rows": rows}


def trained_source(folder: Path) -> Path:
    """A source of the digits' experiment, trained where the folder does not hold it."""
    if not (folder / "model").is_dir():
        run(experiment("digits", ["preset=tiny_gqa"]), folder)
    return folder / "model"


def calibration_of(source: str) -> Calibration:
    """Conversations about videos made like those that the source was trained on."""
    config = ModelConfig.from_file(Path(source))
    stream = samples(np.random.default_rng(5), Processor.from_dir(Path(source), config), DigitsConfig(), 1.0)
    return from_samples(list(islice(stream, SAMPLES)), config, length=LENGTH, rows=ROWS)


@dataclass(frozen=True)
class _Bench:
    folder: Path
    source: str
    videos: int
    seed: int

    @cached_property
    def _asked(self) -> Any:
        return questions(self.videos, self.seed)

    @cached_property
    def _reference(self) -> Observed:
        return observe(load(self.source), self._asked)

    @cached_property
    def _calibration(self) -> Calibration:
        return calibration_of(self.source)

    def converted(self, name: str, config: ConvertConfig) -> str:
        """The folder of a conversion, made where it is missing."""
        out = self._place(name)
        if not out.exists():
            convert(self.source, out, config, self._calibration)
        return str(out)

    def trained_on(self, name: str, init: str) -> str:
        """The folder of what that training makes of a model."""
        out = self._place(f"{name}, trained on")
        if not (out / "model").exists():
            run(experiment("digits", [*RECOVERY, f"init={init}"]), out)
        return str(out / "model")

    def _place(self, name: str) -> Path:
        return self.folder / name.replace(",", "").replace("%", "").replace(" ", "-")

    def row(self, name: str, folder: str) -> dict[str, Any]:
        """A line of the table."""

        def measure() -> dict[str, Any]:
            seen = self._reference if folder == self.source else observe(load(folder), self._asked)
            text = ModelConfig.from_file(Path(folder)).text_config
            found = {"answer_loss": seen.answer_loss, "bytes_per_token": cache_bytes(text)}
            return found | asdict(agreement(self._asked, self._reference, seen))

        return {"name": name} | Cells(self.folder / f"{self.videos}-{self.seed}")(
            name.replace("%", ""), measure
        )


def cache_bytes(text: TextConfig) -> int:
    """Of one token over all layers, in bf16."""
    return jax.eval_shape(partial(init_cache, text, 1, 1, jnp.bfloat16, False)).nbytes


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(
        title=f"conversions of a tiny model with q/k norm, {result['videos']} held-out videos a task",
        caption=f"trained on: the digits' training from there, with {', '.join(result['recovery'])}",
    )
    table.add_column("model")
    table.add_column("cache", justify="right")
    table.add_column("answers' −log p", justify="right")
    add_columns(table)
    whole = result["rows"][0]["bytes_per_token"]
    for row in result["rows"]:
        share = f"{row['bytes_per_token'] / whole:.1%}"
        table.add_row(row["name"], share, f"{row['answer_loss']:.3f}", *cells(row))
    return as_text(table, 185)
