"""What a converted model has besides plain M²LA: equal to GQA where it must be, over a cache, layers alone.

The formulas themselves are compared with float64 in test_m2la.py. fp32, tolerance 1e-4 on values of order 1
to 10; about 1e-6 is seen.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import (
    CONVERTED,
    conversation,
    difference,
    forward,
    in_chunks,
    random_model,
    random_tensors,
    tiny_config,
    to_ours,
    to_theirs,
    tree_difference,
)

from iv3jax import ops
from iv3jax.checkpoint.names import insert, tensors
from iv3jax.data.collate import collate
from iv3jax.models.attention import LatentAdapters
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3, init_params
from iv3jax.models.layers import Execution
from iv3jax.sharding import unbox
from kernels_pallas import cached_attention
from kernels_pallas.latent_compress import xla

TOLERANCE = 1e-4
PROMPT = [2, ("video", 2, 4, 6), 3, ("image", 1, 4, 4), 6]
RANKS = CONVERTED["all"]["kv_lora_rank_list"]
RANK, ROPE = 13, 8


@cache
def tiny(what: str = "all"):
    """A model, its weights, a prompt with a video and an image, and what one forward makes of it."""
    model, params = random_model(tiny_config(**CONVERTED[what]))
    sample = conversation(model.config, PROMPT)
    batch = collate([[sample]], model.config, length=len(sample))
    return model, params, batch, forward(model, params, batch)


def text_only(what: str, **run):
    """A model without a tower, and nine tokens."""
    config = replace(tiny_config(**CONVERTED[what]), vision_config=None, model_type="internvideo3_text")
    batch = collate([[conversation(config, [9])]], config, length=9)
    return InternVideo3(config, Execution(**run)), batch


def from_gqa(values, config):
    """A GQA model's tensors as M²LA with a component for each group: nothing is approximate.

    Each group's keys, their norm's weight folded in, are a RoPE component of the shared key; a query head
    looks at its group's only; values pass through the latent.
    """
    text = config.text_config
    heads, groups, d = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    n, e, half = 1, groups * d, d // 2
    latent = replace(
        text,
        kv_lora_rank=groups * d,
        qk_nope_head_dim=n,
        qk_rope_head_dim=e,
        v_head_dim=d,
        rope_components=groups,
    )
    converted = {k: v for k, v in values.items() if "k_proj" not in k and "v_proj" not in k}
    for i in range(text.num_hidden_layers):
        root = f"model.language_model.layers.{i}.self_attn."
        gamma = converted.pop(root + "k_norm.weight")
        key = values[root + "k_proj.weight"].reshape(groups, d, -1)
        # Pair j of a group is (j, j + d/2) in theirs and (2j, 2j + 1) of its component in ours.
        pairs = (gamma[:, None] * key).reshape(groups, 2, half, -1).swapaxes(1, 2).reshape(e, -1)
        expand = np.zeros((heads, n + e, d), np.float32)
        up = np.zeros((heads, n + d, groups, d), np.float32)
        for h in range(heads):
            g = h * groups // heads
            up[h, n:, g] = np.eye(d)
            for j in range(half):
                for part in (0, 1):
                    expand[h, n + g * d + 2 * j + part, j + part * half] = ((n + e) / d) ** 0.5
        converted[root + "q_expand.weight"] = expand.reshape(-1, d)
        converted[root + "k_norm_proj.weight"] = values[root + "k_proj.weight"]
        converted[root + "kv_a_proj_with_mqa.weight"] = np.concatenate(
            [values[root + "v_proj.weight"], pairs]
        )
        converted[root + "kv_b_proj.weight"] = up.reshape(heads * (n + d), -1)
    return converted, replace(config, model_type="internvideo3", text_config=latent)


def test_equal_to_gqa_with_a_component_for_each_group():
    """q/k norm and interleaved M-RoPE kept exactly, on a video, an image and text."""
    config = tiny_config("gqa")
    values = random_tensors(config)
    sample = conversation(config, PROMPT)
    batch = collate([[sample]], config, length=len(sample))
    assert (batch.positions[0] != batch.positions[1]).any()
    expected = forward(InternVideo3(config), to_ours(values, config), batch)
    converted, latent = from_gqa(values, config)
    got = forward(InternVideo3(latent), to_ours(converted, latent), batch)
    assert difference(got["layers"], expected["layers"]) <= TOLERANCE
    assert difference(got["logits"], expected["logits"]) <= TOLERANCE


def test_new_adapters_change_nothing():
    """Identity and zero, which is what init makes."""
    _, params, batch, expected = tiny("ranks")
    config = tiny_config(kv_lora_rank_list=RANKS, latent_adapters=True)
    new = unbox(LatentAdapters(RANK).init(jax.random.key(0))["params"])
    assert new["kernel"].shape == (2, RANK, RANK)
    layers = params["language_model"]["layers"]
    adapters = jax.tree.map(lambda x: jnp.stack([x] * len(RANKS)), new)
    attention = layers["self_attn"] | {"kv_adapters": adapters}
    decoder = params["language_model"] | {"layers": layers | {"self_attn": attention}}
    got = forward(InternVideo3(config), params | {"language_model": decoder}, batch)
    assert difference(got["hidden"], expected["hidden"]) <= 1e-6


@pytest.mark.medium
@pytest.mark.parametrize("what", CONVERTED)
def test_over_a_cache(what, monkeypatch):
    """A chunk expanded in blocks of 5, then one token absorbed: one forward."""
    model, params, batch, expected = tiny(what)
    monkeypatch.setattr(ops, "FEW_QUERIES", 1)
    monkeypatch.setattr(cached_attention, "BLOCK", 5)
    tokens = batch.input_ids.shape[1]
    hidden, cache_ = in_chunks(model, params, batch, [0, tokens - 2, tokens - 1, tokens], tokens + 5)
    assert difference(hidden, expected["hidden"]) <= TOLERANCE
    assert ("logit_scale" in cache_.entries) == model.config.text_config.use_qk_norm
    assert cache_.length.tolist() == [tokens] and not cache_.overflow.any()


def alone(model, params):
    """The same model and weights with layers that stand alone."""
    values = to_theirs(params, model.config)
    found: dict = {}
    for tensor in (t for t in tensors(model.config, scan_layers=False) if t.index is None):
        insert(found, tensor.path, jnp.asarray(tensor.to_ours(values[tensor.name])))
    return InternVideo3(model.config, Execution(scan_layers=False)), found | {"visual": params["visual"]}


@pytest.mark.medium
def test_layers_alone_have_their_own_ranks():
    """Hidden states and cache of the two forms; a layer alone holds no padding, in a stack it is zero."""
    model, params, batch, expected = tiny()
    other, own = alone(model, params)
    kernel = own["language_model"]["layers_0"]["self_attn"]["kv_adapters"]["kernel"]
    assert kernel.shape == (2, RANKS[0], RANKS[0])
    tokens = batch.input_ids.shape[1]
    bounds = [0, tokens - 1, tokens]
    got, parts = in_chunks(other, own, batch, bounds, tokens)
    _, stacked = in_chunks(model, params, batch, bounds, tokens)
    assert difference(got, expected["hidden"]) <= TOLERANCE
    assert [x.shape[-1] for x in parts.entries["latent"]] == [r + ROPE for r in RANKS]
    assert stacked.entries["latent"].shape[-1] == RANK + ROPE
    for layer, rank in enumerate(RANKS):
        ours, theirs = (x.entries["latent"][layer] for x in (parts, stacked))
        assert not theirs[..., rank:RANK].any()
        kept = jnp.delete(theirs, np.arange(rank, RANK), axis=-1)
        assert difference(ours[0], kept) <= TOLERANCE
        factors = [x.entries["logit_scale"][layer] for x in (parts, stacked)]
        assert difference(factors[0][0], factors[1]) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_caches(dtype):
    """Codes move values of order 1 by a few parts in a hundred; factors and RoPE keys are not coded."""
    model, params, batch, expected = tiny()
    tokens = batch.input_ids.shape[1]
    empty = init_cache(model.config.text_config, 1, tokens, dtype)
    assert empty.entries["logit_scale"].dtype == jnp.float32 and empty.capacity == tokens
    out = jax.jit(lambda batch, cache_: model.apply({"params": params}, batch, None, cache_))(batch, empty)
    assert difference(out.hidden, expected["hidden"]) <= (0.1 if dtype == "int8" else 0.5)
    assert (out.cache.entries["logit_scale"][0] > 0).all()


@pytest.mark.parametrize("tile", [2, 128])
def test_factors_are_written_where_their_latents_are(tile, monkeypatch):
    """Rows of several lengths, padding, a full row and a row past the end, against a loop."""
    monkeypatch.setattr(xla, "_TILE", tile)
    rng = np.random.default_rng(0)
    capacity, tokens = 7, 4
    old = rng.standard_normal((2, 6, 3, capacity)).astype(np.float32)
    factors = rng.standard_normal((6, tokens, 3)).astype(np.float32)
    offsets, counts = np.array([0, 2, 5, 7, 3, 9], np.int32), np.array([4, 1, 4, 2, 0, 3], np.int32)
    expected = old.copy()
    for row, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        for token in range(count):
            if offset + token < capacity:
                expected[1, row, :, offset + token] = factors[row, token]
    for width in (tokens, 1):
        if width == 1:
            expected, counts = old.copy(), np.minimum(counts, 1)
            for row in np.flatnonzero((counts > 0) & (offsets < capacity)):
                expected[1, row, :, offsets[row]] = factors[row, 0]
        write = jax.jit(lambda *given: ops.logit_scale_into(*given))
        got = write(old, jnp.int32(1), offsets, counts, factors[:, :width])
        np.testing.assert_array_equal(got, expected)


@pytest.mark.medium
def test_new_weights_and_gradients_are_zero_past_a_layers_rank():
    """What is zero at the start has no gradient, so that training leaves it; all the rest has one."""
    model, batch = text_only("all")
    params = init_params(model, jax.random.key(1))

    def loss(params):
        return jnp.sum(model.apply({"params": params}, batch).hidden[:, ::3, ::2] ** 3)

    gradients = jax.jit(jax.grad(loss))(params)
    past = np.arange(RANK) >= np.array(RANKS)[:, None]
    both = partial(np.pad, past, constant_values=False)
    for tree in (params, gradients):
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))
        own = jax.tree.map(np.asarray, tree["language_model"]["layers"]["self_attn"])
        down = both([(0, 0), (0, ROPE)])
        adapters = own["kv_adapters"]["kernel"].swapaxes(1, 2)
        cases = {
            "kv_a": (own["kv_a_proj_with_mqa"]["kernel"], down),
            "kv_a bias": (own["kv_a_proj_with_mqa"]["bias"], down),
            "kv_b": (np.moveaxis(own["kv_b_proj"]["kernel"], -1, 1), past),
            "adapters out": (adapters, past),
            "adapters in": (np.moveaxis(adapters, -1, 1), past),
        }
        for name, (x, zero) in cases.items():
            assert not x[zero].any(), name
            assert x[~zero].any(axis=tuple(range(1, x.ndim - 1))).all(), name
    for module in ("q_norm", "q_expand", "k_norm_proj", "kv_adapters"):
        for x in jax.tree.leaves(gradients["language_model"]["layers"]["self_attn"][module]):
            assert bool((x != 0).any(axis=tuple(range(1, x.ndim))).all()), module


@pytest.mark.medium
def test_heads_expanded_some_at_a_time(monkeypatch):
    """One head at a time and all four at once, whose factors are those of two groups."""
    model, batch = text_only("norms")
    params = to_ours(random_tensors(model.config), model.config)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, batch).hidden[:, ::3, ::2] ** 3)

    expected, whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(ops, "EXPANDED_BYTES", 1)
    got, gradients = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert difference(got, expected) <= TOLERANCE
    assert tree_difference(gradients, whole) <= 1e-3


@pytest.mark.medium
def test_quantised_weights():
    """Random codes run over a cache; the small maps beside the linear layers stay floats."""
    model, batch = text_only("all", weights="int8")
    params = init_params(model, jax.random.key(0))
    attention = params["language_model"]["layers"]["self_attn"]
    assert {"kernel_codes", "kernel_scale"} == set(attention["k_norm_proj"])
    assert {"kernel"} == set(attention["q_expand"]) and {"kernel", "bias"} == set(attention["kv_adapters"])
    whole = jax.jit(lambda p: model.apply({"params": p}, batch).hidden)(params)
    hidden, _ = in_chunks(model, params, batch._replace(visual_index=np.full((1, 9), -1)), [0, 8, 9], 9)
    assert difference(hidden, whole) <= TOLERANCE
