"""The training loop of all stages: one state, one step, one feed; saved, stopped and gone on with exactly.

A stage is a Job: what is made small, and where the batches come from: a feed of samples, or a collector that
makes them with the parameters as they are (`feeds.py`). Resuming follows one order: the run's
own latest checkpoint; else what `config.init` names (another run's checkpoint, a model folder); else random
weights.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from iv3jax import ops
from iv3jax.checkpoint.manager import Checkpoints
from iv3jax.compiles import Stopwatch
from iv3jax.data.feed import Feed
from iv3jax.distributed import startup_lines
from iv3jax.errors import UserError
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.changes import check_changes
from iv3jax.train.config import MeshConfig, TrainConfig
from iv3jax.train.display import Display
from iv3jax.train.distill import TEACHER
from iv3jax.train.feeds import Collector, Ready, place_lanes, ready, row_group
from iv3jax.train.metrics import MetricLog
from iv3jax.train.objective import Objective
from iv3jax.train.optimizer import learning_rate, make_optimizer
from iv3jax.train.preempt import Preemption
from iv3jax.train.profile import Profiler
from iv3jax.train.state import TrainState, new_state, state_shapes
from iv3jax.train.step import Metrics, make_step
from iv3jax.train.trainable import join, split, trainable
from iv3jax.typing import Params


@dataclass(frozen=True)
class Job:
    """What a run trains.

    Attributes:
        model, config: its shape and its numbers.
        objective: what is made small.
        open_feed: (state of this host's lanes, or None at the start; this host's part of the rows; number of
            parts) → the batches, or what makes them.
        start: shardings → whole parameters to begin with, made where they say.
        title: what the progress line begins with.
        held_out: opens the same batches of held-out samples each time, if the config wants them measured.
        beside: the whole parameters that the run began with → those of the model that is compared with, a
            reference or a teacher; they lie among the frozen ones at TEACHER.
        together: steps that learn from what was collected at one time; a run stops and is saved between them.
    """

    model: InternVideo3
    config: TrainConfig
    objective: Objective
    open_feed: Callable[[np.ndarray | None, int, int], Feed | Collector]
    start: Callable[[Params], Params]
    title: str
    held_out: Callable[[], list[Any]] | None = None
    beside: Callable[[Params], Params] | None = None
    together: int = 1


class Stopped(Exception):  # noqa: N818 — no error: the run was asked to stop, and can go on
    """The run was asked to stop and has saved what it has.

    Attributes:
        step: steps that are done. exit_code: what the process should end with.
    """

    def __init__(self, step: int, exit_code: int) -> None:
        super().__init__(f"stopped after step {step}; the same command goes on")
        self.step, self.exit_code = step, exit_code


def mesh_of(config: MeshConfig, devices: Any = None) -> Mesh:
    """The mesh a config asks for; 0 takes what the others leave.

    Raises:
        UserError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    if zeros := [axis for axis, size in sizes.items() if size == 0]:
        if len(zeros) > 1:
            raise UserError(f"mesh: {' and '.join(zeros)} are 0; only one axis can take what is left")
        named = math.prod(size for size in sizes.values() if size)
        if named < 1 or len(devices) % named:
            raise UserError(f"mesh {sizes}: {named} does not divide the {len(devices)} devices there are")
        sizes[zeros[0]] = len(devices) // named
    return make_mesh(devices, **sizes)


def train(job: Job, mesh: Mesh | None = None, out: Path | None = None) -> Params:
    """Trains a model, going on from the latest checkpoint of OUT if there is one.

    Args:
        mesh: the devices to train on; None takes the config's over all there are.
        out: for checkpoints and metrics; None keeps nothing.

    Returns:
        The whole parameters after the last step, those that were not trained included.

    Raises:
        Stopped: by SIGTERM or an interrupt, with everything saved.
        UserError: a loss that is not finite, naming step and samples; a checkpoint of another run; what the
            mesh does not divide.
    """
    run = _Run(job, mesh_of(job.config.mesh) if mesh is None else mesh, out)
    with ExitStack() as stack, jax.set_mesh(run.mesh):
        return run.all_steps(stack)


