"""`iv3 shapes`: what a model is made of, from its config alone."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iv3jax.checkpoint.hub import CONFIG_FILES, model_folder
from iv3jax.checkpoint.names import tensors
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.presets import preset
from iv3jax.paths import PathArgument, make_path
from iv3jax.sharding import unbox


@dataclass(frozen=True)
class ModelShapes:
    """A model's tensors as its checkpoint names them, their number, and its bytes and its cache's in bf16.

    Where ranks differ by layer, the bytes are those of layers that stand alone (`Execution.scan_layers`).
    """

    tensors: dict[str, tuple[int, ...]]
    parameters: int
    weight_bytes: int
    cache_bytes_per_token: int


def model_shapes(source: PathArgument, weights: str | None = None) -> ModelShapes:
    """Shapes of a preset or of a model folder's config.json; no weight is read or made.

    `weights` (int8, nf4) gives the bytes of a model loaded with it.

    Raises:
        UserError: no such folder, preset or model of the hub, a config that cannot be read, or
            unknown `weights`.
    """
    path = make_path(source)
    folder = path if path.is_file() else model_folder(source, CONFIG_FILES)
    config = preset(str(source)) if folder is None else ModelConfig.from_file(folder)
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    # In a stack, and in its cache, every layer has room for the largest rank.
    scan_layers = config.text_config.kv_lora_rank_list is None
    cache = jax.eval_shape(lambda: init_cache(config.text_config, 1, 1, jnp.bfloat16, scan_layers))
    run = Execution(jnp.bfloat16, jnp.bfloat16, weights=weights, scan_layers=scan_layers)
    arrays = jax.tree.leaves(unbox(boxed_params(InternVideo3(config, run))))
    weight_bytes = sum(x.size * x.dtype.itemsize for x in arrays)
    return ModelShapes(shapes, sum(map(math.prod, shapes.values())), weight_bytes, cache.nbytes)
