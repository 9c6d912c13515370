"""`iv3 convert` where something is wrong: one clear line; and stopped half-way: the same bytes in the end."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models.peers import even_config, random_tensors, write_folder
from PIL import Image

from iv3jax.cli import main
from iv3jax.conversion import latent
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import preset

ROOT = Path(__file__).parents[2]
FEW = ("--tokens", "512", "--length", "64")
BOOK = " ".join(f"Line {i} of a book about the number {i * i}." for i in range(200))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny GQA model with tokenizer: two key heads of 32 dims, q/k norm, a tower."""
    config, folder = preset("tiny_gqa"), tmp_path_factory.mktemp("source") / "gqa"
    shutil.copytree(TINY_FOLDER, folder)
    return write_folder(folder, config, random_tensors(config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A llama."""
    text = replace(even_config("gqa").text_config, mrope_section=None, use_qk_norm=False)
    config = ModelConfig("llama", text)
    return write_folder(tmp_path_factory.mktemp("plain") / "llama", config, random_tensors(config))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A text and a picture."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "book.txt").write_text(BOOK)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "dot.png")
    return folder / "book.txt", folder / "dot.png"


@pytest.fixture
def refused(tmp_path, capsys, files):
    """Runs a conversion of book and picture that must fail: its one line, after lines of progress."""

    def run(source: Path, *argv: str | Path, calibration: tuple = files) -> str:
        words = ["convert", source, tmp_path / "out", *FEW, *argv]
        if calibration:
            words += ["--calibration", *calibration]
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if not re.match(r"\w+ +layer \d", line)]
        assert out == "" and len(said) == 1 and said[0].startswith("iv3: error: ")
        assert not (tmp_path / "out" / "config.json").exists()
        return said[0]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sizes_that_cannot_be(refused, source, plain):
    assert "rank 97: the source has 96 dims besides the RoPE key's 32" in refused(source, "--rank", "97")
    assert "--rank 0: must be 1 or more" in refused(source, "--rank", "0")
    small = refused(source, "--cache-fraction", "0.2")
    assert "RoPE key alone takes 32 of the source's 128 numbers" in small and "ask for 0.258" in small
    assert "must be above 0 and at most 1" in refused(source, "--cache-fraction", "1.5")
    both = ("--rank", "16", "--cache-fraction", "0.5")
    assert "or give --budget dynamic" in refused(source, *both)
    assert "mean rank of 32, above --rank 16" in refused(source, *both, "--budget", "dynamic")
    assert "name --rank or --cache-fraction" in refused(source)
    assert "2 key heads" in refused(source, "--rank", "8", "--rope-components", "3")
    even = ("--rank", "8", "--rope-pairs", "even", "--rope-dim")
    assert "cannot be folded" in refused(source, *even, "8")
    assert "qk_rope_head_dim 7 does not divide" in refused(source, *even, "7")
    for width in ("7", "66"):
        words = f"--rope-dim {width}: must be even and at most the 64 dims that keys have"
        assert words in refused(source, "--rank", "8", "--rope-dim", width)
    assert "give --rope-pairs even" in refused(source, "--rank", "8", "--rope-components", "2")
    assert "give --rope-pairs even" in refused(source, "--rank", "8", "--freqfold", "2")
    peer = ("--rank", "8", "--method", "transmla", "--rope-pairs", "chosen")
    assert "--rope-pairs chosen: is not part of --method transmla" in refused(source, *peer)
    assert "at least one row" in refused(source, "--rank", "8", "--length", "600")
    assert "the source has no q/k norm" in refused(plain, "--rank", "8", "--qk-norm", "cached")


def test_words_that_are_not_known(refused, source):
    for name, known in (
        ("--method", "iv3, transmla, care, svd"),
        ("--budget", "uniform, dynamic"),
        ("--rope-pairs", "chosen, even"),
        ("--qk-norm", "linear, cached, dropped"),
        ("--adapters", "on, off"),
    ):
        assert f"{name} best: there are {known}" in refused(source, "--rank", "8", name, "best")
    asked = ("--rank", "8", "--method", "care", "--qk-norm", "cached")
    assert "is not part of --method care" in refused(source, *asked)


def test_calibration_that_does_not_do(refused, source, plain, files, tmp_path):
    book, picture = files
    asked = (source, "--rank", "8")
    adapters = refused(*asked, "--adapters", "on", calibration=(book,))
    assert "holds no vision tokens" in adapters and "--adapters off" in adapters
    assert "the source is text-only" in refused(plain, "--rank", "8", "--adapters", "on")
    assert "--calibration: no file given" in refused(*asked, calibration=())
    assert "no such file" in refused(*asked, calibration=(tmp_path / "none.txt",))
    for name, content, words in (
        ("torn.jsonl", b'{"text": "half', "torn.jsonl:1: not valid JSON"),
        ("odd.jsonl", b'{"prompt": "half"}', "a line must be"),
        ("latin.txt", b"caf\xe9 " * 9, "not UTF-8 text"),
        ("torn.png", picture.read_bytes()[:300], "torn.png"),
        ("empty.txt", b"", "hold no sample"),
        ("what.xyz", b"x", "unknown kind"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refused(*asked, calibration=(tmp_path / name,))


def test_sources_that_cannot_be_converted(refused, source, tmp_path):
    gpt2 = Path(shutil.copytree(source, tmp_path / "gpt2"))
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "'gpt2'" in refused(gpt2, "--rank", "8")
    config = even_config("m2la")
    latents = write_folder(tmp_path / "latents", config, random_tensors(config))
    assert "is M²LA already" in refused(latents, "--rank", "8")
    assert "neither a folder nor a preset" in refused(tmp_path / "none", "--rank", "8")
    torn = Path(shutil.copytree(source, tmp_path / "torn"))
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in refused(torn, "--rank", "8")


def test_places_that_cannot_be_written(refused, source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "is not empty" in refused(source, "--rank", "8")
    shutil.rmtree(tmp_path / "out")
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: usage)
        assert "GB more on this disk and 0.0 GB are free" in refused(source, "--rank", "8")


@pytest.mark.medium
def test_a_disk_that_fills_up_and_is_cleared(refused, source, files, tmp_path, monkeypatch, capsys):
    """The second layer's tensors do not fit; with room again the same command goes on, to the same bytes."""
    asked = ("--rank", "24", "--adapters", "on", "--method", "iv3")
    argv = [*FEW, *asked, "--calibration", *map(str, files), "--json"]
    whole, save_tensors, calls = tmp_path / "whole", latent.save_tensors, []
    assert main(["convert", str(source), str(whole), *argv]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["folder"] == str(whole) and set(shown["files"]) == set(contents(whole))
    assert shown["report"]["ranks"] == [24, 24, 24]

    def full(folder: Path, values: dict[str, np.ndarray]) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_tensors(folder, values)

    with monkeypatch.context() as patch:
        patch.setattr(latent, "save_tensors", full)
        assert "the disk is full; finished steps are kept" in refused(source, *asked)
    work = tmp_path / "out.converting"
    assert (work / "layer_0").exists() and not (work / "layer_1").exists()
    other = refused(source, "--rank", "16", "--adapters", "on")
    assert "holds an unfinished conversion with rank 24 instead of 16" in other

    with monkeypatch.context() as patch:
        patch.setattr(latent, "save_tensors", lambda *given: (calls.append(given), save_tensors(*given)))
        assert main(["convert", str(source), str(tmp_path / "out"), *argv]) == 0
    # One layer and half of the second; then the second and the third.
    assert len(calls) == 2 + 2
    assert contents(tmp_path / "out") == contents(whole)
    assert not work.exists()


@pytest.mark.slow
def test_killed_half_way_and_run_again(source, files, tmp_path):
    """SIGKILL once the first layer is there; the next process goes on, to the same bytes."""

    def command(out: Path) -> list[str]:
        words = ["convert", source, out, *FEW, "--cache-fraction", "0.5", "--budget", "dynamic"]
        words += ["--qk-norm", "cached", "--calibration", *files]
        return [sys.executable, "-m", "iv3jax.cli", *map(str, words)]

    run = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run(command(tmp_path / "whole"), **run)
    assert done.returncode == 0, done.stderr
    assert "cache: " in done.stdout and "latent: rank" in done.stdout and "tensors  " in done.stdout

    work = tmp_path / "out.converting"
    with subprocess.Popen(command(tmp_path / "out"), cwd=ROOT, env=run["env"], stderr=-3) as process:
        while not (work / "layer_0").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert (work / "layer_0").exists() and not (work / "layer_2").exists()
    done = subprocess.run(command(tmp_path / "out"), **run)
    assert done.returncode == 0, done.stderr
    assert "source " not in done.stderr and "convert  layer 3 of 3" in done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