class _Run:
    """One call of `train`: the objects that all its steps share."""

    def __init__(self, job: Job, mesh: Mesh, out: Path | None) -> None:
        config = job.config
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.rows % parts:
            raise UserError(f"rows {config.rows} is no multiple of the {parts} devices that share a batch")
        self.job, self.mesh, self.out = job, mesh, out
        self.boxed = boxed_params(job.model)
        self.shardings = param_shardings(self.boxed, mesh)
        self.trained = trainable(job.model, config.frozen)
        self.optimizer = make_optimizer(config.optimizer, config.steps, split(self.boxed, self.trained)[0])
        self.lr = learning_rate(config.optimizer, config.steps)
        self.lead = jax.process_index() == 0

    def all_steps(self, stack: ExitStack) -> Params:
        config, job = self.job.config, self.job
        checkpoints = None
        if self.out is not None:
            checkpoints = Checkpoints(self.out, config.checkpoint.keep)
            stack.callback(checkpoints.close)
        state, frozen, lanes = self._begin(checkpoints)
        done = int(state.step)
        feed = job.open_feed(lanes, *row_group(self.mesh))
        stack.callback(feed.close)
        log = None
        if self.out is not None and self.lead:
            log = MetricLog(self.out, done, dataclasses.asdict(config))
            stack.callback(log.close)
        display = stack.enter_context(Display(job.title, config.steps, done, quiet=not self.lead))
        for line in startup_lines(self.mesh, _bytes_of_a_device((state, frozen))):
            display.say(line)
        # A run that keeps nothing is stopped as any program is.
        preemption = None if checkpoints is None else stack.enter_context(Preemption())
        profiler = stack.enter_context(Profiler(self.out))
        places = split(self.shardings, self.trained)[0]
        # The new state lies where the old one lay: elsewhere, the next step would be compiled anew.
        whole = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(
            make_step(self.optimizer, job.objective, config.accumulate, places),
            donate_argnums=(0,),
            out_shardings=(whole, None),
        )
        meter = _Meter(self.lr, config.on_nonfinite)
        held_out = _HeldOut(job, frozen) if job.held_out is not None and config.held_out.every else None
        for number in range(done, config.steps):
            profiler.at(number)
            given = ready(feed, number, state.params, frozen, self.mesh)
            state, metrics = step(state, frozen, given.batch)
            # Its memory is wanted for the next.
            given = dataclasses.replace(given, batch=None)
            if number == done:
                display.say(f"kernels: {ops.log_line()}")
            # One step late, so that the devices never wait for the host to look.
            self._report(meter.push(number + 1, metrics, given), log, display)
            measured = None
            if held_out is not None and (
                (number + 1) % config.held_out.every == 0 or number + 1 == config.steps
            ):
                self._report(meter.flush(), log, display)
                measured = held_out(state.params)
                display.say(f"{job.title}: step {number + 1} held-out loss {measured:.4f}")
                if log is not None:
                    log.write(number + 1, {"held_out_loss": measured})
            stop = preemption is not None and preemption.requested(number + 1)
            stop = stop and (number + 1) % job.together == 0
            due = config.checkpoint.every and (number + 1) % config.checkpoint.every == 0
            if checkpoints is not None and (
                stop or due or measured is not None or number + 1 == config.steps
            ):
                # What is saved has been looked at.
                self._report(meter.flush(), log, display)
                self._save(checkpoints, state, given.state, number + 1, measured)
            if preemption is not None and stop and number + 1 < config.steps:
                raise Stopped(number + 1, preemption.exit_code)
        self._report(meter.flush(), log, display)
        return {name: x for name, x in join(state.params, frozen).items() if name != TEACHER}

    def _begin(self, checkpoints: Checkpoints | None) -> tuple[TrainState, Params, np.ndarray | None]:
        """State, frozen parameters and the feed's lanes: from the latest checkpoint, else the job's start."""
        job, config = self.job, self.job.config
        latest = None if checkpoints is None else checkpoints.latest
        if checkpoints is None or latest is None:
            params, frozen = self._halves()
            # A copy: the steps overwrite their own in place.
            params = jax.device_put(params, split(self.shardings, self.trained)[0], may_alias=False)
            return new_state(params, self.optimizer, config.seed, self.mesh), frozen, None
        check_changes(checkpoints.record(latest)["config"], config, checkpoints.folder)
        boxed, untrained = split(self.boxed, self.trained)
        frozen = self._halves()[1] if job.beside is not None or jax.tree.leaves(untrained) else {}
        places = split(self.shardings, self.trained)[0]
        restored = checkpoints.restore(
            latest, state_shapes(boxed, places, self.optimizer, self.mesh), self.mesh
        )
        group, groups = row_group(self.mesh)
        lanes = np.split(restored.feed, groups)[group]
        return TrainState(**restored.state), frozen, lanes

    def _halves(self) -> tuple[Params, Params]:
        """What the job begins with: the parameters to train, and the frozen ones with those beside them."""
        whole = self.job.start(self.shardings)
        params, frozen = split(whole, self.trained)
        if self.job.beside is not None:
            frozen[TEACHER] = self.job.beside(whole)
        return params, frozen

    def _save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        lanes: np.ndarray,
        step: int,
        held_out: float | None,
    ) -> None:
        record = {"config": dataclasses.asdict(self.job.config)}
        checkpoints.save(state._asdict(), place_lanes(lanes, self.mesh), record, step, held_out)

    def _report(self, numbers: "_Numbers | None", log: MetricLog | None, display: Display) -> None:
        if numbers is not None:
            display.show(numbers.step, numbers.values)
            if log is not None:
                log.write(numbers.step, numbers.values)


