"""launch/slurm on a real Slurm of one node, which a script of ours starts and stops.

Two tasks that find each other, arrays, and a job that is told to leave, goes back into the queue and ends.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pair import clean_environment

from iv3jax.checkpoint.load import load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "launch" / "slurm" / "install_test_slurm.sh"
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"

TOGETHER = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from iv3jax.distributed import start
from iv3jax.sharding import make_mesh
hosts = start()
mesh = make_mesh()
row = np.array([10.0 ** hosts.process], np.float32)
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("fsdp")), row)
print("sum", float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(x)))
"""

# Stands for `iv3 train`: counts to `steps` on all tasks together, saves the count when told to leave, and
# goes on from it.
COUNTER = """
import pathlib, sys, time
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from iv3jax.distributed import start
from iv3jax.sharding import make_mesh
from iv3jax.train.preempt import Preemption
assert sys.argv[1:4] == ["train", "--config", "count"] and sys.argv[4] == "--out", sys.argv
out = pathlib.Path(sys.argv[5])
steps = int(dict(word.split("=") for word in sys.argv[6:])["steps"])
hosts = start()
out.mkdir(parents=True, exist_ok=True)
saved = out / "count"
first = int(saved.read_text()) if saved.exists() else 0
everywhere = NamedSharding(make_mesh(), PartitionSpec())
step = jax.jit(lambda x: x + 1, out_shardings=everywhere)
x = jax.device_put(jnp.int32(first), everywhere)
def save():
    if hosts.process == 0:
        saved.write_text(str(int(x)))
with Preemption() as preemption:
    for number in range(first, steps):
        x = step(x)
        time.sleep(0.02)
        if preemption.requested(number):
            save()
            sys.exit(preemption.exit_code)
        if number == first + 5 and hosts.process == 0:
            (out / "running").touch()
save()
print("finished from", first, "with", int(x))
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm.

    Attributes:
        environment: with which its commands find it.
    """

    environment: dict[str, str]

    def __call__(self, *words: str | Path, **variables: str) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, job: str, seconds: float = 120.0) -> None:
        """Until a job has left the queue."""
        end = time.monotonic() + seconds
        while self("squeue", "--noheader", f"--jobs={job}").strip():
            assert time.monotonic() < end, self("scontrol", "show", "job", job)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start Slurm's daemons")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["bash", INSTALL, folder], capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield Slurm(clean_environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu"})
    finally:
        subprocess.run(["bash", INSTALL, "--stop", folder], check=True, capture_output=True)


