"""From an experiment to a model folder, and a run's folder as a model: `run`, `load`, `export`."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from data.media import write_video
from flax.traverse_util import flatten_dict
from models.peers import tree_difference
from safetensors.numpy import load_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.lora import merged
from iv3jax.cli import main
from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.errors import UserError
from iv3jax.generate.encode import encode
from iv3jax.models.lora import LEAVES, Lora
from iv3jax.models.presets import preset
from iv3jax.train.config import CheckpointConfig, HeldOutConfig, MeshConfig, TrainConfig, experiment
from iv3jax.train.optimizer import OptimizerConfig
from iv3jax.train.run import run

READ = SourceConfig("task:read")
TASKS = TrainConfig(
    steps=3,
    rows=2,
    length=96,
    chunks=12,
    mesh=MeshConfig(data=1),
    optimizer=OptimizerConfig(kind="adamw", learning_rate=1e-2, warmup=0.0, decay=0.0),
    checkpoint=CheckpointConfig(every=1, keep=3),
    data=DataConfig(sources=(READ,)),
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch):
    """As on a machine with one; compiling for eight takes most of a minute."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def logged(folder: Path, name: str) -> float:
    """A number of the last step of the run that a model's folder is of."""
    return json.loads((folder.parent / "metrics.jsonl").read_text().splitlines()[-1])[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps with held-out loss after each."""
    out = tmp_path_factory.mktemp("run")
    held_out = HeldOutConfig(every=1, batches=1, sources=(replace(READ, options=("split=test",)),))
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        assert run(replace(TASKS, held_out=held_out), out) == out / "model"
    return out


@pytest.mark.medium
def test_a_runs_folder_is_its_latest_checkpoint(trained: Path, tmp_path: Path):
    """`load` and `export` take it; what they give is what the run wrote at its end."""
    model = load(trained / "model")
    assert tree_difference(load(trained).params, model.params) == 0
    assert tree_difference(load(f"{trained}@3").params, model.params) == 0
    assert tree_difference(load(f"{trained}@1").params, model.params) > 0
    assert load(f"{trained}@best").config == model.config == preset("tiny")
    export(trained, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / "model" / name).read_bytes()


@pytest.mark.medium
def test_checkpoints_that_are_not_there(trained: Path):
    for which in ("7", "first"):
        with pytest.raises(UserError, match=f"@{which}: no such checkpoint; there are 1, 2, 3"):
            load(f"{trained}@{which}")


@pytest.mark.medium
def test_another_run_goes_on_from_a_run(trained: Path, tmp_path: Path):
    """`init=RUN` starts from its parameters, with new moments and step 0."""
    still = replace(TASKS.optimizer, learning_rate=0.0)
    folder = run(replace(TASKS, init=str(trained), optimizer=still, steps=1), tmp_path)
    assert tree_difference(load(folder).params, load(trained).params) == 0


@pytest.mark.medium
def test_layers_alone_learn_what_scanned_ones_learn(trained: Path, tmp_path: Path):
    """Losses, what is written, and the run's folder as a model, whose own form counts."""
    config = replace(TASKS, init=str(trained / "model"), steps=2)
    scanned = run(config, tmp_path / "scanned")
    alone = run(replace(config, scan_layers=False), tmp_path / "alone")
    assert logged(alone, "loss") == pytest.approx(logged(scanned, "loss"), abs=1e-5)
    assert tree_difference(load(alone).params, load(scanned).params) <= 1e-4
    found = load(tmp_path / "alone")
    assert not found.model.run.scan_layers
    again = load(alone, run=replace(found.model.run))
    assert tree_difference(found.params, again.params) == 0
    with pytest.raises(UserError, match="scan_layers=True; take its model folder"):
        run(replace(config, init=str(trained), scan_layers=False), tmp_path / "other")


@pytest.mark.medium
@pytest.mark.parametrize("weights", ["", "int8"])
def test_low_rank_additions_are_merged_at_the_end(trained: Path, tmp_path: Path, weights: str, capsys):
    """OUT/model is base + additions; the run's folder keeps them apart; OUT/adapter has them alone."""
    config = replace(
        TASKS,
        init=str(trained / "model"),
        lora=Lora(4, 8.0, ("q_proj", "kv_b_proj", "down_proj")),
        weights=weights,
    )
    folder = run(config, tmp_path / "out")
    apart = load(tmp_path / "out")
    additions = {path: x for path, x in flatten_dict(apart.params).items() if path[-1] in LEAVES}
    assert additions and min(float(abs(x).max()) for x in additions.values()) > 0
    base, together = load(trained / "model"), load(folder)
    assert tree_difference(merged(apart).params, together.params) <= 1e-6
    changed = {
        path[-2]
        for path, x in flatten_dict(together.params).items()
        if not np.array_equal(x, flatten_dict(base.params)[path])
    }
    assert changed == {"q_proj", "kv_b_proj", "down_proj"}
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "adapter"), "--adapter"]) == 0
    written = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert written == (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 3 * 3


@pytest.mark.medium
def test_training_reads_videos_from_a_store(trained: Path, tmp_path: Path):
    """The decoder's loss on features from a store is that on decoded videos; a trained tower is refused."""
    video = tmp_path / "clip.mp4"
    write_video(video, 24, height=64, width=64)
    question = [
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "text", "text": "<VIDEO_CONTEXT>What?"},
    ]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "It."}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": 1, "messages": messages}) + "\n")
    model = load(trained / "model")
    processor = model.processor
    data = DataConfig(
        sources=(SourceConfig("internvideo3", path=str(tmp_path / "data.jsonl")),),
        fps=processor.fps,
        min_frames=processor.min_frames,
        max_frames=processor.max_frames,
        video_pixels=processor.video_pixels,
    )
    encode(model, [str(video)], str(tmp_path / "store"), dtype="float32")
    config = replace(TASKS, init=str(trained / "model"), steps=1, frozen=("model.visual.*",), data=data)
    decoded = run(config, tmp_path / "decoded")
    stored = run(replace(config, data=replace(data, features=str(tmp_path / "store"))), tmp_path / "stored")
    # A step of Adam would blow up differences of gradients that are nearly zero.
    for name in ("loss", "grad_norm"):
        assert logged(stored, name) == pytest.approx(logged(decoded, name), rel=1e-5)
    with pytest.raises(UserError, match=r"the tower is trained, but .* add model\.visual\.\* to frozen"):
        run(replace(config, frozen=(), data=replace(data, features=str(tmp_path / "store"))), tmp_path / "no")


@pytest.mark.slow
def test_the_demo_experiment_runs_and_its_model_loads(tmp_path: Path):
    config = replace(experiment("digits:smoke"), mesh=MeshConfig(data=1))
    folder = run(config, tmp_path)
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


def test_a_shape_without_a_tokenizer_is_not_trained_from_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="preset internvideo3_8b has no tokenizer"):
        run(replace(TASKS, preset="internvideo3_8b"), tmp_path)


def test_a_run_lies_on_this_machine():
    with pytest.raises(UserError, match="a run's folder must be local"):
        run(TASKS, "gs://bucket/run")
