"""A batch with ready features in place of patches: the model computes the same, and runs no tower."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import ATTENTIONS, conversation, difference, encode, forward, random_model, tiny_config

from iv3jax.data.collate import collate
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.models.batch import LOGICAL_AXES, Batch
from iv3jax.models.vision import VisionTower

pytestmark = pytest.mark.medium

TOLERANCE = 1e-5
"""Of the largest value; float noise, because a clip alone is looked at in chunks of another width."""

VIDEO, OTHER, PICTURE = ("video", 2, 4, 6), ("video", 3, 2, 4), ("image", 1, 4, 4)


@pytest.fixture(scope="module", params=ATTENTIONS)
def either(request):
    return random_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def tiny():
    return random_model(tiny_config("m2la"))


def stored(model, params, sample: Sample, which: tuple[bool, ...]) -> Sample:
    """The sample with some of its media as features, as the tower sees each alone."""
    merge, config = model.config.vision_config.spatial_merge_size, model.config
    features, patches, done = [], [], 0
    for grid, ready in zip(sample.grids, which, strict=True):
        own = sample.patches[done : done + int(np.prod(grid))]
        done += len(own)
        if not ready:
            features.append(None)
            patches.append(own)
            continue
        tokens = np.full(len(own) // merge**2, config.video_token_id, np.int32)
        nothing = np.zeros((3, len(tokens)), np.int32)
        alone = Sample(tokens, nothing, tokens, own, (grid,), ())
        visual = encode(model, params, collate([[alone]], config, length=len(tokens)))
        levels = np.concatenate([np.asarray(visual.tokens)[None], np.asarray(visual.deepstack)])
        # Chunks are as large as the temporal patch, so tokens are in order.
        features.append(np.moveaxis(levels[:, 0], 0, 1))
    rest = np.concatenate(patches) if patches else sample.patches[:0]
    return replace(sample, patches=rest, features=tuple(features))


def rows_of(model, params, how: str) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Rows with two clips, text alone and a picture, packed; the second with features as `how` says."""
    config = model.config
    items = [[[3, VIDEO, 4], [7], [2, OTHER, VIDEO, 3]], [[5], [1, PICTURE, OTHER, 6]], [[9]]]
    rows = [[conversation(config, item, seed) for seed, item in enumerate(row)] for row in items]
    number = iter(range(100))

    def ready(kinds) -> tuple[bool, ...]:
        return tuple(how == "all" or (kind != PICTURE and next(number) % 2 == 0) for kind in kinds)

    changed = [
        [
            stored(model, params, sample, ready([one for one in item if isinstance(one, tuple)]))
            if sample.grids
            else sample
            for sample, item in zip(row, own, strict=True)
        ]
        for row, own in zip(rows, items, strict=True)
    ]
    return rows, changed


@pytest.mark.parametrize("how", ["all", "some"])
def test_the_same_logits(either, how):
    model, params = either
    rows, changed = rows_of(model, params, how)
    expected = forward(model, params, collate(rows, model.config, length=96))
    batch = collate(changed, model.config, length=96)
    assert batch.features is not None and (batch.patches is None) == (how == "all")
    got = forward(model, params, batch)
    real = batch.segment_ids != 0
    for name in ("hidden", "logits"):
        assert difference(got[name][real], expected[name][real]) <= TOLERANCE * np.abs(expected[name]).max()


def test_fixed_shapes(tiny):
    """Given numbers of chunks and features, batches of whatever rows have one shape and the same logits."""
    model, params = tiny
    rows, changed = rows_of(model, params, "some")
    text = [[conversation(model.config, [5])]] * 3
    how = dict(length=96, chunks=6, chunk_patches=24, features=96, feature_dtype=np.float32)
    batches = [collate(each, model.config, **how) for each in (changed, text, rows)]
    assert len({tuple((x.shape, x.dtype) for x in batch if x is not None) for batch in batches}) == 1
    expected = forward(model, params, batches[2])
    got = forward(model, params, batches[0])
    real = batches[0].segment_ids != 0
    scale = np.abs(expected["logits"]).max()
    assert difference(got["logits"][real], expected["logits"][real]) <= TOLERANCE * scale
    assert (batches[1].visual_index == -1).all()


