"""Which implementation of an operation runs: the reference in XLA, or a kernel for a TPU or a GPU.

A chip is looked at when a program is traced. Programs compiled for a chip that is not there
(`iv3jax/chips.py`) are traced under `target`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

IMPLEMENTATIONS = ("xla", "tpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a program is made for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        name: "v5e", "v5p", "h100", …: a key of the block table; other chips by their device_kind.
    """

    platform: str
    name: str


_NAMES = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}

_target: ContextVar[Chip | None] = ContextVar("target", default=None)
_taken: dict[str, str] = {}


def chip() -> Chip:
    """The chip that programs traced now are made for."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    device = jax.devices()[0]
    return Chip(jax.default_backend(), _NAMES.get(device.device_kind, device.device_kind))


@contextmanager
def target(chip: Chip) -> Iterator[None]:
    """Inside, programs are traced for that chip, whatever this machine has.

    What was traced before is forgotten on the way in and out: jax remembers traces, not what they were for.
    """
    jax.clear_caches()
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)
        jax.clear_caches()


class ImplementationError(ValueError):
    """An implementation was named that does not exist, or that cannot do what was asked."""


@dataclasses.dataclass(frozen=True)
class Version:
    """One implementation of an operation.

    Attributes:
        call: the function; a kernel's takes `interpret=`, True on a CPU, besides the arguments.
        refusal: why it cannot take these arguments, naming the argument and what is accepted; None if it can.
    """

    call: Callable[..., Any]
    refusal: str | None = None


def no_float16(name: str, x: jax.Array) -> str | None:
    """The refusal of the kernels where an argument is float16, which XLA alone takes."""
    return f"{name} is float16; kernels take float32 and bfloat16" if x.dtype.name == "float16" else None


def run(op: str, implementation: str | None, versions: Mapping[str, Version], *args: Any) -> Any:
    """Calls the implementation that was named, or the best one for the chip.

    Args:
        op: the operation's name, for errors and the log.
        implementation: None takes the chip's kernel if it accepts the arguments, else XLA; a name takes that
            one or fails. On a CPU a named kernel runs interpreted.
        versions: "xla", "tpu" and "gpu".
        args: what the versions are called with.

    Raises:
        ImplementationError: an unknown one, one for another chip, or arguments that it does not take.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ImplementationError(f"{op}: implementation is {implementation!r}; accepted are None, {names}")
    here = chip()
    name, why = implementation, ""
    if name is None:
        name = here.platform if here.platform in versions else "xla"
        if refusal := versions[name].refusal:
            name, why = "xla", f" ({name}: {refusal})"
    elif name != "xla" and here.platform not in ("cpu", name):
        raise ImplementationError(
            f"{op}: implementation {name!r} does not run on this {here.platform} ({here.name}); "
            f"accepted here are None, 'xla' and {here.platform!r}"
        )
    elif refusal := versions[name].refusal:
        raise ImplementationError(f"{op}: implementation {name!r}: {refusal}")
    _taken[op] = name + why + (", interpreted" if name != "xla" and here.platform == "cpu" else "")
    if name == "xla":
        return versions[name].call(*args)
    return versions[name].call(*args, interpret=here.platform == "cpu")


def taken() -> dict[str, str]:
    """What each operation traced since the last `forget` took, and why where it fell back."""
    return dict(_taken)


def log_line() -> str:
    """`taken` in one line, for the log of a run."""
    return ", ".join(f"{op} {name}" for op, name in sorted(_taken.items()))


def forget() -> None:
    """Starts the log of `taken` anew."""
    _taken.clear()
