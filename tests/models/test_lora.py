"""Low-rank additions against the same model with W + alpha/rank·B·A for its kernels: values and gradients.

fp32. Sums run in another order: tolerance 3e-5 of the largest number of each array; 1e-5 is seen.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from models.low_rank import (
    ALPHA,
    RANK,
    base_params,
    explicit,
    joined,
    layers_of,
    low_rank_model,
    random_additions,
)
from models.peers import (
    CONVERTED,
    conversation,
    difference,
    even_config,
    in_chunks,
    tiny_config,
)

from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.layers import Execution, Linear
from iv3jax.models.lora import LEAVES, Lora
from iv3jax.models.quantized import FORMATS, dequantize
from iv3jax.sharding import unbox

TOLERANCE = 3e-5


def config_of(attention: str):
    """A tiny config; "converted" is M²LA with all that a converted model may have."""
    return tiny_config("m2la", **CONVERTED["all"]) if attention == "converted" else tiny_config(attention)


def batch_of(config):
    """A video and an image in one row, text in another."""
    packs = [
        [conversation(config, [3, ("video", 2, 4, 4), 4], 1), conversation(config, [6], 2)],
        [conversation(config, [2, ("image", 1, 4, 4), 9], 3)],
    ]
    return collate(packs, config, length=32, chunks=3, chunk_patches=16)


def relative(got, expected) -> float:
    """The largest difference, in units of the largest number."""
    return difference(got, expected) / max(float(np.abs(np.asarray(expected, np.float64)).max()), 1e-30)


def logits_of(model, params, batch):
    hidden = model.apply({"params": params}, batch).hidden
    return model.apply({"params": params}, hidden, method="logits")


def computed(model, batch):
    """(trained, other parameters) → gradients of a loss for the trained ones, and logits."""

    def loss(trained, others):
        logits = logits_of(model, joined(others, trained), batch)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch.labels, 0)[..., None], -1)
        return -jnp.mean(chosen, where=batch.labels[..., None] != IGNORE_LABEL), logits

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize(("rows", "tokens"), [((5,), 7), ((3, 2), 1)])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_one_layer_by_hand(rows, tokens, weights):
    """Both forms, a product and a kernel, beside numpy in fp64; on a float and on a quantised kernel."""

    class One(Linear):
        def forms(self, x):
            return self.product(x, jnp.float32), *self.dense(x)

    axes = ("embed", "head_dim")[-len(rows) :]
    run = Execution(weights=weights, lora=Lora(RANK, ALPHA, ("",)))
    layer = One(rows, (4, 2), axes, ("heads", "head_dim"), True, run, 0.5)
    x = np.random.default_rng(0).standard_normal((2, tokens, *rows)).astype(np.float32)
    params = unbox(layer.init(jax.random.key(0), x)["params"])
    assert params["lora_a"].shape == (RANK, *rows) and params["lora_b"].shape == (4, 2, RANK)
    assert not params["lora_b"].any() and 0 < np.std(params["lora_a"]) < 1
    base = One(rows, (4, 2), axes, ("heads", "head_dim"), True, Execution(weights=weights), 0.5)
    own = {name: value for name, value in params.items() if name not in LEAVES}
    plain = base.apply({"params": own}, x, method="forms")
    for got, expected in zip(layer.apply({"params": params}, x, method="forms"), plain, strict=True):
        np.testing.assert_array_equal(got, expected)
    params["lora_b"] = jax.random.normal(jax.random.key(1), (4, 2, RANK))
    ((kernel, a, b),) = layers_of(plain[1], params["lora_a"], params["lora_b"])
    summed = kernel + ALPHA / RANK * b @ a
    product, dense, bias = layer.apply({"params": params}, x, method="forms")
    assert relative(product, (x.reshape(2, tokens, -1) @ summed.T).reshape(2, tokens, 4, 2)) <= TOLERANCE
    assert relative(dense, summed.reshape(4, 2, *rows)) <= TOLERANCE
    np.testing.assert_array_equal(bias, params["bias"])


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "run"),
    [
        ("m2la", dict(scan_layers=False)),
        ("gqa", dict(remat="full")),
        pytest.param("converted", dict(), marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients(attention, run):
    """Additions everywhere: logits, and by the chain rule dA = s·Bᵀ·dW and dB = s·dW·Aᵀ, dW of the sum."""
    model = low_rank_model(config_of(attention), **run)
    batch, plain = batch_of(model.config), InternVideo3(model.config, Execution(**run))
    base, additions = base_params(model.config, model.run.scan_layers), random_additions(model)
    params = joined(base, additions)
    assert jax.tree.structure(params) == jax.tree.structure(unbox(boxed_params(model)))
    gradients, got = computed(model, batch)(additions, base)
    dense, expected = computed(plain, batch)(explicit(base, additions), {})
    assert relative(got, expected) <= TOLERANCE
    low, found, dense = flatten_dict(additions), flatten_dict(gradients), flatten_dict(dense)
    for path in low:
        if path[-1] != "lora_a":
            continue
        a, b = (*path[:-1], "lora_a"), (*path[:-1], "lora_b")
        parts = layers_of(dense[*path[:-1], "kernel"], low[a], low[b])
        by_a = np.stack([ALPHA / RANK * y.T @ dw for dw, _, y in parts]).reshape(low[a].shape)
        by_b = np.stack([ALPHA / RANK * dw @ x.T for dw, x, _ in parts]).reshape(low[b].shape)
        assert np.abs(by_a).max() > 0 and np.abs(by_b).max() > 0, path
        assert relative(found[a], by_a) <= TOLERANCE, path
        assert relative(found[b], by_b) <= TOLERANCE, path


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "scan_layers"),
    [("m2la", True), ("gqa", False), pytest.param("converted", True, marks=pytest.mark.slow)],
)
def test_over_a_cache(attention, scan_layers):
    """A prompt of 70 tokens, a few and single ones: expanded and absorbed latents."""
    config = config_of(attention)
    model = low_rank_model(config, scan_layers=scan_layers)
    batch = collate([[conversation(config, [52, ("video", 2, 4, 4), 9])]], config, length=80)
    base, additions = base_params(config, scan_layers), random_additions(model)
    bounds = [0, 70, 71, 72, 75, 80]
    got, cache = in_chunks(model, joined(base, additions), batch, bounds, 96)
    plain = InternVideo3(config, Execution(scan_layers=scan_layers))
    expected, wanted = in_chunks(plain, explicit(base, additions), batch, bounds, 96)
    assert relative(got, expected) <= TOLERANCE
    for name, entry in cache.entries.items():
        for own, other in zip(entry, wanted.entries[name], strict=True):
            assert relative(own, other) <= TOLERANCE, name


@pytest.mark.medium
@pytest.mark.parametrize(("attention", "run"), [("m2la", dict()), ("gqa", dict(dtype=jnp.bfloat16))])
def test_new_additions_change_no_bit(attention, run):
    config = even_config(attention)
    model, plain = low_rank_model(config, **run), InternVideo3(config, Execution(**run))
    base = base_params(config, plain.run.scan_layers)
    additions = init_params(model, jax.random.key(3), only=LEAVES)
    params = joined(base, additions)
    assert jax.tree.structure(params) == jax.tree.structure(unbox(boxed_params(model)))
    for path, value in flatten_dict(additions).items():
        assert value.dtype == jnp.float32 and np.any(value) == (path[-1] == "lora_a"), path
    batch = batch_of(config)
    logits = jax.jit(logits_of, static_argnums=0)
    np.testing.assert_array_equal(logits(model, params, batch), logits(plain, base, batch))


def random_codes(model):
    """Random weights, with codes of any value and scales that keep products their size."""
    rng, how = np.random.default_rng(5), FORMATS[model.run.weights]
    leaves = flatten_dict(base_params(model.config))
    made = {}
    for path, leaf in flatten_dict(unbox(boxed_params(model))).items():
        if path[-1] == "kernel_codes":
            low, high = (0, 256) if how.packed == 2 else (-127, 128)
            made[path] = rng.integers(low, high, leaf.shape).astype(leaf.dtype)
        elif path[-1] == "kernel_scale":
            made[path] = np.full(leaf.shape, 0.2 / how.code_rms).astype(leaf.dtype)
        else:
            made[path] = leaves[path]
    return jax.tree.map(jnp.asarray, unflatten_dict(made))


def dequantised(params, floats, weights):
    """The float model's parameters from those with codes, layer by layer."""
    leaves = flatten_dict(params)
    for path, leaf in flatten_dict(unbox(boxed_params(floats))).items():
        if path[-1] != "kernel":
            continue
        codes, scale = (leaves.pop((*path[:-1], name)) for name in ("kernel_codes", "kernel_scale"))
        stacked = bool({"layers", "blocks", "deepstack_merger_list"} & set(path))
        if not stacked:
            codes, scale = codes[None], scale[None]
        out_shape = scale.shape[2:]
        in_shape = leaf.shape[stacked + len(out_shape) :]
        kernels = [
            np.asarray(dequantize(c, s, math.prod(in_shape), weights, jnp.float32))
            .reshape(-1, math.prod(out_shape))
            .T
            for c, s in zip(codes, scale, strict=True)
        ]
        leaves[path] = jnp.asarray(np.stack(kernels).reshape(leaf.shape))
    return unflatten_dict(leaves)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "weights"), [("m2la", "nf4"), ("gqa", "int8")])
