"""Several processes as one program: found from the environment, connected, and said once at the start.

What a run's devices are split into is in sharding.py; what happens when a scheduler takes the machines away
is in train/preempt.py; the scripts that start the processes are in launch/.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from glob import glob
from typing import Any

import jax
from jax.sharding import Mesh

from iv3jax.errors import UserError

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that describe a process where no scheduler does: host:port of process 0, how many, which one.
jax itself reads the first."""

_CONNECT_SECONDS, _HEARTBEAT_SECONDS = 900, 300
"""How long a process waits for the others to start, and how long for a sign of life from one of them.
jax's own 300 and 100 are too short for hundreds of hosts that read their packages from one disk."""


@dataclass(frozen=True)
class Hosts:
    """The processes of a run and their devices, as one of them sees it.

    Attributes:
        process, processes: this process's number, and how many there are: one a host, if not more.
        local_devices, devices: of this process (each has as many), and of all.
        platform: cpu, gpu or tpu.
        kind: of a device, in the maker's words.
    """

    process: int
    processes: int
    local_devices: int
    devices: int
    platform: str
    kind: str

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        each = "" if self.processes == 1 else f" each, {self.devices} in all"
        kind = self.platform if self.kind.lower() == self.platform else f"{self.platform} ({self.kind})"
        return f"hosts: {processes} with {self.local_devices} × {kind}{each}"


@cache
def start() -> Hosts:
    """Joins the other processes of this run, if there are any; process 0 prints what came together.

    To be called before anything asks jax for a device; a second call changes and prints nothing.
    Slurm's tasks and the workers of a TPU pod are found by themselves, others through the three variables
    above. If the others do not come within 15 minutes, jax ends the process.

    Raises:
        UserError: the environment describes the processes by halves, or they differ in number of devices.
    """
    arguments = _arguments(os.environ)
    if arguments is None and _may_be_pod(os.environ):
        arguments = {}
    if arguments is not None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=_CONNECT_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except ValueError:
            # What jax says where it finds no cluster: a single TPU host without the cloud's metadata.
            if arguments:
                raise
    hosts = _hosts()
    if hosts.processes > 1 and hosts.platform == "cpu":
        # A CPU program from the cache runs its collectives in another order than one compiled here: where
        # process 0 finds it there and process 1 does not, they wait for each other for ever (jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    say(str(hosts))
    return hosts


def say(text: str) -> None:
    """Prints a line, on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def startup_lines(mesh: Mesh, state_bytes_per_device: int) -> list[str]:
    """What is said about a run before its first step, after `start`'s line: its mesh, and bytes per device.

    Args:
        state_bytes_per_device: of parameters, optimiser state and the like on one device.
    """
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {limit / 1e9:.1f} GB" if limit else ""
    return [
        f"mesh: {axes}",
        f"state: {state_bytes_per_device / 1e9:.3f} GB per device{of}, before activations",
    ]


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """How `jax.distributed.initialize` is to be called; None where the environment names one process only."""
    given = {name: environment[name] for name in (PROCESSES, PROCESS) if environment.get(name)}
    address = environment.get(ADDRESS)
    if given:
        missing = [name for name in (ADDRESS, PROCESSES, PROCESS) if not environment.get(name)]
        if missing:
            there = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(f"{there}, but {' and '.join(missing)} not set; set all three, or none of them")
        processes, process = (_number(name, given[name]) for name in (PROCESSES, PROCESS))
        if not 0 <= process < processes:
            raise UserError(f"{PROCESS}={process} is not below {PROCESSES}={processes}; count from 0")
        # jax takes the number of the port for granted.
        if not (address or "").rpartition(":")[2].isdigit():
            raise UserError(f"{ADDRESS}={address} names no port; write HOST:PORT of process 0")
        return {
            "coordinator_address": address,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    tasks = _number("SLURM_NTASKS", environment.get("SLURM_NTASKS") or "1")
    if tasks > 1:
        if environment.get("SLURM_STEP_NUM_TASKS") != str(tasks):
            raise UserError(
                f"Slurm has {tasks} tasks for this job, and srun did not start this process as one of them; "
                "write `srun iv3 …`, or `srun --ntasks=1 iv3 …` to run in one process"
            )
        return {"local_device_ids": []} if _sees_own_gpus(environment, tasks) else {}
    if address and not _may_be_pod(environment):
        raise UserError(f"{ADDRESS}={address}, but {PROCESSES} and {PROCESS} not set; set all three, or none")
    return None


def _sees_own_gpus(environment: Mapping[str, str], tasks: int) -> bool:
    """Whether all GPUs that a Slurm task sees are its own.

    So with one task a node, and where Slurm shows each task its own (--gpus-per-task). Otherwise jax gives
    the first task of a node the first GPU, and so on, which would leave one task of a node with one GPU.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    return str(tasks) == environment.get("SLURM_STEP_NUM_NODES") or (shown != "" and "," not in shown)


def _may_be_pod(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips, and jax is to use them: then it may be one of several."""
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    return (
        wanted
        and importlib.util.find_spec("libtpu") is not None
        and bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))
    )


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text} is no number") from None


def _hosts() -> Hosts:
    """What jax sees, all processes connected."""
    devices = jax.devices()
    counts = Counter(device.process_index for device in devices)
    mine = counts[jax.process_index()]
    if odd := [process for process, count in sorted(counts.items()) if count != counts[0]]:
        raise UserError(
            f"process {odd[0]} has {counts[odd[0]]} devices and process 0 has {counts[0]}; "
            "a run needs as many in each: look for a broken chip, or ask for equal shares"
        )
    return Hosts(
        jax.process_index(),
        jax.process_count(),
        mine,
        len(devices),
        devices[0].platform,
        devices[0].device_kind,
    )
