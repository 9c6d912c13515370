"""The loop: it learns, it repeats, it goes on exactly where it was stopped, and refuses what cannot work."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from iv3jax.checkpoint.manager import FOLDER
from iv3jax.errors import UserError
from iv3jax.models.batch import Batch, fake_batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.config import CheckpointConfig, HeldOutConfig, MeshConfig, TrainConfig
from iv3jax.train.feeds import StepFeed, place_batch
from iv3jax.train.loop import Job, Stopped, mesh_of, train
from iv3jax.train.objective import supervised
from iv3jax.train.optimizer import OptimizerConfig

TINY = InternVideo3(preset("tiny"))
SMALL = TrainConfig(steps=30, rows=8, length=16)
SIX = replace(SMALL, steps=6, checkpoint=CheckpointConfig(every=2))


@pytest.fixture(scope="module")
def one_device() -> Mesh:
    """Compiling for eight takes most of a minute."""
    return make_mesh(jax.devices()[:1])


def one_batch(step: int) -> Batch:
    """The same batch at every step."""
    return fake_batch(TINY.config, rows=8, length=16, chunks=2)


def other_batch(step: int) -> Batch:
    """Another batch at every step."""
    return fake_batch(TINY.config, rows=8, length=16, chunks=2, seed=step)


class Signalling(StepFeed):
    """Sends SIGTERM when a step's batch is taken."""

    def __init__(self, step: int, batch_at, state=None) -> None:
        super().__init__(batch_at, state)
        self._step = step

    def __next__(self):
        fed = super().__next__()
        if int(fed.state[0, 0]) - 1 == self._step:
            os.kill(os.getpid(), signal.SIGTERM)
        return fed


def job(config: TrainConfig, batch_at=one_batch, start=None, held_out=None, feed=StepFeed) -> Job:
    def random(shardings):
        return init_params(TINY, jax.random.key(config.seed), shardings)

    def opened(state, group, groups):
        assert (group, groups) == (0, 1)
        return feed(batch_at, state)

    return Job(TINY, config, supervised(TINY), opened, start or random, "test", held_out)


def same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def logged(out: Path, name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_a_batch_is_learned_by_heart(one_device: Mesh, capsys: pytest.CaptureFixture[str]):
    params = train(job(SMALL), one_device)
    batch, objective = one_batch(0), supervised(TINY)
    weights = objective.weights(batch)
    losses = jax.jit(objective.losses)(jax.device_get(params), batch, jax.random.key(0))
    # log(256) = 5.5 at the start.
    assert (losses * weights).sum() / weights.sum() < 2.0
    out = capsys.readouterr().out
    assert "test: 30 steps" in out and "step 30/30 loss" in out and "tokens/s" in out


@pytest.mark.medium
def test_a_run_goes_on_where_it_was_stopped(one_device: Mesh, tmp_path: Path):
    """Parameters and losses of a run that SIGTERM stopped twice are those of one that was not, to the bit."""
    whole = train(job(SIX, other_batch), one_device, tmp_path / "whole")
    for step in (2, 3):
        with pytest.raises(Stopped) as stopped:
            train(job(SIX, other_batch, feed=partial(Signalling, step)), one_device, tmp_path / "again")
        assert (stopped.value.step, stopped.value.exit_code) == (step + 1, 75)
    same(train(job(SIX, other_batch), one_device, tmp_path / "again"), whole)
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "again", name) == logged(tmp_path / "whole", name)
    # Once more, with nothing left to do.
    same(train(job(SIX, other_batch), one_device, tmp_path / "again"), whole)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(one_device: Mesh, tmp_path: Path):
    """One device for four steps, then eight: losses to float noise."""
    whole = train(job(SIX, other_batch), one_device, tmp_path / "whole")
    half = replace(SIX, steps=6, checkpoint=CheckpointConfig(every=4))

    def stop(step: int) -> Batch:
        if step == 5:
            raise UserError("the machine is gone")
        return other_batch(step)

    with pytest.raises(UserError, match="machine is gone"):
        train(job(half, stop), one_device, tmp_path / "moved")
    moved = train(job(half, other_batch), make_mesh(fsdp=8), tmp_path / "moved")
    for step, loss in logged(tmp_path / "whole").items():
        assert logged(tmp_path / "moved")[step] == pytest.approx(loss, abs=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), jax.device_get(moved), jax.device_get(whole)
    )