def test_over_quantised_kernels(attention, weights):
    """Beside the same additions to the dequantised kernels, gradients included; new ones change no bit."""
    config = even_config(attention)
    model, floats = low_rank_model(config, weights=weights), low_rank_model(config)
    plain = InternVideo3(config, Execution(weights=weights))
    batch, additions = batch_of(config), random_additions(model)
    base = random_codes(plain)
    both = computed(model, batch)
    gradients, logits = both(additions, base)
    expected, wanted = computed(floats, batch)(additions, dequantised(base, InternVideo3(config), weights))
    assert relative(logits, wanted) <= TOLERANCE
    found = flatten_dict(gradients)
    for path, value in flatten_dict(expected).items():
        assert np.abs(value).max() > 0, path
        assert relative(found[path], value) <= TOLERANCE, path
    new = flatten_dict(additions)
    new = unflatten_dict({path: 0 * x if path[-1] == "lora_b" else x for path, x in new.items()})
    _, logits = both(new, base)
    np.testing.assert_array_equal(logits, jax.jit(logits_of, static_argnums=0)(plain, base, batch))


def test_rank_zero_is_no_addition():
    """The same parameters and, word for word, the same program."""
    config = tiny_config()
    none, zero = InternVideo3(config), InternVideo3(config, Execution(lora=Lora()))
    params = unbox(boxed_params(zero))
    assert jax.tree.structure(params) == jax.tree.structure(unbox(boxed_params(none)))
    batch = batch_of(config)
    texts = {jax.jit(lambda p, m=m: logits_of(m, p, batch)).lower(params).as_text() for m in (none, zero)}
    assert len(texts) == 1


def test_only_the_targets():
    model = low_rank_model(tiny_config(), ("kv_b_proj", "model.visual.blocks.*.mlp.*"))
    found = {"/".join(p[:-1]) for p in flatten_dict(boxed_params(model)) if p[-1] == "lora_a"}
    blocks = "visual/tower/blocks"
    assert found == {
        "language_model/layers/self_attn/kv_b_proj",
        f"{blocks}/linear_fc1",
        f"{blocks}/linear_fc2",
    }


def test_errors():
    with pytest.raises(UserError, match=r"lora.rank -1 is negative"):
        Lora(-1)
    with pytest.raises(UserError, match=r"lora.targets is empty"):
        Lora(4)
    # A pattern that nobody has resolved.
    model = InternVideo3(tiny_config(), Execution(lora=Lora(4, 8.0, ("q_proj",))))
    with pytest.raises(UserError, match=r"'q_proj' is no linear layer"):
        boxed_params(model)