def test_no_tower_is_run(tiny, monkeypatch):
    model, params = tiny
    _, changed = rows_of(model, params, "all")
    batch = collate(changed, model.config, length=96)
    without = {name: value for name, value in params.items() if name != "visual"}
    monkeypatch.setattr(VisionTower, "__call__", None)
    expected = model.apply({"params": params}, batch).hidden
    assert difference(model.apply({"params": without}, batch).hidden, expected) == 0


def test_gradients(tiny):
    """Of the decoder and the embeddings: those of the same batch with patches. None reaches the tower."""
    model, params = tiny
    rows, changed = rows_of(model, params, "all")

    gradient = jax.jit(jax.grad(lambda params, batch: cross_entropy(model, params, batch)))
    expected = gradient(params, collate(rows[:1], model.config, length=96))
    got = gradient(params, collate(changed[:1], model.config, length=96))
    for name in params:
        if name == "visual":
            assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(got[name])) == 0
            assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[name])) > 0
            continue
        for mine, theirs in zip(jax.tree.leaves(got[name]), jax.tree.leaves(expected[name]), strict=True):
            assert difference(mine, theirs) <= 1e-5 * max(1.0, float(jnp.abs(theirs).max()))


def cross_entropy(model, params, batch):
    """Plain mean of −log p of the labels, all logits at once."""
    out = model.apply({"params": params}, batch)
    logits = jax.nn.log_softmax(model.apply({"params": params}, out.hidden, method="logits"))
    picked = jnp.take_along_axis(logits, jnp.maximum(batch.labels, 0)[..., None], -1)[..., 0]
    trained = batch.labels >= 0
    return -jnp.sum(picked * trained) / jnp.sum(trained)


def test_bf16_features(tiny):
    """Rounded features change logits by as much as bf16 rounds, and a bf16 model takes them as they are."""
    model, params = tiny
    rows, changed = rows_of(model, params, "all")
    expected = forward(model, params, collate(rows, model.config, length=96))["logits"]
    batch = collate(changed, model.config, length=96, feature_dtype=jnp.bfloat16)
    assert batch.features.dtype == jnp.bfloat16
    real = batch.segment_ids != 0
    got = forward(model, params, batch)["logits"]
    scale = float(np.abs(expected).max())
    assert 0 < difference(got[real], expected[real]) <= 2**-8 * 4 * scale


def test_generation(tiny):
    """Prompts with features continue as those with patches."""
    model, params = tiny
    rows, changed = rows_of(model, params, "all")
    prompts = [[row[-1]] for row in rows], [[row[-1]] for row in changed]
    texts = [
        generate(
            model, params, collate(each, model.config, length=64), max_new_tokens=5, stop_ids=[96]
        ).tokens
        for each in prompts
    ]
    assert texts[0] == texts[1]


def test_counts(tiny):
    """What packing asks a sample."""
    model, params = tiny
    sample = conversation(model.config, [1, PICTURE, VIDEO, 2])
    assert sample.temporal_patches.tolist() == [16, 24, 24] and sample.feature_tokens == 0
    half = stored(model, params, sample, (False, True))
    assert half.temporal_patches.tolist() == [16] and half.feature_tokens == 12
    whole = stored(model, params, sample, (True, True))
    assert whole.temporal_patches.tolist() == [] and whole.feature_tokens == 16


def test_refusals(tiny):
    model, params = tiny
    _, changed = rows_of(model, params, "all")
    with pytest.raises(UserError, match="row 0: 30 features are above the limit of 29"):
        collate(changed, model.config, length=96, features=29)
    with pytest.raises(ValueError, match="no vision tower"):
        collate(changed, replace(model.config, vision_config=None), length=96)


def test_axes_are_named():
    assert LOGICAL_AXES.features[0] == "batch" and len(LOGICAL_AXES.features) == 4
    assert Batch._fields[-1] == "features"
