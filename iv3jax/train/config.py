"""What an experiment file may say: frozen dataclasses, filled once from a ConfigDict at the door."""

import dataclasses
import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from iv3jax.errors import UserError
from iv3jax.train.optimizer import OptimizerConfig

T = TypeVar("T")


@dataclass(frozen=True)
class DigitsConfig:
    """The digit task's mixture (`data/digits.py`).

    Attributes:
        reading_only: share of the steps, from the start, with short videos of one number only.
        reading: share of such videos in the mixture after that; without them reading is lost again.
        alone: share of the steps, from the start, in which a long video shows one number only: when it is
            shown can then be learned before telling numbers apart.
        events: at most this many numbers in a long video after that.
        seconds: shortest and longest duration of a long video.
        growth: share of the steps over which the longest duration grows from the shortest to its full length.
        shown: for how long a number is shown, shortest and longest. Shorter than in the test: where most
            of a video shows a number, guessing its start and end pays too well.
        questions: at most this many different questions about one long video, as turns of one conversation.
    """

    reading_only: float = 0.12
    reading: float = 0.2
    alone: float = 0.85
    events: int = 2
    seconds: tuple[float, float] = (4.0, 16.0)
    growth: float = 0.55
    shown: tuple[float, float] = (2.5, 7.0)
    questions: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """One supervised run.

    Attributes:
        preset: the model's shape, unless `init` has one.
        init: a model folder or hub id to go on from, its shape included; empty: random weights.
        steps: optimiser steps.
        rows, length: rows of a batch over all devices, and tokens of a row.
        chunks: temporal patches of a row.
        seed: of the weights and of the data.
        remat: see `models.layers.REMAT_POLICIES`.
    """

    preset: str = "tiny"
    init: str = ""
    steps: int = 600
    rows: int = 16
    length: int = 256
    chunks: int = 32
    seed: int = 0
    remat: str = "none"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)


def experiment(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The experiment of `configs/NAME.py`, or its variant for `NAME:VARIANT`, with `key=value` overrides.

    Raises:
        UserError: no such experiment, an unknown field (the nearest name is suggested), or a bad value.
    """
    module, _, variant = name.partition(":")
    try:
        get_config = importlib.import_module(f"configs.{module}").get_config
    except ModuleNotFoundError:
        raise UserError(f"{name}: there is no experiment configs/{module}.py") from None
    try:
        config = get_config(variant or None).to_dict()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise UserError(f"{override!r} is no override; write key=value")
        target = config
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"{key}: {parent} has no fields")
        try:
            target[last] = json.loads(text)
        except json.JSONDecodeError:
            target[last] = text
    return build(TrainConfig, config, name)


def build(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """A frozen dataclass from nested plain values, checked field by field."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.0)
            raise UserError(f"{source}: unknown field {key!r}; did you mean {near[0]!r}?")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}.{key} has fields of its own, {value!r} is a single value")
            made[key] = build(kind, value, f"{source}.{key}")
        else:
            made[key] = _checked(kind, value, f"{source}.{key}")
    return cls(**made)


def _checked(kind: Any, value: Any, name: str) -> Any:
    """One plain value of the annotated kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is str and isinstance(value, str):
        return value
    if str(kind).startswith("tuple") and isinstance(value, list | tuple):
        return tuple(float(v) for v in value)
    raise UserError(f"{name}: {value!r} is no {getattr(kind, '__name__', kind)}")
