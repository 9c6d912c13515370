"""Paths on stores behave like pathlib's, and everything that goes wrong is one line that says where."""

import io
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
from stores import KEY, point_at_nothing, store

from iv3jax import paths
from iv3jax.errors import UserError
from iv3jax.paths import StorePath, make_path, remove_folder


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
    with store(request.param) as path:
        yield path


@pytest.fixture
def folder(bucket, request):
    """A place of its own for each test."""
    return bucket / request.node.name.partition("[")[0]


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_local_and_what_is_not(tmp_path):
    assert make_path("runs/demo") == Path("runs/demo")
    assert make_path(tmp_path) == tmp_path and not isinstance(make_path(tmp_path), StorePath)
    assert make_path("odd:name/x") == Path("odd:name/x")
    for text in ("gs://b/model/", "s3://b/a b/c#1?.mp4"):
        path = make_path(text)
        assert isinstance(path, StorePath) and make_path(path) is path
        assert str(path) == text.rstrip("/") and pickle.loads(pickle.dumps(path)) == path
    # pathlib has eaten a slash.
    assert str(make_path(Path("gs://b/model"))) == "gs://b/model"
    path = make_path("s3://b/model") / "x" / "clip.mp4"
    assert (path.name, path.suffix, str(path.parent)) == ("clip.mp4", ".mp4", "s3://b/model/x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/video.mp4", "paths are local or start with gs:// and s3://; download it first"),
        ("gs://", "names no bucket; write gs://BUCKET/PATH"),
        ("s3:///", "names no bucket"),
    ],
)
def test_urls_that_name_nothing(text, message):
    assert refusal(lambda: make_path(text)).startswith(f"{text}: {message}")


def test_like_pathlib(folder, tmp_path):
    """The same calls give the same results on a store as on the local disk."""
    for root in (folder, tmp_path):
        root.mkdir(parents=True, exist_ok=True)
        (root / "inner").mkdir(parents=True)
        (root / "a.txt").write_text("für\n")
        (root / "inner" / "b c.bin").write_bytes(bytes(range(256)))
        assert [p.name for p in sorted(root.iterdir(), key=str)] == ["a.txt", "inner"]
        assert (root / "a.txt").read_text() == "für\n"
        assert (root / "inner/b c.bin").read_bytes() == bytes(range(256))
        assert root.is_dir() and root.exists() and not root.is_file()
        assert (root / "a.txt").is_file() and not (root / "a.txt").is_dir()
        assert not (root / "a").exists() and not (root / "absent").is_dir()
        for missing in (lambda r=root: (r / "no").read_text(), lambda r=root: (r / "no").open("rb")):
            with pytest.raises(FileNotFoundError):
                missing()
        with pytest.raises(IsADirectoryError):
            (root / "inner").open("rb")
        (root / "a.txt").unlink()
        assert not (root / "a.txt").exists()
        remove_folder(root)
        assert not root.exists()
        remove_folder(root)


@pytest.mark.medium
def test_ranges(folder, monkeypatch):
    monkeypatch.setattr(paths, "_PIECE", 1000)
    data = os.urandom(12_345)
    (folder / "x").write_bytes(data)
    for start, stop in ((0, 0), (5, 5), (0, 1), (999, 1001), (3000, 12_345), (0, 12_345), (12_344, 12_345)):
        assert (folder / "x").read_range(start, stop) == data[start:stop]
    assert (folder / "x").size() == 12_345
    text = refusal(lambda: (folder / "x").read_range(12_000, 12_346))
    assert text == f"{folder / 'x'}: ended or changed while it was read; read it again"


def test_a_cut_answer_is_asked_for_again(folder, monkeypatch):
    monkeypatch.setattr(paths, "_PIECE", 1000)
    data = os.urandom(2500)
    (folder / "x").write_bytes(data)
    system, cut = paths._file_system(folder.scheme), []

    async def once_short(*args, **kwargs):
        whole = await read(*args, **kwargs)
        if kwargs["start"] == 1000 and not cut:
            cut.append(len(whole))
            return whole[:-1]
        return whole

    read = system._cat_file
    monkeypatch.setattr(system, "_cat_file", once_short)
    assert (folder / "x").read_range(0, 2500) == data and cut == [1000]


