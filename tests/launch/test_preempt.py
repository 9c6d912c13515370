"""A request to leave: one process, and two that must stop after the same step whichever is told."""

import os
import signal
import subprocess

import pytest
from pair import outputs, pair

from iv3jax.train.preempt import SIGNALS, Preemption

SCRIPT = """
import sys, time
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from iv3jax.distributed import start
from iv3jax.sharding import make_mesh
from iv3jax.train.preempt import Preemption
hosts = start()
everywhere = NamedSharding(make_mesh(), PartitionSpec())
step = jax.jit(lambda x: x + 1, out_shardings=everywhere)
x = jax.device_put(jnp.zeros(()), everywhere)
with Preemption() as preemption:
    for number in range(100_000):
        x = step(x)
        time.sleep(0.01 * (1 + hosts.process))  # unequal hosts
        if preemption.requested(number):
            assert preemption.requested(number)
            print("stopped after", number, int(x))
            sys.exit(preemption.exit_code)
        if number == 2:
            print("ready")
"""


@pytest.mark.parametrize(("name", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_one_process(name: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with Preemption() as preemption:
        assert not preemption.requested(0)
        os.kill(os.getpid(), name)
        assert preemption.requested(1) and preemption.requested(2)
        assert preemption.exit_code == code
    assert [signal.getsignal(other) for other in SIGNALS] == before
    assert capfd.readouterr().err == f"{name.name}: saving after this step, then leaving\n"


def test_a_second_interrupt_does_not_wait() -> None:
    # A process that was started in the background ignores interrupts, and so would pytest's.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Preemption():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Preemption():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.medium
@pytest.mark.parametrize(
    ("told", "name"), [((1,), signal.SIGUSR1), ((0, 1), signal.SIGTERM), ((0,), signal.SIGTERM)]
)
def test_two_processes_stop_after_the_same_step(told: tuple[int, ...], name: signal.Signals) -> None:
    with pair(SCRIPT) as processes:
        for process in processes:
            wait_until_ready(process)
        for number in told:
            processes[number].send_signal(name)
        stops = [out.splitlines()[-1] for out, _ in outputs(processes, code=75)]
    words = stops[0].split()
    assert stops[0] == stops[1] and words[:2] == ["stopped", "after"]
    # Each step added one.
    assert int(words[3]) == int(words[2]) + 1 > 3


def wait_until_ready(process: subprocess.Popen) -> None:
    """Reads its output up to the third step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            return
    raise AssertionError(process.communicate())
