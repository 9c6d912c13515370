"""How processes find each other: what an environment is read as, and two real processes over gloo."""

import jax
import numpy as np
import pytest
from pair import outputs, pair

from iv3jax.distributed import _arguments, startup_lines
from iv3jax.errors import UserError
from iv3jax.sharding import make_mesh

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
}
BATCH_SHELL = {key: value for key, value in TASK.items() if not key.startswith("SLURM_STEP")}
SCRIPT = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from iv3jax.distributed import start, startup_lines
from iv3jax.sharding import make_mesh
hosts = start()
assert start() is hosts
mesh = make_mesh()
if hosts.process == 0:
    print("\\n".join(startup_lines(mesh, 123_456_789)))
rows = np.arange(2, dtype=np.float32) + 10 * hosts.process
x = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("fsdp")), rows)
print("sum", float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(x)))
"""


def test_one_process_is_left_alone() -> None:
    assert _arguments({}) is None
    assert _arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}) is None
    # `srun --ntasks=1` inside a job of many tasks counts as its own step does.
    assert _arguments(TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_the_three_variables() -> None:
    assert _arguments(EXPLICIT) == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    # They count before a scheduler's.
    assert _arguments(TASK | EXPLICIT) == _arguments(EXPLICIT)


def test_gpus_of_a_slurm_task() -> None:
    """jax's rule, one GPU a task, is kept only where a node has several tasks that see all its GPUs."""
    all_it_sees = {"local_device_ids": []}
    eight = ",".join(map(str, range(8)))
    assert _arguments(TASK | {"CUDA_VISIBLE_DEVICES": eight}) == {}
    assert _arguments(TASK) == {}
    assert _arguments(TASK | {"CUDA_VISIBLE_DEVICES": "5"}) == all_it_sees
    one_a_node = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "CUDA_VISIBLE_DEVICES": eight}
    assert _arguments(TASK | one_a_node) == all_it_sees
    # The address alone replaces the one that jax takes from Slurm.
    assert _arguments(TASK | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}) == {}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not set"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"),
        (EXPLICIT | {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID not set"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 is not below JAX_NUM_PROCESSES=4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, "count from 0"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four is no number"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "names no port"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS=many is no number"),
        (BATCH_SHELL, "srun did not start this process"),
        (BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, "srun did not start this process"),
    ],
)
def test_environments_that_are_half_set(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        _arguments(environment)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_startup_lines_have_mesh_and_bytes() -> None:
    assert startup_lines(make_mesh(data=2, tensor=2), 1_234_567_890) == [
        "mesh: data 2 × fsdp 2 × context 1 × tensor 2",
        "state: 1.235 GB per device, before activations",
    ]


def test_cpus_talk_through_gloo() -> None:
    assert jax.config.jax_cpu_collectives_implementation == "gloo"


@pytest.mark.medium
def test_two_processes_become_one_program() -> None:
    with pair(SCRIPT) as processes:
        (first, _), (second, _) = outputs(processes)
    # The rows of both: 0, 1, 10, 11.
    total = float(np.sum([0, 1, 10, 11]))
    assert first.splitlines() == [
        "hosts: 2 processes with 1 × cpu each, 2 in all",
        "mesh: data 1 × fsdp 2 × context 1 × tensor 1",
        "state: 0.123 GB per device, before activations",
        f"sum {total}",
    ]
    assert second.splitlines() == [f"sum {total}"]


@pytest.mark.medium
def test_processes_with_unequal_devices_are_refused() -> None:
    with pair("from iv3jax.distributed import start\nstart()", devices=(2, 1)) as processes:
        for _, error in outputs(processes, code=1):
            assert "process 1 has 1 devices and process 0 has 2" in error