def command(path: Path, script: str) -> Path:
    """An executable that runs a Python script with its own arguments."""
    path.write_text(f"#!{sys.executable} -u\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def wait_for(path: Path, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


def test_the_tasks_of_a_step_find_each_other(slurm: Slurm) -> None:
    out = slurm("srun", "--ntasks=2", sys.executable, "-u", "-c", TOGETHER)
    assert out.count("hosts: 2 processes with 1 × cpu each, 2 in all") == 1
    assert out.count("sum 11.0") == 2


def test_a_batch_shell_without_srun_is_told(slurm: Slurm, tmp_path: Path) -> None:
    script = "from iv3jax.distributed import start\nstart()"
    job = ["sbatch", "--parsable", "--ntasks=2", f"--output={tmp_path}/log"]
    slurm.wait(slurm(*job, f"--wrap={sys.executable} -c '{script}'").strip())
    assert "write `srun iv3" in (tmp_path / "log").read_text()


def test_arrays_are_seeds_or_lines_of_a_file(slurm: Slurm, tmp_path: Path) -> None:
    echo = command(tmp_path / "iv3", "import sys\nprint('ran', *sys.argv[1:])")
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optimizer.learning_rate=1e-3\noptimizer.learning_rate=1e-4 rows=8\n")
    variables = {"IV3": str(echo), "CONFIG": "sft:short", "OUT": "o"}
    job = ["sbatch", "--parsable", f"--output={tmp_path}/%A-%a.log", f"--chdir={tmp_path}"]
    seeds = slurm(*job, "--array=0-1", SBATCH, "steps=5", **variables).strip()
    lines = slurm(*job, "--array=2-3", SBATCH, SWEEP=str(sweep), **variables).strip()
    for number in (seeds, lines):
        slurm.wait(number)

    def ran(name: str) -> list[str]:
        return re.findall("^ran (.*)$", (tmp_path / name).read_text(), re.MULTILINE)

    for seed in (0, 1):
        words = f"train --config sft:short --out o/seed-{seed} steps=5 seed={seed}"
        assert ran(f"{seeds}-{seed}.log") == [words]
    words = "train --config sft:short --out o/line-2 optimizer.learning_rate=1e-4 rows=8"
    assert ran(f"{lines}-2.log") == [words]
    assert "has no line 3" in (tmp_path / f"{lines}-3.log").read_text()


def count(slurm: Slurm, folder: Path) -> str:
    """Submits COUNTER's job and waits until it runs; its number."""
    counter = command(folder / "iv3", COUNTER)
    job = slurm(
        *["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={folder}/log", SBATCH, "steps=150"],
        **{"IV3": str(counter), "CONFIG": "count", "OUT": str(folder / "out")},
    ).strip()
    wait_for(folder / "out" / "running")
    return job


@pytest.mark.parametrize("told", ["signal", "requeue"])
def test_a_job_that_must_leave_comes_back_and_finishes(slurm: Slurm, told: str, tmp_path: Path) -> None:
    """Told by a signal, as before its time is over, and by an operator, which signals the shell too."""
    job = count(slurm, tmp_path)
    slurm(*{"signal": ["scancel", "--signal=TERM"], "requeue": ["scontrol", "requeue"]}[told], job)
    slurm.wait(job)
    log = (tmp_path / "log").read_text()
    assert "start 1" in log and "saved and stopped" in log and "start 2" in log, log
    finished = re.findall(r"finished from (\d+) with (\d+)", log)
    assert len(finished) == 2 and finished[0] == finished[1], log
    assert 0 < int(finished[0][0]) < 150 and finished[0][1] == "150", log


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    job = count(slurm, tmp_path)
    slurm("scancel", job)
    slurm.wait(job)
    time.sleep(10)  # for as long as a requeued job waits, and more
    assert not slurm("squeue", "--noheader", f"--jobs={job}").strip()
    log = (tmp_path / "log").read_text()
    assert "saved and stopped" in log and "start 2" not in log and "finished" not in log, log
    assert int((tmp_path / "out" / "count").read_text()) > 0


EXPERIMENT = "digits"
STEPS = 60
OVERRIDES = [f"steps={STEPS}", "rows=2", "checkpoint.every=25"]


def test_training_that_was_preempted_ends_as_one_process_does(slurm: Slurm, tmp_path: Path) -> None:
    """Two tasks, stopped and requeued, beside one process that runs through: parameters ≤ 1e-5 apart.

    The one process has two devices, so that sums over a batch have the same two parts: with one device they
    are rounded otherwise, and what that is worth grows from step to step (1.9e-5 after 30).
    """
    iv3 = Path(sys.executable).with_name("iv3")
    alone, out, log = tmp_path / "alone", tmp_path / "out", tmp_path / "log"
    job = slurm(
        *["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}", SBATCH, *OVERRIDES],
        **{"IV3": str(iv3), "CONFIG": EXPERIMENT, "OUT": str(out)},
    ).strip()
    end = time.monotonic() + 600
    while (steps(out) or 0) < 3:
        assert time.monotonic() < end and slurm("squeue", "--noheader", f"--jobs={job}"), log.read_text()
        time.sleep(0.1)
    slurm("scancel", "--signal=TERM", job)
    slurm.wait(job, 600)
    text = log.read_text()
    assert "hosts: 2 processes" in text and "saved and stopped" in text and "start 2" in text, text
    assert steps(out) == STEPS and f"model written to {out}" in text, text

    words = [iv3, "train", "--config", EXPERIMENT, "--out", alone, *OVERRIDES]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "16"}
    done = subprocess.run(words, env=slurm.environment | devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (flatten_dict(load(str(folder)).params) for folder in (alone, out))
    assert first.keys() == second.keys()
    apart = max(float(np.max(np.abs(first[key] - second[key]))) for key in first)
    assert apart <= 1e-5, apart


def steps(out: Path) -> int | None:
    """The last step that a run has written down."""
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(rows[-1])["step"] if rows else None
