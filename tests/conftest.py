"""What every test gets: a CPU with eight fake devices, a compilation cache, the golden files.

Nothing here imports jax: the settings below must be in the environment before anything does.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# launch/test.sh sets most of these; here they are for a bare `pytest` too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()


# How many threads XLA's pool has. A collective of fake devices blocks a thread for each of them, and with as
# many threads as a small machine has cores, two collectives of eight devices wait for each other for ever.
os.environ.setdefault("NPROC", "16")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files: two tiny models with inputs and expected outputs from PyTorch."""
    folder = Path(os.environ.get("IV3_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
    if not (folder / "processing.json").is_file():
        pytest.skip(f"no golden files in {folder}: put them there, or name their folder in IV3_GOLDEN")
    return folder


# A compiled program for the CPU takes about a memory map for each of its kernels, a rollout two thousand, and
# Linux allows a process 65 530 (vm.max_map_count): past them LLVM cannot allocate, and the worker crashes.
MAPS = 25_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Compiled programs go before a process has too many; what is needed again comes from the cache."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        sys.modules["jax"].clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_missing_package(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_missing_package(report)
    return report


def _refuse_missing_package(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI (IV3_CI=1) a skip whose reason starts with "needs " fails: .ci/run installs what tests need."""
    if os.environ.get("IV3_CI") == "1" and report.skipped and isinstance(report.longrepr, tuple):
        file, line, reason = report.longrepr
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith("needs "):
            report.outcome = "failed"
            report.longrepr = f"{file}:{line}: {reason} (add it to debian_packages in .ci/run)"
