"""A run that is killed again and again ends with the bytes of one that never was: parameters and log."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from iv3jax.checkpoint.manager import FOLDER

KILLS = 20
STEPS = 120
TIMEOUT = 900

ARGUMENTS = [
    *(
        "preset=tiny",
        f"steps={STEPS}",
        "rows=2",
        "accumulate=2",
        "length=160",
        "chunks=16",
        "checkpoint.every=2",
    ),
    *("data.workers=1", "data.look_ahead=3", "optimizer.kind=adamw", "optimizer.learning_rate=0.001"),
    'data.sources=[{"kind": "task:read"}, {"kind": "task:chase", "options": ["seconds=30,40", "frames=8"]}]',
]


def command(out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "iv3jax.cli",
        "train",
        "--config",
        "digits:smoke",
        "--out",
        str(out),
        *ARGUMENTS,
    ]


def environment() -> dict[str, str]:
    """One device, as a user has it."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def run_to_the_end(out: Path) -> None:
    done = subprocess.run(command(out), env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def losses(out: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_twenty_times_and_the_same_bytes(tmp_path: Path):
    """Killed with signal 9 at random moments: starting, training, writing checkpoints, reading data."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(whole)
    rng = np.random.default_rng(0)
    kills = 0
    for number in range(KILLS):
        # In a group of its own, so that its data workers die with it, as on a machine that goes down; every
        # third time they are left to find out by themselves.
        process = subprocess.Popen(
            command(killed),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        before, start = steps_logged(killed), time.monotonic()
        # Most kills while it trains, some before it has done a step.
        steps = before + int(rng.integers(1, 5)) if number % 4 else before
        while process.poll() is None and steps_logged(killed) < steps and time.monotonic() - start < TIMEOUT:
            time.sleep(0.02)
        time.sleep(float(rng.random()) * (3.0 if number % 4 == 0 else 0.3))
        if process.poll() is None:
            (process.kill if number % 3 == 0 else lambda p=process: os.killpg(p.pid, signal.SIGKILL))()
            kills += 1
        process.wait()
    assert kills == KILLS, "the run was over before the last kill; give it more steps"
    run_to_the_end(killed)
    assert (whole / "model" / "model.safetensors").read_bytes() == (
        killed / "model" / "model.safetensors"
    ).read_bytes()
    assert losses(whole) == losses(killed)
    # Nothing half-written is left, and the last checkpoint is the last step.
    left = [path.name for path in (killed / FOLDER).iterdir()]
    assert str(STEPS) in left and all(name.isdecimal() for name in left)
