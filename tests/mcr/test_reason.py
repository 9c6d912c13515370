"""A question about a file, answered by the loop."""

import json
from pathlib import Path

import numpy as np
import pytest

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.cli import main
from iv3jax.errors import UserError
from iv3jax.mcr.trace import show
from iv3jax.mcr.video import reason
from iv3jax.train.config import experiment
from tests.data.media import write_video

pytestmark = pytest.mark.slow
CONFIG = experiment("rl:tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("loop") / "model"
    export("tiny", folder, random_weights=True)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds."""
    return write_video(tmp_path_factory.mktemp("loop") / "video.mp4", 90)


def test_steps_end_with_an_answer_and_the_prompt_is_the_overview(model: Path, video: Path):
    trace = reason(load(model), video, "what?", CONFIG.rollout, frames=2, fps=8.0)
    # Frames at 0.0, 0.13, …, 2.87 and 2.97 seconds, in pairs.
    assert "<0.1 seconds>[1 vision tokens]<2.9 seconds>[1 vision tokens]what?" in trace["question"]
    assert trace["steps"][-1]["tool"] == "answer" and not trace["overflow"]
    assert "answer: " in show(trace)
    total = trace["tokens"]
    for kind in ("free", "forced", "observation"):
        assert total[kind] == sum(step["tokens"][kind] for step in trace["steps"])


def test_the_command_prints_the_same_trace_every_time(
    model: Path, video: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["ask", str(video), "what?", "--model", str(model), "--loop", "rl:tiny"]
    assert main([*argv, "--json"]) == 0
    trace = json.loads(capsys.readouterr().out)
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == show(trace)


def test_what_cannot_be_asked_is_refused(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    loaded = load(model)
    with pytest.raises(UserError, match="the question is empty"):
        reason(loaded, video, " ", CONFIG.rollout, frames=2, fps=8.0)
    with pytest.raises(UserError, match="no such file"):
        reason(loaded, tmp_path / "absent.mp4", "what?", CONFIG.rollout, frames=2, fps=8.0)
    argv = ["ask", str(video), "what?", "--model", str(model), "--loop", "rll"]
    assert main(argv) != 0
    assert np.char.count(capsys.readouterr().err.strip(), "\n") == 0
