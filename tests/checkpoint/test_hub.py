"""Ids of the Hugging Face hub, against a hub on localhost; local folders and presets go first."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import numpy as np
import pytest
from models.peers import random_tensors, tiny_config, to_theirs, write_folder
from stores import free_port

from iv3jax.checkpoint.hub import is_hub_id
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.shapes import model_shapes
from iv3jax.errors import UserError
from iv3jax.models.presets import PRESETS

CONFIG = tiny_config("m2la")
VALUES = random_tensors(CONFIG)
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for `org/model` (revisions main and v1), the gated `org/gated`, and no others."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        revisions = {f"/api/models/org/model{end}" for end in ("", "/revision/v1", f"/revision/{SHA}")}
        if path in revisions | {"/api/models/org/model/revision/main"}:
            names = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self._answer(200, {"id": "org/model", "sha": SHA, "siblings": names})
        elif path.startswith(f"/api/models/org/model/tree/{SHA}"):
            sizes = {file.name: file.stat().st_size for file in self.folder.iterdir()}
            entries = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            self._answer(200, entries)
        elif path.startswith(f"/org/model/resolve/{SHA}/"):
            data = (self.folder / path.rpartition("/")[2]).read_bytes()
            self._answer(200, data)
        elif path.startswith("/api/models/org/model/"):
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/gated"):
            self._answer(403, {}, {"X-Error-Code": "GatedRepo"})
        else:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        name = urlsplit(self.path).path.rpartition("/")[2]
        fixed = {"Content-Length": str(len(data)), "X-Repo-Commit": SHA, "ETag": f'"{name}"'}
        for key, value in (fixed | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is for tests."""


def point_at(patch: pytest.MonkeyPatch, url: str) -> None:
    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    # Made from the former when the library was imported.
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    patch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/" + template.split("/", 3)[3]
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.folder, Hub.asked = write_folder(tmp_path / "repo", CONFIG, VALUES, shards=2), []
    (Hub.folder / "training_log.bin").write_bytes(b"not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield huggingface_hub.constants.ENDPOINT
    server.shutdown()
    server.server_close()


def refusal(source, read=load) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read(source)
    assert time.monotonic() - start < 3
    text = str(caught.value)
    assert text.startswith(f"{source}: ") and "\n" not in text
    return text.removeprefix(f"{source}: ")


@pytest.mark.parametrize(
    ("source", "could_be"),
    [
        ("org/model", True),
        ("Org-1/model.v2_x@v1.0", True),
        ("org/model@refs/pr/3", True),
        ("model", False),
        ("/org/model", False),
        ("./org/model", False),
        ("../model", False),
        ("~/model", False),
        ("a/b/c", False),
        ("org/", False),
        ("org/model@", False),
        ("s3://org/model", False),
        (Path("org/model"), False),
    ],
)
def test_what_could_be_an_id(source, could_be):
    assert is_hub_id(source) == could_be


@pytest.mark.parametrize("source", ["org/model", "org/model@v1"])
def test_a_model_of_the_hub(hub, source, monkeypatch):
    assert model_shapes(source).parameters == sum(v.size for v in VALUES.values())
    assert not [path for path in Hub.asked if path.endswith(".safetensors")], "shapes need the config only"
    loaded = load(source)
    assert loaded.folder is not None and SHA in str(loaded.folder)
    assert not (loaded.folder / "training_log.bin").exists()
    for name, value in to_theirs(loaded.params, CONFIG).items():
        np.testing.assert_array_equal(value, VALUES[name])
    # Without a network, what was downloaded is used.
    point_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    assert load("org/model@" + SHA).folder == loaded.folder


def test_what_the_hub_refuses(hub):
    assert refusal("runs/modle") == (
        f"no such folder, and no public model runs/modle at {hub}; check the name, or log in with "
        "`hf auth login` if the model is private"
    )
    assert refusal("org/model@v7") == (
        f"no such folder, and the model org/model at {hub} has no revision v7; check it"
    )
    assert refusal("org/gated").startswith(
        f"no such folder, and the hub's model org/gated is gated: accept its terms at {hub}/org/gated, then"
    )
    assert "no public model runs/modle" in refusal("runs/modle", model_shapes)


def test_no_hub(hub, monkeypatch):
    """Refused, unknown, forbidden by the user: within a second or two, with both possible meanings."""
    start = "no such folder, and the hub, where it could be a model's name, cannot be asked ("
    for url in (f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid"):
        point_at(monkeypatch, url)
        text = refusal("runs/modle")
        assert text.startswith(start) and text.endswith(
            f"check the path, or the network and HF_ENDPOINT ({url})"
        )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("runs/modle").startswith(start)


def test_folders_and_presets_go_first(hub, tmp_path):
    write_folder(tmp_path / "org" / "model", CONFIG, VALUES)
    assert load("org/model").folder == Path("org/model")
    (tmp_path / "org" / "file").write_text("")
    assert refusal("org/file").startswith("a file; a model is a folder with")
    assert refusal("tiny").startswith("a preset is a shape without weights")
    assert refusal("tinny") == f"neither a folder nor a preset ({', '.join(PRESETS)})"
    assert not Hub.asked
