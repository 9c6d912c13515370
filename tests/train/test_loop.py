"""The minimal supervised loop on the digit task: it learns, it repeats, it refuses what cannot work."""

import jax
import numpy as np
import pytest

from iv3jax.checkpoint.load import load
from iv3jax.errors import UserError
from iv3jax.models.batch import Batch, fake_batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.presets import preset
from iv3jax.train.config import TrainConfig, experiment
from iv3jax.train.digits import train_digits
from iv3jax.train.loop import supervised_loss, train

TINY = InternVideo3(preset("tiny"))


def one_batch(step: int) -> Batch:
    """The same batch at every step."""
    return fake_batch(TINY.config, rows=8, length=16, chunks=2)


def test_a_batch_is_learned_by_heart(capsys: pytest.CaptureFixture[str]):
    params = train(TINY, TrainConfig(steps=30, rows=8, length=16), one_batch, "test")
    loss = supervised_loss(TINY, jax.device_get(params), one_batch(0))
    # log(256) = 5.5 at the start.
    assert loss < 2.0
    out = capsys.readouterr().out
    assert "test: 30 steps" in out and "step 30/30 loss" in out and "tokens/s" in out


def test_a_run_repeats_bit_for_bit():
    runs = [train(TINY, TrainConfig(steps=3, rows=8, length=16), one_batch, "test") for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, runs))


def test_rows_must_divide_over_the_devices():
    with pytest.raises(UserError, match="rows 5 is no multiple of the 8 devices"):
        train(TINY, TrainConfig(steps=1, rows=5), one_batch, "test")


def test_a_loss_that_is_not_finite_stops_the_run():
    def poisoned(step: int) -> Batch:
        batch = one_batch(step)
        return batch._replace(patches=batch.patches.astype(np.float32) * (np.inf if step == 2 else 1))

    with pytest.raises(UserError, match="step 2"):
        train(TINY, TrainConfig(steps=4, rows=8, length=16), poisoned, "test")


@pytest.mark.medium
def test_the_demo_experiment_runs_and_its_model_loads(tmp_path):
    folder = train_digits(experiment("digits:smoke"), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "video_preprocessor_config.json",
    ]
    loaded = load(folder)
    assert loaded.config == preset("tiny")
    assert loaded.processor.video_pixels == (1024, 4096)
