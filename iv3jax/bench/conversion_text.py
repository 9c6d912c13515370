"""`iv3 bench conversion`, real weights: what conversions of SmolLM2-135M cost on real text.

Every method gets the same calibration tokens, the same RoPE width and rank, hence the same cache, and its own
best layout, which is chosen on calibration text that no conversion saw, with fewer tokens. Excess is the
log-perplexity above the source's, in nats a token; its standard error is over windows, which are the same for
all. The ratio is to TransMLA at that size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from iv3jax.bench.cells import Cells
from iv3jax.bench.conversion_distill import RATES, distilled
from iv3jax.bench.conversion_lab import Lab, load_source, make, model_of, rope_step
from iv3jax.bench.packages import CACHE
from iv3jax.bench.perplexity import token_losses
from iv3jax.bench.smollm2 import FOLDER, smollm2_folder
from iv3jax.bench.table import as_text
from iv3jax.bench.texts import read_text, windows
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.conversion.calibration import Calibration, from_samples, text_sample
from iv3jax.conversion.source import Source
from iv3jax.errors import UserError
from iv3jax.generate.own_text import own_texts

HANDBOOK, OWN = "calibration", "own"
"""What conversions are calibrated on, and what else they may be: texts that the source samples itself."""

METHODS = ("svd", "transmla", "care", "iv3")
PEER = "transmla"
SIZES = {"100 %": {64: 320}, "50 %": {64: 128, 32: 160}, "31 %": {64: 56, 32: 88}, "25 %": {64: 32, 32: 64}}
"""Share of the source's 384 cached numbers a token and layer → RoPE width → rank."""

CHOSEN_AT = {"25 %": "31 %"}
"""Sizes that take the layout which is best at another, to spare the time."""

LAYOUTS = ((64, 1), (64, 2), (64, 4), (32, 2), (32, 4))
"""RoPE widths and frequency foldings to choose from."""

OWN_LAYOUTS = ((64, None), (32, None))
"""What ours may have besides: pairs that each layer chooses."""

DISTILLED = ("31 %", "25 %")
WINDOW = 256
CALIBRATION, CHOICE, JUDGE = 128, 32, 8
"""Windows of the handbook: from its start, all those calibrated on; of these, evenly spaced, those that the
layout is chosen with; after them, evenly spaced, those that it is judged by."""

TEXTS = {"persuasion": 20, "devref": 8}
"""Held-out text → its windows of TEST_WINDOW tokens, evenly spaced over the whole text."""

TEST_WINDOW = 1024
ROWS = 8
"""Calibration windows of a batch."""


@dataclass(frozen=True)
class Point:
    """One line of the table.

    Attributes:
        row: what is measured: a method's name, with what is special about it.
        method, rope_dim, freqfold: the conversion's; no folding where layers choose their pairs.
        rank: of its latents, with a dynamic budget their mean.
        budget: "uniform" or "dynamic"; "none" for the RoPE step alone.
        distilled: whether it was trained after.
        steps: of that training, a batch of calibration tokens each; None for one pass over all.
    """

    row: str
    size: str
    method: str
    rope_dim: int
    freqfold: int | None
    rank: int
    budget: str = "uniform"
    distilled: bool = False
    steps: int | None = None


def spaced(text: np.ndarray, count: int) -> np.ndarray:
    """`count` of the windows (N, T), evenly spaced from the first to the last."""
    return text[np.linspace(0, len(text) - 1, count).round().astype(int)]


