"""`iv3jax.load`: a model folder or a preset → a model ready to use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from iv3jax.checkpoint.dtypes import DTYPES, KEPT, bits_of, cast, common, torch_name
from iv3jax.checkpoint.files import TensorFiles, check
from iv3jax.checkpoint.hub import model_folder
from iv3jax.checkpoint.names import Path as TreePath
from iv3jax.checkpoint.names import Tensor, insert, lookup, tensors
from iv3jax.checkpoint.patterns import resolve
from iv3jax.checkpoint.run_folder import RunCheckpoint, run_checkpoint
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.layers import Execution
from iv3jax.models.lora import LEAVES, Lora
from iv3jax.models.presets import preset
from iv3jax.models.quantized import NotFiniteError, quantize
from iv3jax.paths import AnyPath, PathArgument
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.typing import DType, Params

Bounds = tuple[tuple[int, int], ...]
"""A device's part of an array: (start, stop) of each axis."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: the Flax module; `model.apply({"params": params}, batch)`.
        params: nested dicts of sharded arrays.
        folder: where config, tokenizer and processor files lie; None for a preset without any.
        mesh: the mesh the parameters live on.
        file_dtypes: the dtype in the file, in safetensors' words, of each tensor that was widened because
            its parameter stacks tensors of several dtypes; an export writes it as it was.
    """

    model: InternVideo3
    params: Params
    folder: AnyPath | None
    mesh: Mesh
    file_dtypes: Mapping[str, str] = field(default_factory=dict)

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
    source: PathArgument,
    *,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
    run: Execution | None = None,
    random_weights: bool = False,
    weights: str | None = None,
) -> LoadedModel:
    """Loads a Hugging Face model folder, or makes a preset with random weights.

    Tensors are read one by one into their place; the host never holds more than the arrays themselves and
    one stacked parameter beside them. (Every host of a pod reads each tensor once and keeps its own part.)

    Args:
        source: a folder with config.json and safetensors, local or on a store (gs://, s3://); a preset's
            name; an id of the Hugging Face hub, `org/name[@revision]`, which is downloaded; or the folder of
            a training run, of which `OUT[@STEP|@best]` is a checkpoint, its layers scanned and its low-rank
            additions kept apart.
        dtype: dtype of the parameters and of computing. None keeps each tensor's own, widened to fp32
            where one stacked parameter holds several, and computes in the dtype of most bytes.
        mesh: where to put the parameters; None puts them on the first device.
        run: how to compute (remat, tower steps, scanned layers); its dtypes are overridden by `dtype`. The
            targets of its `lora` may be patterns (checkpoint/patterns.py); new additions change nothing.
        random_weights: allows a preset, which has no weights, to be made with random ones.
        weights: int8 or nf4 stores the kernels of all linear layers so (models/quantized.py), each tensor
            quantised on the host as it is read. Such a model (`model.run.weights`) cannot be saved.

    Raises:
        UserError: no such folder, preset or model of the hub, a store or hub that cannot be reached, a
            preset without `random_weights`, a broken file, tensors that do not fit the config, all of them
            named, a dtype that no parameter can have, or a head of its own in a checkpoint whose config
            ties it to the embeddings; `weights` that are unknown, or tensors to be quantised that are not
            finite.
    """
    mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh
    run = Execution() if run is None else run
    run = run if weights is None else replace(run, weights=weights)
    if (checkpoint := run_checkpoint(source)) is not None:
        return _load_run(checkpoint, dtype, mesh, run, random_weights)
    folder = model_folder(source)
    if folder is None:
        if not random_weights:
            raise UserError(
                f"{source}: a preset is a shape without weights; name a model folder, or ask for "
                "random weights (--random-weights)"
            )
        dtype = jnp.float32 if dtype is None else dtype
        config = preset(str(source))
        run = replace(run, lora=resolve(run.lora, config, run.scan_layers))
        model = InternVideo3(config, replace(run, dtype=dtype, param_dtype=dtype))
        params = init_params(model, jax.random.key(0), param_shardings(boxed_params(model), mesh))
        return LoadedModel(model, params, TINY_FOLDER if str(source) == "tiny" else None, mesh)
    if random_weights:
        raise UserError(f"{source}: has weights of its own; random weights are for presets")
    config = ModelConfig.from_file(folder)
    run = replace(run, lora=resolve(run.lora, config, run.scan_layers))
    expected = tensors(config, run.scan_layers)
    files = TensorFiles(folder)
    ignored = [r".*\.rotary_emb\.inv_freq"]
    if config.text_config.tie_word_embeddings:
        ignored.append(r"lm_head\.weight")
    check(files, expected, ignored)
    file_dtypes = check_dtypes(files, expected, dtype)
    if config.text_config.tie_word_embeddings and "lm_head.weight" in files.names:
        check_tie(files, expected)
    compute = _of_most_bytes(files, expected) if dtype is None else dtype
    model = InternVideo3(config, replace(run, dtype=compute, param_dtype=compute))
    params = _stream(files, expected, model, mesh, keep=dtype is None)
    return LoadedModel(model, params, folder, mesh, file_dtypes)


def _load_run(
    checkpoint: RunCheckpoint, dtype: DType | None, mesh: Mesh, run: Execution, random_weights: bool
) -> LoadedModel:
    """What a run has trained, over what it started from where it trained only a part."""
    if random_weights:
        raise UserError(f"{checkpoint.out}: has weights of its own; random weights are for presets")
    settings, config = checkpoint.config, ModelConfig.from_file(checkpoint.shape)
    additions = settings["lora"]
    # Runs from before there was a choice have scanned layers.
    scan_layers = settings.get("scan_layers", True)
    kept = jnp.dtype(settings["dtype"] if additions["rank"] else "float32").type
    compute = kept if dtype is None else dtype
    lora = Lora(**{**additions, "targets": tuple(additions["targets"])}) if additions["rank"] else None
    run = replace(
        run,
        scan_layers=scan_layers,
        dtype=compute,
        param_dtype=compute,
        weights=run.weights or settings["weights"] or None,
        lora=resolve(lora, config, scan_layers),
    )
    model = InternVideo3(config, run)
    leaves = flatten_dict(checkpoint.trained(model, mesh))
    if dtype is not None:
        leaves = {path: x if path[-1] in LEAVES else x.astype(dtype) for path, x in leaves.items()}
    folder: AnyPath | None = checkpoint.shape
    if missing := set(flatten_dict(boxed_params(model))) - set(leaves):
        if settings["init"]:
            base = load(settings["init"], dtype=compute, mesh=mesh, run=run)
            rest, folder = base.params, base.folder
        else:
            key = jax.random.key(settings["seed"])
            rest = init_params(model, key, param_shardings(boxed_params(model), mesh))
        leaves |= {path: x for path, x in flatten_dict(rest).items() if path in missing}
    return LoadedModel(model, unflatten_dict(leaves), folder, mesh)


def check_dtypes(files: TensorFiles, expected: Sequence[Tensor], dtype: DType | None) -> dict[str, str]:
    """Refuses what no parameter can hold; returns the tensors to be widened, with their own dtypes.

    Args:
        files: the checkpoint. expected: its tensors.
        dtype: that all are cast to; None keeps each one's own.

    Raises:
        UserError: names the first tensor of a dtype that is not supported.
    """
    allowed = KEPT if dtype is None else tuple(DTYPES)
    if wrong := [tensor.name for tensor in expected if files.dtype(tensor.name) not in allowed]:
        kind = files.dtype(wrong[0])
        more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        # Integers and narrower floats are codes whose scales lie elsewhere.
        advice = "; name a dtype to round them to" if kind == "F64" else ""
        raise UserError(
            f"{files.folder}: {wrong[0]} has dtype {kind}; supported are {', '.join(allowed)}{more}{advice}"
        )
    if dtype is not None:
        return {}
    own = {tensor.name: files.dtype(tensor.name) for tensor in expected}
    wide = _common_dtypes(files, expected)
    return {t.name: own[t.name] for t in expected if own[t.name] != wide[t.path]}


def _common_dtypes(files: TensorFiles, expected: Sequence[Tensor]) -> dict[TreePath, str]:
    """Parameter → the dtype that holds all its tensors."""
    found: dict[TreePath, list[str]] = {}
    for tensor in expected:
        found.setdefault(tensor.path, []).append(files.dtype(tensor.name))
    return {path: common(names) for path, names in found.items()}


def _of_most_bytes(files: TensorFiles, expected: Sequence[Tensor]) -> DType:
    """The dtype in which most of a checkpoint is written."""
    count: dict[str, int] = {}
    for tensor in expected:
        name = files.dtype(tensor.name)
        count[name] = count.get(name, 0) + math.prod(tensor.shape) * DTYPES[name].itemsize
    return getattr(jnp, torch_name(max(count, key=lambda name: count[name])))


def check_tie(files: TensorFiles, expected: Sequence[Tensor]) -> None:
    """A tied checkpoint may repeat its embeddings as a head; a head of its own would be lost silently.

    Raises:
        UserError: `lm_head.weight` differs from the embeddings.
    """
    name = next(tensor.name for tensor in expected if tensor.path == ("embed_tokens", "embedding"))
    head, embedding = files.read("lm_head.weight"), files.read(name)
    if head.dtype != embedding.dtype or not np.array_equal(bits_of(head), bits_of(embedding)):
        raise UserError(
            f"{files.folder}: lm_head.weight differs from {name}, though config.json says "
            "tie_word_embeddings; set it to false to use the head"
        )


def _stream(
    files: TensorFiles, expected: list[Tensor], model: InternVideo3, mesh: Mesh, keep: bool
) -> Params:
    """Fills our parameters one after the other, each from its tensors in order.

    `keep` keeps the dtypes of the files; else all become the model's.
    """
    kept = _common_dtypes(files, expected)
    boxed = boxed_params(model)
    shardings = param_shardings(boxed, mesh)
    by_path: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in expected:
        by_path.setdefault(tensor.path, []).append(tensor)
    params: dict = {}
    for path, parts in by_path.items():
        dtype = DTYPES[kept[path]] if keep else jnp.dtype(model.run.param_dtype)
        quantised = path[-1] == "kernel" and "kernel_codes" in lookup(boxed, path[:-1])
        leaves = [(*path[:-1], name) for name in ("kernel_codes", "kernel_scale")] if quantised else [path]
        places = []
        for leaf in leaves:
            abstract = lookup(boxed, leaf).value
            own = abstract.dtype if quantised else dtype
            places.append(_Place(abstract.shape, own, lookup(shardings, leaf)))
        for tensor in parts:
            try:
                value = files.read(tensor.name)
                if quantised:
                    values = _quantised(tensor, value, places[-1], model.run)
                else:
                    values = (tensor.to_ours(cast(value, dtype)),)
            except (OverflowError, NotFiniteError) as error:
                raise UserError(f"{files.folder}: {tensor.name}: {error}") from None
            for place, part in zip(places, values, strict=True):
                place.put(tensor.index, part)
        for leaf, place in zip(leaves, places, strict=True):
            # Waited for: a copy still under way would keep its host memory beside the next one's.
            insert(params, leaf, jax.block_until_ready(place.array()))
    if model.run.lora is not None:
        # In no file of the model's.
        own = {path: x for path, x in flatten_dict(shardings).items() if path[-1] in LEAVES}
        made = init_params(model, jax.random.key(0), unflatten_dict(own), only=LEAVES)
        for path, value in flatten_dict(made).items():
            insert(params, path, value)
    return params


def _quantised(tensor: Tensor, value: np.ndarray, scale: "_Place", run: Execution) -> tuple[np.ndarray, ...]:
    """Codes and scales of one tensor, from the numbers in the file."""
    assert run.weights is not None
    ours = tensor.to_ours(value)
    outputs = len(scale.shape) - (1 if tensor.index is None else 2)
    return quantize(np.moveaxis(ours, range(outputs), range(-outputs, 0)), ours.ndim - outputs, run.weights)


class _Place:
    """One array to be, its parts for this host's devices in host memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> None:
        self.shape, self._sharding = shape, sharding
        self._shards: dict[Bounds, np.ndarray] = {}
        for index in sharding.addressable_devices_indices_map(shape).values():
            assert index is not None  # only for shardings that are not fully described by their mesh
            self._shards.setdefault(_key(index, shape), np.empty(_size(index, shape), dtype))

    def put(self, layer: int | None, value: np.ndarray) -> None:
        """Fills the whole, or one layer of a stack."""
        for (first, *rest), shard in self._shards.items():
            inner = tuple(slice(*bounds) for bounds in rest)
            if layer is None:
                shard[...] = value[(slice(*first), *inner)]
            elif first[0] <= layer < first[1]:
                shard[layer - first[0]] = value[inner]

    def array(self) -> jax.Array:
        """The array on its devices."""

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return self._shards[_key(index, self.shape)]

        return jax.make_array_from_callback(self.shape, self._sharding, part)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in _key(index, shape))
