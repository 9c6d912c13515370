"""Worlds made on the host: padding and vectors against NumPy, features against the model's own `encode`."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv3jax.data.collate import collate
from iv3jax.data.digits import Event
from iv3jax.data.processor import Processor
from iv3jax.data.tasks.episode import Episode
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.world import (
    NO_TIME,
    Scene,
    TimedText,
    WorldSize,
    encoded_features,
    episode_sample,
    episode_scene,
    padded_features,
    shots,
    tenths,
    world_of,
)
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.presets import preset

TINY = Tokenizer.from_dir(TINY_FOLDER, preset("tiny"))
TABLE = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
SIZE = WorldSize(patches=4, texts=2, text_tokens=12, segments=2)
SCENE = Scene(np.array([0.25, 0.75]), 1.0, (TimedText(0.0, 0.96, "the  number"),), ((0.0, 1.0),))


def features(*patches: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(count * 3, 2, 8)).astype(np.float32) for count in patches]


def test_padding_and_vectors():
    given = features(2, 4)
    other = Scene(np.arange(4) + 0.06, 4.04)
    world = world_of([SCENE, other], padded_features(given, 4, 3), SIZE, TINY, TABLE)
    assert world.features.shape == (2, 4, 3, 2, 8)
    np.testing.assert_array_equal(world.features[0, :2].reshape(6, 2, 8), given[0])
    # 0.25 is written 0.2, 0.75 is 0.8: as Python writes them.
    assert world.times.tolist() == [[2, 8, NO_TIME, NO_TIME], [1, 11, 21, 31]]
    assert world.duration.tolist() == [10, 40]
    line = TINY.encode(" the number\n")
    assert world.texts[0, 0, : len(line)].tolist() == line
    assert world.text_lengths.tolist() == [[len(line), 0], [0, 0]]
    assert world.text_times[0, 0].tolist() == [0, 10]
    assert world.segments.tolist() == [[[0, 10], [-1, -1]], [[-1, -1], [-1, -1]]]
    mean = TABLE[TINY.encode(" the number")].mean(axis=0)
    np.testing.assert_allclose(world.text_vectors[0, 0], mean / np.linalg.norm(mean), rtol=1e-5)
    assert not np.asarray(world.text_vectors[1]).any()
    patch = given[1].reshape(4, 3, 2, 8)[:, :, 0].mean(axis=1)
    np.testing.assert_allclose(
        world.patch_vectors[1], patch / np.linalg.norm(patch, axis=1, keepdims=True), rtol=1e-5
    )


def test_no_room_for_texts_and_segments():
    world = world_of([Scene(np.zeros(1), 1.0)], padded_features(features(1), 4, 3), WorldSize(4), TINY, TABLE)
    assert world.texts.shape == (1, 0, 0) and world.segments.shape == (1, 0, 2)
    assert world.text_vectors.shape == (1, 0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": np.arange(5.0)}, "5 patches, but there is room for 4"),
        ({"times": np.zeros(0)}, "there must be one"),
        ({"times": np.array([1.0, 0.0])}, "do not decrease"),
        ({"times": np.array([-1.0])}, "from 0 to 9999.9"),
        ({"duration": 10_000.0}, "from 0 to 9999.9"),
        ({"texts": (TimedText(0, 1, "a"),) * 3}, "3 texts, but there is room for 2"),
        ({"texts": (TimedText(0, 1, "too many words " * 3),)}, "room for 12; split it"),
        ({"segments": ((0.0, 1.0),) * 3}, "3 segments, but there is room for 2"),
    ],
)
def test_scenes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        scene = Scene(**{**vars(SCENE), **change})
        world_of([scene], padded_features(features(2), 4, 3), SIZE, TINY, TABLE)


def test_features_that_do_not_fit():
    with pytest.raises(UserError, match="scene 1: 5 temporal patches"):
        padded_features(features(2, 5), 4, 3)
    with pytest.raises(ValueError, match="2 scenes"):
        world_of([SCENE, SCENE], padded_features(features(2), 4, 3), SIZE, TINY, TABLE)


def test_shots_are_cut_where_the_picture_changes():
    rng = np.random.default_rng(4)
    scenes = rng.normal(size=(3, 8))
    own = np.repeat(scenes, [3, 5, 2], axis=0)[:, None, None] + rng.normal(0, 0.02, (10, 3, 2, 8))
    times = np.arange(10) + 0.5
    assert shots(own, times, 10.0, 8) == ((0.0, 3.0), (3.0, 8.0), (8.0, 10.0))
    assert len(shots(own, times, 10.0, 2)) == 2
    assert shots(own, times, 10.0, 1) == ((0.0, 10.0),)
    assert shots(own[:1], times[:1], 1.0, 4) == ((0.0, 1.0),)


def test_tenths_are_as_they_are_written():
    drawn = np.random.default_rng(2).uniform(0, 9999, 2000).round(2).tolist()
    for seconds in [*drawn, 0.05, 0.15, 0.25, 12.45]:
        assert f"{tenths(seconds, '') / 10:.1f}" == f"{seconds:.1f}"


def test_an_episode_is_seen_as_the_model_itself_would_see_it():
    config = preset("tiny")
    model = InternVideo3(config, Execution(dtype=jnp.float32))
    rng = np.random.default_rng(3)
    shapes = nn.unbox(boxed_params(model))
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    processor = Processor(TINY, config)
    episodes = [
        Episode(2.0, (Event(45, 0.5, 1.5),), "train", 1),
        Episode(3.0, (Event(12, 0.5, 2.5),), "test", 2),
    ]
    samples = [episode_sample(processor, episode) for episode in episodes]
    got = encoded_features(model, params, samples, 16)
    world = world_of(
        [episode_scene(e) for e in episodes], got, WorldSize(16), TINY, params["embed_tokens"]["embedding"]
    )
    assert got.shape == (2, 16, 1, 2, 128)
    encode = jax.jit(partial(model.apply, method="encode"))
    for row, (sample, episode) in enumerate(zip(samples, episodes, strict=True)):
        batch = collate([[sample]], config, length=256, chunks=12, chunk_patches=4)
        seen = encode({"params": params}, batch)
        count = sample.grids[0][0]
        assert count == episode.duration * 4
        np.testing.assert_allclose(got[row, :count, 0, 0], seen.tokens[0, :count], atol=1e-5)
        np.testing.assert_allclose(got[row, :count, 0, 1], seen.deepstack[0, 0, :count], atol=1e-5)
        # The times that stand beside the frames in a prompt.
        text = TINY.decode(sample.input_ids)
        times = [int(t * 10 + 0.5) for t in map(float, [p.split()[0] for p in text.split("<")[1:]])]
        assert world.times[row, :count].tolist() == times
        assert (world.times[row, count:] == NO_TIME).all()
    with pytest.raises(UserError, match="room for 8 of"):
        encoded_features(model, params, samples, 8)
