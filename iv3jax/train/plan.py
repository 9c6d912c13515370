"""`iv3 plan`: an experiment's real step, compiled for chips that are not here, and what it says of itself.

Bytes and collectives are the compiler's. FLOPs are from formulas (flops.py), and the time is a model: peak
numbers of the chip (chips.py), everything overlapped. Nothing is run and no weight exists. The table of all
8B stages is made in plan_table.py.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.chips import CHIPS, GIB, PEAKS, Topology, devices, refused_temporaries, topology
from iv3jax.errors import UserError
from iv3jax.hlo import collectives
from iv3jax.models.batch import LOGICAL_AXES, Batch
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import preset
from iv3jax.sharding import param_shardings, partition_spec, unbox
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import TEACHER
from iv3jax.train.flops import Flops, flops_per_token
from iv3jax.train.loop import mesh_of
from iv3jax.train.model import model_of
from iv3jax.train.objective import supervised
from iv3jax.train.optimizer import make_optimizer
from iv3jax.train.plan_rollouts import (
    PlannedRollouts,
    beside_shapes,
    planned_rollouts,
    rollout_batch,
    rollout_objective,
)
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.train.state import TrainState, state_shapes
from iv3jax.train.step import make_step
from iv3jax.train.trainable import join, split, trainable
from iv3jax.typing import Params
from kernels_pallas.choice import target

_OPTIONS: dict[str, dict[str, str | bool]] = {
    # Of jax 0.10.2's XLA: its Triton products find no tiles for a gradient of the tower's qkv.
    "h100": {"xla_gpu_enable_triton_gemm": False},
}
"""Chip → options of its compiler."""

_FEWER = "half of rollout.slots and collect.prompts, so that fewer videos and caches are there at one time"


@dataclass(frozen=True)
class RolloutPlan:
    """The program of a stage's rollouts, which runs between two steps. Bytes are of one device.

    Attributes:
        fits: with what lies beside it.
        argument_bytes, temporary_bytes, peak_bytes: as in Plan; prompts, videos and weights are arguments.
        beside_bytes: the state of the step, a reference or teacher, without the weights that are arguments.
        compile_seconds: as in Plan.
    """

    fits: bool
    argument_bytes: int
    temporary_bytes: int | None
    peak_bytes: int | None
    beside_bytes: int
    compile_seconds: float


@dataclass(frozen=True)
class Plan:
    """One step on one topology. Bytes are of one device.

    Attributes:
        topology, chip, devices: where. mesh: how it is split.
        rows, accumulate, length: rows at one time over all devices, how many times, and tokens of a row.
        fits: whether the program can run there: a TPU's compiler refuses what cannot; on a GPU the bytes are
            summed. Rollouts, too.
        argument_bytes: parameters, the optimiser's state and the batch.
        temporary_bytes: what the program needs besides, results that take no argument's place included; where
            the compiler refuses, those that it names; None if it names none.
        peak_bytes: arguments, and what is alive of the temporaries where most is: this is what must fit. None
            where there is no program.
        limit_bytes: what the device has for a program.
        collective_bytes_per_step: bytes a device must at least receive; None where there is no program.
        collectives: the same by kind.
        flops_per_token: forward and backward, for each token of a row, one sample filling it.
        executed_flops_per_token: with everything computed twice.
        bound_seconds: a model's lower bound of a step's time: the longest of "compute", "memory" and
            "network" at the chip's peak numbers.
        tokens_per_second: that this bound allows on all devices together; None without a program.
        advice: what to change where it does not fit.
        compile_seconds: tracing, lowering and compiling here.
        rollouts: of a stage that learns from them; None of others.
    """

    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    rows: int
    accumulate: int
    length: int
    fits: bool
    argument_bytes: int
    temporary_bytes: int | None
    peak_bytes: int | None
    limit_bytes: int
    collective_bytes_per_step: int | None
    collectives: dict[str, int] | None
    flops_per_token: float
    executed_flops_per_token: float
    bound_seconds: dict[str, float]
    tokens_per_second: float | None
    advice: tuple[str, ...]
    compile_seconds: float
    rollouts: RolloutPlan | None = None


@dataclass(frozen=True)
class Planned:
    """A step that can be compiled without its chips: what it is called with, as shapes with shardings.

    Attributes:
        function: (state, frozen parameters, batch) → (state, metrics).
        model: what it trains. trained: the paths of the parameters that it does.
    """

    function: Callable[..., Any]
    arguments: tuple[TrainState, Any, Batch | PolicyBatch]
    model: InternVideo3
    mesh: Mesh
    trained: frozenset[tuple[str, ...]]

    def compiled(self, chip: str) -> Any:
        """The program for that chip, a key of CHIPS."""
        places = jax.tree.map(lambda x: x.sharding, self.arguments[0])
        with target(CHIPS[chip]), jax.set_mesh(self.mesh):
            # A reference model that the step itself does not read has its memory all the same.
            step = jax.jit(self.function, donate_argnums=(0,), out_shardings=(places, None), keep_unused=True)
            return step.lower(*self.arguments).compile(_OPTIONS.get(chip))

    @property
    def policy(self) -> tuple[Params, Mesh]:
        """All parameters of what it trains, without those of a model beside it, and where they are."""
        state, frozen, _ = self.arguments
        own = {name: x for name, x in frozen.items() if name != TEACHER}
        return join(state.params, own), self.mesh

    @property
    def argument_bytes(self) -> int:
        """Of all arguments, on one device."""
        return _bytes(self.arguments)


def plan(config: TrainConfig, where: str, say: Callable[[str], None] | None = None) -> Plan:
    """Compiles an experiment's step for a topology.

    Args:
        where: a topology's name, `v5p-128` (chips.topology).
        say: takes lines about what is being done; None writes them to stderr.

    Raises:
        UserError: an unknown topology, a mesh or rows that do not fit it, or compilers that are missing.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    place = topology(where)
    step = planned(config, mesh_of(config.mesh, devices(place.chip, place.shape, place.slices)))
    used = {axis: size for axis, size in step.mesh.shape.items() if size > 1}
    shown = f"{place.count} chips as {used or 'one'}"
    say(f"iv3 plan: compiling the step for {where}: {shown}; this can take minutes")
    # Before anything is compiled, so that rollouts that cannot work are refused at once.
    rollouts = None if config.stage == "supervised" else planned_rollouts(config, step.model, *step.policy)
    program, refused, seconds = _tried(lambda: step.compiled(place.chip), say)
    made = _plan(config, place, step, program, refused, seconds)
    if rollouts is None:
        return made
    say(f"iv3 plan: compiling the rollouts for {where}")
    rolled = _rollout_plan(place, step, rollouts, say)
    return dataclasses.replace(
        made,
        fits=made.fits and rolled.fits,
        rollouts=rolled,
        advice=made.advice if rolled.fits else (*made.advice, _FEWER),
    )


