"""`iv3` as a person uses it: the answers it gives, and one clear line with exit code 2 for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "data"))
from media import cut, write_sound, write_video

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights."""
    return save(load("tiny", random_weights=True), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 frames, 30 a second, of 64×48 pixels."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 45, height=48, width=64)


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Runs a command that must fail with code 2 and one line on stderr, which is returned."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("iv3: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.medium
def test_ask_prints_answer_frames_and_speed(model: Path, video: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ask", str(video), "what?", "--model", str(model), "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    # 45 frames at 30 a second are 1.5 s: 3 frames at 2 a second, raised to the least, 4.
    assert "frames   4 of 45, 32x32, at 0.00, 0.50, 0.97, 1.47 s" in out
    for word in ("prompt", "new", "cache", "tokens/s"):
        assert word in out


def test_ask_json_is_one_object_and_repeats(model: Path, video: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["ask", str(video), "what?", "--model", str(model), "--max-new-tokens", "5", "--json"]
    answers = []
    for extra in ([], [], ["--max-frames", "2"]):
        assert main(argv + extra) == 0
        answers.append(json.loads(capsys.readouterr().out))
    first, second, fewer = answers
    assert first["text"] == second["text"]
    assert first["new_tokens"] <= 5 and first["media"]["total_frames"] == 45
    assert len(fewer["media"]["times"]) == 2 and fewer["prompt_tokens"] < first["prompt_tokens"]


def test_ask_takes_a_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "dot.png")
    argv = ["ask", tmp_path / "dot.png", "what?", "--model", model, "--max-new-tokens", "2", "--json"]
    assert main([str(word) for word in argv]) == 0
    assert json.loads(capsys.readouterr().out)["media"]["kind"] == "image"


def test_bad_videos(model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def ask(path: Path) -> str:
        return refused(capsys, "ask", path, "what?", "--model", model)

    text = tmp_path / "text.mp4"
    text.write_text("no video at all\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    truncated = cut(Path(shutil.copy(video, tmp_path / "truncated.mp4")), 0.6)
    wide = write_video(tmp_path / "wide.mp4", 4, height=32, width=6464)
    small = write_video(tmp_path / "small.mp4", 4, height=16, width=64)
    no_frames = {"movflags": "empty_moov+frag_keyframe"}
    for path, words in (
        (tmp_path / "absent.mp4", "no such file"),
        (tmp_path, "folder"),
        (text, "not a video"),
        (empty, "empty"),
        (truncated, "truncated"),
        (write_sound(tmp_path / "sound.wav"), "video track"),
        (write_video(tmp_path / "none.mp4", 0, container_options=no_frames), "no frames"),
        (wide, "aspect"),
        (small, "at least 32"),
    ):
        message = ask(path)
        assert str(path) in message and words in message


def test_bad_questions_and_budgets(model: Path, video: Path, capsys: pytest.CaptureFixture[str]):
    assert "question is empty" in refused(capsys, "ask", video, "  ", "--model", model)
    many = refused(capsys, "ask", video, "what?", "--model", model, "--max-new-tokens", "9000")
    assert "8192" in many and "prompt tokens" in many
    none = refused(capsys, "ask", video, "what?", "--model", model, "--max-new-tokens", "0")
    assert "max_new_tokens" in none
    long = refused(capsys, "ask", video, "why? " * 9000, "--model", model)
    assert "8192" in long
    assert "fps" in refused(capsys, "ask", video, "what?", "--model", model, "--fps", "0")
    assert "max_frames" in refused(capsys, "ask", video, "what?", "--model", model, "--max-frames", "0")
    assert "top_p" in refused(capsys, "ask", video, "what?", "--model", model, "--top-p", "2")


def test_bad_models(model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def ask(folder: str | Path) -> str:
        return refused(capsys, "ask", video, "what?", "--model", folder)

    assert "neither a folder nor a preset" in ask("tinny")
    assert "--random-weights" in ask("tiny")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    tensors = load_file(model / "model.safetensors")
    norm = "model.language_model.norm.weight"
    for name, change, words in (
        ("missing", lambda t: t.pop(norm), f"1 missing: {norm}"),
        ("extra", lambda t: t.update(surplus=t[norm]), "1 unexpected: surplus"),
        ("shape", lambda t: t.update({norm: t[norm][:5]}), f"1 of the wrong shape: {norm} is (5,)"),
    ):
        folder, changed = broken(name), dict(tensors)
        change(changed)
        save_file(changed, folder / "model.safetensors")
        message = ask(folder)
        assert words in message and str(folder) in message

    folder = broken("index")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "model.safetensors.index.json" in ask(folder)

    folder = broken("type")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "'gpt2'" in ask(folder)

    folder = broken("tokenizer")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in ask(folder)


def test_shapes(capsys: pytest.CaptureFixture[str]):
    found = {}
    for preset in ("internvideo3_8b", "qwen3_vl_8b"):
        assert main(["shapes", preset, "--json"]) == 0
        found[preset] = json.loads(capsys.readouterr().out)
    ours, gqa = found["internvideo3_8b"], found["qwen3_vl_8b"]
    assert ours["parameters"] == 9_484_672_240 and len(ours["tensors"]) == 750
    assert (ours["cache_bytes_per_token"], gqa["cache_bytes_per_token"]) == (73_728, 147_456)
    assert "neither a folder nor a preset" in refused(capsys, "shapes", "9b")


def test_parity_passes_fails_and_refuses(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, case = golden / "m2la", golden / "m2la" / "cases" / "text.safetensors"
    assert main(["parity", str(folder), str(case), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and {"logits", "loss_square"} <= {row["quantity"] for row in result["rows"]}

    values = load_file(case)
    values["logits"] = values["logits"] + np.float32(1e-3)
    save_file(values, tmp_path / "off.safetensors")
    assert main(["parity", str(folder), str(tmp_path / "off.safetensors")]) == 1
    assert "FAIL" in capsys.readouterr().out
    values["logits"][0, 0, 0] = np.nan
    save_file(values, tmp_path / "nan.safetensors")
    assert main(["parity", str(folder), str(tmp_path / "nan.safetensors"), "--tolerance", "1"]) == 1
    capsys.readouterr()

    assert "no such file" in refused(capsys, "parity", folder, tmp_path / "none.safetensors")
    assert "nothing to compare" in refused(capsys, "parity", folder)


def test_parity_of_processing(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["parity", "--processing", str(golden / "processing.json")]) == 0
    capsys.readouterr()
    tables = json.loads((golden / "processing.json").read_text())
    tables["sampling"][3]["index_sum"] += 1
    (tmp_path / "off.json").write_text(json.dumps(tables))
    assert main(["parity", "--processing", str(tmp_path / "off.json"), "--json"]) == 1
    rows = {row["quantity"]: row["difference"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows == {"image_resize": 0, "video_resize": 0, "sampling": 1}


def test_train_refuses_unknown_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ("--out", tmp_path)
    near = refused(capsys, "train", "--config", "digits", *out, "stepps=3")
    assert "'stepps'" in near and "'steps'" in near
    nested = refused(capsys, "train", "--config", "digits", *out, "optimizer.learnig_rate=3")
    assert "'learning_rate'" in nested
    assert "configs/digit.py" in refused(capsys, "train", "--config", "digit", *out)
    assert "steps" in refused(capsys, "train", "--config", "digits", *out, "steps=many")


def test_no_model_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr("iv3jax.cli.source.DEMO_MODEL", tmp_path / "nothing")
    assert "launch/demo.sh" in refused(capsys, "ask", "x.mp4", "what?")


def test_the_installed_command_prints_no_traceback():
    argv = [sys.executable, "-m", "iv3jax.cli", "ask", "none.mp4", ""]
    done = subprocess.run(argv, capture_output=True, text=True)
    # Where the extra `chips` is installed, its plugin has its say before.
    said = [line for line in done.stderr.splitlines() if "absl::" not in line and "cudart" not in line]
    assert done.returncode == 2 and said == ["iv3: error: the question is empty"]


def test_fields_of_a_bench_that_has_none(capsys: pytest.CaptureFixture[str]):
    assert "iv3 bench train has no fields to change (steps=3)" in refused(capsys, "bench", "train", "steps=3")
    assert "did you mean 'steps'" in refused(capsys, "bench", "rollout", "rollout.stepz=3")
