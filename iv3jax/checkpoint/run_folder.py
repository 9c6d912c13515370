"""The folder of a training run as a model: OUT/shape has its small files, OUT/checkpoints its parameters.

`load` and `export` take such a folder like a model folder, and take its latest checkpoint. `OUT@STEP` names
one of them, `OUT@best` the one with the least held-out loss.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from iv3jax.checkpoint.hub import CONFIG_FILES, model_folder
from iv3jax.checkpoint.manager import FOLDER, Checkpoints
from iv3jax.errors import UserError
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.paths import AnyPath, PathArgument
from iv3jax.sharding import param_shardings, unbox
from iv3jax.typing import Params

SHAPE = "shape"


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Attributes:
        out: the run's folder. step: the checkpoint's.
        config: the run's settings (`train.config.TrainConfig` as plain values).
    """

    out: Path
    step: int
    config: dict[str, Any]

    @property
    def shape(self) -> Path:
        """The folder with config, tokenizer and processor files."""
        return self.out / SHAPE

    def trained(self, model: InternVideo3, mesh: Mesh) -> Params:
        """The parameters that the run trains, without those it does not.

        Raises:
            UserError: a checkpoint that cannot be read, or of other parameters.
        """
        checkpoints = Checkpoints(self.out, read_only=True)
        try:
            boxed = boxed_params(model)
            places = flatten_dict(param_shardings(boxed, mesh))
            shapes = {path: x.shape for path, x in flatten_dict(unbox(boxed)).items()}
            dtypes = checkpoints.params_dtypes(self.step)
            if odd := sorted("/".join(path) for path in dtypes if path not in shapes):
                raise UserError(
                    f"{self.out}/{FOLDER}/{self.step}: holds {odd[0]}, which {self.shape} has not"
                )
            wanted = {
                path: jax.ShapeDtypeStruct(shapes[path], dtype, sharding=places[path])
                for path, dtype in dtypes.items()
            }
            return checkpoints.restore_params(self.step, unflatten_dict(wanted))
        finally:
            checkpoints.close()


def run_checkpoint(source: PathArgument) -> RunCheckpoint | None:
    """The checkpoint that a path names; None where it names no run.

    Raises:
        UserError: a run without that checkpoint, or without any.
    """
    text, _, which = str(source).partition("@")
    out = Path(text)
    if "://" in text or not (out / FOLDER).is_dir() or not (out / SHAPE).is_dir():
        return None
    checkpoints = Checkpoints(out, read_only=True)
    try:
        steps = checkpoints.steps
        if not steps:
            raise UserError(f"{out}: the run has saved no checkpoint yet")
        step = (
            checkpoints.best if which == "best" else int(which) if which.isdecimal() else checkpoints.latest
        )
        if (which not in ("", "best") and not which.isdecimal()) or step not in steps:
            raise UserError(
                f"{source}: no such checkpoint; there are {', '.join(map(str, steps))}, and `best` where "
                "held-out loss was measured"
            )
        return RunCheckpoint(out, step, checkpoints.record(step)["config"])
    finally:
        checkpoints.close()


def shape_folder(source: PathArgument) -> AnyPath:
    """The folder of config, tokenizer and processor files of a model, a hub id, or a run.

    Raises:
        UserError: there is none of that name.
    """
    run = run_checkpoint(source)
    if run is not None:
        return run.shape
    folder = model_folder(source, (*CONFIG_FILES, "tokenizer*.json", "*processor_config.json"))
    if folder is None:
        raise UserError(f"{source}: a preset is a shape without weights; set preset, not init")
    return folder
