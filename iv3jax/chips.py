"""Chips that are not here: programs compiled for a v5e, v5p or H100 on any machine.

Needs the `chips` extra (libtpu and the CUDA plugin; no driver). What comes out is the real program for that
chip with its real memory use, and one that does not fit is refused by the compiler; nothing is run.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from iv3jax.errors import UserError
from kernels_pallas.choice import Chip, target

CHIPS = {"v5e": Chip("tpu", "v5e"), "v5p": Chip("tpu", "v5p"), "h100": Chip("gpu", "h100")}

_TPU_ENVIRONMENT = {
    # Without these libtpu asks the cloud's metadata server what machine this is.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
 device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(chip: str, topology: str | None = None) -> Sequence[Any]:
    """Devices that programs can be compiled for, and nothing run on.

    Args:
        chip: a key of CHIPS.
        topology: "4x4" chips of a v5e, "2x2x1" of a v5p, "1x1x8" H100s; None is the smallest.

    Raises:
        UserError: an unknown chip or topology, or a package is missing.
    """
    if chip not in CHIPS:
        raise UserError(f"chip {chip!r} is not one of {', '.join(CHIPS)}")
    module = "jax_cuda12_plugin" if chip == "h100" else "libtpu"
    if importlib.util.find_spec(module) is None:
        raise UserError(f"compiling for a {chip} needs {module}: pip install 'iv3jax[chips]'")
    try:
        if chip == "h100":
            found = topologies.get_topology_desc(
                "", platform="cuda", topology=topology or "1x1x1", target_config=_H100
            )
            return found.devices
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        name, config, bounds = {
            "v5e": (f"v5e:{topology or '2x2'}", "default", (2, 2, 1)),
            "v5p": (f"v5:{topology or '2x2x1'}", "megacore", (2, 2, 1)),
        }[chip]
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chip_config_name=config,
            chips_per_host_bounds=bounds,
            num_slices=1,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{chip} chips as {topology}: {str(error).splitlines()[0]}") from error
    return found.devices


def compile_on(chip: str, mesh: Mesh, function: Callable[..., Any], shardings: Any, *shapes: Any) -> Any:
    """Compiles a function for the devices of a mesh → jax's compiled program.

    Args:
        chip: what the mesh's devices are, a key of CHIPS.
        mesh: of `devices`; ambient while the function is traced.
        shardings: a PartitionSpec for each argument, or a pytree of them.
        shapes: a pytree of `jax.ShapeDtypeStruct` an argument.
    """
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        tuple(shardings),
    )
    with target(CHIPS[chip]), jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile()


def compile_for(chip: str, function: Callable[..., Any], *shapes: Any, donate: Sequence[int] = ()) -> Any:
    """Compiles a function for one chip → jax's compiled program (`memory_analysis()`, `as_text()`).

    Args:
        function: traced for that chip, so that operations take its kernels.
        shapes: a pytree of `jax.ShapeDtypeStruct` (or arrays, of which only the shape is used) an argument.
        donate: arguments whose memory the results may take.

    Raises:
        UserError: as `devices`.
    """
    sharding = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with target(CHIPS[chip]):
        return jax.jit(function, donate_argnums=tuple(donate)).lower(*placed).compile()
