"""The minimal supervised loop on the digit task: it learns, it repeats, it refuses what cannot work."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from iv3jax.checkpoint.load import load
from iv3jax.errors import UserError
from iv3jax.models.batch import Batch, fake_batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.config import TrainConfig, experiment
from iv3jax.train.digits import train_digits
from iv3jax.train.loop import supervised_loss, train
from iv3jax.train.optimizer import OptimizerConfig

TINY = InternVideo3(preset("tiny"))
SMALL = TrainConfig(steps=30, rows=8, length=16)


@pytest.fixture(scope="module")
def one_device() -> Mesh:
    """Compiling for eight takes most of a minute."""
    return make_mesh(jax.devices()[:1])


def one_batch(step: int) -> Batch:
    """The same batch at every step."""
    return fake_batch(TINY.config, rows=8, length=16, chunks=2)


@pytest.mark.medium
def test_a_batch_is_learned_by_heart(one_device: Mesh, capsys: pytest.CaptureFixture[str]):
    params = train(TINY, SMALL, one_batch, "test", one_device)
    loss = supervised_loss(TINY, jax.device_get(params), one_batch(0))
    # log(256) = 5.5 at the start.
    assert loss < 2.0
    out = capsys.readouterr().out
    assert "test: 30 steps" in out and "step 30/30 loss" in out and "tokens/s" in out


@pytest.mark.medium
def test_a_run_repeats_bit_for_bit(one_device: Mesh):
    runs = [train(TINY, replace(SMALL, steps=3), one_batch, "test", one_device) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, runs))


def test_rows_must_divide_over_the_devices():
    with pytest.raises(UserError, match="rows 5 is no multiple of the 8 devices"):
        train(TINY, TrainConfig(steps=1, rows=5), one_batch, "test")


@pytest.mark.medium
def test_a_loss_that_is_not_finite_stops_the_run(one_device: Mesh):
    def poisoned(step: int) -> Batch:
        batch = one_batch(step)
        patches = batch.patches.astype(np.float32)
        return batch._replace(patches=np.full_like(patches, np.nan) if step == 2 else patches)

    with pytest.raises(UserError, match="step 2"):
        train(TINY, replace(SMALL, steps=4), poisoned, "test", one_device)


@pytest.mark.medium
def test_given_parameters_are_where_it_starts_and_stay_as_they_are(one_device: Mesh):
    given = init_params(TINY, jax.random.key(7), param_shardings(boxed_params(TINY), one_device))
    before = jax.device_get(given)
    still = OptimizerConfig(learning_rate=0.0, adam_learning_rate=0.0)
    params = train(TINY, replace(SMALL, steps=1, optimizer=still), one_batch, "test", one_device, given)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), before)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(given), before)


@pytest.mark.medium
def test_the_demo_experiment_runs_and_its_model_loads(tmp_path):
    folder = train_digits(experiment("digits:smoke"), tmp_path)
    # As `export` writes it, so that transformers loads it too.
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "modeling_internvideo3.py",
        "preprocessor_config.json",
        "tokenizer.json",
        "video_preprocessor_config.json",
    }
    loaded = load(folder)
    assert loaded.config == preset("tiny")
    assert loaded.processor.video_pixels == (1024, 4096)
    # It goes on from there, wherever the shape is from.
    more = replace(experiment("digits:smoke"), steps=1, preset="nothing", init=str(folder))
    assert load(train_digits(more, tmp_path / "more")).config == loaded.config
