"""Reinforcement learning as a whole run, tiny: it goes on exactly, writes what it did, and refuses early."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from iv3jax.checkpoint.load import load
from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling
from iv3jax.mcr.grammar import GrammarConfig
from iv3jax.mcr.rewards import RewardConfig
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.tools import ToolConfig
from iv3jax.mcr.trace import read_traces, show
from iv3jax.train import loop
from iv3jax.train.collect_config import CollectConfig, TracesConfig
from iv3jax.train.config import CheckpointConfig, MeshConfig, TrainConfig, experiment
from iv3jax.train.optimizer import OptimizerConfig
from iv3jax.train.run import run

SMALL = TrainConfig(
    stage="rl",
    steps=4,
    rows=2,
    accumulate=2,
    length=224,
    frozen=("model.visual.*",),
    mesh=MeshConfig(data=1),
    optimizer=OptimizerConfig(kind="adamw", learning_rate=1e-3, warmup=0.0, decay=0.0),
    checkpoint=CheckpointConfig(every=2, keep=4),
    data=DataConfig(sources=(SourceConfig("task:read", options=("count=50",)),)),
    collect=CollectConfig(prompts=4, group=2, attempts=2, frames=2),
    rollout=RolloutConfig(
        steps=2,
        budget=112,
        slots=8,
        sampling=Sampling(temperature=1.0),
        grammar=GrammarConfig(thought_tokens=3, text_tokens=3, answer_tokens=3, tools=("zoom", "answer")),
        tools=ToolConfig(frames=2, memory=2),
    ),
    # Calls differ between random rollouts, right answers do not.
    reward=RewardConfig({"exact": 1.0, "step": 0.1}),
    traces=TracesConfig(every=2, count=3),
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch):
    """As on a machine with one; compiling for eight takes most of a minute."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_learns_from_its_rollouts_and_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = run(SMALL, tmp_path / "whole")
    found = lines(tmp_path / "whole")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    first, second = found[:2]
    # Before its first update the policy is what it was, to the model it began with too.
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-8)
    assert first["correction"] == pytest.approx(1, abs=1e-3) and first["entropy"] > 0
    assert second["ratio"] != 1 and second["clipped"] > 0
    assert first["answered"] == 1 and 1 <= first["calls"] <= 2 and first["overflow"] == 0
    assert "reward" in first and "reward" not in second
    assert first["reward_step"] == -first["calls"]
    assert 4 <= first["groups"] <= 8 and first["learned_groups"] <= 4
    assert all(line["compiles"] == found[1]["compiles"] for line in found[2:])
    # The tower stays, the decoder moves.
    steps = [load(f"{tmp_path / 'whole'}@{step}").params for step in (2, 4)]
    jax.tree.map(np.testing.assert_array_equal, steps[0]["visual"], steps[1]["visual"])
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), *(x["language_model"] for x in steps))
    assert min(jax.tree.leaves(moved)) > 0
    traces = read_traces(tmp_path / "whole" / "traces" / "4.jsonl")
    assert len(traces) == 3 and "Which number is shown?" in traces[0]["question"]
    assert traces[0]["reward"]["step"] == -len(traces[0]["steps"]) and "answer:" in show(traces[0])

    # Killed within the second round, after the checkpoint of the first.
    reported = loop._Meter.push

    def push(self, step, metrics, given):
        if step == 3:
            raise RuntimeError("gone")
        return reported(self, step, metrics, given)

    monkeypatch.setattr(loop._Meter, "push", push)
    with pytest.raises(RuntimeError, match="gone"):
        run(SMALL, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again" / "checkpoints").iterdir()} == {"2"}
    monkeypatch.setattr(loop._Meter, "push", reported)
    again = run(SMALL, tmp_path / "again")
    for name in ("loss", "reward", "grad_norm", "kl", "ratio"):
        theirs = [line[name] for line in lines(tmp_path / "again") if name in line]
        assert theirs == [line[name] for line in found if name in line]
    jax.tree.map(np.testing.assert_array_equal, load(whole).params, load(again).params)
    mine = (tmp_path / "again" / "traces" / "4.jsonl").read_text()
    assert mine == (tmp_path / "whole" / "traces" / "4.jsonl").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage=rll", "did you mean 'rl'"),
        ("collect.group=1", "a group of one"),
        ("collect.prompts=3", "no multiple of the 32 rows"),
        ("steps=7", "steps 7 is no multiple of 4"),
        ("checkpoint.every=6", "checkpoint.every 6 is no multiple of 4"),
        ("collect.grup=4", "did you mean 'group'"),
        ('rollout.grammar.tools=["zom", "answer"]', "unknown tool 'zom'; did you mean 'zoom'"),
        ("rollout.budget=320", "there is no room for the prompt"),
        ("rollout.sampling.temperature=0", "is 0"),
        ("rollout.patience=many", "'many' is no float"),
        ("reward.weights.exakt=1", "unknown part 'exakt'; did you mean 'exact'"),
        ("rl.kind=gspoo", "did you mean 'gspo'"),
        ("mesh.context=2", "not split over it"),
        ("mesh.tensor=2", "not split over it"),
        ("held_out.every=4", "of the supervised stages"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(override: str, words: str):
    with pytest.raises(UserError, match=words):
        experiment("rl:tiny", [override])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(frozen=()), r"the tower is trained; add model\.visual\.\* to frozen"),
        (dict(rollout=replace(SMALL.rollout, budget=20)), "the budget of 20 tokens is smaller than"),
    ],
)
def test_what_only_the_model_tells_is_refused_before_compiling(changes: dict, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        run(replace(SMALL, **changes), tmp_path)