def bench_text(folder: Path, packages: Path = CACHE) -> dict[str, Any]:
    """Measures everything that `folder` does not hold yet.

    Args:
        folder: for the figures and, meanwhile, about 10 GB of conversions' steps.
        packages: where the packages of model and texts lie or are downloaded to.

    Raises:
        UserError: a package that cannot be had.
    """
    bench = Bench.open(folder, packages)
    layouts = {(m, s): bench.chosen(m, CHOSEN_AT.get(s, s)) for m in METHODS for s in SIZES}
    rows = [bench.measured(point) for point in points(layouts)]
    return {
        "source": bench.means(bench.source_losses()),
        "calibration_tokens": CALIBRATION * WINDOW,
        "texts": {name: [count, TEST_WINDOW] for name, count in TEXTS.items()},
        "distillation": {"steps": CALIBRATION // ROWS, "tokens": ROWS * WINDOW, "learning_rate": RATES},
        "rows": with_ratios(rows),
    }


def points(layouts: dict[tuple[str, str], tuple[int, int | None]]) -> list[Point]:
    """The lines of the table, by size.

    Args:
        layouts: (method, size) → the chosen RoPE width and folding.
    """

    def point(size: str, method: str, row: str, **what: Any) -> Point:
        e, fold = layouts[method, size]
        return Point(row, size, method, e, fold, SIZES[size][e], **what)

    found = []
    for size in SIZES:
        whole = size == "100 %"
        # Without a limit of rank the peers are their RoPE step.
        found += [point(size, m, m, budget="none" if whole and m != "iv3" else "uniform") for m in METHODS]
        if whole:
            found.append(point(size, "iv3", "iv3, RoPE step alone", budget="none"))
        else:
            found.append(point(size, "iv3", "iv3, ranks by layer", budget="dynamic"))
        if size in DISTILLED:
            found.append(point(size, PEER, f"{PEER}, distilled", distilled=True))
            ours = "iv3, ranks by layer, distilled"
            found.append(point(size, "iv3", ours, budget="dynamic", distilled=True))
    return found


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each text's excess over the peer's of that size, distilled or not like the row."""
    peers = {(r["size"], r["distilled"]): r for r in rows if r["method"] == PEER}
    out = []
    for row in rows:
        peer = peers[row["size"], row["distilled"]]
        ratios = {text: row["excess"][text] / peer["excess"][text] for text in row["excess"]}
        out.append(row | {"ratio": ratios})
    return out


def excess(losses: np.ndarray, source: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over windows (N,) of the difference to the source."""
    difference = losses - source
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def calibration_windows(name: str, tokenizer: Path, packages: Path) -> tuple[np.ndarray, np.ndarray]:
    """What conversions see of a text, (CALIBRATION, WINDOW), and what is left for a judge, (N, WINDOW).

    Of a text that is tested neither is part of a tested window.

    Args:
        name: of `texts.TEXTS`, or OWN: texts that the source samples by itself.

    Raises:
        UserError: no such text, or too little of it.
    """
    text = own_text(packages) if name == OWN else read_text(name, packages)
    if name not in TEXTS:
        book = windows(text, tokenizer, WINDOW)
        return book[:CALIBRATION], book[CALIBRATION:]
    pages = windows(text, tokenizer, TEST_WINDOW)
    book = np.delete(pages, spaced(np.arange(len(pages)), TEXTS[name]), axis=0).reshape(-1, WINDOW)
    if len(book) < CALIBRATION + JUDGE:
        raise UserError(
            f"text {name!r}: {len(book)} windows are not tested, {CALIBRATION + JUDGE} are needed"
        )
    known = spaced(np.arange(len(book)), CALIBRATION)
    return book[known], np.delete(book, known, axis=0)


def mixed_windows(names: Sequence[str], tokenizer: Path, packages: Path) -> tuple[np.ndarray, np.ndarray]:
    """`calibration_windows` of several texts, each with the same share of them; a judge's are the first's."""
    parts = [calibration_windows(name, tokenizer, packages) for name in names]
    # In turns, so that a distillation's step sees all of them.
    shares = [spaced(known, CALIBRATION // len(parts)) for known, _ in parts]
    return np.stack(shares, axis=1).reshape(-1, WINDOW), parts[0][1]


def own_text(packages: Path) -> str:
    """What `iv3 sample` writes of the source, made where it is missing: about 5 minutes on two cores."""
    path = packages.expanduser() / f"{FOLDER}-own.txt"
    if not path.exists():
        # Tokenized again they may be a little shorter.
        wanted = round(1.05 * (CALIBRATION + JUDGE) * WINDOW)
        texts = own_texts(load_source(smollm2_folder(packages)), tokens=wanted, length=WINDOW)
        part = path.with_suffix(".part")
        part.write_text("\n\n".join(text for text, _ in texts), encoding="utf-8")
        part.replace(path)
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Bench:
    """The source, its conversions' steps and figures, and what they are calibrated, judged and tested on."""

    model: LoadedModel
    cells: Cells
    large: Lab
    small: Lab
    judge: np.ndarray
    texts: dict[str, np.ndarray]

    @staticmethod
    def open(folder: Path, packages: Path, calibrated_on: Sequence[str] = (HANDBOOK,)) -> "Bench":
        """Reads, or downloads first, all that conversions are made and measured with.

        Args:
            folder, packages: as in `bench_text`.
            calibrated_on: texts, each with the same share of the calibration's windows; judged by the first.
        """
        place = smollm2_folder(packages)
        source, tokenizer = Source.open(place), place / "tokenizer.json"

        def calibration(ids: np.ndarray) -> Calibration:
            return from_samples(list(map(text_sample, ids)), source.config, length=WINDOW, rows=ROWS)

        known, rest = mixed_windows(calibrated_on, tokenizer, packages)
        texts = {
            name: spaced(windows(read_text(name, packages), tokenizer, TEST_WINDOW), count)
            for name, count in TEXTS.items()
        }
        return Bench(
            load_source(place),
            Cells(folder / "text"),
            Lab(source, calibration(known), folder / "steps"),
            Lab(source, calibration(spaced(known, CHOICE)), folder / "steps-choice"),
            spaced(rest, JUDGE),
            texts,
        )

    def chosen(self, method: str, size: str) -> tuple[int, int | None]:
        """The layout under which the calibration text's later windows lose least."""
        found = {}
        for e, fold in (*LAYOUTS, *(OWN_LAYOUTS if method == "iv3" else ())):
            if e in SIZES[size]:
                point = Point(
                    "", size, method, e, fold, SIZES[size][e], "none" if size == "100 %" else "uniform"
                )
                name = f"choice-{method}-e{e}-f{fold or 'chosen'}-r{point.rank}"
                found[e, fold] = self.cells(name, partial(self._judged, point))
        return min(found, key=found.__getitem__)

    def _judged(self, point: Point) -> float:
        return float(token_losses(self._converted(self.small, point), self.judge, len(self.judge)).mean())

    def _converted(self, lab: Lab, point: Point) -> LoadedModel:
        with lab.prepared(point.method, point.rope_dim, point.freqfold) as run:
            none = point.budget == "none"
            made = rope_step(run) if none else make(run, point.rank, point.budget)
        model = model_of(made, self.model)
        if not point.distilled:
            return model
        batches = lab.calibration.batches[: point.steps]
        return distilled(model, self.model, batches, RATES[point.method])[0]

    def source_losses(self) -> dict[str, list[float]]:
        """Of each text's windows."""
        return self.cells("source", lambda: self._losses(self.model))

    def _losses(self, model: LoadedModel) -> dict[str, list[float]]:
        return {
            name: token_losses(model, ids, 2).mean(axis=1, dtype=np.float64).tolist()
            for name, ids in self.texts.items()
        }

    def means(self, losses: dict[str, list[float]]) -> dict[str, float]:
        """Log-perplexity of each text."""
        return {name: float(np.mean(values)) for name, values in losses.items()}

    def measured(self, point: Point) -> dict[str, Any]:
        """A line of the table, without its ratios."""
        kind = point.budget
        if point.distilled:
            kind += "-distilled" + ("" if point.steps is None else str(point.steps))
        name = f"{point.method}-e{point.rope_dim}-f{point.freqfold or 'chosen'}-r{point.rank}-{kind}"
        losses = self.cells(name, lambda: self._losses(self._converted(self.large, point)))
        source = self.source_losses()
        found = {text: excess(np.array(losses[text]), np.array(source[text])) for text in source}
        return asdict(point) | {
            "excess": {text: mean for text, (mean, _) in found.items()},
            "standard_error": {text: error for text, (_, error) in found.items()},
        }


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    source = ", ".join(f"{name} {value:.3f}" for name, value in result["source"].items())
    trained = result["distillation"]
    table = Table(
        title=f"excess log-perplexity over SmolLM2-135M's ({source}), calibrated on "
        f"{result['calibration_tokens']:,} tokens",
        caption=f"distilled: attention, end to end, forward KL, Adam, {trained['steps']} steps of "
        f"{trained['tokens']:,} calibration tokens, learning rate "
        + ", ".join(f"{rate:g} ({method})" for method, rate in trained["learning_rate"].items()),
    )
    table.add_column("cache")
    table.add_column("method")
    for head in ("e", "fold", "rank", *(h for text in result["source"] for h in (text, "× peer"))):
        table.add_column(head, justify="right")
    for number, row in enumerate(result["rows"]):
        cells = []
        for text in result["source"]:
            cells += [
                f"{row['excess'][text]:.3f} ±{row['standard_error'][text]:.3f}",
                f"{row['ratio'][text]:.2f}",
            ]
        following = result["rows"][number + 1 : number + 2]
        last = not following or following[0]["size"] != row["size"]
        layout = [str(row["rope_dim"]), str(row["freqfold"] or "chosen"), str(row["rank"])]
        table.add_row(row["size"], row["row"], *layout, *cells, end_section=last)
    return as_text(table, 120)