@pytest.mark.medium
def test_frozen_parameters_stay_bit_for_bit(one_device: Mesh, tmp_path: Path):
    """Also over a stop; the others move, and the optimiser has no moments of frozen ones."""
    config = replace(SIX, frozen=("model.visual.*",), steps=3, checkpoint=CheckpointConfig(every=1))
    before = init_params(TINY, jax.random.key(0), param_shardings(boxed_params(TINY), one_device))
    for _ in range(2):
        after = train(job(config, other_batch), one_device, tmp_path)
        same(after["visual"], before["visual"])
    moved = jax.tree.map(
        lambda x, y: float(abs(x - y).max()), after["language_model"], before["language_model"]
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_rows_must_divide_over_the_devices():
    with pytest.raises(UserError, match="rows 5 is no multiple of the 8 devices"):
        train(job(TrainConfig(steps=1, rows=5)))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (MeshConfig(data=0, fsdp=0), "only one axis can take what is left"),
        (MeshConfig(data=0, fsdp=3), "3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2), "needs 4 devices, but there are 8"),
    ],
)
def test_meshes_that_do_not_fit(sizes, words):
    with pytest.raises(UserError, match=words):
        mesh_of(sizes)


def test_a_mesh_takes_what_is_left():
    assert dict(mesh_of(MeshConfig(data=0, tensor=2)).shape) == {
        "data": 4,
        "fsdp": 1,
        "context": 1,
        "tensor": 2,
    }


def poisoned(step: int) -> Batch:
    batch = other_batch(step)
    patches = batch.patches.astype(np.float32)
    return batch._replace(patches=np.full_like(patches, np.nan) if step == 2 else patches)


@pytest.mark.medium
def test_a_loss_that_is_not_finite_stops_the_run(one_device: Mesh):
    with pytest.raises(UserError, match=r"at step 2; samples: step 2, .*on_nonfinite"):
        train(job(replace(SMALL, steps=4), poisoned), one_device)


@pytest.mark.medium
def test_a_loss_that_is_not_finite_is_skipped_and_counted(one_device: Mesh, tmp_path: Path):
    params = train(job(replace(SMALL, steps=4, on_nonfinite="skip"), poisoned), one_device, tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(params)))
    assert logged(tmp_path, "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1}


@pytest.mark.medium
def test_given_parameters_are_where_it_starts_and_stay_as_they_are(one_device: Mesh):
    given = init_params(TINY, jax.random.key(7), param_shardings(boxed_params(TINY), one_device))
    before = jax.device_get(given)
    still = OptimizerConfig(learning_rate=0.0, adam_learning_rate=0.0)
    same(train(job(replace(SMALL, steps=1, optimizer=still), start=lambda _: given), one_device), before)
    same(given, before)


@pytest.mark.medium
def test_another_run_is_refused_and_how_it_is_computed_may_change(one_device: Mesh, tmp_path: Path):
    train(job(replace(SIX, steps=2), other_batch), one_device, tmp_path)
    for change, words in (
        (dict(seed=1), "seed = 0, not 1"),
        (dict(optimizer=OptimizerConfig(clip=2.0)), "optimizer.clip = 1.0, not 2.0"),
        (dict(steps=8), "steps = 2, not 8"),
    ):
        with pytest.raises(UserError, match=f"are of a run with {words}; take the old value"):
            train(job(replace(SIX, **dict(steps=2) | change), other_batch), one_device, tmp_path)
    train(
        job(replace(SIX, steps=2, checkpoint=CheckpointConfig(every=1), remat="full"), other_batch),
        one_device,
        tmp_path,
    )


@pytest.mark.medium
def test_the_best_checkpoint_stays(one_device: Mesh, tmp_path: Path):
    """Held-out loss is measured, logged, and decides what is kept beside the latest."""
    config = replace(SIX, held_out=HeldOutConfig(every=2, batches=1), checkpoint=CheckpointConfig(keep=1))
    batch = place_batch(fake_batch(TINY.config, rows=8, length=16, chunks=2, seed=99), one_device)
    train(job(config, other_batch, held_out=lambda: [batch]), one_device, tmp_path)
    losses = logged(tmp_path, "held_out_loss")
    assert list(losses) == [2, 4, 6]
    kept = {int(path.name) for path in (tmp_path / FOLDER).iterdir()}
    assert kept == {6, min(losses, key=losses.__getitem__)}


@pytest.mark.medium
def test_a_trace_on_demand(one_device: Mesh, tmp_path: Path):
    tmp_path.joinpath("profile").write_text("1\n")
    train(job(replace(SMALL, steps=2)), one_device, tmp_path)
    assert list((tmp_path / "traces").rglob("*.xplane.pb")) and not (tmp_path / "profile").exists()
