"""What tests of low-rank additions share: models that have some, and the same with them in their kernels.

Nothing here asserts.
"""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from models.peers import random_tensors

from iv3jax.checkpoint.names import insert, tensors
from iv3jax.checkpoint.patterns import resolve
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.lora import LEAVES, Lora
from iv3jax.sharding import unbox

RANK, ALPHA = 3, 4.5
ALL = ("*",)


def base_params(config: ModelConfig, scan_layers: bool = True, seed: int = 0) -> dict[str, Any]:
    """Random weights without additions, stacked or not."""
    values = random_tensors(config, seed)
    parts: dict[tuple[str, ...], list[np.ndarray]] = {}
    for tensor in tensors(config, scan_layers):
        ours = tensor.to_ours(values[tensor.name])
        parts.setdefault(tensor.path, []).append(ours if tensor.index is None else ours[None])
    params: dict[str, Any] = {}
    for path, layers in parts.items():
        insert(params, path, jax.numpy.asarray(np.concatenate(layers)))
    return params


def low_rank_model(config: ModelConfig, targets: tuple[str, ...] = ALL, **run: Any) -> InternVideo3:
    """The model with additions to the layers that patterns name."""
    lora = resolve(Lora(RANK, ALPHA, targets), config, run.get("scan_layers", True))
    return InternVideo3(config, Execution(lora=lora, **run))


def random_additions(model: InternVideo3, seed: int = 1) -> dict[str, Any]:
    """lora_a and lora_b of order one over the square root of what they sum, zero beyond a layer's rank."""
    rng = np.random.default_rng(seed)
    ranks = model.config.text_config.kv_lora_rank_list
    found = {}
    for path, leaf in sorted(flatten_dict(unbox(boxed_params(model))).items()):
        if path[-1] not in LEAVES:
            continue
        value = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.3)
        if ranks is not None and model.run.scan_layers and path[-2:] == ("kv_b_proj", "lora_a"):
            value *= (np.arange(max(ranks)) < np.array(ranks)[:, None])[:, None]
        if ranks is not None and model.run.scan_layers and path[-2:] == ("kv_a_proj_with_mqa", "lora_b"):
            rows = np.arange(value.shape[1])
            value *= ((rows < np.array(ranks)[:, None]) | (rows >= max(ranks)))[:, :, None]
        found[path] = jax.numpy.asarray(value)
    return unflatten_dict(found)


def joined(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with different leaves, as one."""
    return unflatten_dict({path: x for tree in trees for path, x in flatten_dict(tree).items()})


def layers_of(kernel: Any, a: Any, b: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each layer's kernel, A and B as matrices (out, in), (rank, in) and (out, rank) in fp64."""
    kernel, a, b = (np.asarray(x, np.float64) for x in (kernel, a, b))
    if a.ndim + b.ndim - 2 == kernel.ndim:
        kernel, a, b = kernel[None], a[None], b[None]
    return [
        (w.reshape(-1, x[0].size), x.reshape(RANK, -1), y.reshape(-1, RANK))
        for w, x, y in zip(kernel, a, b, strict=True)
    ]


def explicit(base: dict[str, Any], additions: dict[str, Any]) -> dict[str, Any]:
    """The base with W + alpha/rank·B·A for its kernels, in plain numpy."""
    leaves, low = flatten_dict(base), flatten_dict(additions)
    for path in low:
        if path[-1] == "lora_a":
            module = path[:-1]
            kernel = leaves[*module, "kernel"]
            summed = [
                w + ALPHA / RANK * b @ a for w, a, b in layers_of(kernel, low[path], low[*module, "lora_b"])
            ]
            leaves[*module, "kernel"] = jax.numpy.asarray(
                np.stack(summed).reshape(kernel.shape).astype(kernel.dtype)
            )
    return unflatten_dict(leaves)
