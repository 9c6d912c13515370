"""Model folders, videos and pictures on a store: numbers and error lines as from the local disk."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from data.media import cut, write_video
from models.peers import even_config, random_tensors, tiny_config, to_theirs, write_folder
from PIL import Image
from stores import point_at_nothing, store

from iv3jax.checkpoint import files
from iv3jax.checkpoint.files import INDEX, SINGLE, TensorFiles
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.checkpoint.shapes import model_shapes
from iv3jax.data.image import is_picture, read_image
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.data.video import read_video
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.paths import StorePath

CONFIG = tiny_config("m2la")
VALUES = random_tensors(CONFIG)
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    with store(request.param) as path:
        yield path


@pytest.fixture
def remote(bucket, request):
    """A folder of its own for each test."""
    return bucket / request.node.name


def refusal(call, path) -> str:
    """The rest of the line, which starts with the path."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


@pytest.mark.medium
@pytest.mark.parametrize(("dtype", "shards"), [("float32", None), ("bfloat16", 3)])
def test_load_is_bit_equal(remote, tmp_path, dtype, shards):
    config = even_config()
    values = {k: v.astype(jnp.dtype(dtype)) for k, v in random_tensors(config).items()}
    upload_folder(write_folder(tmp_path, config, values, shards), remote)
    loaded = load(str(remote))
    assert loaded.folder == remote and loaded.config == config == model_config(remote)
    got = to_theirs(loaded.params, config)
    assert got.keys() == values.keys()
    assert all((got[k].dtype, got[k].tobytes()) == (v.dtype, v.tobytes()) for k, v in values.items())
    assert model_shapes(str(remote)) == model_shapes(tmp_path)


def model_config(folder) -> ModelConfig:
    """Read from the folder, and from the file in it."""
    config = ModelConfig.from_file(folder)
    assert ModelConfig.from_file(str(folder / "config.json")) == config
    return config


def test_headers_of_any_length(remote, tmp_path, monkeypatch):
    """Shorter than what is read at first, or longer."""
    upload_folder(write_folder(tmp_path, CONFIG, VALUES), remote)
    for first in (4, 8, 100, 1 << 18):
        monkeypatch.setattr(files, "_FIRST_READ", first)
        held = TensorFiles(remote)
        assert set(held.names) == set(VALUES)
        for name in list(VALUES)[::10]:
            assert held.dtype(name) == "F32"
            np.testing.assert_array_equal(held.read(name), VALUES[name])


