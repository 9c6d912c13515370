"""Folders written to a store: the file that makes them complete comes last, nothing else is touched."""

from pathlib import Path

import pytest
from stores import store

from iv3jax.checkpoint.upload import StoreTarget
from iv3jax.errors import UserError
from iv3jax.paths import StorePath


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    with store(request.param) as path:
        yield path


@pytest.fixture
def folder(bucket, request):
    return bucket / request.node.name.partition("[")[0]


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    """Where files are written first: nothing may be left there."""
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "staging"))
    yield tmp_path / "staging"
    assert not list((tmp_path / "staging").iterdir())


def names(folder: StorePath) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def test_shard_by_shard(folder, staging):
    target = StoreTarget(folder)
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        with target.open(name) as file:
            file.write(b"....")
            file.seek(0)
            file.write(name.encode()[:2])
        assert not list(staging.iterdir())
        assert not (folder / "config.json").exists()
    assert names(folder) == ["a.safetensors", "b.safetensors"]
    target.finish()
    assert names(folder) == ["a.safetensors", "b.safetensors", "config.json"]
    assert (folder / "b.safetensors").read_bytes() == b"b..."
    assert (folder / "config.json").read_bytes() == b"co.."
    (folder / "config.json").unlink()
    target.discard()
    assert names(folder) == []


def test_an_exception_half_way(folder):
    target = StoreTarget(folder)
    with target.open("a.safetensors") as file:
        file.write(b"whole")
    with pytest.raises(KeyboardInterrupt), target.open("b.safetensors") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert names(folder) == ["a.safetensors"]
    with pytest.raises(UserError, match=r"config\.json was never written, so the folder is not complete"):
        target.finish()
    with pytest.raises(UserError) as caught:
        StoreTarget(folder)
    assert str(caught.value) == (
        f"{folder}: is not empty and has no config.json, as after an export that was cut off; name a new "
        "folder to export to, or remove this one"
    )
    target.discard()
    assert names(folder) == []
    StoreTarget(folder)


def test_targets_that_are_taken(folder):
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        StoreTarget(folder)
    with pytest.raises(UserError, match="a file; name a new folder"):
        StoreTarget(folder / "config.json")
    assert names(folder) == ["config.json"]


def test_a_missing_bucket(bucket, tmp_path):
    target = StoreTarget(StorePath(bucket.scheme, "absent/model"))
    with pytest.raises(UserError, match="no such bucket; make it first"), target.open("a") as file:
        file.write(b"1")


def test_no_room_for_a_shard(folder, monkeypatch):
    def full(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("iv3jax.checkpoint.upload.NamedTemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left on device.*point TMPDIR at a disk with room"):
        StoreTarget(folder).open("a").__enter__()
