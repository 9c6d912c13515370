"""Different ways to compute the same function agree, for both attentions: fp32, tolerance 1e-4.

Values are of order 1 to 10; about 1e-6 is seen. The whole forward pass that all are compared with is itself
compared with transformers and with float64 (test_transformers.py, test_m2la.py).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import (
    ATTENTIONS,
    IMAGE,
    VIDEO,
    conversation,
    difference,
    encode,
    forward,
    in_chunks,
    random_model,
    tiny_config,
    to_theirs,
    tree_difference,
)

from iv3jax import ops
from iv3jax.checkpoint.names import insert, tensors
from iv3jax.data.collate import collate
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from kernels_pallas import cached_attention, query_blocks
from kernels_pallas.latent_attention.ops import latent_attention

TOLERANCE = 1e-4
PROMPT = [2, ("video", 2, 4, 6), 3, ("image", 1, 4, 4), 6]


@cache
def shared_model(attention: str):
    return random_model(tiny_config(attention))


@pytest.fixture(params=ATTENTIONS)
def tiny(request):
    """A model and its parameters."""
    return shared_model(request.param)


@pytest.mark.medium
@pytest.mark.parametrize("few", [0, 1000], ids=["blocks", "at-once"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("chunks", ["whole", "decode", "odd"])
def test_over_a_cache(attention, few, chunks, monkeypatch):
    """Prefill + one-token decode, odd chunks, and everything at once, in blocks of 5 (M²LA expanded) and
    all slots at once (M²LA absorbed): one forward.
    """
    model, params = shared_model(attention)
    monkeypatch.setattr(ops, "FEW_QUERIES", few)
    monkeypatch.setattr(cached_attention, "BLOCK", 5)
    sample = conversation(model.config, PROMPT)
    tokens = len(sample)
    batch = collate([[sample]], model.config, length=tokens)
    bounds = {
        "whole": [0, tokens],
        "decode": [0, tokens - 4, *range(tokens - 3, tokens + 1)],
        "odd": [*range(0, tokens, 7), tokens],
    }[chunks]
    hidden, cache_ = in_chunks(model, params, batch, bounds, capacity=tokens + 5)
    assert difference(hidden, forward(model, params, batch)["hidden"]) <= TOLERANCE
    assert cache_.length.tolist() == [tokens] and not cache_.overflow.any()


def test_blocks_over_rows_of_different_length():
    """Grouped attention in blocks against all slots at once: rows whose tokens start at other slots, padding
    between tokens, a row without any, a capacity and a number of queries that no block divides.
    """
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((3, 13, 6, 5), np.float32))
    key, value = (jnp.asarray(rng.standard_normal((3, 2, 23, 5), np.float32)) for _ in range(2))
    segments = (rng.random((3, 13)) < 0.7).astype(np.int32)
    segments[1] = 0
    slots = np.where(segments, np.cumsum(segments, 1) - 1 + np.array([[0], [4], [9]]), 23)
    mask = ops.AttentionMask(jnp.asarray(segments), None, jnp.asarray(slots, jnp.int32))
    results = []
    for few, block in ((1000, 256), (0, 256), (0, 4), (0, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "FEW_QUERIES", few)
            patch.setattr(cached_attention, "BLOCK", block)
            results.append(
                np.asarray(jax.jit(lambda *a: ops.attention_over_cache(*a, mask))(query, key, value))
            )
    assert not results[0][segments == 0].any() and results[0][segments == 1].all()
    for result in results[1:]:
        assert difference(result, results[0]) <= TOLERANCE


@pytest.mark.medium
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_layers_scanned_or_alone(attention):
    """Hidden states and cache of the two forms of one model, with DeepStack, whole and over a cache."""
    model, params = shared_model(attention)
    alone = InternVideo3(model.config, Execution(scan_layers=False))
    values = to_theirs(params, model.config)
    alone_params: dict = {}
    for tensor in (t for t in tensors(model.config, scan_layers=False) if t.index is None):
        insert(alone_params, tensor.path, jnp.asarray(tensor.to_ours(values[tensor.name])))
    alone_params["visual"] = params["visual"]
    sample = conversation(model.config, PROMPT)
    batch = collate([[sample]], model.config, length=len(sample))
    whole = jax.jit(lambda batch: alone.apply({"params": alone_params}, batch).hidden)(batch)
    assert difference(whole, forward(model, params, batch)["hidden"]) <= TOLERANCE
    bounds = [0, len(sample) - 1, len(sample)]
    expected, cache_ = in_chunks(model, params, batch, bounds, len(sample))
    got, alone_cache = in_chunks(alone, alone_params, batch, bounds, len(sample))
    assert difference(got, expected) <= TOLERANCE
    stacked = {name: jnp.concatenate(parts) for name, parts in alone_cache.entries.items()}
    assert tree_difference(stacked, cache_.entries) <= TOLERANCE


def spy(called: list[str], name: str, function, *arguments, **named):
    called.append(name)
    return function(*arguments, **named)


def test_more_queries_are_absorbed_where_that_costs_no_more():
    """r of the 8B and of a small latent, each with its n+v; and GQA, which has none."""
    assert [ops.few_queries(4, rank, both) for rank, both in ((896, 256), (32, 64))] == [64, 256]
    assert ops.few_queries(4) == 64


def test_absorbed_and_expanded_run_different_code(monkeypatch):
    """The threshold of the test above does switch: each side calls the operation it is named after."""
    model, params = shared_model("m2la")
    batch = collate([[conversation(model.config, PROMPT)]], model.config, length=40)
    for few, expected in ((0, ["latent_prefill"]), (1000, ["latent_decode"])):
        called: list[str] = []
        for name in ("latent_attention", "latent_prefill", "latent_decode"):
            monkeypatch.setattr(ops, name, partial(spy, called, name, getattr(ops, name)))
        monkeypatch.setattr(ops, "FEW_QUERIES", few)
        in_chunks(model, params, batch, [0, 40], capacity=48)
        assert sorted(set(called)) == expected
        monkeypatch.undo()


def samples(config):
    """Three conversations of different length, two with vision and one of text."""
    return [
        conversation(config, [2, ("video", 3, 4, 4), 4], 1),
        conversation(config, [11], 2),
        conversation(config, [1, ("image", 1, 6, 4), 2, ("video", 1, 4, 6), 3], 3),
    ]


@pytest.mark.medium
def test_packed_is_separate_and_padded_is_single(tiny):
    model, params = tiny
    parts = samples(model.config)
    total = sum(map(len, parts))
    packed = forward(model, params, collate([parts], model.config, length=total + 7))
    padded = forward(model, params, collate([[s] for s in parts], model.config, length=total))
    start = 0
    for row, sample in enumerate(parts):
        single = forward(model, params, collate([[sample]], model.config, length=len(sample)))
        for name in ("hidden", "logits"):
            alone = single[name][0]
            stop = start + len(sample)
            assert difference(packed[name][0, start:stop], alone) <= TOLERANCE, f"packed, {name}"
            assert difference(padded[name][row, : len(sample)], alone) <= TOLERANCE, f"padded, {name}"
        start += len(sample)


def test_a_pack_does_not_look_across(tiny):
    """Other tokens and pixels in the first sample change nothing in the second."""
    model, params = tiny
    first, other, second = (conversation(model.config, [2, ("image", 1, 4, 4), 3], s) for s in (1, 2, 3))
    batches = [collate([[s, second]], model.config, length=2 * len(second)) for s in (first, other)]
    a, b = (forward(model, params, batch)["hidden"][0] for batch in batches)
    assert difference(a[: len(first)], b[: len(first)]) > 0.1
    assert difference(a[len(first) :], b[len(first) :]) == 0


def gradients(model, params, batch):
    """The loss Σ cos(logits) and its gradients: every logit counts, none cancels."""

    def loss(params):
        out = model.apply({"params": params}, batch)
        logits = model.apply({"params": params}, out.hidden, method="logits")
        return jnp.mean(jnp.cos(logits) * (batch.segment_ids != 0)[..., None])

    return jax.jit(jax.value_and_grad(loss)).trace(params)


@pytest.mark.medium
@pytest.mark.parametrize(("attention", "policy"), [("m2la", "full"), ("gqa", "dots")])
def test_remat_changes_no_gradient(attention, policy):
    model, params = shared_model(attention)
    batch = collate([samples(model.config)[:2]], model.config, length=64)
    plain = gradients(model, params, batch)
    remat = gradients(InternVideo3(model.config, Execution(remat=policy)), params, batch)
    # Once for the scan of the tower's blocks, once for the decoder's layers.
    assert str(plain.jaxpr).count("remat") == 0 and str(remat.jaxpr).count("remat") >= 2
    value, expected = plain.lower().compile()(params)
    same, got = remat.lower().compile()(params)
    assert difference(same, value) <= 1e-6
    relative = jax.tree.map(lambda g, e: (g - e) / jnp.max(jnp.abs(e)), got, expected)
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(relative)) <= TOLERANCE


def attention_case(name: str):
    """One of the operations, its mask for two packed samples and padding, and random arguments."""
    rng = np.random.default_rng(0)
    tokens = 37
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 2, 0]], [20, 14, 3], axis=1).astype(np.int32))
    order = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), segments.shape)
    shapes = {
        "attention": [(6, 5), (3, 5), (3, 5)],
        "tower": [(4, 6), (4, 6), (4, 6)],
        "latent_attention": [(3, 9), (3, 12), (4,)],
    }[name]
    mask = ops.AttentionMask(segments, segments, None if name == "tower" else order)
    operation = latent_attention if name == "latent_attention" else ops.attention
    arguments = [jnp.asarray(rng.standard_normal((2, tokens, *s), np.float32)) for s in shapes]
    return lambda *a: operation(*a, mask), arguments


@pytest.mark.parametrize("block", [1, 16, 36])
@pytest.mark.parametrize("name", ["attention", "tower", "latent_attention"])
def test_blocks_of_queries(name, block, monkeypatch):
    """Values and gradients of every argument, with blocks that do not divide the 37 queries."""
    operation, arguments = attention_case(name)

    def run():
        def loss(*arguments):
            out = operation(*arguments)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=range(len(arguments)), has_aux=True)).trace(*arguments)

    plain = run()
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", block)
    blocked = run()
    assert "scan" not in str(plain.jaxpr) and f"length={-(-37 // block)}" in str(blocked.jaxpr)
    expected, got = (r.lower().compile()(*arguments) for r in (plain, blocked))
    assert tree_difference(got, expected) <= TOLERANCE


@pytest.mark.medium
def test_model_in_blocks_of_queries(tiny, monkeypatch):
    model, params = tiny
    batch = collate([samples(model.config)], model.config, length=75)
    expected = forward(model, params, batch)
    monkeypatch.setattr(query_blocks, "QUERY_BLOCK", 16)
    # Another tower step size is another program for jit, which would not look at QUERY_BLOCK again.
    model = InternVideo3(model.config, Execution(patches_per_step=10_000))
    assert tree_difference(forward(model, params, batch), expected) <= TOLERANCE


@pytest.mark.parametrize("per_step", [1, 24, 50])
def test_tower_in_steps(per_step):
    """patches_per_step below one chunk, one chunk, and two of seven chunks, which leaves one over."""
    model, params = shared_model("m2la")
    rows = [[conversation(model.config, [1, ("video", n, 4, 6)], n)] for n in (7, 3)]
    batch = collate(rows, model.config, length=100)
    stepped = InternVideo3(model.config, Execution(patches_per_step=per_step))
    assert tree_difference(encode(stepped, params, batch), encode(model, params, batch)) <= TOLERANCE


@pytest.mark.medium
def test_several_temporal_patches_in_a_chunk():
    """Where in the chunks a temporal patch lies changes nothing, padding beside it neither."""
    model, params = shared_model("m2la")
    pack = [samples(model.config)]
    results = []
    for width in (None, 28, 48, 120):
        batch = collate(pack, model.config, length=75, chunk_patches=width)
        computed = forward(model, params, batch)
        visual = np.isin(batch.input_ids[0], [IMAGE, VIDEO])
        index = batch.visual_index[0][visual]
        results.append([computed["tokens"][0, index], computed["deepstack"][:, 0, index], computed["hidden"]])
    for other in results[1:]:
        assert tree_difference(other, results[0]) <= TOLERANCE


def test_uint8_pixels_are_normalised():
    """uint8 x means x / 127.5 − 1 (mean = std = 0.5)."""
    model, params = shared_model("m2la")
    batch = collate([[conversation(model.config, [1, ("image", 1, 4, 4)])]], model.config, length=12)
    pixels = np.random.default_rng(0).integers(0, 256, batch.patches.shape, dtype=np.uint8)
    floats = ((pixels / 255.0 - 0.5) / 0.5).astype(np.float32)
    raw, done = (encode(model, params, batch._replace(patches=p)) for p in (pixels, floats))
    assert tree_difference(raw, done) <= TOLERANCE


@pytest.mark.parametrize("outputs", [8, 7], ids=["shared", "plain"])
@pytest.mark.parametrize("lead", [(1, 1), (1,), (2, 3)])
def test_product_of_one_token_and_of_several(lead, outputs):
    """ops.product against NumPy in fp64, values and gradients: 1e-5 on order 1 to 10."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((*lead, 13)), rng.standard_normal((outputs, 13))
    weights = rng.standard_normal((*lead, outputs))

    def loss(x, kernel):
        return jnp.sum(ops.product(x, kernel, jnp.float32) * weights)

    single = [jnp.asarray(v, jnp.float32) for v in (x, kernel)]
    assert difference(jax.jit(ops.product, static_argnums=2)(*single, jnp.float32), x @ kernel.T) <= 1e-5
    to_x, to_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(*single)
    assert difference(to_x, weights @ kernel) <= 1e-5
    assert difference(to_kernel, weights.reshape(-1, outputs).T @ x.reshape(-1, 13)) <= 1e-5
    branches = "platform_index" in str(jax.make_jaxpr(ops.product, static_argnums=2)(*single, jnp.float32))
    assert branches == (np.prod(lead) == 1 and outputs % 4 == 0)
