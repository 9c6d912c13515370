"""`iv3 shapes`: what a model is made of, from its config alone."""

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from iv3jax.checkpoint.names import tensors
from iv3jax.errors import UserError
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import PRESETS, preset


@dataclass(frozen=True)
class ModelShapes:
    """A model's tensors as its checkpoint names them, their total size, and the cache's in bf16."""

    tensors: dict[str, tuple[int, ...]]
    parameters: int
    cache_bytes_per_token: int


def model_shapes(source: str | Path) -> ModelShapes:
    """Shapes of a preset or of a model folder's config.json; no weight is read or made.

    Raises:
        UserError: neither a folder nor a preset, or a config that cannot be read.
    """
    if Path(source).exists():
        config = ModelConfig.from_file(source)
    elif str(source) in PRESETS:
        config = preset(str(source))
    else:
        raise UserError(f"{source}: neither a folder nor a preset ({', '.join(PRESETS)})")
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    cache = jax.eval_shape(lambda: init_cache(config.text_config, 1, 1, jnp.bfloat16))
    return ModelShapes(shapes, sum(map(math.prod, shapes.values())), cache.nbytes)
