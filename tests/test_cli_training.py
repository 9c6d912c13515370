"""`iv3 train`, `plan`, `data` and `doctor` as a person uses them: what they print, and how they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data.media import write_video

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.cli import main

TASK = 'data.sources=[{"kind": "task:read"}]'


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Runs a command that must fail with code 2 and one line on stderr, which is returned."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("iv3: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.source=[]"], "unknown field 'source'; did you mean 'sources'?"),
        (['data.sources=[{"path": "x.jsonl"}]'], "missing 1 required positional argument: 'kind'"),
        (['data.sources=[{"kind": "task:reed"}]'], "there is no task 'reed'"),
        (['data.sources=[{"kind": "llava", "path": "none.json"}]'], "none.json"),
        (["optimizer.kind=adam"], "optimizer.kind 'adam' is not one of muon, adamw"),
        (["reduction=mean"], "reduction 'mean' is not one of 'token', 'sample', 'square'"),
        (["steps=0"], "steps 0 must be at least 1"),
        (["weights=nf4"], "weights 'nf4' cannot be trained; set lora.rank"),
        (["lora.rank=4"], "lora.targets is empty"),
        (["lora.rank=4", 'lora.targets=["q_prj"]'], "'q_prj' names nothing in the model; did you mean"),
        (['frozen=["model.visul.*"]'], "'model.visul.*' names nothing in the model"),
        (["mesh.fsdp=0"], "only one axis can take what is left"),
        (["init=nowhere"], "nowhere"),
        (["preset=internvideo3_8b"], "has no tokenizer"),
    ],
)
def test_bad_experiments(overrides, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    extra = [] if any(x.startswith("data.") for x in overrides) else [TASK]
    argv = ["train", "--config", "digits:smoke", "--out", tmp_path / "out", *extra, *overrides]
    assert words in refused(capsys, *argv)
    assert not (tmp_path / "out" / "checkpoints").exists() or not list(
        (tmp_path / "out" / "checkpoints").iterdir()
    )


def test_changes_may_stand_before_and_after_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    split = ["train", "--config", "digits:smoke", "steps=4", "--out", tmp_path, "steps=0"]
    assert "steps 0 must be at least 1" in refused(capsys, *split)
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, split), "--ouut"])
    assert "unrecognized arguments: steps=0 --ouut" in capsys.readouterr().err


def test_plan_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]):
    assert "v5p-128" in refused(capsys, "plan", "--config", "cpt", "--topology", "v6e-8")
    assert "no experiment" in refused(capsys, "plan", "--config", "nothing", "--topology", "v5p-128")


def test_inspect_says_what_would_be_fed(capsys: pytest.CaptureFixture[str]):
    argv = ["data", "inspect", "--config", "digits", "--samples", "6", TASK, "length=120", "chunks=12"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in ("task:read", "dropped: none", "packing:", "⟦", "<|video_pad|>×"):
        assert words in out
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sources"][0]["used"] == 6 and 0 < report["efficiency"] <= 1
    assert "makes its data as it goes" in refused(capsys, "data", "inspect", "--config", "digits")


def test_doctor(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {fit["preset"] for fit in found["fits"]} >= {"internvideo3_8b", "tiny"}
    assert main(["doctor"]) == 0
    assert "internvideo3_8b" in capsys.readouterr().out


@pytest.mark.medium
def test_encode_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save(load("tiny", random_weights=True), tmp_path / "model")
    video = write_video(tmp_path / "clip.mp4", 24, height=64, width=64)
    argv = ["data", "encode", str(video), "--store", str(tmp_path / "store"), "--model", str(model), "--json"]
    counts = []
    for _ in range(2):
        assert main(argv) == 0
        done = json.loads(capsys.readouterr().out)
        counts.append((done["clips"], done["kept"], done["failed"]))
    assert counts == [(1, 0, 0), (0, 1, 0)]
    assert "none.mp4" in refused(capsys, "data", "encode", tmp_path / "none.mp4", *argv[3:])


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path):
    """A real process: interrupted after some steps it leaves with 130, and is at its end the second time."""
    argv = [sys.executable, "-m", "iv3jax.cli", "train", "--config", "digits", "--out", str(tmp_path)]
    argv += [TASK, "steps=60", "rows=1", "length=64", "chunks=8"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert len(saved) == 1 and 3 <= saved[0] < 60
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"60 steps, {saved[0]} done" in done.stdout
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 61))