def _bytes_of_a_device(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@dataclass(frozen=True)
class _Numbers:
    step: int
    values: dict[str, float]


class _Meter:
    """Turns metrics on the devices into numbers, one step behind, and refuses what is not finite."""

    def __init__(self, lr: Callable[[int], Any], on_nonfinite: str) -> None:
        self._lr, self._skip = lr, on_nonfinite == "skip"
        self._waiting: deque[tuple[int, Metrics, Ready]] = deque()
        self._watch, self._tokens, self._waited, self._skipped = Stopwatch(), 0, 0.0, 0

    def push(self, step: int, metrics: Metrics, given: Ready) -> _Numbers | None:
        """Takes a step's metrics, gives the one's before."""
        before = self.flush()
        self._waiting.append((step, metrics, given))
        return before

    def flush(self) -> _Numbers | None:
        """What is waiting, if there is."""
        if not self._waiting:
            return None
        step, metrics, given = self._waiting.popleft()
        metrics = jax.tree.map(float, metrics)
        loss, norm, weight, applied, terms = metrics
        if not applied:
            self._skipped += 1
            if not self._skip:
                names = ", ".join(given.names)
                raise UserError(
                    f"the loss is {loss}, its gradient's norm {norm}, at step {step - 1}; samples: {names}; "
                    'lower the learning rate, look at the samples, or set on_nonfinite="skip"'
                )
        self._tokens += given.tokens
        self._waited += given.waited
        seconds = self._watch.seconds
        values = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(self._lr(step - 1)),
            "trained_tokens": weight,
            "tokens_per_second": self._tokens * jax.process_count() / seconds,
            "wait_share": self._waited / max(seconds, 1e-9),
            "compiles": self._watch.compiles,
            "skipped_steps": self._skipped,
            "seconds": time.time(),
        }
        return _Numbers(step, values | dict(terms) | dict(given.numbers))


class _HeldOut:
    """The objective on held-out batches that stay on the devices' host."""

    def __init__(self, job: Job, frozen: Params) -> None:
        assert job.held_out is not None
        self._batches, self._frozen = job.held_out(), frozen

        def sums(params: Params, frozen: Params, batch: Any) -> tuple[Any, Any]:
            weights = job.objective.weights(batch)
            losses = job.objective.losses(join(params, frozen), batch, jax.random.key(0))
            return (losses * weights).sum(), weights.sum()

        self._sums = jax.jit(sums)

    def __call__(self, params: Params) -> float:
        found = [self._sums(params, self._frozen, batch) for batch in self._batches]
        return float(sum(float(x) for x, _ in found) / max(sum(float(y) for _, y in found), 1e-30))
