"""Two processes of one program on this machine, with one CPU device each unless said otherwise."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 120
"""Seconds after which a process that should have ended has failed."""


def clean_environment() -> dict[str, str]:
    """This environment without what says how many devices or processes there are."""
    prefixes = ("SLURM_", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR", "XLA_FLAGS")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


@contextmanager
def pair(script: str, devices: tuple[int, int] = (1, 1)) -> Iterator[list[subprocess.Popen]]:
    """Starts `script` as process 0 and 1 with their numbers of CPU devices; ends what is left of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in (0, 1):
        environment = clean_environment() | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices[number]}",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-u", "-c", script],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()


def outputs(
    processes: list[subprocess.Popen], code: int = 0, patience: float = PATIENCE
) -> list[tuple[str, str]]:
    """Standard output, without gloo's own lines, and error of each, all of which must end with `code`."""
    done = []
    for process in processes:
        out, err = process.communicate(timeout=patience)
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
        done.append(("".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")), err))
    return done
