"""launch/xm.py through XManager's local executor, in an environment that uv makes for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pair import clean_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
XMANAGER = "xmanager==0.8.5"
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs launch/xm.py with flags and overrides."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not installed (extra dev)")
    home = tmp_path_factory.mktemp("xm")
    environment = os.environ | {"VIRTUAL_ENV": str(home / "venv")}
    for words in (["venv", "--python", sys.executable, home / "venv"], ["pip", "install", XMANAGER]):
        done = subprocess.run([uv, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(*words: str) -> subprocess.CompletedProcess:
        # XManager keeps a data base of experiments in the home.
        return subprocess.run(
            [home / "venv" / "bin" / "xmanager", "launch", ROOT / "launch" / "xm.py", "--", *words],
            env=clean_environment() | {"HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def iv3(tmp_path: Path) -> Path:
    """A command that writes down how it was called, and fails for seed 13."""
    path = tmp_path / "iv3"
    path.write_text(
        f'#!/bin/bash\n{{ printf "[%s]" "$@"; echo; }} >>{tmp_path}/calls\n[ "${{*: -1}}" != seed=13 ]\n'
    )
    path.chmod(0o755)
    return path


def test_each_seed_runs_the_same_command(launch: Launch, iv3: Path, tmp_path: Path) -> None:
    flags = ["--config=sft:short", f"--out={tmp_path}/out", "--seeds=3,4", f"--iv3={iv3}"]
    done = launch(*flags, "steps=5", "note=two words")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"[train][--config][sft:short][--out][{tmp_path}/out/seed-{n}][steps=5][note=two words][seed={n}]"
        for n in (3, 4)
    ]


def test_a_failed_run_is_an_error_and_the_last(launch: Launch, iv3: Path, tmp_path: Path) -> None:
    flags = ["--config=sft:short", f"--out={tmp_path}/out", "--seeds=3,13,4", f"--iv3={iv3}"]
    assert launch(*flags).returncode != 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_what_is_no_override_is_refused(launch: Launch, iv3: Path) -> None:
    done = launch("--config=sft:short", "--out=o", f"--iv3={iv3}", "steps")
    assert done.returncode != 0 and "'steps' is no override" in done.stdout + done.stderr


def test_it_trains(launch: Launch, tmp_path: Path) -> None:
    """The real command, a few steps of it."""
    done = launch(f"--out={tmp_path}/out", "--config=digits:smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "seed-0" / "model" / "model.safetensors").is_file()
