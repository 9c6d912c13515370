"""Parameters and linear layers by patterns of the checkpoint's names, as `iv3 shapes` lists them.

A pattern is a glob (`*` crosses dots) of a whole name or of its end after a dot: `model.visual.*`, `*.bias`
and `q_proj.weight` name parameters, `q_proj` and `model.language_model.*.mlp.*` linear layers.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from iv3jax.checkpoint.names import Path, tensors
from iv3jax.errors import UserError, did_you_mean
from iv3jax.models.attention import MATRICES
from iv3jax.models.config import ModelConfig
from iv3jax.models.lora import Lora


def chosen(patterns: Sequence[str], named: Iterable[tuple[str, Path]], field: str) -> set[Path]:
    """The paths that patterns name.

    Args:
        named: every name and the path in our tree that it belongs to; several where layers are stacked.
        field: of the config, for errors.

    Raises:
        UserError: a pattern that names nothing, with the nearest that would; or one that names only some of
            the layers that one parameter stacks.
    """
    named = list(named)
    found: set[tuple[str, Path]] = set()
    for pattern in patterns:
        match = re.compile(rf"(?s:.*\.)?{fnmatch.translate(pattern)}").match
        own = {pair for pair in named if match(pair[0])}
        if not own:
            near = did_you_mean(pattern, _suggestions(name for name, _ in named))
            raise UserError(f"{field}: {pattern!r} names nothing in the model{near}")
        found |= own
    paths = {path for _, path in found}
    if lost := [name for name, path in named if path in paths and (name, path) not in found]:
        raise UserError(
            f"{field}: names some of {_starred(lost[0])} without {lost[0]}, but these layers are one "
            "parameter; write * in place of the layer's number"
        )
    return paths


def resolve(lora: Lora | None, config: ModelConfig, scan_layers: bool = True) -> Lora | None:
    """The same with paths for targets; None where the rank is 0. Paths among the targets stay.

    Args:
        scan_layers: the model's (`Execution.scan_layers`). Layers that stand alone may be named one by one.

    Raises:
        UserError: see `chosen`.
    """
    if lora is None or not lora.rank:
        return None
    linears = {
        tensor.name.removesuffix(".weight"): tensor.path[:-1]
        for tensor in tensors(config, scan_layers)
        if tensor.path[-1] == "kernel" and tensor.path[-2] not in MATRICES
    }
    paths = {"/".join(path) for path in linears.values()}
    patterns = [target for target in lora.targets if target not in paths]
    named = {"/".join(path) for path in chosen(patterns, linears.items(), "lora.targets")}
    return replace(lora, targets=tuple(sorted(named | paths.intersection(lora.targets))))


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _suggestions(names: Iterable[str]) -> list[str]:
    """Patterns that name something: names and their ends, and all that begins like a name."""
    found = []
    for name in dict.fromkeys(map(_starred, names)):
        words = name.split(".")
        found += [".".join(words[i:]) for i in range(len(words))]
        found += [".".join([*words[:i], "*"]) for i in range(1, len(words))]
    return list(dict.fromkeys(found))
