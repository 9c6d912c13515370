"""`iv3 bench weights`: what int8 and nf4 weights cost the digits' model, against the same model in bf16.

Bytes are those of all parameters. Nothing is timed here.
"""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from iv3jax.bench.agreement import add_columns, agreement, cells, observe, questions
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import load
from iv3jax.typing import DType

REFERENCE = "bf16"
VARIANTS: dict[str, tuple[DType, str | None]] = {
    "fp32": (jnp.float32, None),
    REFERENCE: (jnp.bfloat16, None),
    "int8": (jnp.bfloat16, "int8"),
    "nf4": (jnp.bfloat16, "nf4"),
}
"""Row → dtype of computing and of what is not quantised, and `weights`."""


def bench_weights(folder: str, videos: int = 100, seed: int = 1) -> dict[str, Any]:
    """`videos` held-out questions of each task, the same ones for every row and for the same seed.

    Raises:
        UserError: `load`'s, for the folder.
    """
    asked = questions(videos, seed)
    reference = observe(load(folder, dtype=VARIANTS[REFERENCE][0]), asked)
    rows = []
    for name, (dtype, weights) in VARIANTS.items():
        model = load(folder, dtype=dtype, weights=weights)
        seen = reference if name == REFERENCE else observe(model, asked)
        size = sum(x.nbytes for x in jax.tree.leaves(model.params))
        rows.append({"name": name, "weight_bytes": size} | asdict(agreement(asked, reference, seen)))
    return {"seed": seed, "videos": videos, "rows": rows}


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(title=f"weights against {REFERENCE}, {result['videos']} held-out videos a task")
    table.add_column("weights")
    table.add_column("bytes", justify="right")
    add_columns(table)
    for row in result["rows"]:
        table.add_row(row["name"], f"{row['weight_bytes']:,}", *cells(row))
    return as_text(table, 140)
