"""The feature store without a tower: what is written is read, whatever happens in between, bit for bit."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import stores

from iv3jax.data import features
from iv3jax.data.clips import StoreSpec, VideoSampling, identify
from iv3jax.data.features import FeatureStore, FeatureWriter
from iv3jax.data.sample import Media
from iv3jax.errors import UserError

SAMPLING = VideoSampling(2.0, 4, 768, 4096, 65536)
SPEC = StoreSpec("0123456789abcdef", levels=2, width=5)
FP32 = replace(SPEC, dtype="float32")
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class BrokenOffError(Exception):
    """What breaks a run off."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three tokens a chunk and six a shard in fp32, twice as many in bf16, so that clips have several."""
    monkeypatch.setattr(features, "_CHUNK_BYTES", 3 * 15 * 4)
    monkeypatch.setattr(features, "_SHARD_BYTES", 6 * 15 * 4)


def video(folder: Path, number: int, size: int = 1000) -> Path:
    """A file that need be no video; no two are alike."""
    path = folder / f"clip {number}.mp4"
    path.write_bytes(np.random.default_rng(number).bytes(size))
    return path


def values(number: int, tokens: int, spec: StoreSpec = SPEC) -> np.ndarray:
    """(tokens, 1+K, D): what is stored of a clip. Some of it is zero for longer than a chunk."""
    found = np.random.default_rng(number).standard_normal((tokens, 1 + spec.levels, spec.width))
    found[: tokens // 2] *= number % 2
    return found.astype(NUMPY[spec.dtype])


def grid_of(number: int) -> tuple[int, int, int]:
    """Grids of 2 to 40 vision tokens."""
    return (1 + number % 5, 2, 4 * (1 + number % 4))


def add(writer: FeatureWriter, path: Path, number: int, piece: int = 4) -> None:
    grid = grid_of(number)
    tokens = grid[0] * grid[1] * grid[2] // 4
    times = tuple(np.random.default_rng(number).uniform(0, 100, 2 * grid[0]).tolist())
    media = Media("video", str(path), 2 * grid[0], 99, times, (32, 64))
    whole = values(number, tokens, writer.spec)
    pieces = (whole[i : i + piece] for i in range(0, tokens, piece))
    writer.add(identify(path), SAMPLING, media, grid, tokens, pieces)


def check(store: FeatureStore, path: Path, number: int) -> None:
    """The clip is there, with all that was known of it."""
    clip = store.find(path, SAMPLING)
    whole = values(number, clip.tokens, store.spec)
    read = store.read(clip)
    assert read.dtype == whole.dtype and read.tobytes() == whole.tobytes()
    each = clip.tokens // clip.grid[0]
    assert store.read(clip, 1, 3).tobytes() == whole[each : 3 * each].tobytes()
    times = np.random.default_rng(number).uniform(0, 100, 2 * clip.grid[0]).tolist()
    assert clip.media == Media("video", str(path), len(times), 99, tuple(times), (32, 64))
    assert clip.grid == grid_of(number)


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder, with a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, paths: list[Path], spec: StoreSpec = SPEC, part: int = 0, parts: int = 1) -> None:
    with FeatureWriter.open(folder, spec, part) as writer:
        for number in range(part, len(paths), parts):
            if not writer.has(paths[number], SAMPLING):
                add(writer, paths[number], number)


@pytest.fixture
def videos(tmp_path) -> list[Path]:
    return [video(tmp_path, number) for number in range(9)]


@pytest.mark.parametrize("spec", [SPEC, FP32, replace(SPEC, levels=0)], ids=["bf16", "fp32", "no levels"])
def test_what_is_written_is_read(tmp_path, videos, spec):
    write(tmp_path / "store", videos, spec)
    store = FeatureStore(tmp_path / "store", spec.tower)
    assert len(store) == len(videos) == len(list(store.clips)) and store.spec == spec
    for number, path in enumerate(videos):
        check(store, path, number)
    array = json.loads((tmp_path / "store/part-00000/features.zarr/zarr.json").read_text())
    assert array["zarr_format"] == 3 and array["data_type"] == spec.dtype


