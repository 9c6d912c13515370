"""Low-rank additions and files: PEFT's folders, written and read, and weights with the additions merged in.

    FOLDER/adapter_model.safetensors   base_model.model.NAME.lora_A.weight, .lora_B.weight
    FOLDER/adapter_config.json

Which layers a pattern names is in `patterns.py`, what is computed in `models/lora.py`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from safetensors import SafetensorError, deserialize

from iv3jax.checkpoint.dtypes import DTYPES, safetensors_name
from iv3jax.checkpoint.files import collapse
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.names import Entry, Tensor, lookup, tensors
from iv3jax.checkpoint.patterns import resolve
from iv3jax.checkpoint.target import LocalTarget
from iv3jax.checkpoint.upload import StoreTarget
from iv3jax.checkpoint.write import Planned, on_host, write_safetensors
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.lora import LEAVES, Lora, addition
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path
from iv3jax.sharding import param_shardings
from iv3jax.typing import Array

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."


def adapter_tensors(config: ModelConfig, run: Execution) -> list[Tensor]:
    """Every tensor of an adapter and its place in our tree; none without `run.lora`. No memory is used."""
    if run.lora is None or not run.lora.rank:
        return []
    return [
        _adapter_tensor(tensor, run.lora.rank, leaf)
        for tensor in tensors(config, run.scan_layers)
        if tensor.path[-1] == "kernel" and "/".join(tensor.path[:-1]) in run.lora.targets
        for leaf in LEAVES
    ]


def _adapter_tensor(tensor: Tensor, lora_rank: int, leaf: str) -> Tensor:
    """A weight's `lora_A` (rank, *in) or `lora_B` (*out, rank); with ones for what else a convolution has."""
    theirs, ours = tensor.entry.pattern.split(" -> ")
    out_group, *in_groups = re.findall(r"\([^)]*\)|\S+", theirs)
    out_axes = out_group.strip("()")
    outputs = len(out_axes.split())
    if leaf == "lora_a":
        groups, mine = ["lora", *in_groups], f"lora{ours.removeprefix(out_axes)}"
        latent = tuple(axis - outputs + 1 for axis in tensor.entry.latent if axis >= outputs)
    else:
        groups, mine = [out_group, "lora", *"1" * (len(in_groups) - 1)], f"{out_axes} lora"
        latent = tuple(axis for axis in tensor.entry.latent if axis < outputs)
    lengths = dict(tensor.sizes, lora=lora_rank)
    words = re.findall(r"\w+", mine)
    sizes = {word: lengths[word] for word in words}
    shape = tuple(math.prod(sizes.get(word, 1) for word in re.findall(r"\w+", group)) for group in groups)
    name = f"{_PREFIX}{tensor.name.removesuffix('weight')}{leaf[:-1]}{leaf[-1].upper()}.weight"
    path = (*tensor.path[:-1], leaf)
    entry = Entry(path, name, f"{' '.join(groups)} -> {mine}", latent)
    padding = tensor.padding if latent else 0
    return Tensor(name, shape, path, entry, tensor.index, tuple(sizes.items()), tensor.rank, padding)


def merged(loaded: LoadedModel) -> LoadedModel:
    """The model without additions, its kernels W + alpha/rank·B·A, summed in fp32 and of W's dtype.

    Where kernels are stored in int8 or nf4, the original is loaded again and W is its own.

    Raises:
        UserError: see `load`; a quantised model that is from no folder.
    """
    run, params = loaded.model.run, loaded.params
    if run.lora is None or not run.lora.rank:
        return loaded
    base = replace(loaded, model=InternVideo3(loaded.config, replace(run, lora=None)))
    if run.weights is not None:
        if loaded.folder is None:
            raise UserError(
                f"{run.weights} weights are merged with the original's, but the model has no folder"
            )
        base = load(loaded.folder, mesh=loaded.mesh, run=replace(run, lora=None, weights=None))
        params = base.params
    leaves = {path: x for path, x in flatten_dict(params).items() if path[-1] not in LEAVES}
    for target in run.lora.targets:
        module = tuple(target.split("/"))
        kernel = leaves[*module, "kernel"]
        add = jax.jit(partial(_merge, run.lora.scale), out_shardings=kernel.sharding)
        leaves[*module, "kernel"] = add(kernel, *(lookup(loaded.params, (*module, leaf)) for leaf in LEAVES))
    return replace(base, params=unflatten_dict(leaves))


