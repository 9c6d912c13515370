"""Reinforcement learning by two real processes, beside one process with one device."""

import json
from pathlib import Path

import jax
import pytest
from pair import outputs, pair

from iv3jax.train.config import experiment
from iv3jax.train.run import run

SMALL = [
    *("steps=2", "rows=4", "length=224", "checkpoint.every=2", "traces.every=2", "optimizer.warmup=0"),
    *("collect.prompts=4", "collect.group=2", "rollout.steps=2", "rollout.budget=112", "rollout.slots=4"),
    *(f"rollout.grammar.{name}_tokens=3" for name in ("thought", "text", "answer")),
]
SCRIPT = """
from iv3jax.train.config import experiment
from iv3jax.train.run import run
run(experiment("rl:tiny", {overrides}), {out!r})
"""


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_hosts_learn_what_one_device_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = tmp_path / "one", tmp_path / "two"
    overrides = [*SMALL, "mesh.data=1", "mesh.fsdp=2"]
    with pair(SCRIPT.format(overrides=overrides, out=str(two))) as processes:
        outputs(processes, patience=600)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    run(experiment("rl:tiny", [*SMALL, "mesh.data=1"]), one)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], abs=1e-4), name
    # What is written to be read is whole, not one host's part.
    traces = [[json.loads(line) for line in (out / "traces/2.jsonl").open()] for out in (one, two)]
    assert [t["tokens"] for t in traces[0]] == [t["tokens"] for t in traces[1]]