def test_a_clip_shares_no_file(tmp_path, videos):
    """A clip begins at a shard, so that later clips leave its files as they are."""
    write(tmp_path / "store", videos[:4])
    before = content(tmp_path / "store/part-00000/features.zarr/c")
    write(tmp_path / "store", videos)
    after = content(tmp_path / "store/part-00000/features.zarr/c")
    assert before.items() < after.items()
    clips = list(FeatureStore(tmp_path / "store").clips)
    assert {clip.start % 12 for clip in clips} == {0}
    assert sum(-(-clip.tokens // 12) for clip in clips) == len(after) > len(clips)


@pytest.mark.parametrize("piece", [1, 5, 12, 100])
def test_pieces_of_any_size(tmp_path, videos, piece):
    with FeatureWriter.open(tmp_path / "store", SPEC) as writer:
        add(writer, videos[3], 3, piece)
    check(FeatureStore(tmp_path / "store"), videos[3], 3)


@pytest.mark.parametrize("wrong", [-1, 1, 15])
def test_a_wrong_number_of_features(tmp_path, videos, wrong):
    media = Media("video", "", 4, 4, (0.0, 1.0, 2.0, 3.0), (32, 64))
    with FeatureWriter.open(tmp_path / "store", SPEC) as writer, pytest.raises(ValueError, match="26 tokens"):
        writer.add(identify(videos[0]), SAMPLING, media, (2, 2, 26), 26, [values(0, 26 + wrong)])
    assert len(FeatureStore(tmp_path / "store")) == 0


@pytest.mark.parametrize("done", [0, 1, 3, 8])
@pytest.mark.parametrize("where", ["tokens", "line"])
def test_interrupted_and_resumed(tmp_path, videos, monkeypatch, done, where):
    """A run that breaks off while it writes a clip, or before the clip's line is there: the same bytes."""
    write(tmp_path / "whole", videos)

    def broken(number: int):
        yield values(number, 1)
        yield values(number, 12)
        raise BrokenOffError

    write(tmp_path / "store", videos[:done])
    with pytest.raises(BrokenOffError), FeatureWriter.open(tmp_path / "store", SPEC) as writer:
        if where == "tokens":
            media = Media("video", "", 2, 99, (0.0, 1.0), (32, 64))
            # Another clip than the one that will be here, and longer.
            writer.add(identify(videos[-1]), SAMPLING, media, (1, 2, 160), 80, broken(done))
        else:

            def stop(*_: object) -> None:
                raise BrokenOffError

            with monkeypatch.context() as patch:
                patch.setattr(features, "write_whole", stop)
                add(writer, videos[done], done)
    assert len(FeatureStore(tmp_path / "store")) == done
    write(tmp_path / "store", videos)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


_KILLED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/data"]
from pathlib import Path
import test_features as t
t.features._CHUNK_BYTES, t.features._SHARD_BYTES = {chunk}, {shard}
paths = [Path(p) for p in {paths!r}]
t.write(Path({store!r}), paths)
"""


@pytest.mark.medium
def test_killed(tmp_path):
    """Processes that are killed while they write."""
    root = Path(__file__).resolve().parents[2]
    videos = [video(tmp_path, number) for number in range(40)]
    write(tmp_path / "whole", videos)
    numbers = dict(chunk=features._CHUNK_BYTES, shard=features._SHARD_BYTES)
    names = list(map(str, videos))
    script = _KILLED.format(root=str(root), paths=names, store=str(tmp_path / "store"), **numbers)
    shards, counts = tmp_path / "store/part-00000/features.zarr/c", []
    for target in (1, 7, 20, 41):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        while process.poll() is None and len(list(shards.glob("*"))) < target:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        counts.append(len(FeatureStore(tmp_path / "store")))
    assert counts == sorted(counts) and counts[0] < 7 < counts[-1] < 40
    write(tmp_path / "store", videos)
    kept = {k: v for k, v in content(tmp_path / "store").items() if not Path(k).name.startswith(".")}
    assert kept == content(tmp_path / "whole")


def test_two_hosts(tmp_path, videos):
    """Hosts that write at the same time, and then one that does the work of both: nothing twice."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: write(tmp_path / "store", videos[:7], part=part, parts=2), range(2)))
    store = FeatureStore(tmp_path / "store")
    assert [clip.part for clip in store.clips] == [0] * 4 + [1] * 3
    for number, path in enumerate(videos[:7]):
        check(store, path, number)
    write(tmp_path / "store", videos)
    assert len(FeatureStore(tmp_path / "store")) == 9
    check(FeatureStore(tmp_path / "store"), videos[8], 8)


def test_many_clips(tmp_path, videos, monkeypatch):
    """The index goes on in another file when one is full."""
    monkeypatch.setattr(features, "_CLIPS_A_FILE", 2)
    write(tmp_path / "store", videos[:5])
    write(tmp_path / "store", videos)
    names = sorted(path.name for path in (tmp_path / "store/part-00000").glob("clips-*"))
    assert names == [f"clips-{i:05}.jsonl" for i in range(5)]
    for number, path in enumerate(videos):
        check(FeatureStore(tmp_path / "store"), path, number)


def test_one_writer_for_a_part(tmp_path):
    with FeatureWriter.open(tmp_path / "store", SPEC):
        with FeatureWriter.open(tmp_path / "store", SPEC, 1):
            pass
        with (
            pytest.raises(UserError, match="another process is writing"),
            FeatureWriter.open(tmp_path / "store", SPEC),
        ):
            pass


@pytest.mark.parametrize(
    "change", [dict(tower="fedcba9876543210"), dict(levels=1), dict(width=6), dict(dtype="float32")], ids=str
)
def test_a_store_is_of_one_tower(tmp_path, videos, change):
    write(tmp_path / "store", videos[:1])
    ((field, value),) = change.items()
    said = f"{field} of this feature store is {getattr(SPEC, field)}, but {value} is asked for"
    with (
        pytest.raises(UserError, match=said),
        FeatureWriter.open(tmp_path / "store", replace(SPEC, **change)),
    ):
        pass
    if field == "tower":
        with pytest.raises(UserError, match=said):
            FeatureStore(tmp_path / "store", value)


def test_a_video_is_found_by_path_and_content(tmp_path, videos, monkeypatch):
    write(tmp_path / "store", videos)
    store = FeatureStore(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    check_at = store.find("clip 3.mp4", SAMPLING)
    assert check_at.file.path == str(videos[3])
    # Touched: the same. Moved: found by its content. Gone: found by its path.
    os.utime(videos[3], (1, 1))
    assert store.find(videos[3], SAMPLING) == check_at
    videos[3].rename(tmp_path / "moved.mp4")
    assert store.find(tmp_path / "moved.mp4", SAMPLING) == check_at
    assert store.find(videos[3], SAMPLING) == check_at


def test_what_is_not_there(tmp_path, videos):
    write(tmp_path / "store", videos[:4])
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(UserError, match=r"clip 5\.mp4: is not in the feature store .*iv3 data encode"):
        store.find(videos[5], SAMPLING)
    with pytest.raises(UserError, match=r"absent\.mp4: is not in the feature store"):
        store.find(tmp_path / "absent.mp4", SAMPLING)
    other = replace(SAMPLING, fps=1.0, max_frames=32)
    with pytest.raises(UserError, match=r"it has fps 2, 4 to 768 frames.* but fps 1, 4 to 32 frames"):
        store.find(videos[0], other)
    video(tmp_path, 99).replace(videos[0])
    with pytest.raises(UserError, match="has changed since it was encoded"):
        store.find(videos[0], SAMPLING)


def test_a_changed_video_is_written_again(tmp_path, videos):
    write(tmp_path / "store", videos[:3])
    old = videos[1].read_bytes()
    video(tmp_path, 99, 2000).replace(videos[1])
    with FeatureWriter.open(tmp_path / "store", SPEC) as writer:
        assert writer.has(videos[0], SAMPLING) and not writer.has(videos[1], SAMPLING)
        assert not writer.has(videos[0], replace(SAMPLING, fps=1.0))
        add(writer, videos[1], 7)
        assert writer.has(videos[1], SAMPLING)
    check(FeatureStore(tmp_path / "store"), videos[1], 7)
    # Both are there: the file says which is meant.
    videos[1].write_bytes(old)
    check(FeatureStore(tmp_path / "store"), videos[1], 1)


def test_quarantine(tmp_path, videos):
    where = tmp_path / "store/part-00000/quarantine.jsonl"
    with FeatureWriter.open(tmp_path / "store", SPEC) as writer:
        writer.quarantine(videos[0], "truncated")
        writer.quarantine(videos[2], "no frames")
    rows = [json.loads(line) for line in where.read_text().splitlines()]
    assert rows == [
        {"path": str(videos[0]), "reason": "truncated"},
        {"path": str(videos[2]), "reason": "no frames"},
    ]
    with FeatureWriter.open(tmp_path / "store", SPEC):
        assert not where.exists()


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9 \xff.mp4")
    path.write_bytes(b"a video")
    write(tmp_path / "store", [path])
    check(FeatureStore(tmp_path / "store"), path, 0)


@pytest.mark.parametrize("damage", ["bit", "cut", "lost"])
def test_damaged_features(tmp_path, videos, damage):
    """Never read as if they were right; other clips are not touched."""
    write(tmp_path / "store", videos[:2])
    shard = tmp_path / "store/part-00000/features.zarr/c/1/0/0"
    data = bytearray(shard.read_bytes())
    if damage == "lost":
        shard.unlink()
    else:
        data[len(data) // 3] ^= 4
        shard.write_bytes(data if damage == "bit" else data[: len(data) // 2])
    store = FeatureStore(tmp_path / "store")
    check(store, videos[0], 0)
    with pytest.raises(UserError, match=r"clip 1\.mp4: .*damaged or lost.*encode again"):
        store.read(store.find(videos[1], SAMPLING))


def test_damaged_index(tmp_path, videos):
    write(tmp_path / "store", videos[:2])
    index = tmp_path / "store/part-00000/clips-00000.jsonl"
    whole = index.read_bytes()
    for broken in (whole[:-20], b"\xff" + whole, whole.replace(b'"grid"', b'"gird"'), b"[]\n"):
        index.write_bytes(broken)
        with pytest.raises(UserError, match=r"clips-00000\.jsonl: line \d is no clip"):
            FeatureStore(tmp_path / "store")
    index.write_bytes(whole)
    spec = tmp_path / "store/store.json"
    for text in ("", "[]", '{"format": 1}', spec.read_text().replace("tower", "power")):
        spec.write_text(text)
        with pytest.raises(UserError, match=r"store\.json: is not what"):
            FeatureStore(tmp_path / "store")
    with pytest.raises(UserError, match="is no feature store"):
        FeatureStore(tmp_path)


def test_another_format(tmp_path, videos):
    write(tmp_path / "store", videos[:1])
    spec = tmp_path / "store/store.json"
    spec.write_text(spec.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2"):
        FeatureStore(tmp_path / "store")


def test_a_store_that_cannot_be_written(tmp_path, videos):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="Not a directory"),
        FeatureWriter.open(tmp_path / "file" / "store", SPEC),
    ):
        pass
    with FeatureWriter.open(tmp_path / "store", SPEC) as writer:
        # A folder where a shard should be.
        (tmp_path / "store/part-00000/features.zarr/c/0/0/0/x").mkdir(parents=True)
        with pytest.raises(UserError, match=r"part-00000: .*finished clips stay"):
            add(writer, videos[0], 0)


def test_in_other_processes_and_threads(tmp_path, videos):
    write(tmp_path / "store", videos)
    store = FeatureStore(tmp_path / "store")
    check(store, videos[0], 0)
    copy = pickle.loads(pickle.dumps(store))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: check(copy, videos[number], number), range(9)))


@pytest.mark.medium
def test_on_a_store(tmp_path, videos):
    """A remote folder, written in two runs, the first broken off, and read; the videos are local.

    S3 only: tensorstore does not understand the answers of the emulator that stands for gs://.
    """
    with stores.store("s3") as bucket:
        folder = bucket / "some" / "features"
        write(folder, videos[:3])
        with FeatureWriter.open(folder, SPEC) as writer, pytest.raises(ValueError, match="no features"):
            media = Media("video", "", 2, 99, (0.0, 1.0), (32, 64))
            writer.add(identify(videos[8]), SAMPLING, media, (1, 2, 160), 80, [values(0, 60)])
        write(folder, videos)
        write(folder, videos[:3], part=1)
        store = FeatureStore(str(folder), SPEC.tower)
        assert len(store) == len(videos)
        for number, path in enumerate(videos):
            check(store, path, number)
        write(tmp_path / "local", videos)
        arrays = folder / "part-00000" / "features.zarr"
        shards = [
            (path / "0" / "0").read_bytes()
            for path in sorted((arrays / "c").iterdir(), key=lambda path: int(path.name))
        ]
        here = sorted((tmp_path / "local/part-00000/features.zarr/c").iterdir(), key=lambda p: int(p.name))
        assert shards == [(path / "0/0").read_bytes() for path in here]
