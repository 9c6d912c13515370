"""The checkpoints of a run (Orbax): state, feed and a record of what the run is, together or not at all.

    OUT/checkpoints/STEP/     state: parameters, moments, step, key · feed: a line a lane · record: JSON
    OUT/model/                the finished model's folder, which `export` writes

A checkpoint is written beside its place by a thread and renamed, so a killed run leaves none that is half.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from iv3jax.errors import UserError
from iv3jax.typing import Params

FOLDER = "checkpoints"
HELD_OUT = "held_out_loss"
_LANES = "lanes"
_TIMEOUT = 3600
"""Seconds that hosts wait for each other to finish a checkpoint: a large one on slow storage takes long."""

# Orbax tells every step of every save; what matters is said by the training loop.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Restored:
    """A checkpoint's content; see `Checkpoints.save`."""

    step: int
    state: Any
    feed: np.ndarray
    record: dict[str, Any]


class Checkpoints:
    """Those of one run. Close it: what is being written is finished then."""

    def __init__(self, out: Path, keep: int = 2, read_only: bool = False) -> None:
        """Opens OUT/checkpoints, which is made where it is missing unless `read_only`.

        Args:
            keep: how many of the latest stay, beside the best one.
        """
        # Orbax takes absolute paths only.
        self.folder = out.absolute() / FOLDER
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[HELD_OUT],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[HELD_OUT],
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(timeout_secs=_TIMEOUT),
        )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "feed", "record")
        )

    @property
    def latest(self) -> int | None:
        """The last whole checkpoint's step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step with the least held-out loss, None where none was measured."""
        measured = [step for step in self._manager.all_steps() if self._manager.metrics(step)]
        return min(measured, key=lambda step: self._manager.metrics(step)[HELD_OUT], default=None)

    def save(
        self, state: Any, feed: jax.Array, record: Mapping[str, Any], step: int, held_out: float | None = None
    ) -> None:
        """Starts writing a checkpoint; the arrays may be overwritten afterwards.

        Args:
            state: a pytree of arrays. feed: (lanes of all hosts, S). record: what JSON can hold.
            held_out: the loss that the best checkpoint has the least of.
        """
        metrics = None if held_out is None else {HELD_OUT: held_out}
        content = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            feed=ocp.args.StandardSave({_LANES: feed}),
            record=ocp.args.JsonSave(dict(record)),
        )
        self._manager.save(step, args=content, metrics=metrics, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """What the run said of itself at a step."""
        return self._restore(step, record=ocp.args.JsonRestore())["record"]

    def restore(self, step: int, abstract_state: Any, mesh: Mesh) -> Restored:
        """Reads a checkpoint into arrays that lie as `abstract_state` says, on this mesh or another.

        Raises:
            UserError: a checkpoint that is damaged, or of other shapes.
        """
        whole = NamedSharding(mesh, PartitionSpec())
        lanes = self._shapes(step, "feed")[_LANES]
        # Said in full: otherwise Orbax takes the sharding that was saved, perhaps of other devices.
        feed = {_LANES: jax.ShapeDtypeStruct(lanes.shape, np.int32, sharding=whole)}
        found = self._restore(
            step,
            state=ocp.args.StandardRestore(abstract_state),
            feed=ocp.args.StandardRestore(feed),
            record=ocp.args.JsonRestore(),
        )
        return Restored(step, found["state"], np.asarray(found["feed"][_LANES], np.int64), found["record"])

    def params_dtypes(self, step: int) -> dict[tuple[str, ...], Any]:
        """Path → dtype of the parameters in a checkpoint."""
        found = flatten_dict(self._shapes(step, "state")["params"])
        return {path: leaf.dtype for path, leaf in found.items()}

    def restore_params(self, step: int, abstract_params: Params) -> Params:
        """The parameters alone, as shapes with shardings say.

        Raises:
            UserError: a checkpoint that is damaged, or of other shapes.
        """
        wanted = {"params": abstract_params}
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        with self._readable(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(step) / "state", args=args)["params"]

    def _shapes(self, step: int, item: str) -> Any:
        """The pytree of an item, with shapes and dtypes in place of arrays."""
        with self._readable(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.metadata(self.folder / str(step) / item).item_metadata
            if found is None:
                raise ValueError(f"{item} has lost its description")
            return found.tree

    def _restore(self, step: int, **items: Any) -> Any:
        with self._readable(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.folder}/{step}: this checkpoint cannot be read ({first}); delete it to go on from "
                "the one before"
            ) from error

    def wait(self) -> None:
        """Returns when what is being written is there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
