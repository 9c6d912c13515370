"""What an experiment file may say: frozen dataclasses, filled once from a ConfigDict at the door."""

import dataclasses
import importlib
import json
from collections import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.errors import UserError, did_you_mean
from iv3jax.mcr.rewards import RewardConfig
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.models.lora import Lora
from iv3jax.train.collect_config import CollectConfig, TracesConfig, check_stage
from iv3jax.train.distill import DistillConfig
from iv3jax.train.optimizer import OptimizerConfig
from iv3jax.train.rl import RLConfig

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
class MeshConfig:
    """How many ways each axis of the mesh splits (`sharding.MESH_AXES`); one may be 0, for what is left.

    Attributes:
        data: replicas. fsdp: weights and rows. context: the sequence. tensor: heads and hidden units.
    """

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
        every: steps between two checkpoints; 0: only at the end, and where the run is asked to stop.
        keep: how many of the latest stay, beside the best one.
    """

    every: int = 0
    keep: int = 2


@dataclass(frozen=True)
class HeldOutConfig:
    """The loss on samples that are not trained on; the checkpoint with the least of it is the best.

    Attributes:
        every: steps between two measurements; 0: none.
        batches: how many, always the same ones.
        sources: their samples.
    """

    every: int = 0
    batches: int = 4
    sources: tuple[SourceConfig, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        stage: "supervised" learns from samples; "rl" from the rewards of its own rollouts; "distill" from
            what a teacher makes of them.
        preset: the model's shape, unless `init` has one.
        init: where to start: a model folder or hub id, its shape included, or the folder of another run,
            whose latest checkpoint it is; empty: random weights.
        steps: optimiser steps.
        rows: rows over all devices that are computed at one time. accumulate: so many times, for one step.
        length: tokens of a row; where rows are rollouts, a prompt and `rollout.budget` together.
        chunks: vision chunks of a row. chunk_patches: patches of a chunk, at least those of a temporal patch.
        seed: of the weights and of the data.
        remat: see `models.layers.REMAT_POLICIES`.
        scan_layers: see `models.layers.Execution`; false trains and rolls out faster on a CPU.
        dtype: of computing; trained parameters are fp32.
        reduction: "token", "sample" or "square" (SPEC §5).
        frozen: patterns of checkpoint names (`model.visual.*`) that are not trained.
        lora: train low-rank additions instead, and nothing else. weights: "int8" or "nf4" stores what they
            are added to so; empty: in `dtype`.
        on_nonfinite: "stop" ends the run where the loss is not finite, "skip" leaves that step out.
        mesh, checkpoint, held_out, optimizer, data: see there.
        digits: of the digit task, which is what a supervised run without `data.sources` learns.
        collect, rollout, reward, traces: of the stages that learn from rollouts; `data.sources` are then
            what is asked. rl, distill: of the one and the other.
    """

    stage: str = "supervised"
    preset: str = "tiny"
    init: str = ""
    steps: int = 600
    rows: int = 16
    accumulate: int = 1
    length: int = 256
    chunks: int = 32
    chunk_patches: int = 4
    seed: int = 0
    remat: str = "none"
    scan_layers: bool = True
    dtype: str = "float32"
    reduction: str = "token"
    frozen: tuple[str, ...] = ()
    lora: Lora = field(default_factory=Lora)
    weights: str = ""
    on_nonfinite: str = "stop"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)

    def __post_init__(self) -> None:
        choices = {
            "reduction": ("token", "sample", "square"),
            "on_nonfinite": ("stop", "skip"),
            "dtype": ("float32", "bfloat16"),
            "weights": ("", "int8", "nf4"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(repr(x) for x in allowed)
                raise UserError(f"{name} {value!r} is not one of {listed}")
        for name in ("steps", "rows", "accumulate", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if self.weights and not self.lora.rank:
            raise UserError(f"weights {self.weights!r} cannot be trained; set lora.rank to train beside them")
        check_stage(self)


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
            raise UserError(f"{source}: unknown field {key!r}{did_you_mean(key, fields)}")
        made[key] = _field(fields[key].type, value, f"{source}.{key}")
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except TypeError as error:
        # A field without a default is missing.
        raise UserError(f"{source}: {str(error).split(') ')[-1]}") from None


def _field(kind: Any, value: Any, name: str) -> Any:
    """A field's value: a dataclass of its own, or what `_checked` takes."""
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type)):
        return _checked(kind, value, name)
    if not isinstance(value, Mapping):
        raise UserError(f"{name} has fields of its own, {value!r} is a single value")
    return build(kind, value, name)


def _checked(kind: Any, value: Any, name: str) -> Any:
    """One value of the annotated kind."""
    if get_origin(kind) is UnionType:
        (inner,) = (one for one in get_args(kind) if one is not NoneType)
        return None if value is None else _checked(inner, value, name)
    if get_origin(kind) is abc.Mapping and isinstance(value, Mapping):
        (_, inner) = get_args(kind)
        return {key: _checked(inner, one, f"{name}.{key}") for key, one in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        inner, *more = get_args(kind)
        if more == [Ellipsis] or len(value) == len(get_args(kind)):
            kinds = [inner] * len(value) if more == [Ellipsis] else [inner, *more]
            return tuple(
                _field(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    raise UserError(f"{name}: {value!r} is no {kind.__name__ if isinstance(kind, type) else kind}")
