"""The training loop: batches in, parameters out, with a progress bar.

Checkpoints and resuming are not here yet: a run is a few minutes long so far.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iv3jax import ops
from iv3jax.compiles import Stopwatch
from iv3jax.errors import UserError
from iv3jax.models.batch import LOGICAL_AXES, Batch, dealt
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.sharding import make_mesh, param_shardings, partition_spec, zigzag
from iv3jax.train.config import TrainConfig
from iv3jax.train.loss import cross_entropy, reduced, token_weights
from iv3jax.train.optimizer import make_optimizer
from iv3jax.typing import Array, Params

PLAIN_EVERY = 25
"""Steps between two lines of progress where there is no terminal to draw a bar on."""


def train(
    model: InternVideo3,
    config: TrainConfig,
    batch_at: Callable[[int], Batch],
    title: str,
    mesh: Mesh | None = None,
    params: Params | None = None,
) -> Params:
    """Trains a model.

    Args:
        batch_at: step → its batch, the same for the same step; called ahead, in a thread.
        title: what the progress line begins with.
        mesh: the devices to train on; None splits the rows of a batch over all there are.
        params: where to start; None draws random ones.

    Returns:
        The parameters after the last step.

    Raises:
        UserError: a loss that is not finite, naming the step.
    """
    mesh = make_mesh(data=jax.device_count(), fsdp=1) if mesh is None else mesh
    if config.rows % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"rows {config.rows} is no multiple of the {parts} devices that share a batch")
    boxed = boxed_params(model)
    shardings = param_shardings(boxed, mesh)
    if params is None:
        params = init_params(model, jax.random.key(config.seed), shardings)
    else:
        # A copy: the steps overwrite their own in place.
        params = jax.device_put(params, shardings, may_alias=False)
    optimizer = make_optimizer(config.optimizer, config.steps, boxed)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(partial(_step, model, optimizer), donate_argnums=(0, 1))
    watch = Stopwatch()
    tokens = 0
    with jax.set_mesh(mesh), _Display(title, config.steps) as display:
        for step, batch in enumerate(_ahead(batch_at, config.steps)):
            tokens += int(np.sum(batch.segment_ids != 0))
            if (parts := mesh.shape["context"]) > 1:
                batch = dealt(batch, zigzag(batch.input_ids.shape[1], parts))
            batch = jax.device_put(batch, _shardings(batch, mesh))
            params, state, loss = update(params, state, batch)
            if not np.isfinite(loss):
                raise UserError(f"the loss is {float(loss)} at step {step}; lower the learning rate")
            display.show(step + 1, float(loss), tokens / watch.seconds)
            if step == 0:
                display.say(f"kernels: {ops.log_line()}")
    return params


def supervised_loss(model: InternVideo3, params: Params, batch: Batch) -> Array:
    """The mean cross-entropy of a batch's trained tokens."""
    out = model.apply({"params": params}, batch)
    if batch.labels is None:
        raise ValueError("a batch without labels has no loss")
    weights = token_weights(batch.labels, batch.segment_ids, "token")
    return reduced(cross_entropy(model, params, out.hidden, batch.labels), weights)


def _step(
    model: InternVideo3, optimizer: optax.GradientTransformation, params: Params, state: Any, batch: Batch
) -> tuple[Params, Any, Array]:
    loss, gradients = jax.value_and_grad(partial(supervised_loss, model))(params, batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, jnp.asarray(loss)


def _shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Where each field of a batch goes."""
    return Batch(
        *(
            None if value is None else NamedSharding(mesh, partition_spec(axes))
            for value, axes in zip(batch, LOGICAL_AXES, strict=True)
        )
    )


def _ahead(batch_at: Callable[[int], Batch], steps: int) -> Iterator[Batch]:
    """Each step's batch, two of them being made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(batch_at, step) for step in range(min(2, steps))]
        for step in range(steps):
            batch = waiting.pop(0).result()
            if step + 2 < steps:
                waiting.append(pool.submit(batch_at, step + 2))
            yield batch


class _Display:
    """A bar on a terminal, else a line every PLAIN_EVERY steps."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps, self._loss = title, steps, float("nan")
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s ·"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns) if sys.stdout.isatty() else None

    def __enter__(self) -> "_Display":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._steps, loss=float("nan"), speed=0.0)
        else:
            print(f"{self._title}: {self._steps} steps", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        (print if self._bar is None else self._bar.console.print)(text)

    def show(self, step: int, loss: float, speed: float) -> None:
        """Reports a finished step; the loss shown is smoothed over about 20 steps."""
        self._loss = loss if np.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=self._loss, speed=speed)
        elif step % PLAIN_EVERY == 0 or step == self._steps:
            text = f"{self._title}: step {step}/{self._steps} loss {self._loss:.3f} {speed:,.0f} tokens/s"
            print(text, flush=True)
