"""Where a run's numbers go: OUT/metrics.jsonl, OUT/tensorboard, and Weights & Biases where it is set up."""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricLog:
    """Writes numbers by step. A run that goes on drops what was written after its checkpoint.

    Weights & Biases gets them too if it is installed and WANDB_PROJECT is set.
    """

    def __init__(self, out: Path, step: int, config: Mapping[str, Any]) -> None:
        """Opens the files of a run that has done `step` steps."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / FILE
        if path.exists():
            _truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        self._wandb: Any = None
        if importlib.util.find_spec("wandb") is not None and os.environ.get("WANDB_PROJECT"):
            import wandb

            self._wandb = wandb.init(
                dir=str(out), name=out.name, id=out.name, resume="allow", config=dict(config)
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the step that is the `step`-th, from 1."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines up to a step; a line that a kill cut short is none."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)
