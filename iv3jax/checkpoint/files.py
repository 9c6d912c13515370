"""The safetensors files of a model folder: which tensor lies where, checked before anything is loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from iv3jax.checkpoint.dtypes import DTYPES
from iv3jax.checkpoint.names import Tensor
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, StorePath

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FIRST_READ = 1 << 18
"""Bytes of a file on a store that are read at once, in the hope that they hold the header."""

_LONGEST_HEADER = 100_000_008
"""safetensors' own limit, with the eight bytes of its length."""


class _Header(NamedTuple):
    """Where a tensor lies and what it is: its file, its first byte there and the one after its last."""

    path: AnyPath
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


class TensorFiles:
    """The safetensors files of one folder, local or on a store, read tensor by tensor."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder
        self._headers: dict[str, _Header] = {}
        for path, names in _layout(folder).items():
            held = _headers(path)
            if names is not None and (lost := sorted(set(names) - set(held))):
                raise UserError(f"{path}: does not hold {collapse(lost)}, though {INDEX} says so")
            self._headers |= {name: held[name] for name in (held if names is None else names)}

    @property
    def names(self) -> list[str]:
        """All tensors of the folder."""
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return self._headers[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's dtype in safetensors' words (F32, BF16, …), from the header."""
        return self._headers[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, in host memory."""
        path, shape, dtype, start, stop = self._headers[name]
        if isinstance(path, StorePath):
            data = np.frombuffer(path.read_range(start, stop), np.uint8)
        else:
            # Not through safetensors' mapping, whose pages would be in memory beside the tensor.
            data = np.fromfile(path, np.uint8, stop - start, offset=start)
        if data.size != stop - start:
            raise UserError(f"{path}: ends before {name} does; it was whole when it was opened")
        # The loader takes these dtypes and no others, and says so from the headers.
        return data.view(DTYPES[dtype]).reshape(shape)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _headers(path: AnyPath) -> dict[str, _Header]:
    """What a file holds."""
    if isinstance(path, Path):
        kinds = _kinds(path)
        with path.open("rb") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
    else:
        header, size = _read_header(path)
        # A local file of the same header and size, with a hole for the numbers: the library checks both
        # alike, that the header is valid, that its tensors fit and that they fill the file.
        with NamedTemporaryFile(prefix="iv3-header-") as file:
            file.write(header)
            file.truncate(size)
            try:
                kinds = _kinds(Path(file.name))
            except UserError as error:
                raise UserError(str(error).replace(file.name, str(path))) from None
    places = {name: value["data_offsets"] for name, value in json.loads(header[8:]).items() if name in kinds}
    begin = len(header)
    return {
        name: _Header(path, *kind, begin + places[name][0], begin + places[name][1])
        for name, kind in kinds.items()
    }


def _kinds(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of all tensors of a local file."""
    with _open(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def _read_header(path: StorePath) -> tuple[bytes, int]:
    """The first bytes of a file up to the numbers, or all there are, and the file's size."""
    try:
        size = path.size()
        data = path.read_range(0, min(size, _FIRST_READ))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it") from None
    end = min(8 + int.from_bytes(data[:8], "little"), size)
    # A header too long for the library is refused from its length alone.
    if len(data) < end <= _LONGEST_HEADER:
        data += path.read_range(len(data), end)
    return bytes(data[:end]), size


def _layout(folder: AnyPath) -> dict[AnyPath, list[str] | None]:
    """File → the tensors the index puts in it (None: all it holds)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return {folder / SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        layout: dict[AnyPath, list[str] | None] = {}
        for name, file in weight_map.items():
            names = layout.setdefault(folder / file, [])
            assert names is not None
            names.append(name)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{index}: not valid JSON ({error})") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: has no weight_map of tensor names to files") from None
    return layout


def check(files: TensorFiles, expected: Sequence[Tensor], ignored: Sequence[str]) -> None:
    """Compares a folder with what its config needs.

    Raises:
        UserError: names every missing, unexpected and mis-shaped tensor, all in one line.
    """
    held = set(files.names)
    wanted = {tensor.name: tensor.shape for tensor in expected}
    missing = [name for name in wanted if name not in held]
    unexpected = [n for n in files.names if n not in wanted and not any(re.fullmatch(p, n) for p in ignored)]
    shapes = [
        f"{t.name} is {files.shape(t.name)} instead of {t.shape}"
        + (f" (rank {t.rank} in kv_lora_rank_list)" if t.rank is not None else "")
        for t in expected
        if t.name in held and files.shape(t.name) != t.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {collapse(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {collapse(unexpected)}")
    if shapes:
        problems.append(f"{len(shapes)} of the wrong shape: {', '.join(shapes)}")
    if problems:
        raise UserError(f"{files.folder}: tensors do not fit config.json: {'; '.join(problems)}")


def collapse(names: Sequence[str]) -> str:
    """Names that differ only in one number, written once: `layers.{0-35}.norm.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        key = name if number is None else f"{name[: number.start(1)]}\0{name[number.end(1) :]}"
        groups.setdefault(key, []).append(-1 if number is None else int(number.group(1)))
    return ", ".join(key.replace("\0", _ranges(sorted(n))) for key, n in groups.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 7] → '{0-2,7}'; a single number stays as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) + "}"
