"""Finished steps and the source's other tensors → the model folder of a conversion.

Shards of single steps are written here, too; the small files are those of an export (checkpoint/folder.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from iv3jax.checkpoint.dtypes import bits_of, safetensors_name, torch_name
from iv3jax.checkpoint.export import MAX_SHARD_SIZE, Export, parse_size
from iv3jax.checkpoint.files import SINGLE, TensorFiles, check
from iv3jax.checkpoint.folder import check_folder, small_files
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.names import tensors
from iv3jax.checkpoint.target import LocalTarget
from iv3jax.checkpoint.write import Planned, natural, write, write_safetensors
from iv3jax.conversion.source import Source
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.sharding import make_mesh


def save_tensors(folder: Path, values: Mapping[str, np.ndarray]) -> None:
    """Writes one step's tensors, under their final names, layouts and dtypes, as one safetensors file."""
    planned = {
        name: Planned(value.shape, safetensors_name(value.dtype), partial(iter, (value,)))
        for name, value in values.items()
    }
    with (folder / SINGLE).open("wb") as file:
        write_safetensors(file, planned)


def assemble(
    source: Source,
    config: ModelConfig,
    steps: Iterable[Path],
    out_dir: Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    extra_files: Mapping[str, bytes] | None = None,
) -> Export:
    """Writes the model folder, whole or not at all; the same inputs give the same bytes.

    Tensors that no step has are the source's, bit for bit. The host holds two copies of one tensor at most:
    every one is read back and compared with where it came from.

    Args:
        source: what was converted.
        config: the converted model's.
        steps: folders that `save_tensors` wrote to.
        out_dir: a place that is free, or an empty folder.
        max_shard_size: see `export`.
        extra_files: name → content of what else is to lie in the folder, such as a report.

    Raises:
        UserError: the place is taken, or the disk is full.
        ValueError: steps and source do not make a model of this config.
    """
    planned = _plan(source, config, steps)
    # Before anything is written: half an hour later nobody watches.
    shard_bytes = parse_size(max_shard_size)
    loaded = LoadedModel(InternVideo3(config), {}, source.folder, make_mesh(jax.devices()[:1]))
    small = {**(extra_files or {}), **small_files(loaded, planned)}
    target = LocalTarget(out_dir)
    try:
        names = write(planned, shard_bytes, target.open)
        for name, content in small.items():
            with target.open(name) as file:
                file.write(content)
        check_folder(target.part, loaded)
        _compare(target.part, config, planned)
        target.finish()
    except BaseException:
        target.discard()
        raise
    counts = Counter(torch_name(tensor.dtype) for tensor in planned.values())
    nbytes = sum(tensor.nbytes for tensor in planned.values())
    return Export(str(out_dir), (*names, *small), len(planned), nbytes, dict(counts))


def _plan(source: Source, config: ModelConfig, steps: Iterable[Path]) -> dict[str, Planned]:
    """Every tensor of the converted model, in the table's order, with where its numbers lie."""
    homes = dict.fromkeys(source.kept, source.files)
    for step in steps:
        files = TensorFiles(step)
        if twice := sorted(homes.keys() & files.names):
            raise ValueError(f"{step}: {twice[0]} is there already")
        homes |= dict.fromkeys(files.names, files)
    # The order of an export.
    expected = {tensor.name: tensor.shape for tensor in sorted(tensors(config), key=natural)}
    if odd := sorted(expected.keys() ^ homes.keys()):
        raise ValueError(f"{', '.join(odd)} in the config or in the steps only")
    planned = {}
    for name, shape in expected.items():
        files = homes[name]
        if files.shape(name) != shape:
            raise ValueError(f"{files.folder}: {name} is {files.shape(name)} instead of {shape}")
        planned[name] = Planned(shape, files.dtype(name), partial(_read, files, name))
    return planned


def _read(files: TensorFiles, name: str) -> Iterator[np.ndarray]:
    yield files.read(name)


def _compare(folder: Path, config: ModelConfig, planned: Mapping[str, Planned]) -> None:
    """Reads what was written, and looks whether `load` would take it."""
    files = TensorFiles(folder)
    check(files, tensors(config), ())
    for name, tensor in planned.items():
        (meant,) = tensor.blocks()
        if not np.array_equal(bits_of(files.read(name)), bits_of(meant)):
            raise UserError(
                f"{folder}: {name} reads back with other numbers than were written; check the disk"
            )
