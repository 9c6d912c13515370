"""Worker processes: a hung or dying one takes only its task with it, and all end when they are closed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from iv3jax.data.workers import TaskDiedError, TaskTimeoutError, Workers, WorkersClosedError
from iv3jax.errors import UserError


def obey(task: tuple[str, Any]) -> Any:
    """Runs in the processes."""
    what, value = task
    if what == "sleep":
        time.sleep(value)
    elif what == "die":
        os._exit(3)
    elif what == "die once":
        if not os.path.exists(value):
            open(value, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    elif what == "large":
        return os.getpid(), np.full(value, 7, np.uint8)
    return value


class Unwilling:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return int, ("no number",)

    def __call__(self, task: Any) -> Any:
        return task


@pytest.fixture
def workers():
    made = Workers(obey, 2, 2.0)
    yield made
    made.close()


def children() -> int:
    return len(multiprocessing.active_children())


@pytest.mark.medium
def test_a_hung_task_is_killed_and_a_dying_one_is_named(workers, tmp_path):
    first = [workers.submit(("echo", i)) for i in range(6)]
    assert [future.result(60) for future in first] == list(range(6))
    start = time.monotonic()
    hung = workers.submit(("sleep", 3600))
    with pytest.raises(TaskTimeoutError, match="2 seconds"):
        hung.result(60)
    assert time.monotonic() - start < 20
    with pytest.raises(TaskDiedError, match="died 3 times"):
        workers.submit(("die", None)).result(60)
    # Killed once, by whom ever: tried again.
    assert workers.submit(("die once", str(tmp_path / "died"))).result(60) == str(tmp_path / "died")
    after = [workers.submit(("echo", i)) for i in range(6)]
    assert [future.result(60) for future in after] == list(range(6))


@pytest.mark.medium
def test_processes_that_are_killed_at_any_moment_cost_nothing(workers):
    """At work, while they send, and perhaps idle."""
    rng = np.random.default_rng(0)
    known: set[int] = set()

    def kill_one() -> None:
        time.sleep(float(rng.uniform(0, 0.2)))
        os.kill(known.pop(), signal.SIGKILL)

    for _ in range(8):
        futures = [workers.submit(("large", 20_000_000)) for _ in range(4)]
        killer = threading.Thread(target=kill_one)
        if known:
            killer.start()
        for future in futures:
            _, data = future.result(60)
            assert (data == 7).all()
        if killer.ident is not None:
            killer.join()
        # Those that are ready for more.
        alive = {child.pid for child in multiprocessing.active_children()}
        known = {pid for pid, _ in (workers.submit(("large", 1)).result(60) for _ in range(4))} & alive
    assert workers.submit(("echo", "still here")).result(60) == "still here"


@pytest.mark.medium
def test_closing_ends_what_runs_and_what_waits():
    before = children()
    workers = Workers(obey, 1, 600.0)
    running, waiting = workers.submit(("sleep", 3600)), workers.submit(("echo", 1))
    time.sleep(1.0)
    start = time.monotonic()
    workers.close()
    assert time.monotonic() - start < 10
    for future in (running, waiting):
        with pytest.raises(WorkersClosedError):
            future.result(1)
    with pytest.raises(WorkersClosedError):
        workers.submit(("echo", 2))
    assert children() == before


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_workers import obey
from iv3jax.data.workers import Workers

if __name__ == "__main__":
    workers = Workers(obey, 1, 3600.0)
    pid, _ = workers.submit(("large", 1)).result(60)
    workers.submit(("sleep", 3600))
    print(pid, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.medium
@pytest.mark.parametrize("how", ["killed", "left open"])
def test_a_hung_process_ends_with_its_parent(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, str(script), folder, "3600" if how == "killed" else "0.5"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.stdout.close()
    if how == "killed":
        parent.kill()
    # A program that never closed its workers ends, too.
    parent.wait(60)
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)


@dataclass(frozen=True)
class Loaded:
    """Which modules of a set a process has imported that got a `Read`, as all do."""

    read: Any

    def __call__(self, names: set[str]) -> set[str]:
        return names & set(sys.modules)


@pytest.mark.medium
def test_processes_that_read_import_no_jax(tmp_path):
    # Not at the top: the processes import this file.
    from feeding import PROCESSOR, config_of, source, write_corpus

    from iv3jax.data.read import Read
    from iv3jax.data.sources import open_sources

    read = Read([one.source for one in open_sources(config_of(source(write_corpus(tmp_path))))], PROCESSOR)
    workers = Workers(Loaded(read), 1, 60.0)
    try:
        asked = {"jax", "grain", "tensorflow", "torch", "iv3jax.data.video"}
        assert workers.submit(asked).result(60) == {"iv3jax.data.video"}
    finally:
        workers.close()


def is_running(pid: int) -> bool:
    """A process that ended may still be listed where nobody collects it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_processes_a_thread_reads():
    workers = Workers(obey, 0, 0.01)
    start = time.monotonic()
    futures = [workers.submit(("sleep", 0.1)), workers.submit(("echo", 3))]
    # The time limit is not kept: a thread cannot be killed.
    assert [future.result(10) for future in futures] == [0.1, 3]
    assert time.monotonic() - start >= 0.1
    workers.close()


def test_an_error_here_is_the_callers():
    workers = Workers(len, 0, 1.0)
    with pytest.raises(TypeError):
        workers.submit(3).result(10)
    workers.close()


@pytest.mark.medium
def test_workers_that_cannot_start_are_no_tasks_fault(capfd):
    workers = Workers(Unwilling(), 1, 60.0)
    with pytest.raises(UserError, match="did not start"):
        workers.submit(1).result(120)
    workers.close()
    assert "no number" in capfd.readouterr().err