def _tried(compiled: Callable[[], Any], say: Callable[[str], None]) -> tuple[Any, str, float]:
    """A program, or None and the words of the compiler that has no memory for it; and seconds."""
    start = time.perf_counter()
    program, refused = None, ""
    try:
        program = compiled()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = str(error)
    seconds = time.perf_counter() - start
    say(f"iv3 plan: {'refused' if program is None else 'compiled'} in {seconds:.0f} s")
    return program, refused, seconds


def _rollout_plan(
    place: Topology, step: Planned, rollouts: PlannedRollouts, say: Callable[[str], None]
) -> RolloutPlan:
    beside = _bytes(step.arguments[:2]) - _bytes(step.policy[0])

    def compiled() -> Any:
        with target(CHIPS[place.chip]), jax.set_mesh(step.mesh):
            return rollouts.lower().compile(_OPTIONS.get(place.chip))

    program, refused, seconds = _tried(compiled, say)
    if program is None:
        arguments = _bytes(rollouts.given)
        return RolloutPlan(False, arguments, refused_temporaries(refused, arguments), None, beside, seconds)
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes
    most = arguments + temporary if place.chip == "h100" else memory.peak_memory_in_bytes
    fits = most + beside <= PEAKS[place.chip].memory
    return RolloutPlan(fits, arguments, temporary, memory.peak_memory_in_bytes, beside, seconds)


