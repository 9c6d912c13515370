"""The model that an experiment trains: its shape, how it is run, and weights in the form that this needs."""

import jax.numpy as jnp
from jax.sharding import Mesh

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.patterns import resolve
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.paths import PathArgument
from iv3jax.train.config import TrainConfig
from iv3jax.typing import Params


def model_of(config: TrainConfig, shape: ModelConfig) -> InternVideo3:
    """A model of this shape, run as the experiment says.

    Trained parameters are fp32; beside low-rank additions the others are of the dtype of computing.

    Raises:
        UserError: a target of the additions that names nothing.
    """
    compute = jnp.dtype(config.dtype).type
    lora = resolve(config.lora, shape, config.scan_layers) if config.lora.rank else None
    kept = jnp.float32 if lora is None else compute
    run = Execution(
        compute,
        kept,
        config.remat,
        scan_layers=config.scan_layers,
        weights=config.weights or None,
        lora=lora,
    )
    return InternVideo3(shape, run)


def load_params(source: PathArgument, run: Execution, mesh: Mesh) -> Params:
    """Parameters of a model or a run, for a model that is run so.

    Raises:
        UserError: `load`'s; a run's checkpoints whose layers are stacked otherwise.
    """
    loaded = load(source, dtype=run.param_dtype, mesh=mesh, run=run, weights=run.weights)
    if loaded.model.run.scan_layers != run.scan_layers:
        raise UserError(
            f"{source}: its checkpoints have scan_layers={loaded.model.run.scan_layers}; take its "
            "model folder (iv3 export makes one), or the same scan_layers"
        )
    return loaded.params