def _merge(scale: float, kernel: Array, a: Array, b: Array) -> Array:
    def one(parts: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = parts
        return (kernel.astype(jnp.float32) + addition(a, b, scale)).astype(kernel.dtype)

    # Layer by layer where they are stacked: the sum in fp32 is that of one layer.
    stacked = a.ndim + b.ndim - 2 > kernel.ndim
    return jax.lax.map(one, (kernel, a, b)) if stacked else one((kernel, a, b))


def save_adapter(loaded: LoadedModel, folder: PathArgument, *, replace: bool = False) -> AnyPath:
    """Writes the additions as PEFT does, for `PeftModel.from_pretrained(model, FOLDER)`; returns the folder.

    A local folder appears whole or not at all; on a store adapter_config.json comes last.

    Args:
        folder: one that does not exist or is empty, local or on a store.
        replace: allow an older local folder, which goes.

    Raises:
        UserError: a model without additions, or spread over several hosts, or a folder that is taken or
            cannot be written to.
    """
    lora, out = loaded.model.run.lora, make_path(folder)
    planned = {
        tensor.name: _planned(loaded, tensor) for tensor in adapter_tensors(loaded.config, loaded.model.run)
    }
    if lora is None or not planned:
        raise UserError(f"{out}: the model has no low-rank additions to write")
    modules = {name.removeprefix(_PREFIX).split(".lora_")[0] for name in planned}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if loaded.folder is None else str(loaded.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    target = StoreTarget(out, CONFIG) if isinstance(out, StorePath) else LocalTarget(out, replace)
    try:
        with target.open(WEIGHTS) as file:
            write_safetensors(file, planned)
        with target.open(CONFIG) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        target.finish()
    except BaseException:
        target.discard()
        raise
    return out


def _planned(loaded: LoadedModel, tensor: Tensor) -> Planned:
    value = lookup(loaded.params, tensor.path)
    if not value.is_fully_addressable:
        raise UserError(
            f"{'/'.join(tensor.path)} is spread over several hosts; write a checkpoint of it on one"
        )

    def blocks() -> Iterator[np.ndarray]:
        yield tensor.to_theirs(on_host(value, tensor.index))

    return Planned(tensor.shape, safetensors_name(value.dtype), blocks)


def load_adapter(loaded: LoadedModel, folder: PathArgument) -> LoadedModel:
    """The model with the additions of a PEFT folder, in place of any that it has.

    Raises:
        UserError: a file that is missing or broken, an adapter of another kind, or tensors that do not fit
            the model.
    """
    place = make_path(folder)
    held, (rank, alpha) = _read_tensors(place / WEIGHTS), _read_config(place / CONFIG)
    modules = sorted({name.removeprefix(_PREFIX).split(".lora_")[0] for name in held})
    if not modules:
        raise UserError(f"{place / WEIGHTS}: holds no tensors")
    run = loaded.model.run
    try:
        lora = resolve(Lora(rank, alpha, tuple(modules)), loaded.config, run.scan_layers)
    except UserError as error:
        raise UserError(f"{place / WEIGHTS}: does not fit the model: {error}") from None
    model = InternVideo3(loaded.config, replace(run, lora=lora))
    expected = adapter_tensors(loaded.config, model.run)
    odd = {t.name for t in expected} ^ set(held)
    if odd := odd or {t.name for t in expected if held[t.name].shape != t.shape}:
        raise UserError(f"{place / WEIGHTS}: does not fit the model: {collapse(sorted(odd))}")
    shardings = flatten_dict(param_shardings(boxed_params(model), loaded.mesh))
    parts: dict[tuple[str, ...], list[np.ndarray]] = {}
    for tensor in expected:
        ours = tensor.to_ours(held[tensor.name]).astype(np.float32)
        parts.setdefault(tensor.path, []).append(ours if tensor.index is None else ours[None])
    leaves = {path: x for path, x in flatten_dict(loaded.params).items() if path[-1] not in LEAVES}
    for path, values in parts.items():
        leaves[path] = _placed(np.concatenate(values), shardings[path])
    return replace(loaded, model=model, params=unflatten_dict(leaves))


def _placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Also where this host has only some of the devices."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _read_tensors(path: AnyPath) -> dict[str, np.ndarray]:
    try:
        held = dict(deserialize(path.read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    if odd := [name for name, part in held.items() if part["dtype"] not in DTYPES]:
        raise UserError(
            f"{path}: {odd[0]} has dtype {held[odd[0]]['dtype']}; supported are {', '.join(DTYPES)}"
        )
    return {
        name: np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
        for name, part in held.items()
    }


def _read_config(path: AnyPath) -> tuple[int, float]:
    """Rank and alpha of an adapter that is computed as ours is."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = data["peft_type"], int(data["r"]), float(data["lora_alpha"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the config of a LoRA adapter ({error!r})") from None
    start = data.get("init_lora_weights")
    odd = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if data.get(key)]
    # Others change the weights of the base as well.
    odd += ["init_lora_weights"] if isinstance(start, str) and start != "gaussian" else []
    if kind != "LORA" or odd:
        raise UserError(f"{path}: only plain LoRA can be loaded, not {(odd or [kind])[0]}")
    return rank, alpha
