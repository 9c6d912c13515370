"""The model that an experiment trains: its shape, and how it is run. The plan compiles the same one."""

import jax.numpy as jnp

from iv3jax.checkpoint.patterns import resolve
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.train.config import TrainConfig


def model_of(config: TrainConfig, shape: ModelConfig) -> InternVideo3:
    """A model of this shape, run as the experiment says.

    Trained parameters are fp32; beside low-rank additions the others are of the dtype of computing.

    Raises:
        UserError: a target of the additions that names nothing.
    """
    compute = jnp.dtype(config.dtype).type
    lora = resolve(config.lora, shape, True) if config.lora.rank else None
    kept = jnp.float32 if lora is None else compute
    return InternVideo3(
        shape, Execution(compute, kept, config.remat, weights=config.weights or None, lora=lora)
    )
