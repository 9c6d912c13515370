"""Exports to and from stores: the same bits, nothing that looks complete before it is checked."""

import numpy as np
import pytest
from models.peers import even_config, random_tensors, write_folder
from safetensors.numpy import load_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.errors import UserError

stores = pytest.importorskip("stores")

pytestmark = pytest.mark.medium

CONFIG = even_config()
VALUES = random_tensors(CONFIG)


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    with stores.store(request.param) as path:
        yield path


@pytest.fixture
def model(tmp_path):
    return write_folder(tmp_path / "in", CONFIG, VALUES)


def test_there_and_back(model, tmp_path, bucket):
    """Local → store → local: every tensor bit for bit, every other file as it was."""
    done = export(model, bucket / "models" / "one", max_shard_size="20KB")
    assert done.folder == str(bucket / "models" / "one")
    assert sorted(p.name for p in (bucket / "models" / "one").iterdir()) == sorted(done.files)
    again = export(str(bucket / "models" / "one"), tmp_path / "out")
    assert again.tensors == done.tensors
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), value.view(np.uint32), err_msg=name)
    for name in ("config.json", "generation_config.json", "modeling_internvideo3.py"):
        assert (bucket / "models" / "one" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_taken_and_replaced(model, bucket):
    place = bucket / "models" / "two"
    save(load(model), place)
    with pytest.raises(UserError, match="two: is not empty"):
        export(model, place)
    with pytest.raises(UserError, match="lies in the model folder"):
        export(place, place / "inner")
    (place / "junk").write_bytes(b"")
    save(load(model), place)
    assert "junk" not in {p.name for p in place.iterdir()} and load(place).config == CONFIG


def test_a_failed_check_leaves_nothing(model, bucket, monkeypatch):
    def refuse(*_):
        assert (bucket / "three" / "config.json").exists()
        raise UserError("odd bits")

    monkeypatch.setattr("iv3jax.checkpoint.export.compare", refuse)
    with pytest.raises(UserError, match="odd bits"):
        export(model, bucket / "three")
    assert not (bucket / "three").exists()