def planned(config: TrainConfig, mesh: Mesh) -> Planned:
    """The step that `iv3 train` would run, on a mesh of any devices.

    Raises:
        UserError: rows, or sizes of the model, that the mesh does not divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.rows % parts:
        raise UserError(
            f"rows {config.rows} is no multiple of the {parts} parts of a batch (mesh.data x mesh.fsdp); "
            f"set rows to {parts} and accumulate to what gives the batch, or raise mesh.context"
        )
    shape = ModelConfig.from_file(shape_folder(config.init)) if config.init else preset(config.preset)
    model = model_of(config, shape)
    boxed = boxed_params(model)
    trained = trainable(model, config.frozen)
    shardings = split(param_shardings(boxed, mesh), trained)
    moving, still = split(boxed, trained)
    optimizer = make_optimizer(config.optimizer, config.steps, moving)
    state = TrainState(**state_shapes(moving, shardings[0], optimizer, mesh))
    frozen = jax.tree.map(_placed, unbox(still), shardings[1])
    batch: Batch | PolicyBatch
    if config.stage == "supervised":
        objective = supervised(model, config.reduction)
        batch = batch_shapes(config, model.config, mesh)
    else:
        objective, beside = rollout_objective(config, model)
        batch = rollout_batch(config, model, beside, mesh)
        if beside is not None:
            frozen = {**frozen, TEACHER: beside_shapes(beside, mesh)}
    function = make_step(optimizer, objective, config.accumulate, shardings[0])
    return Planned(function, (state, frozen, batch), model, mesh, trained)


def batch_shapes(config: TrainConfig, shape: ModelConfig, mesh: Mesh) -> Batch:
    """The batch of a step, shapes with shardings: all rows, with all the patches that they may have."""
    rows, length = config.rows * config.accumulate, config.length
    tokens = ((rows, length), jnp.int32)
    fields: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(
        ("input_ids", "segment_ids", "labels"), tokens
    )
    fields["positions"] = ((3, rows, length), jnp.int32)
    if mesh.shape["context"] > 1:
        fields["order"] = tokens
    if shape.vision_config is not None and config.chunks:
        patches = (rows, config.chunks, config.chunk_patches)
        fields |= {
            "visual_index": tokens,
            "patches": ((*patches, shape.vision_config.patch_dim), jnp.uint8),
            "patch_coords": ((*patches, 4), jnp.int32),
            "patch_segment_ids": (patches, jnp.int32),
        }
    return Batch(
        **{
            name: jax.ShapeDtypeStruct(
                size, dtype, sharding=NamedSharding(mesh, partition_spec(getattr(LOGICAL_AXES, name)))
            )
            for name, (size, dtype) in fields.items()
        }
    )


def _plan(
    config: TrainConfig, place: Topology, step: Planned, program: Any, refused: str, seconds: float
) -> Plan:
    limit = PEAKS[place.chip].memory
    arguments = step.argument_bytes
    peak = None
    received: dict[str, int] | None = None
    if program is None:
        temporary = refused_temporaries(refused, arguments)
        fits = False
    else:
        memory = program.memory_analysis()
        arguments = memory.argument_size_in_bytes
        extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporary = memory.temp_size_in_bytes + extra
        peak = memory.peak_memory_in_bytes
        fits = place.chip != "h100" or arguments + temporary <= limit
        received = {}
        for one in collectives(program.as_text()):
            received[one.kind] = received.get(one.kind, 0) + round(one.received)
    flops = _flops(config, step)
    total = None if received is None else sum(received.values())
    bound = _bound(config, place, step, flops, total)
    tokens = config.rows * config.accumulate * config.length
    return Plan(
        topology=place.name,
        chip=place.chip,
        devices=place.count,
        mesh=dict(step.mesh.shape),
        rows=config.rows,
        accumulate=config.accumulate,
        length=config.length,
        fits=fits,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        peak_bytes=peak,
        limit_bytes=limit,
        collective_bytes_per_step=total,
        collectives=received,
        flops_per_token=flops.training,
        executed_flops_per_token=flops.executed,
        bound_seconds=bound,
        tokens_per_second=tokens / max(bound.values()) if program is not None else None,
        advice=() if fits else advice(config, dict(step.mesh.shape), arguments, limit),
        compile_seconds=seconds,
    )


def _flops(config: TrainConfig, step: Planned) -> Flops:
    """Of the step's model, where a sample fills its row; of a teacher in the step nothing is counted."""
    if config.stage != "supervised":
        # Videos were encoded before.
        config = dataclasses.replace(config, chunks=0)
    chunks = config.rows * config.chunks / step.mesh.size
    return flops_per_token(
        step.model.config,
        config,
        config.length,
        step.mesh.shape["context"],
        steps_of_tower=2 if chunks * config.chunk_patches > step.model.run.patches_per_step else 1,
        kernels=any(path[-1] == "kernel" and path[0] != "visual" for path in step.trained),
        tower=any(path[0] == "visual" for path in step.trained),
    )