def test_broken_files_give_the_lines_of_local_ones(remote, tmp_path):
    """Whatever safetensors finds wrong, it finds on a store too, in the same words."""
    write_folder(tmp_path, CONFIG, VALUES)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    broken = [data[:n] for n in (0, 5, 8, 100, len(data) // 2, len(data) - 1)]
    broken += [
        data + b"\0",
        (1 << 62).to_bytes(8, "little") + data[8:],
        (200 << 20).to_bytes(8, "little") + data[8:],
        data[:8] + b"x" * length + data[8 + length :],
        data[:8] + header.replace(b'"F32"', b'"F99"', 1) + data[8 + length :],
        data[:8] + header.replace(b"[0,", b"[4,", 1) + data[8 + length :],
    ]
    (remote / "config.json").write_text((tmp_path / "config.json").read_text())
    for content in broken:
        (tmp_path / SINGLE).write_bytes(content)
        (remote / SINGLE).write_bytes(content)
        found = refusal(lambda: load(remote), remote / SINGLE)
        assert found == refusal(lambda: load(tmp_path), tmp_path / SINGLE)
        assert found.startswith(": not a whole safetensors file (")


def test_folders_that_are_not_whole(remote, tmp_path):
    write_folder(tmp_path, CONFIG, VALUES, shards=2)
    upload_folder(tmp_path, remote)
    (remote / FIRST).write_bytes((tmp_path / FIRST).read_bytes()[:-1])
    assert refusal(lambda: load(remote), remote / FIRST).startswith(": not a whole safetensors file (")
    (remote / FIRST).unlink()
    assert refusal(lambda: load(remote), remote / FIRST) == f": no such file, though {INDEX} names it"
    (remote / INDEX).write_text("{")
    assert refusal(lambda: load(remote), remote / INDEX).startswith(": not valid JSON (")
    (remote / INDEX).unlink()
    assert refusal(lambda: load(remote), remote) == f": holds neither {SINGLE} nor {INDEX}"
    (remote / "config.json").unlink()
    text = refusal(lambda: load(remote), remote / "config.json")
    assert text == ": no such file; a model folder holds a config.json"


def test_places_that_are_no_folder(remote):
    absent = StorePath(remote.scheme, "absent/model")
    for path in (absent, remote / "absent"):
        text = refusal(lambda p=path: load(str(p)), path)
        assert text == ": no such folder on the store; check the bucket and the path"
    (remote / "file").write_bytes(b"1")
    assert refusal(lambda: load(remote / "file"), remote / "file").startswith(": a file; a model is a folder")


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_is_away(monkeypatch, scheme):
    monkeypatch.setattr("iv3jax.paths._FIRST_ANSWER", 1.0)
    with store(scheme) as bucket:
        point_at_nothing(monkeypatch, scheme)
        for read in (load, lambda p: read_video(p, min_pixels=1, max_pixels=9), ModelConfig.from_file):
            text = refusal(lambda r=read: r(str(bucket / "x")), bucket / "x")
            assert text.startswith(": the store cannot be reached (")


def test_processor(remote):
    for file in TINY_FOLDER.glob("*.json"):
        (remote / file.name).upload(file)
    config = ModelConfig.from_dict(tiny_model_config())
    local, ours = Processor.from_dir(TINY_FOLDER, config), Processor.from_dir(str(remote), config)
    assert ours.tokenizer.to_json() == local.tokenizer.to_json()
    assert (ours.fps, ours.image_pixels, ours.video_pixels) == (
        local.fps,
        local.image_pixels,
        local.video_pixels,
    )
    (remote / "tokenizer.json").unlink()
    text = refusal(lambda: Processor.from_dir(remote, config), remote / "tokenizer.json")
    assert text.startswith(": no such file; copy the tokenizer.json of the model")


def tiny_model_config():
    from iv3jax.models.presets import preset

    return preset("tiny").to_dict()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_video(remote, tmp_path, name):
    """Frames and times as from the local file; MP4 keeps its index at the end."""
    upload(write_video(tmp_path / name, 40), remote)
    budget = {"min_pixels": 4096, "max_pixels": 1 << 20}
    local, ours = read_video(tmp_path / name, **budget), read_video(str(remote / name), **budget)
    np.testing.assert_array_equal(ours.frames, local.frames)
    np.testing.assert_array_equal(ours.times, local.times)
    assert ours.total_frames == 40


def upload(local: Path, remote: StorePath) -> None:
    (remote / local.name).upload(local)


def upload_folder(local: Path, remote: StorePath) -> None:
    for file in local.iterdir():
        upload(file, remote)


def test_picture(remote, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "p.png")
    upload(tmp_path / "p.png", remote)
    budget = {"min_pixels": 1024, "max_pixels": 1 << 20}
    assert is_picture(remote / "p.png")
    np.testing.assert_array_equal(
        read_image(str(remote / "p.png"), **budget), read_image(tmp_path / "p.png", **budget)
    )


@pytest.mark.parametrize("kind", ["video", "image"])
def test_broken_media_give_the_lines_of_local_ones(remote, tmp_path, kind):
    if kind == "video":
        cut(write_video(tmp_path / "cut.mp4"), 0.7)
        write_video(tmp_path / "begun.mkv", 40)
        cut(tmp_path / "begun.mkv", 0.5)
    else:
        Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
        cut(tmp_path / "cut.png", 0.5)
    (tmp_path / "text.mp4").write_text("no video at all, and no picture")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "x").write_bytes(b"1")
    read = read_video if kind == "video" else read_image
    budget = {"min_pixels": 4096, "max_pixels": 1 << 20}
    for file in [*tmp_path.iterdir(), tmp_path / "absent.mp4"]:
        if file.is_file():
            upload(file, remote)
    (remote / "folder.mp4" / "x").write_bytes(b"1")
    for file in [*tmp_path.iterdir(), tmp_path / "absent.mp4"]:
        path = remote / file.name
        ours = refusal(lambda p=path: read(str(p), **budget), path)
        assert ours == refusal(lambda p=file: read(p, **budget), file)


@pytest.mark.medium
def test_iv3_ask_and_shapes(tmp_path, monkeypatch, capsys):
    """A model and a video on a store, at the command line: the answer is that of the local ones."""
    from iv3jax.cli import main

    save(load("tiny", random_weights=True), tmp_path / "model")
    write_video(tmp_path / "clip.mp4", 20)

    def run(root) -> str:
        assert main(["shapes", f"{root}/model"]) == 0
        arguments = ["--model", f"{root}/model", "--max-frames", "4", "--max-new-tokens", "4", "--json"]
        assert main(["ask", f"{root}/clip.mp4", "What is it?", *arguments]) == 0
        shapes, _, answer = capsys.readouterr().out.rpartition("\n{")
        return shapes + json.loads("{" + answer)["text"]

    with store("s3") as bucket:
        upload_folder(tmp_path / "model", bucket / "model")
        upload(tmp_path / "clip.mp4", bucket)
        assert run(bucket) == run(tmp_path)
        assert main(["ask", f"{bucket}/absent.mp4", "What is it?", "--model", f"{bucket}/model"]) == 2
        assert capsys.readouterr().err == (
            f"iv3: error: {bucket}/absent.mp4: no such file; check the path of the video\n"
        )


WIDE = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax
from iv3jax.checkpoint.files import TensorFiles
from iv3jax.paths import make_path

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024

files = TensorFiles(make_path({folder!r}))
files.read("small")
before = peak()
print(json.dumps([files.read("large").nbytes, peak() - before]))
"""


@pytest.mark.medium
def test_peak_memory_while_reading(tmp_path):
    """Of a shard of 450 MB one tensor is read: it and the pieces under way, 64 MiB twice, are held."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from Linux's /proc")
    from safetensors.numpy import save_file

    values = {name: np.zeros((150, 1 << 20), np.uint8).view(np.float32) for name in ("a", "b", "large")}
    save_file(values | {"small": np.zeros(1, np.float32)}, tmp_path / SINGLE)
    root = Path(__file__).parents[2]
    with store("s3") as bucket:
        upload(tmp_path / SINGLE, bucket / "wide")
        folder = str(bucket / "wide")
        script = WIDE.format(root=str(root), tests=str(root / "tests"), folder=folder)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    size, grown = json.loads(result.stdout.splitlines()[-1])
    assert size == 150 << 20 and grown <= size + (140 << 20), grown
