"""`iv3 doctor`: what this machine has, and by arithmetic which presets fit on it. Nothing is compiled.

Bytes of a real step, activations and collectives come from `iv3 plan`, which compiles it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from iv3jax.checkpoint.names import Tensor, tensors
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import PRESETS
from iv3jax.models.quantized import FORMATS
from iv3jax.train.machine import Devices, Line, devices, lines

CONTEXTS = (8 * 1024, 32 * 1024, 128 * 1024)
WEIGHTS = ("bf16", *FORMATS)

STATE_BYTES = 16
"""Of training per parameter: fp32 weight, gradient, and AdamW's two moments."""

ROOM = 0.9
"""Share of a device that weights, cache and state may take; activations need the rest, or more."""


@dataclass(frozen=True)
class Fit:
    """The bytes of one use of a preset.

    Attributes:
        use: ask or train.
        weights: the linear layers' form, bf16, int8 or nf4; for training fp32.
        context: tokens of bf16 cache; 0 for training.
        bytes: weights and cache, or training's state. Without activations.
        devices: how many of this machine's they take if split evenly, and no more than it has; None
            where they do not fit.
    """

    preset: str
    use: str
    weights: str
    context: int
    bytes: int
    devices: int | None


@dataclass(frozen=True)
class Doctor:
    """What `doctor` found.

    Attributes:
        devices: None where jax cannot start; there are no fits then.
        problems: how many lines name one.
    """

    lines: list[Line]
    devices: Devices | None
    fits: list[Fit]
    problems: int

    def __str__(self) -> str:
        count = {0: "no problems", 1: "1 problem"}.get(self.problems, f"{self.problems} problems")
        fits = [] if self.devices is None else _table(self.fits, self.devices)
        return "\n".join([*map(_text, self.lines), count, "", *fits]).rstrip()


def doctor() -> Doctor:
    """Looks at this machine."""
    here, line = devices()
    found = [line, *lines()]
    # Without a device jax does not even give shapes.
    fits = [] if here is None else [fit for name in PRESETS for fit in _fits(name, PRESETS[name], here)]
    return Doctor(found, here, fits, sum(bool(line.problem) for line in found))


def _fits(name: str, config: ModelConfig, here: Devices) -> list[Fit]:
    """Every use of a preset; no more context than it has positions."""
    fits = []
    table = tensors(config)
    cache = jax.eval_shape(lambda: init_cache(config.text_config, 1, 1, jnp.bfloat16)).nbytes
    for weights in WEIGHTS:
        own = weight_bytes(table, weights)
        for context in CONTEXTS:
            if context <= config.text_config.max_position_embeddings:
                total = own + context * cache
                fits.append(Fit(name, "ask", weights, context, total, _devices_for(total, here)))
    state = STATE_BYTES * sum(math.prod(tensor.shape) for tensor in table)
    return [*fits, Fit(name, "train", "fp32", 0, state, _devices_for(state, here))]


def weight_bytes(table: Sequence[Tensor], weights: str) -> int:
    """Bytes of a model's tensors in bf16, its linear layers in `weights` (models/quantized.py)."""
    total = 0
    for tensor in table:
        if weights == "bf16" or tensor.path[-1] != "kernel":
            total += 2 * math.prod(tensor.shape)
            continue
        outputs, inputs = tensor.shape[0], math.prod(tensor.shape[1:])
        how = FORMATS[weights]
        total += math.prod(how.codes_shape(inputs, (outputs,)))
        total += 2 * math.prod(how.scale_shape(inputs, (outputs,)))
    return total


def _devices_for(total: int, here: Devices) -> int | None:
    if not here.memory_bytes:
        return None
    count = math.ceil(total / (ROOM * here.memory_bytes))
    return count if count <= here.count else None


def _text(line: Line) -> str:
    problem = f"PROBLEM: {line.problem}" if line.problem else ""
    return f"{line.name:20}{line.value}{' ' if line.value and problem else ''}{problem}"


def _table(fits: Sequence[Fit], here: Devices) -> list[str]:
    """A row a preset and form of its weights, and what the cells mean."""
    contexts = [f"ask, {context // 1024} K" for context in CONTEXTS]
    table = Table("preset", "weights", *contexts, "train", box=None, pad_edge=False)
    for name in dict.fromkeys(fit.preset for fit in fits):
        cells = {(fit.weights, fit.context): _cell(fit) for fit in fits if fit.preset == name}
        for weights in WEIGHTS:
            asked = [cells.get((weights, context), "–") for context in CONTEXTS]
            table.add_row(name, weights, *asked, "")
        table.add_row(name, "fp32", "", "", cells["fp32", 0])
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    if not here.memory_bytes:
        on = "these devices do not say how much memory they have"
    else:
        on = f"{here.count} × {here.memory_bytes / 1e9:.1f} GB are here, of which {ROOM:.0%} are counted"
    return [
        *(line.rstrip() for line in captured.get().splitlines()),
        "",
        f"GB by arithmetic, and how many devices hold them; {on}.",
        "ask: weights and a bf16 cache of so many tokens. train: 16 bytes for each parameter, all of them",
        "trained: fp32 weight, gradient and AdamW's two moments. Activations come on top (`iv3 plan`).",
    ]


def _cell(fit: Fit) -> str:
    size = f"{fit.bytes / 1e9:.1f}" if fit.bytes > 1e8 else f"{fit.bytes / 1e9:.3f}"
    return f"{size}  " + ("no" if fit.devices is None else f"on {fit.devices}")
