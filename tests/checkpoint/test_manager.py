"""Checkpoints of a run: whole or not there, the latest and the best, on one mesh or another."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from iv3jax.checkpoint.manager import FOLDER, Checkpoints
from iv3jax.errors import UserError
from iv3jax.sharding import make_mesh


def state_of(step: int, mesh=None):
    """Numbers that tell the step, on a mesh if there is one."""
    state = {"params": {"w": jnp.arange(16.0).reshape(8, 2) + step}, "step": jnp.int32(step)}
    if mesh is None:
        return state
    return jax.device_put(
        state, {"params": {"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, "step": whole(mesh)}
    )


def whole(mesh):
    return NamedSharding(mesh, PartitionSpec())


def shapes(mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole(mesh)), state_of(0))


FEED = np.arange(6, dtype=np.int32).reshape(2, 3)
ONE = make_mesh(jax.devices()[:1])


def test_what_comes_back_is_what_was_saved_on_another_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(7, make_mesh(fsdp=8)), jnp.asarray(FEED), {"config": {"a": [1, "b"]}}, 7)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    for mesh in (ONE, make_mesh(jax.devices()[:2], fsdp=2)):
        found = again.restore(again.latest, shapes(mesh), mesh)
        jax.tree.map(np.testing.assert_array_equal, found.state, state_of(7))
        np.testing.assert_array_equal(found.feed, FEED)
        assert found.record == {"config": {"a": [1, "b"]}} == again.record(7)
    again.close()


def test_the_latest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, None], 1):
        checkpoints.save(state_of(step), jnp.asarray(FEED), {}, step, held_out=loss)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / FOLDER).iterdir()) == [2, 4, 5]
    again = Checkpoints(tmp_path, read_only=True)
    assert (again.latest, again.best) == (5, 2)
    again.close()


def test_a_checkpoint_that_is_half_there_is_never_taken(tmp_path):
    """What a kill leaves, an unfinished folder, is not a checkpoint; a damaged one is refused by name."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_of(step), jnp.asarray(FEED), {}, step)
    checkpoints.close()
    unfinished = tmp_path / FOLDER / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").mkdir()
    again = Checkpoints(tmp_path)
    assert again.latest == 2
    again.close()
    # It is swept away, in a thread.
    deadline = time.monotonic() + 20
    while unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not unfinished.exists()
    for path in (tmp_path / FOLDER / "2").rglob("*"):
        if path.is_file() and "ocdbt" in str(path):
            path.write_bytes(b"")
    again = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"2: this checkpoint cannot be read .*; delete it to go on"):
        again.restore(2, shapes(ONE), ONE)
    again.close()
