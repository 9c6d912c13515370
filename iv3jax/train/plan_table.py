"""The table of docs/plan.md: every 8B stage on every topology, each row compiled for the real chips.

    python -m iv3jax.train.plan_table docs/plan.md                     all rows: minutes each, one after the
    other python -m iv3jax.train.plan_table docs/plan.md sft:long v5p-128    the rows that have all of these
    words

A row takes its place in the file as soon as it is made; the others stay as they are.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from iv3jax.chips import GIB
from iv3jax.data.config import DataConfig
from iv3jax.errors import UserError
from iv3jax.train.config import TrainConfig, experiment
from iv3jax.train.plan import Plan, plan

CONFIGS = ("cpt", "sft:short", "sft:long")
TOPOLOGIES = ("v5p-128", "v5e-256", "v5p-512", "h100x64")
ON_SMALL_CHIPS = "mesh.fsdp=32 rows=32 accumulate=4"
NEEDED = {("cpt", "v5e-256"): ON_SMALL_CHIPS, ("sft:short", "v5e-256"): ON_SMALL_CHIPS}
ROWS = [(name, where, NEEDED.get((name, where), "")) for where in TOPOLOGIES for name in CONFIGS]
ROWS.append(("lora", "h100x8", ""))
"""Experiment, topology, and overrides that it needs there."""

HEAD = (
    "| config | topology | overrides | mesh | rows | fits | arguments GiB | temporaries GiB | "
    "at one time GiB | limit GiB | received GB a step | TFLOPs a token | tokens/s at most | compiled in |"
)
RULE = "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
BEGIN, END = "<!-- plan table -->", "<!-- end of plan table -->"


def main(arguments: Sequence[str]) -> int:
    """Makes the rows and writes them; the exit code."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    path, *words = arguments
    known: dict[tuple[TrainConfig, str], Plan] = {}
    for name, where, overrides in ROWS:
        if all(word in (name, where) for word in words):
            config = experiment(name, overrides.split())
            key = (program_of(config), where)
            try:
                if key not in known:
                    known[key] = plan(config, where)
                made = row(name, where, overrides, known[key])
            except UserError as error:
                made = _cells(name, where, overrides, f"not compiled: {error}", *[""] * 10)
            place(Path(path), made)
            print(made, flush=True)
    return 0


def program_of(config: TrainConfig) -> TrainConfig:
    """The experiment without what changes nothing of its program's size: rates, data, checkpoints."""
    rates = replace(
        config.optimizer, learning_rate=1.0, final_learning_rate=0.0, warmup=0.0, weight_decay=0.0
    )
    plain = TrainConfig()
    return replace(
        config, steps=1, seed=0, init="", optimizer=rates, data=DataConfig(), checkpoint=plain.checkpoint
    )


def row(name: str, where: str, overrides: str, made: Plan) -> str:
    """A row of the table."""
    mesh = " · ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1)
    received = made.collective_bytes_per_step
    return _cells(
        name,
        where,
        overrides,
        mesh,
        f"{made.rows} × {made.accumulate}",
        "yes" if made.fits else f"no: {made.advice[0]}",
        f"{made.argument_bytes / GIB:.2f}",
        "?" if made.temporary_bytes is None else f"{made.temporary_bytes / GIB:.2f}",
        "" if made.peak_bytes is None else f"{made.peak_bytes / GIB:.2f}",
        f"{made.limit_bytes / GIB:.2f}",
        "" if received is None else f"{received / 1e9:.0f}",
        f"{made.executed_flops_per_token / 1e12:.3f}",
        "" if made.tokens_per_second is None else f"{made.tokens_per_second:,.0f}",
        f"{made.compile_seconds:.0f} s",
    )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def place(path: Path, made: str) -> None:
    """Writes a row where the table has one of the same config and topology, or at its end."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{path}: has no lines {BEGIN} and {END}, between which the table goes")
    before, rest = text.split(BEGIN, 1)
    inside, after = rest.split(END, 1)
    key = made.split(" | ")[:2]
    rows = [line for line in inside.strip().splitlines()[2:]]
    places = [i for i, line in enumerate(rows) if line.split(" | ")[:2] == key]
    if places:
        rows[places[0]] = made
    else:
        rows.append(made)
    table = "\n".join([HEAD, RULE, *rows])
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
