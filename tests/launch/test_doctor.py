"""What `iv3 doctor` says: its bytes against the shapes of real parameters, and problems that are planted."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pair import clean_environment

from iv3jax.checkpoint.names import tensors
from iv3jax.checkpoint.shapes import model_shapes
from iv3jax.models.presets import PRESETS
from iv3jax.train import machine
from iv3jax.train.doctor import Fit, _fits, doctor, weight_bytes
from iv3jax.train.machine import Devices, Line

SMALL = ("tiny", "tiny_gqa")


@pytest.mark.parametrize(
    "name",
    [name if name in SMALL else pytest.param(name, marks=pytest.mark.medium) for name in PRESETS],
)
def test_bytes_are_those_of_real_shapes(name: str) -> None:
    table = tensors(PRESETS[name])
    for weights in (None, "int8", "nf4"):
        assert weight_bytes(table, weights or "bf16") == model_shapes(name, weights).weight_bytes


def fits(name: str, here: Devices) -> dict[tuple[str, str, int], Fit]:
    return {(fit.use, fit.weights, fit.context): fit for fit in _fits(name, PRESETS[name], here)}


def test_what_fits_on_eight_large_devices() -> None:
    found = fits("internvideo3_8b", Devices("gpu", "H100", 8, 80_000_000_000))
    train = found["train", "fp32", 0]
    # 9 484 672 240 parameters of 16 bytes, over devices of which 72 GB are counted.
    assert (train.bytes, train.devices) == (151_754_755_840, 3)
    ask = found["ask", "bf16", 131072]
    assert (ask.bytes, ask.devices) == (18_969_344_480 + 131072 * 73728, 1)


def test_what_fits_on_one_small_device() -> None:
    found = fits("internvideo3_8b", Devices("gpu", "T4", 1, 16_000_000_000))
    assert found["ask", "bf16", 32768].devices is None and found["train", "fp32", 0].devices is None
    # 10.2 GB of weights and 2.4 GB of cache in 14.4 GB; 9.7 GB of cache are too much.
    assert found["ask", "int8", 32768].devices == 1 and found["ask", "int8", 131072].devices is None


def test_no_context_beyond_a_models_positions() -> None:
    contexts = {context for use, _, context in fits("tiny", Devices("cpu", "", 1, 1 << 34)) if use == "ask"}
    assert contexts == {8192}


def test_the_report_of_this_machine() -> None:
    report = doctor()
    text = str(report)
    assert report.problems == 0, text
    assert "no problems" in text and "internvideo3_8b" in text and "PROBLEM" not in text
    assert report.devices is not None and 0 < report.devices.memory_bytes == machine.host_memory()
    parsed = json.loads(json.dumps(dataclasses.asdict(report)))
    assert {"lines", "devices", "fits", "problems"} == set(parsed)
    assert {line["name"] for line in parsed["lines"]} >= {"devices", "python", "packages", "extras", "video"}
    assert max(map(len, text.splitlines())) <= 140


def versions(monkeypatch: pytest.MonkeyPatch, **planted: str | None) -> list[Line]:
    """The lines about packages where some have another version, or None: are not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in planted and planted[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return planted.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return list(machine._packages())


def test_a_wrong_version_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = [line for line in versions(monkeypatch, flax="0.10.0") if "0.12" in line.problem]
    assert line.problem.startswith("flax is 0.10.0, not ") and "pip install" in line.problem


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = versions(monkeypatch, einops=None)
    assert line.problem.startswith("einops is missing")


def test_without_a_checkout_the_bounds_of_the_package_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "CONSTRAINTS", tmp_path / "none")
    assert [line.problem for line in versions(monkeypatch, flax="0.12.99")] == [""]
    [line] = versions(monkeypatch, flax="0.10.0")
    assert line.problem == "flax is 0.10.0, not >=0.12: pip install 'flax>=0.12'"


def test_a_build_of_the_right_version_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert machine._wrong_version(Requirement("torch==2.13.0")) == ""
    assert machine._wrong_version(Requirement("torch==2.12.0")) != ""


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**8, 10**8))
    line = machine._disk("downloaded models", tmp_path / "not" / "there")
    assert "0.1 GB free" in line.value and "the disk is full" in line.problem


def test_a_chip_that_jax_does_not_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert machine._unused_chip().startswith("an NVIDIA GPU is here")
    monkeypatch.setattr(machine, "glob", lambda pattern: [])
    assert machine._unused_chip() == ""


@pytest.mark.medium
def test_devices_that_do_not_start_are_a_problem_and_no_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from iv3jax.train.doctor import doctor; print(doctor())"],
        env=clean_environment() | {"JAX_PLATFORMS": "no_such_chip"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "PROBLEM" in done.stdout and "no_such_chip" in done.stdout and "1 problem" in done.stdout
