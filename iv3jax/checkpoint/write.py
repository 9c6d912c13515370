"""Our parameters → safetensors files, tensor by tensor, and the comparison of such files with parameters.

Config, tokenizer and processor files are in `folder.py`; where files go, and when, in `export.py`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from iv3jax.checkpoint.dtypes import DTYPES, bits_of, cast, safetensors_name
from iv3jax.checkpoint.files import INDEX, TensorFiles
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.names import Tensor, lookup, tensors
from iv3jax.errors import UserError

Open = Callable[[str], AbstractContextManager[IO[bytes]]]
"""The name of a file in the folder that is written → that file, open for writing."""

_BLOCK_BYTES = 1 << 24
"""Bytes of a tensor that are brought into order, cast and written at one time."""


@dataclass(frozen=True)
class Planned:
    """A tensor as it is to stand in a file.

    Attributes:
        shape: its shape there.
        dtype: its dtype there, in safetensors' words.
        blocks: gives its numbers, in order, as arrays whose first axes add up to the shape's.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plan(loaded: LoadedModel, dtype: str | None = None) -> dict[str, Planned]:
    """Every tensor of a model's checkpoint; numbers are fetched when they are written.

    Args:
        loaded: the model.
        dtype: dtype of all tensors, in safetensors' words; None gives each the one of its parameter, or of
            the file it came from where `LoadedModel.file_dtypes` names one.

    Raises:
        UserError: a parameter of a dtype that no file holds, or one that is spread over several hosts.
    """
    planned = {}
    # Layer after layer, as readers want them, not parameter after parameter.
    for tensor in sorted(tensors(loaded.config, loaded.model.run.scan_layers), key=natural):
        value = lookup(loaded.params, tensor.path)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise UserError(
                f"{'/'.join(tensor.path)} is spread over several hosts; export a checkpoint of it on one"
            )
        target = dtype or loaded.file_dtypes.get(tensor.name) or safetensors_name(value.dtype)
        planned[tensor.name] = Planned(tensor.shape, target, _Blocks(loaded, tensor, target))
    return planned


def write(planned: Mapping[str, Planned], max_shard_size: int, open_file: Open) -> list[str]:
    """Writes the files, shard by shard, and their index if there are several; returns their names.

    The host holds one tensor at a time beside the parameters, and one copy of it where axes move.

    Raises:
        UserError: a number that does not fit the dtype asked for, or that lies beyond its layer's rank.
    """
    split = split_state_dict_into_shards_factory(
        dict(planned),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        with open_file(file) as out:
            write_safetensors(out, {name: planned[name] for name in names})
    if not split.is_sharded:
        return list(split.filename_to_tensors)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    with open_file(INDEX) as out:
        out.write((json.dumps(index, indent=2) + "\n").encode())
    return [*split.filename_to_tensors, INDEX]


def write_safetensors(out: IO[bytes], planned: Mapping[str, Planned]) -> None:
    """One safetensors file: the length of the header, the header, the numbers.

    The library's own writer wants all tensors of the file in memory at once.
    """
    # Wide numbers first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(planned.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in ordered:
        written = 0
        for block in tensor.blocks():
            written += out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        assert written == tensor.nbytes, f"{name}: {written} bytes written of {tensor.nbytes}"


def compare(files: TensorFiles, loaded: LoadedModel, planned: Mapping[str, Planned]) -> None:
    """Reads written files tensor by tensor, turns each into our layout and compares it with the parameter.

    Raises:
        UserError: names the first tensor of which a bit, the shape or the dtype differs, or that is missing.
    """
    if sorted(files.names) != sorted(planned):
        odd = sorted(set(files.names) ^ set(planned))
        raise UserError(f"{files.folder}: {', '.join(odd)} is in the files or in the model only")
    for tensor in tensors(loaded.config, loaded.model.run.scan_layers):
        name, dtype = tensor.name, planned[tensor.name].dtype
        if (files.dtype(name), files.shape(name)) != (dtype, tensor.shape):
            raise UserError(f"{files.folder}: {name} was written as {files.dtype(name)} {files.shape(name)}")
        found = tensor.cut(tensor.to_ours(files.read(name)))
        meant = tensor.cut(on_host(lookup(loaded.params, tensor.path), tensor.index))
        meant = cast(meant, DTYPES[dtype])
        if not np.array_equal(bits_of(found), bits_of(meant)):
            raise UserError(f"{files.folder}: {name} reads back with other numbers than were written")


def on_host(value: jax.Array | np.ndarray, index: int | None) -> np.ndarray:
    """One layer of a parameter that stacks several, or all of one that does not, in host memory.

    On a CPU device this is a view. Whole arrays of other devices are copied there first: jax keeps the
    host's copy of an array for as long as the array lives, and so would end up with all of them.
    """
    if not isinstance(value, jax.Array):
        return value if index is None else value[index]
    shape = value.shape if index is None else value.shape[1:]
    out: np.ndarray | None = None
    for shard in value.addressable_shards:
        bounds = [slice(*s.indices(size)) for s, size in zip(shard.index, value.shape, strict=True)]
        local = index
        if index is not None:
            first = bounds.pop(0)
            if not first.start <= index < first.stop:
                continue
            local = index - first.start
        if all(b.stop - b.start == size for b, size in zip(bounds, shape, strict=True)):
            return _fetch(shard.data, local)
        if shard.replica_id == 0:
            out = np.empty(shape, value.dtype) if out is None else out
            out[tuple(bounds)] = _fetch(shard.data, local)
    assert out is not None
    return out


def _fetch(data: jax.Array, index: int | None) -> np.ndarray:
    """The same for an array on one device."""
    if _on_cpu(data):
        view = np.asarray(data)
        return view if index is None else view[index]
    return np.asarray(jnp.copy(data) if index is None else data[index])


def _on_cpu(data: jax.Array) -> bool:
    return next(iter(data.devices())).platform == "cpu"


@dataclass(frozen=True)
class _Blocks:
    """The numbers of one tensor, in the file's layout and dtype."""

    loaded: LoadedModel
    tensor: Tensor
    dtype: str

    def __call__(self) -> Iterator[np.ndarray]:
        value = self.tensor.to_theirs(
            on_host(lookup(self.loaded.params, self.tensor.path), self.tensor.index)
        )
        rows = max(1, _BLOCK_BYTES // max(1, value.nbytes // max(1, len(value))))
        for start in range(0, len(value), rows):
            try:
                yield cast(value[start : start + rows], DTYPES[self.dtype])
            except OverflowError as error:
                raise UserError(f"{self.tensor.name}: {error}") from None


def natural(tensor: Tensor) -> list[tuple[int, str]]:
    """The key that sorts tensors by name, layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in tensor.name.split(".")]
