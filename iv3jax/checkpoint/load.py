"""`iv3jax.load`: a model folder or a preset → a model ready to use."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from iv3jax.checkpoint.files import TensorFiles, check
from iv3jax.checkpoint.names import Tensor, insert, lookup, tensors
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.layers import Execution
from iv3jax.models.presets import PRESETS, preset
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.typing import DType, Params

Bounds = tuple[tuple[int, int], ...]
"""A device's part of an array: (start, stop) of each axis."""

_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16, "F64": jnp.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: the Flax module; `model.apply({"params": params}, batch)`.
        params: nested dicts of sharded arrays.
        folder: where config, tokenizer and processor files lie; None for a preset without any.
        mesh: the mesh the parameters live on.
    """

    model: InternVideo3
    params: Params
    folder: Path | None
    mesh: Mesh

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.model.config

    @cached_property
    def processor(self) -> Processor:
        """From files and text to tokens and patches, as this model wants them."""
        if self.folder is None:
            raise UserError("this model has no folder, so no tokenizer; load one from a model folder")
        return Processor.from_dir(self.folder, self.config)


def load(
    source: str | Path,
    *,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    run: Execution | None = None,
    random_weights: bool = False,
) -> LoadedModel:
    """Loads a Hugging Face model folder, or makes a preset with random weights.

    Tensors are read one by one into their place; the host never holds more than the arrays themselves and
    one stacked parameter beside them. (Every host of a pod reads each tensor once and keeps its own part.)

    Args:
        source: a folder with config.json and safetensors, or a preset's name.
        dtype: dtype of the parameters and of computing; None takes the checkpoint's.
        mesh: where to put the parameters; None puts them on the first device.
        run: how to compute (remat, tower steps, scanned layers); its dtypes are overridden by `dtype`.
        random_weights: allows a preset, which has no weights, to be made with random ones.

    Raises:
        UserError: no such folder or preset, a preset without `random_weights`, a broken file, or tensors
            that do not fit the config, all of them named.
    """
    mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh
    run = Execution() if run is None else run
    folder = Path(source)
    if not folder.is_dir():
        if str(source) not in PRESETS:
            if folder.exists():
                raise UserError(f"{source}: a file; a model is a folder with config.json and safetensors")
            raise UserError(f"{source}: neither a folder nor a preset ({', '.join(PRESETS)})")
        if not random_weights:
            raise UserError(
                f"{source}: a preset is a shape without weights; name a model folder, or ask for "
                "random weights (--random-weights)"
            )
        dtype = jnp.float32 if dtype is None else dtype
        model = InternVideo3(preset(str(source)), replace(run, dtype=dtype, param_dtype=dtype))
        params = init_params(model, jax.random.key(0), param_shardings(boxed_params(model), mesh))
        return LoadedModel(model, params, TINY_FOLDER if str(source) == "tiny" else None, mesh)
    if random_weights:
        raise UserError(f"{source}: has weights of its own; random weights are for presets")
    config = ModelConfig.from_file(folder)
    expected = tensors(config, run.scan_layers)
    files = TensorFiles(folder)
    ignored = [r".*\.rotary_emb\.inv_freq"]
    if config.text_config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    check(files, expected, ignored)
    if dtype is None:
        dtype = _DTYPES.get(files.dtype(expected[0].name))
        if dtype is None:
            raise UserError(
                f"{folder}: {expected[0].name} has dtype {files.dtype(expected[0].name)}; "
                f"supported are {', '.join(_DTYPES)}"
            )
    model = InternVideo3(config, replace(run, dtype=dtype, param_dtype=dtype))
    return LoadedModel(model, _stream(files, expected, model, mesh), folder, mesh)


def _stream(files: TensorFiles, expected: list[Tensor], model: InternVideo3, mesh: Mesh) -> Params:
    """Fills our parameters one after the other, each from its tensors in order."""
    boxed = boxed_params(model)
    shardings = param_shardings(boxed, mesh)
    by_path: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in expected:
        by_path.setdefault(tensor.path, []).append(tensor)
    params: dict = {}
    for path, parts in by_path.items():
        shape, sharding = lookup(boxed, path).value.shape, lookup(shardings, path)
        dtype = model.run.param_dtype
        shards = {
            _key(index, shape): np.empty(_size(index, shape), dtype)
            for index in sharding.addressable_devices_indices_map(shape).values()
        }
        for tensor in parts:
            value = tensor.to_ours(files.read(tensor.name))
            for (first, *rest), shard in shards.items():
                inner = tuple(slice(*bounds) for bounds in rest)
                if tensor.index is None:
                    shard[...] = value[(slice(*first), *inner)]
                elif first[0] <= tensor.index < first[1]:
                    shard[tensor.index - first[0]] = value[inner]
        # Waited for: a copy to the device still under way would keep its host memory beside the next one's.
        insert(params, path, jax.block_until_ready(_assemble(shape, sharding, shards)))
    return params


def _assemble(shape: tuple[int, ...], sharding: NamedSharding, shards: dict[Bounds, np.ndarray]) -> jax.Array:
    """One array from its parts in host memory."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only for shardings that are not fully described by their mesh
        return shards[_key(index, shape)]

    return jax.make_array_from_callback(shape, sharding, part)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in _key(index, shape))
