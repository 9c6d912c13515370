"""Chips that are not here: programs compiled for a v5e, v5p or H100 on any machine, and what these can do.

Compiling needs the `chips` extra (libtpu and the CUDA plugin; no driver). What comes out is the real program
for that chip with its real memory use, and one that does not fit is refused by the compiler; nothing is run.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from iv3jax.errors import UserError
from kernels_pallas.choice import Chip, target

CHIPS = {"v5e": Chip("tpu", "v5e"), "v5p": Chip("tpu", "v5p"), "h100": Chip("gpu", "h100")}

GIB = 1 << 30


@dataclass(frozen=True)
class Peak:
    """What a chip can do at most, by its maker's word. No time is ever measured with these.

    Attributes:
        flops: bf16 products, FLOP/s, without sparsity.
        memory_bandwidth: bytes/s.
        network: bytes/s that a chip receives from its neighbours, all links together.
        memory: bytes a program may use: on a TPU where its compiler refuses, on a GPU 0.95 of the device's.
    """

    flops: float
    memory_bandwidth: float
    network: float
    memory: int


PEAKS = {
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, links of 1 600 Gbit/s a chip.
    "v5e": Peak(197e12, 819e9, 200e9, round(15.75 * GIB)),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 2 765 GB/s, links of 4 800 Gbit/s a chip.
    "v5p": Peak(459e12, 2765e9, 600e9, round(95.74 * GIB)),
    # NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways.
    "h100": Peak(989e12, 3.35e12, 450e9, round(0.95 * 84942979072)),
}

NODE = 8
"""H100s of one machine, which NVLink joins."""

NODE_NETWORK = 400e9
"""Bytes/s that such a machine receives: eight adapters of 400 Gbit/s, as in NVIDIA's DGX H100."""


@dataclass(frozen=True)
class Topology:
    """Chips that are wired to each other.

    Attributes:
        name: as people say it; a v5p is counted in cores, two a chip.
        chip: a key of CHIPS.
        shape: chips of a slice along each axis, "4x4x4"; machines and GPUs for H100s.
        slices: how many there are, joined by the data centre's network.
    """

    name: str
    chip: str
    shape: str
    slices: int = 1

    @property
    def count(self) -> int:
        """All chips."""
        return self.slices * math.prod(int(n) for n in self.shape.split("x"))

    @property
    def network(self) -> float:
        """Bytes/s that a chip receives at most.

        Between H100 machines: what their adapters let in, once for all GPUs of a machine.
        """
        peak = PEAKS[self.chip].network
        return min(peak, NODE_NETWORK) if self.chip == "h100" and self.count > NODE else peak


_SHAPES = {
    # Sides as Google Cloud has them; a torus from 16x16 (v5e) and from 4x4x4 (v5p) on.
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {
        8: "2x2x1",
        16: "2x2x2",
        32: "2x2x4",
        64: "2x4x4",
        128: "4x4x4",
        256: "4x4x8",
        512: "4x8x8",
        1024: "8x8x8",
    },
    "h100": {1: "1x1x1", 8: "1x1x8", 16: "1x2x8", 32: "1x4x8", 64: "1x8x8", 128: "1x16x8"},
}
TOPOLOGIES = {
    name: Topology(name, chip, shape)
    for chip, shapes in _SHAPES.items()
    for count, shape in shapes.items()
    for name in [f"h100x{count}" if chip == "h100" else f"{chip}-{count}"]
}
"""Name → what it is; `2*NAME` is two slices of it."""


def topology(name: str) -> Topology:
    """The topology of that name, `v5p-128`, or of several slices, `2*v5p-128`.

    Raises:
        UserError: there is none.
    """
    slices, sign, one = name.partition("*")
    if not sign:
        slices, one = "1", name
    if one not in TOPOLOGIES or not slices.isdigit() or not int(slices):
        raise UserError(
            f"topology {name!r} is unknown; there are {', '.join(TOPOLOGIES)}, and 2*NAME for two slices"
        )
    known = TOPOLOGIES[one]
    if int(slices) > 1 and known.chip == "h100":
        raise UserError(f"topology {name!r}: H100s are not in slices; take h100x{known.count * int(slices)}")
    return Topology(name, known.chip, known.shape, int(slices))


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


def devices(chip: str, topology: str | None = None, slices: int = 1) -> Sequence[Any]:
    """Devices that programs can be compiled for, and nothing run on.

    Args:
        chip: a key of CHIPS.
        topology: "4x4" chips of a v5e, "2x2x1" of a v5p, "1x1x8" H100s; None is the smallest.
        slices: of a TPU, so many of that topology.

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
        name, config, wrap = {
            "v5e": (f"v5e:{topology or '2x2'}", "default", (topology == "16x16",) * 2 + (False,)),
            "v5p": (f"v5:{topology or '2x2x1'}", "megacore", _closed(topology or "2x2x1")),
        }[chip]
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chip_config_name=config,
            chips_per_host_bounds=(2, 2, 1),
            num_slices=slices,
            wrap=wrap,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{chip} chips as {topology}: {str(error).splitlines()[0]}") from error
    return found.devices


def _closed(shape: str) -> tuple[bool, ...]:
    """Which axes of a v5p's slice are rings: all where every side is a multiple of 4."""
    sides = [int(n) for n in shape.split("x")]
    return (all(side % 4 == 0 for side in sides),) * 3


def refused_temporaries(text: str, arguments: int) -> int | None:
    """Bytes of temporaries, from a TPU's compiler's error that a program is too large; None if it names none.

    Args:
        arguments: bytes of the program's arguments, which one of its two messages counts as well.
    """
    if match := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", text):
        return _bytes(*match.groups())
    if match := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", text):
        return max(_bytes(*match.groups()) - arguments, 0)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * (1 << {"K": 10, "M": 20, "G": 30, "T": 40}[unit]))


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