def _bound(
    config: TrainConfig, place: Topology, step: Planned, flops: Flops, received: int | None
) -> dict[str, float]:
    """Seconds that each of a chip's limits asks for, alone, at its peak.

    Memory's are the least there can be: state read and written once; the weights of a device's products
    written once gathered and read for each pass, four with everything recomputed, in each accumulated part;
    the hidden states between layers written and read once.
    """
    peak = PEAKS[place.chip]
    text = step.model.config.text_config
    tokens = config.rows * config.accumulate * config.length / place.count
    passes = 5 if config.remat == "full" else 4
    compute = jnp.dtype(config.dtype).itemsize
    weights = sum(x.size for path, x in _leaves(step) if path[-1] in ("kernel", "kernel_codes"))
    weights *= compute / step.mesh.shape["tensor"]
    hidden = 2 * tokens * text.num_hidden_layers * text.hidden_size * compute
    memory = 2 * step.argument_bytes + passes * config.accumulate * weights + hidden
    seconds = {
        "compute": tokens * flops.executed / peak.flops,
        "memory": memory / peak.memory_bandwidth,
    }
    if received is not None:
        seconds["network"] = received / place.network
    return seconds


def _leaves(step: Planned) -> list[tuple[tuple[str, ...], Any]]:
    return list(flatten_dict(step.policy[0]).items())


def advice(config: TrainConfig, mesh: dict[str, int], arguments: int, limit: int) -> tuple[str, ...]:
    """What to change in an experiment whose step does not fit, what costs least first."""
    found = []
    parts = mesh["data"] * mesh["fsdp"]
    if config.remat != "full":
        found.append("remat=full, which keeps nothing of a layer but its input")
    if config.rows > parts:
        rows, accumulate = parts, config.rows * config.accumulate // parts
        found.append(f"rows={rows} accumulate={accumulate}, one row at a time on a device")
    if config.dtype != "bfloat16":
        found.append("dtype=bfloat16, which halves activations")
    if arguments > limit // 4:
        if mesh["data"] > 1:
            found.append("mesh.data=1 and a larger mesh.fsdp: weights and moments over more devices")
        if config.optimizer.moment_dtype != "bfloat16" and not config.lora.rank:
            found.append("optimizer.moment_dtype=bfloat16, a sixth less of state")
    if config.length // mesh["context"] > 4096:
        found.append(
            f"mesh.context={2 * mesh['context']}, half as many tokens on a device, with half as many rows"
        )
    found.append("more chips, or a shorter length")
    return tuple(found)


def format_plan(made: Plan) -> str:
    """The plan for people."""
    gib = lambda size: "?" if size is None else f"{size / GIB:.2f}"  # noqa: E731
    mesh = " x ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1) or "one device"
    lines = [
        f"{made.topology}: {made.devices} {made.chip} chips as {mesh}",
        f"batch            {made.rows} rows x {made.accumulate} of {made.length} tokens",
        f"fits             {'yes' if made.fits else 'no'}",
        f"GiB a device     arguments {gib(made.argument_bytes)}, temporaries {gib(made.temporary_bytes)}, "
        f"at one time {gib(made.peak_bytes)}, limit {gib(made.limit_bytes)}",
        f"GFLOPs a token   {made.flops_per_token / 1e9:.1f}, {made.executed_flops_per_token / 1e9:.1f} with "
        "what is computed again (formulas; a sample fills its row)",
    ]
    if made.collectives is not None and made.collective_bytes_per_step is not None:
        kinds = [f"{kind} {size / 1e9:.1f}" for kind, size in made.collectives.items()]
        total = f"{made.collective_bytes_per_step / 1e9:.1f}"
        lines.append(
            f"GB received      {', '.join([*kinds, f'total {total}'])} (a device and step, from the program)"
        )
    if made.tokens_per_second is not None:
        times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in made.bound_seconds.items())
        lines.append(
            f"seconds a step   at least {max(made.bound_seconds.values()):.2f}: a roofline model of peak "
            f"numbers, not measured ({times})"
        )
        lines.append(f"tokens/s         at most {made.tokens_per_second:,.0f} by that model")
    if (rolled := made.rollouts) is not None:
        lines.append(
            f"rollouts         {'fit' if rolled.fits else 'do not fit'}; GiB a device: arguments "
            f"{gib(rolled.argument_bytes)}, temporaries {gib(rolled.temporary_bytes)}, at one time "
            f"{gib(rolled.peak_bytes)}, the step's state beside them {gib(rolled.beside_bytes)}"
        )
    lines += [f"to make it fit   {text}" for text in made.advice]
    return "\n".join(lines)


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return dataclasses.asdict(made)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    """Of arrays with shardings, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
