"""What this machine has, line by line: packages, devices, memory, disks, decoders, compilers.

What fits on it is in doctor.py, which prints both.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import av
import jax
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "launch" / "constraints.txt"
"""The versions that are tested together; only a checkout has the file."""

PACKAGE = "iv3jax"
CODECS = ("h264", "hevc", "vp9", "av1")
LEAST_FREE = 1e9
"""Bytes free on a disk, below which something will soon fail."""


@dataclass(frozen=True)
class Line:
    """One thing about the machine.

    Attributes:
        problem: what is wrong and the way out; empty where nothing is.
    """

    name: str
    value: str
    problem: str = ""


@dataclass(frozen=True)
class Devices:
    """What jax computes on here.

    Attributes:
        memory_bytes: of each one; of the whole machine, for a CPU.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int


def lines() -> list[Line]:
    """Everything but the devices."""
    python = f"{platform.python_version()}, {sys.executable}"
    return [
        Line("python", python),
        *_packages(),
        _extras(),
        _host(),
        *_disks(),
        _video(),
        _compilers(),
        _slurm(),
    ]


def devices() -> tuple[Devices | None, Line]:
    """The devices that jax finds, None where it cannot start; and the line that says so."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    asked = f" (JAX_PLATFORMS={wanted})" if wanted else ""
    try:
        found = jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return None, Line("devices", f"none{asked}", f"{reason}; JAX_PLATFORMS=cpu does without")
    first = found[0]
    if first.platform == "cpu":
        here = Devices("cpu", platform.processor() or platform.machine(), 1, host_memory())
        return here, Line("devices", f"the CPU{asked}", "" if wanted else _unused_chip())
    memory = (first.memory_stats() or {}).get("bytes_limit", 0)
    here = Devices(first.platform, first.device_kind, len(found), memory)
    size = f"{memory / 1e9:.1f} GB each" if memory else "which do not say how much memory they have"
    return here, Line("devices", f"{here.count} × {here.platform} ({here.kind}), {size}{asked}")


def host_memory() -> int:
    """Bytes of memory that processes here may use together: the machine's, or less in a container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _packages() -> Iterator[Line]:
    """The packages that everyone needs, and whether all that are installed are of a known version."""
    needed = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    core = [requirement for requirement in needed if requirement.marker is None]
    # A tested version counts before the lower bound.
    wanted = {canonicalize_name(requirement.name): requirement for requirement in [*core, *_tested()]}
    problems = [problem for problem in map(_wrong_version, wanted.values()) if problem]
    named = ", ".join(f"{name} {_version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    yield Line("packages", f"{named} and {len(wanted) - 3} more", problems[0] if problems else "")
    for problem in problems[1:]:
        yield Line("", "", problem)


def _tested() -> list[Requirement]:
    """The exact versions of the constraints, of packages that are installed."""
    if not CONSTRAINTS.is_file():
        return []
    rows = (row.strip() for row in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    pins = [Requirement(row) for row in rows if row and not row.startswith("#")]
    return [pin for pin in pins if _version(pin.name) != "missing"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _wrong_version(requirement: Requirement) -> str:
    """What is wrong with an installed package, and what to type; empty where nothing is."""
    version = _version(requirement.name)
    # A build's own ending, 2.13.0+cpu, is no other version.
    if version != "missing" and requirement.specifier.contains(Version(version).public, prereleases=True):
        return ""
    constraints = f" -c {CONSTRAINTS}" if CONSTRAINTS.is_file() else ""
    wanted = f"{requirement.name}{requirement.specifier}"
    return (
        f"{requirement.name} is {version}, not {requirement.specifier}: pip install{constraints} '{wanted}'"
    )


def _extras() -> Line:
    names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    there = [name for name in names if _has(Requirement(f"{PACKAGE}[{name}]"))]
    without = [name for name in names if name not in there]
    text = ", ".join(there) or "none"
    return Line("extras", text + (f"; not installed: {', '.join(without)}" if without else ""))


def _has(requirement: Requirement) -> bool:
    """Whether a package is installed with all that its extras, if any are asked for, bring along."""
    if _version(requirement.name) == "missing":
        return False
    for text in importlib.metadata.requires(requirement.name) or []:
        below = Requirement(text)
        if below.marker is None or below.marker.evaluate({"extra": ""}):
            continue
        if any(below.marker.evaluate({"extra": extra}) for extra in requirement.extras) and not _has(below):
            return False
    return True


def _unused_chip() -> str:
    for pattern, chip, extra in (
        ("/dev/nvidia[0-9]*", "an NVIDIA GPU", "cuda"),
        ("/dev/accel[0-9]*", "a TPU", "tpu"),
    ):
        if glob(pattern):
            return f"{chip} is here, and jax does not use it: bash launch/setup_env.sh {extra}"
    return ""


def _host() -> Line:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Line("host", f"{host_memory() / 1e9:.1f} GB of memory, {cores} processors")


def _disks() -> Iterator[Line]:
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if compiled and "://" not in compiled:
        yield _disk("compiled programs", Path(compiled))
    else:
        kept = compiled or "not kept between runs; JAX_COMPILATION_CACHE_DIR names a folder for them"
        yield Line("compiled programs", kept)
    yield _disk("downloaded models", Path(constants.HF_HUB_CACHE))


def _disk(name: str, folder: Path) -> Line:
    """A folder, which need not be there yet, and the room on its disk."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    problem = "" if free >= LEAST_FREE else f"{folder}: the disk is full; make room or name another folder"
    return Line(name, f"{folder}, {free / 1e9:.1f} GB free", problem)


def _video() -> Line:
    missing = [name for name in CODECS if name not in av.codecs_available]
    reads = ", ".join(name for name in CODECS if name not in missing)
    problem = f"this build of av does not read {', '.join(missing)}; pip install --force-reinstall av"
    return Line(
        "video",
        f"av {av.__version__} with FFmpeg {av.ffmpeg_version_info}: {reads}",
        problem if missing else "",
    )


def _compilers() -> Line:
    chips = {"libtpu": "v5e, v5p", "jax_cuda12_plugin": "h100"}
    there = [names for module, names in chips.items() if importlib.util.find_spec(module) is not None]
    return Line(
        "compiles for", ", ".join(there) or "no chips that are not here; bash launch/setup_env.sh chips"
    )


def _slurm() -> Line:
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", this is job {job}" if job else ""
    return Line("slurm", f"yes{inside}" if shutil.which("sbatch") else f"none{inside}")
