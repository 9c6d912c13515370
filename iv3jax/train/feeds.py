"""What gives the loop its batches: feeds (`data/feed.py`), whose rows become the global batch here, some of
them made of a function of the step; and collectors, which make a batch with the parameters as they are.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv3jax.data.feed import Fed, Feed
from iv3jax.errors import UserError
from iv3jax.models.batch import LOGICAL_AXES, Batch, dealt
from iv3jax.sharding import RULES, partition_spec, zigzag
from iv3jax.typing import Array, Params

_AHEAD = 2


@dataclass(frozen=True)
class Ready:
    """One step's batch, where the step takes it.

    Attributes:
        batch: of all hosts, on the devices: a Batch or a PolicyBatch.
        names: of what it was made of, for messages.
        tokens: of this host's part of it, padding not counted.
        state: (lanes, S), of this host; see `data.feed.Fed`.
        waited: seconds that the loop waited for the host's part of the work.
        numbers: what is to be logged with the step.
    """

    batch: Any
    names: tuple[str, ...]
    tokens: int
    state: np.ndarray
    waited: float
    numbers: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Collector(Protocol):
    """What makes batches with the parameters as they are: that of step i depends on i and on them alone."""

    def collect(self, step: int, params: Params, frozen: Params) -> Ready:
        """The batch of a step, counted from 0; called for one step after the other.

        Args:
            params, frozen: the two halves of the parameters (`trainable.split`).
        """

    def close(self) -> None:
        """Ends its threads."""


def ready(feed: Feed | Collector, step: int, params: Params, frozen: Params, mesh: Mesh) -> Ready:
    """The batch of a step, from whatever gives it."""
    if isinstance(feed, Collector):
        return feed.collect(step, params, frozen)
    fed = next(feed)
    names = tuple(name for row in fed.names for name in row)
    tokens = int(np.sum(fed.batch.segment_ids != 0))
    return Ready(place_batch(fed.batch, mesh), names, tokens, fed.state, fed.waited)


class StepFeed:
    """Batches that depend on the step alone, two being made while one is used. Its state is the step."""

    def __init__(self, batch_at: Callable[[int], Batch], state: np.ndarray | None = None) -> None:
        self._batch_at, self._next = batch_at, 0 if state is None else int(state[0, 0])
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[Future[Batch]] = []
        self._fill()

    def _fill(self) -> None:
        while len(self._waiting) < _AHEAD:
            self._waiting.append(self._pool.submit(self._batch_at, self._next + len(self._waiting)))

    def __next__(self) -> Fed:
        start = time.perf_counter()
        batch = self._waiting.pop(0).result()
        self._next += 1
        self._fill()
        rows = len(batch.input_ids)
        state = np.full((rows, 1), self._next, np.int64)
        return Fed(batch, ((f"step {self._next - 1}",),) * rows, state, time.perf_counter() - start)

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)


def row_group(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this host must have, and how many parts there are.

    Hosts that share a row's context or heads have the same part.

    Raises:
        UserError: a mesh that gives a host rows which do not lie together.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    places = NamedSharding(mesh, PartitionSpec(RULES["batch"])).addressable_devices_indices_map((rows,))
    mine = sorted({index[0].indices(rows)[0] for index in places.values() if index is not None})
    if mine != list(range(mine[0], mine[0] + len(mine))) or rows % len(mine) or mine[0] % len(mine):
        raise UserError(
            f"mesh {dict(mesh.shape)}: this host's devices hold rows {mine} of {rows}; let context "
            "and tensor multiply to a divisor or a multiple of a host's devices"
        )
    return mine[0] // len(mine), rows // len(mine)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This host's rows (NumPy) as its part of the global batch, dealt over the context axis in zig-zag."""
    if (parts := mesh.shape["context"]) > 1:
        batch = dealt(batch, zigzag(batch.input_ids.shape[1], parts))
    return Batch(
        *(
            None if value is None else _placed(np.asarray(value), axes, mesh)
            for value, axes in zip(batch, LOGICAL_AXES, strict=True)
        )
    )


def place_lanes(state: np.ndarray, mesh: Mesh) -> Array:
    """A feed's state (this host's lanes, S) as one array of all hosts' lanes, int32."""
    return _placed(state.astype(np.int32), ("batch", None), mesh)


def _placed(local: np.ndarray, axes: tuple[str | None, ...], mesh: Mesh) -> Array:
    sharding = NamedSharding(mesh, partition_spec(axes))
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    at = axes.index("batch")
    group, groups = row_group(mesh)
    rows = local.shape[at]
    shape = (*local.shape[:at], rows * groups, *local.shape[at + 1 :])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[at].indices(shape[at])
        inner = slice(start - group * rows, stop - group * rows)
        return local[(*index[:at], inner, *index[at + 1 :])]

    return jax.make_array_from_callback(shape, sharding, part)
