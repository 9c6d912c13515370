"""launch/tpu: the commands that the scripts would run, from --dry-run; there is no cloud here to run them in.

What run.sh sends to a host is run here, in a folder that stands for the host's home.
"""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch" / "slurm").iterdir()), *sorted((ROOT / "launch" / "tpu").iterdir())]
TRAIN = ["train", "--config", "sft:short", "--out", "runs/short", "note=two words"]


def dry_run(script: str, *words: str, **variables: str) -> list[list[str]]:
    """The commands that a script prints, taken apart as a shell does."""
    done = subprocess.run(
        ["bash", ROOT / "launch" / "tpu" / script, "--dry-run", *words],
        env=os.environ | {"NAME": "short", "ZONE": "us-east5-a"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_create_asks_for_a_pod() -> None:
    create, describe = dry_run("create.sh", TYPE="v5p-128")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "short"]
    assert set(create[6:]) == {
        "--zone=us-east5-a",
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=short",
    }
    assert describe[4:6] == ["describe", "short"]


def test_create_asks_for_slices() -> None:
    create, _ = dry_run("create.sh", TYPE="v5litepod-256", SLICES="2", SPOT="1")
    assert {"--node-count=2", "--node-prefix=short", "--spot"} < set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create


def test_delete() -> None:
    words = "gcloud compute tpus queued-resources delete short --zone=us-east5-a --force --quiet"
    assert dry_run("create.sh", "--delete") == [words.split()]


def test_an_unknown_chip_is_refused() -> None:
    command = ["bash", ROOT / "launch" / "tpu" / "create.sh", "--dry-run"]
    environment = os.environ | {"NAME": "x", "ZONE": "z", "TYPE": "v99-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "v99-8 is none of" in done.stderr


def test_every_worker_gets_the_same_command() -> None:
    for action in (["install"], TRAIN, ["stop"]):
        last = dry_run("run.sh", *action, SHARE="10.0.0.2:/runs")[-1]
        assert last[:6] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "short"]
        assert {"--worker=all", "--node=all"} < set(last)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A home with an `iv3` that writes down its arguments, then waits for SIGTERM."""
    iv3 = tmp_path / "iv3jax" / ".venv" / "bin" / "iv3"
    iv3.parent.mkdir(parents=True)
    iv3.write_text(
        "#!/bin/bash\ntrap 'echo saved; exit 75' TERM\nprintf '[%s]' \"$@\"; echo\n"
        "for _ in {1..300}; do sleep 0.1; done\n"
    )
    iv3.chmod(0o755)
    return tmp_path


def send(host: Path, *action: str) -> subprocess.CompletedProcess:
    """Does on the stand-in host what an action would do on a real one."""
    [remote] = [word for word in dry_run("run.sh", *action)[-1] if word.startswith("--command=")]
    return subprocess.run(
        ["bash", "-c", remote.removeprefix("--command=")],
        cwd=host,
        capture_output=True,
        text=True,
        timeout=30,
    )


def wait_for(log: Path, words: str) -> None:
    end = time.monotonic() + 20
    while not (log.exists() and words in log.read_text()):
        assert time.monotonic() < end, f"no {words} in {log}"
        time.sleep(0.05)


def test_a_host_trains_once_and_stops_when_told(host: Path) -> None:
    log = host / "iv3jax" / "train.log"
    assert send(host, *TRAIN).returncode == 0
    try:
        wait_for(log, "[train][--config][sft:short][--out][runs/short][note=two words]")
        again = send(host, *TRAIN)
        assert again.returncode == 1 and "it is running" in again.stderr
    finally:
        assert send(host, "stop").returncode == 0
    wait_for(log, "saved")


def test_xpk_starts_the_run_again_after_it_has_saved() -> None:
    variables = {"CLUSTER": "mine", "PROJECT": "p", "TYPE": "v5p-128", "SLICES": "2"}
    [create] = dry_run("xpk.sh", "cluster", "--spot", **variables)
    place = ["--cluster=mine", "--zone=us-east5-a", "--project=p"]
    assert create == ["xpk", "cluster", "create", *place, "--tpu-type=v5p-128", "--num-slices=2", "--spot"]
    *_, workload = dry_run("xpk.sh", *TRAIN, **variables)
    assert workload[:3] == ["xpk", "workload", "create"]
    assert {"--restart-on-exit-codes=75", "--max-restarts=100", "--num-slices=2"} < set(workload)
    remote = workload[-1].removeprefix("--command=").split(" && ")[-1]
    assert shlex.split(remote) == ["exec", ".venv/bin/iv3", *TRAIN]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    """By bash; shellcheck, where it is installed, has nothing to say."""
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