SEEKS = [(0, 0, 5), (50_000, 0, 999), (-7, 2, 100), (-4000, 1, 2500), (10, 2, 3), (1, 0, 30_000), (0, 0, -1)]


def test_an_open_file_is_seekable(folder, monkeypatch):
    monkeypatch.setattr(paths, "_BLOCK", 1000)
    monkeypatch.setattr(paths, "_KEPT", 20)
    data = os.urandom(54_321)
    (folder / "x").write_bytes(data)
    reads: list[int] = []
    read_range = StorePath.read_range
    monkeypatch.setattr(
        StorePath, "read_range", lambda p, a, b: reads.append(b - a) or read_range(p, a, b), raising=True
    )
    with (folder / "x").open("rb") as file, io.BytesIO(data) as plain:
        assert file.name == str(folder / "x")
        for offset, whence, count in SEEKS:
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(count) == plain.read(count) and file.tell() == plain.tell()
        with pytest.raises(OSError, match="before the start"):
            file.seek(-1)
    # Reading on in order takes ever more at once.
    assert max(reads) == 16_000 and len(paths._StoreFile._blocks) == 20
    reads.clear()
    with (folder / "x").open("rb") as file:
        file.seek(54_000)
        assert file.read() == data[54_000:]
    assert not reads, "the last blocks were in memory"
    (folder / "x").write_bytes(data[::-1])
    with (folder / "x").open("rb") as file:
        assert file.read() == data[::-1]


def test_a_file_of_several_parts(folder, tmp_path, monkeypatch):
    """Large enough that the libraries upload it in parts."""
    local = tmp_path / "x"
    local.write_bytes(os.urandom(11 << 20))
    if folder.scheme == "s3":
        # s3fs does so above 100 MB only.
        import s3fs.core

        monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize: 5 << 20)
    (folder / "x").upload(local)
    assert (folder / "x").read_range(0, 11 << 20) == local.read_bytes()


def test_a_missing_bucket(bucket, tmp_path):
    absent = StorePath(bucket.scheme, "absent/file")
    assert not absent.exists() and not absent.is_dir()
    with pytest.raises(FileNotFoundError):
        absent.read_bytes()
    (tmp_path / "x").write_bytes(b"1")
    for write in (lambda: absent.write_bytes(b"1"), lambda: absent.upload(tmp_path / "x")):
        assert refusal(write) == f"{absent}: no such bucket; make it first, or check its name"


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_does_not_answer(monkeypatch, scheme):
    """Within seconds, and the library's own words and tracebacks stay away."""
    assert paths._FIRST_ANSWER == 10
    # gcsfs tries again and again until it is told to stop.
    monkeypatch.setattr(paths, "_FIRST_ANSWER", 2.0)
    with store(scheme):
        point_at_nothing(monkeypatch, scheme)
        path, start = StorePath(scheme, "bucket/model"), time.monotonic()
        text = refusal(path.exists)
        assert time.monotonic() - start < 4
        assert text.startswith(f"{path}: the store cannot be reached (") and "check the network and " in text


def test_credentials_that_are_refused(monkeypatch):
    with store("s3") as bucket:
        monkeypatch.setattr("stores.KEY", "another key")
        assert KEY != "another key"
        for call in (
            (bucket / "x").read_bytes,
            (bucket / "x").exists,
            lambda: (bucket / "x").write_bytes(b"1"),
        ):
            text = refusal(call)
            assert text.startswith(f"{bucket / 'x'}: access denied (") and "set AWS_PROFILE, or AWS_" in text


def test_no_credentials(monkeypatch, tmp_path):
    with store("s3") as bucket:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "absent"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert "access denied (Unable to locate credentials)" in refusal((bucket / "x").exists)


@pytest.mark.parametrize(("scheme", "library", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_library_that_is_not_installed(monkeypatch, scheme, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"{library}.core")
    path = StorePath(scheme, "bucket/model")
    assert refusal(path.exists) == f"{scheme}:// paths need {library}: pip install 'iv3jax[{extra}]'"
