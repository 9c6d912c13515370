"""Exports that cannot be, or are killed: one line each, nothing lost, nothing left that looks complete."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import even_config, random_tensors, write_folder
from safetensors.numpy import load_file

from iv3jax.checkpoint.export import export, parse_size
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.target import LocalTarget
from iv3jax.cli import main
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig

CONFIG = even_config()
VALUES = random_tensors(CONFIG)


@pytest.fixture
def model(tmp_path) -> Path:
    return write_folder(tmp_path / "in", CONFIG, VALUES)


def refusal(*argv) -> str:
    """The message of an export that must fail."""
    with pytest.raises(UserError) as caught:
        export(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_in_one_line(model, tmp_path, capsys):
    """Through the command: exit code 2, one line on stderr, and every file as before."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    other = tmp_path / "other"
    write_folder(other, even_config("m2la", v_head_dim=12), VALUES)
    wrong_index = write_folder(tmp_path / "index", CONFIG, VALUES, shards=2)
    (wrong_index / "model-00002-of-00002.safetensors").unlink()
    before = files(tmp_path)
    new = tmp_path / "new"
    for argv, words in (
        ((model, taken), f"{taken}: is not empty"),
        ((model, tmp_path / "file"), "file: a file; name a new folder"),
        ((model, tmp_path / "file" / "inner"), "cannot be written"),
        ((model, "/proc/iv3jax/out"), "/proc/iv3jax/out: cannot be written"),
        ((model, model), "lies in the model folder"),
        ((model, model / "deep" / "inside"), "lies in the model folder"),
        ((model, model.parent / "new" / ".." / "in" / "x"), "lies in the model folder"),
        ((model, new, "--dtype", "float8"), "dtype 'float8' is not one of float32, bfloat16, float16"),
        ((model, new, "--max-shard-size", "5XB"), "max shard size '5XB' is no size; write 5GB"),
        ((model, new, "--max-shard-size", "0"), "max shard size"),
        ((other, new), f"{other}: tensors do not fit config.json"),
        ((wrong_index, new), "model-00002-of-00002.safetensors: no such file"),
        ((tmp_path / "absent", new), "absent"),
        (("tiny", new), "--random-weights"),
        ((model, new, "--random-weights"), "has weights of its own"),
    ):
        assert main(["export", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("iv3: error: ") and err.count("\n") == 1, err
        assert words in err
        assert files(tmp_path) == before
    assert not new.exists()


@pytest.mark.parametrize("size", ["5", 5, "5GB", "1.5mb", " 2 kb"])
def test_sizes(size):
    expected = {"5": 5, 5: 5, "5GB": 5 * 10**9, "1.5mb": 1_500_000, " 2 kb": 2000}
    assert parse_size(size) == expected[size]


@pytest.mark.parametrize("size", ["", "GB", "-5GB", "0", "nan", "inf", "infGB", "5GiB", "0.1", "five"])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match="is no size"):
        parse_size(size)


def test_an_empty_folder_is_no_obstacle(model, tmp_path):
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out")
    assert load(tmp_path / "out").config == CONFIG
    export(model, tmp_path / "deep" / "new" / "out")
    assert load(tmp_path / "deep" / "new" / "out").config == CONFIG


def test_dtypes_that_no_parameter_has(tmp_path):
    """F64 needs a dtype named; eight bits or fewer are codes, whatever is named."""
    name = "model.language_model.norm.weight"
    wide = write_folder(tmp_path / "wide", CONFIG, VALUES | {name: VALUES[name].astype(np.float64)})
    assert "norm.weight has dtype F64" in refusal(wide, tmp_path / "out")
    assert "name a dtype" in refusal(wide, tmp_path / "out")
    export(wide, tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")[name], VALUES[name])
    codes = tmp_path / "codes"
    write_folder(codes, CONFIG, VALUES)
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) for k, v in VALUES.items()}
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    pytest.importorskip("safetensors.torch").save_file(tensors, codes / "model.safetensors")
    for dtype in (None, jnp.float32):
        with pytest.raises(UserError, match=r"norm\.weight has dtype F8_E4M3; supported are"):
            load(codes, dtype=dtype)


def test_numbers_that_do_not_fit(tmp_path):
    values = dict(VALUES)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    values[name] = values[name].copy()
    values[name][2, 3] = 1e6
    folder = write_folder(tmp_path / "in", CONFIG, values)
    with pytest.raises(UserError, match=f"{name}: 1 numbers do not fit float16"):
        export(folder, tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantised_models(model, tmp_path, weights):
    message = refusal(load(model, weights=weights), tmp_path / "out")
    assert f"loaded with {weights} weights" in message and "export from the original" in message
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_is_full(model, tmp_path):
    """The system refuses to let a file grow: one line, and nothing is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        message = refusal(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == f"{tmp_path / 'out'}: cannot be written: File too large"
    assert files(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption(model, tmp_path, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr("iv3jax.checkpoint.export.small_files", interrupted)
    with pytest.raises(error):
        export(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_place_taken_in_the_meantime(tmp_path):
    """Two exports to one place: the second one to finish is refused, the first one's folder stays."""
    first, second = (LocalTarget(tmp_path / "out") for _ in range(2))
    for target, text in ((first, b"first"), (second, b"second")):
        with target.open("config.json") as file:
            file.write(text)
    first.finish()
    with pytest.raises(UserError, match="out: cannot be written"):
        second.finish()
    second.discard()
    assert files(tmp_path) == {"out/config.json": b"first"}


def test_verify_without_torch(model, tmp_path, monkeypatch, capsys):
    """Said before anything is loaded or written, with the extra that has it."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    assert main(["export", str(model), str(tmp_path / "out"), "--verify"]) == 2
    assert capsys.readouterr().err == "iv3: error: --verify needs torch; pip install 'iv3jax[export]'\n"
    assert not (tmp_path / "out").exists()
    assert main(["export", str(model), "gs://bucket/out", "--verify"]) == 2
    assert "local folders only" in capsys.readouterr().err


@pytest.mark.medium
def test_killed_half_way(tmp_path):
    """SIGKILL while the shards are written: no OUT_DIR, nothing that loads, and the next export works."""
    config = even_config("gqa", vocab_size=4000, hidden_size=640, intermediate_size=2048, num_hidden_layers=4)
    data = config.to_dict()
    data["vision_config"]["out_hidden_size"] = 640
    config = ModelConfig.from_dict(data)
    folder = write_folder(tmp_path / "in", config, random_tensors(config))
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "iv3jax.cli", "export", str(folder), str(out), "--max-shard-size", "1MB"]
    for least in (0, 3, 10):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(parts := list(tmp_path.glob("out.*.part/*.safetensors"))) < least or not parts:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        left = list(tmp_path.glob("out.*.part"))
        assert len(left) == 1
        with pytest.raises(UserError, match=r"config\.json: no such file"):
            load(left[0])
        shutil.rmtree(left[0])
    done = json.loads(subprocess.check_output([*argv, "--json"]))
    assert done["tensors"] == len(random_tensors(config)) and done["verify"] is None
    assert load(out).config == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
