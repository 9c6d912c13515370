"""The safetensors files of a model folder: which tensor lies where, checked before anything is loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from iv3jax.checkpoint.names import Tensor
from iv3jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class _Header(NamedTuple):
    """Where a tensor lies and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The safetensors files of one folder, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, _Header] = {}
        for path, names in _layout(folder).items():
            with _open(path) as file:
                held = file.keys()
                if names is not None and (lost := sorted(set(names) - set(held))):
                    raise UserError(f"{path}: does not hold {collapse(lost)}, though {INDEX} says so")
                for name in held if names is None else names:
                    part = file.get_slice(name)
                    self._headers[name] = _Header(path, tuple(part.get_shape()), part.get_dtype())

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
        # Opened anew each time: a mapping that stays open keeps all that was ever read through it.
        with _open(self._headers[name].path) as file:
            return file.get_tensor(name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _layout(folder: Path) -> dict[Path, list[str] | None]:
    """File → the tensors the index puts in it (None: all it holds)."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return {folder / SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        layout: dict[Path, list[str] | None] = {}
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
        f"{name} is {files.shape(name)} instead of {shape}"
        for name, shape in wanted.items()
        if name in held and files.shape(name) != shape
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
