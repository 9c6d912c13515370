"""Quantised weights against plain references: codes, products, gradients, whole models, and memory."""

import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import ATTENTIONS, conversation, difference, random_model, tiny_config

from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.quantized import FORMATS, LEVELS, NotFiniteError, dequantize, matmul, quantize

GROUP = {"int8": 128, "nf4": 64}
GRID = {"int8": np.arange(-127, 128), "nf4": np.array(LEVELS)}


def kernel_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def plain(codes: np.ndarray, scale: np.ndarray, rows: int, weights: str) -> np.ndarray:
    """Dequantises number by number, in fp64."""
    out = np.zeros((rows, *scale.shape[1:]))
    for i in range(rows):
        code = codes[i].astype(int) if weights == "int8" else codes[i // 2].astype(int) >> 4 * (i % 2) & 15
        value = code if weights == "int8" else np.array(LEVELS)[code]
        out[i] = value * scale[i // GROUP[weights]].astype(np.float64)
    return out


def test_levels_are_the_normal_distributions_quantiles():
    """QLoRA's construction: 9 levels up from 0, 8 down, at even steps of probability, divided by the largest.

    Its offset is the mean of 1 − 1/32 and 1 − 1/30. Tolerance 1e-6, of its fp32 table.
    """
    offset = 1 - (1 / 32 + 1 / 30) / 2
    up = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    down = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*up, 0.0, *down]) / max(up)
    np.testing.assert_allclose(LEVELS, expected, atol=1e-6)


def test_layout_by_hand():
    """Three rows: the scale is the largest, two codes a byte with the first low, padding is 0's code 7."""
    kernel = np.array([[-2.0], [0.0], [1.0]], np.float32)
    codes, scale = quantize(kernel, 1, "nf4")
    assert codes.tolist() == [[0 | 7 << 4], [12 | 7 << 4]] and scale.tolist() == [[2.0]]
    codes, scale = quantize(kernel, 1, "int8")
    assert codes.tolist() == [[-127], [0], [64]] and scale[0, 0] == jnp.bfloat16(2 / 127)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(
    ("shape", "inputs"), [((1, 1), 1), ((13, 5), 1), ((130, 3, 2), 1), ((3, 43, 7), 2), ((257, 4), 1)]
)
def test_every_code_is_the_nearest(weights, shape, inputs):
    """No other code of the same scale is closer to the weight (to 1e-6 of it), the largest is kept."""
    kernel = kernel_of(*shape)
    rows, out = math.prod(shape[:inputs]), shape[inputs:]
    codes, scale = quantize(kernel, inputs, weights)
    assert codes.shape == FORMATS[weights].codes_shape(rows, out)
    assert scale.shape == (-(-rows // GROUP[weights]), *out) and scale.dtype == jnp.bfloat16
    got = plain(codes, scale, rows, weights)
    spread = np.repeat(scale.astype(np.float64), GROUP[weights], axis=0)[:rows]
    flat = kernel.reshape(rows, *out)
    best = np.abs(GRID[weights] * spread[..., None] - flat[..., None]).min(axis=-1)
    assert np.all(np.abs(got - flat) <= best + 1e-6)
    largest = np.array([np.abs(flat[i : i + GROUP[weights]]).max(0) for i in range(0, rows, GROUP[weights])])
    unit = 127 if weights == "int8" else 1
    np.testing.assert_array_equal(scale, (largest / np.float32(unit)).astype(jnp.bfloat16))
    back = dequantize(jnp.asarray(codes), jnp.asarray(scale), rows, weights, jnp.float32)
    np.testing.assert_allclose(back, got, rtol=1e-6)


@pytest.mark.parametrize(("weights", "expected"), [("int8", 0.0065), ("nf4", 0.0919)])
def test_error_of_normal_weights(weights, expected):
    """Relative error of 10⁶ normal weights: what the head of quantized.py states, ± 1 %."""
    kernel = kernel_of(2048, 512)
    codes, scale = map(jnp.asarray, quantize(kernel, 1, weights))
    back = np.asarray(dequantize(codes, scale, 2048, weights, jnp.float32))
    error = np.sqrt(np.mean((back - kernel) ** 2) / np.mean(kernel**2))
    assert error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("weights", FORMATS)
def test_groups_of_zeros_and_views(weights):
    """Zeros come back as zeros; a transposed bf16 view gives what its fp32 copy gives."""
    kernel = kernel_of(7, 200).astype(jnp.bfloat16)
    kernel[3] = 0
    codes, scale = quantize(kernel.T, 1, weights)
    copied = quantize(np.ascontiguousarray(kernel.T.astype(np.float32)), 1, weights)
    np.testing.assert_array_equal(codes, copied[0])
    np.testing.assert_array_equal(scale, copied[1])
    assert not plain(codes, scale, 200, weights)[:, 3].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_weights_without_a_scale(bad):
    """The last is finite, but not in bf16."""
    kernel = kernel_of(9, 2)
    kernel[4, 1] = bad
    with pytest.raises(NotFiniteError, match="not finite"):
        quantize(kernel, 1, "nf4")


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(
    ("rows", "out", "block"),
    [
        (1, (3,), 1 << 20),
        (13, (5, 2), 1 << 20),
        (129, (3,), 1 << 20),
        (256, (6,), 64 * 6),  # one group a block
        (1024, (4, 3), 300 * 12),  # blocks of two groups (int8) or four (nf4)
        (897, (5,), 200 * 5),  # seven groups of int8, fourteen of nf4, and a last row
        (451, (2, 3), 100),  # a block is smaller than a group
    ],
)
def test_matmul_and_its_gradient(weights, rows, out, block):
    """fp32 against the plain product with dequantised weights in fp64: 1e-4 on values of order 30."""
    codes, scale = quantize(kernel_of(rows, *out), 1, weights)
    dense = plain(codes, scale, rows, weights)
    x, dy = kernel_of(2, 3, rows, seed=1), kernel_of(2, 3, *out, seed=2)

    def product(x):
        return matmul(x, jnp.asarray(codes), jnp.asarray(scale), weights, jnp.float32, block)

    def both(x, dy):
        y, pull = jax.vjp(product, x)
        return y, *pull(dy)

    y, dx = jax.jit(both)(x, dy)
    assert y.dtype == jnp.float32
    assert difference(y, np.tensordot(x, dense, 1)) <= 1e-4
    assert difference(dx, dy.reshape(2, 3, -1) @ dense.reshape(rows, -1).T) <= 1e-4


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_product_never_holds_the_dequantised_kernel(weights, backward):
    """4 MB in fp32, in blocks of 256 KB: memory beside the codes is that of three blocks."""
    codes, scale = map(jnp.asarray, quantize(kernel_of(4096, 256), 1, weights))

    def product(x):
        return matmul(x, codes, scale, weights, jnp.float32, 1 << 16)

    def gradient(x, dy):
        return jax.vjp(product, x)[1](dy)

    x, dy = jnp.ones((1, 4096)), jnp.ones((1, 256))
    lowered = jax.jit(gradient).lower(x, dy) if backward else jax.jit(product).lower(x)
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 3 << 18


def test_matmul_in_bf16_rounds_factors_only():
    """Products of bf16 numbers, summed in fp32: 1e-3 on values of order 30."""
    codes, scale = quantize(kernel_of(700, 9), 1, "int8")
    x = kernel_of(4, 700, seed=1).astype(jnp.bfloat16)
    arguments = jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scale), "int8", jnp.bfloat16
    dense = plain(codes, scale, 700, "int8").astype(np.float32).astype(jnp.bfloat16)
    expected = x.astype(np.float64) @ dense.astype(np.float64)
    assert difference(matmul(*arguments), expected) <= 1e-3
    assert difference(matmul(*arguments, 1024), expected) <= 1e-3


@pytest.mark.parametrize("weights", FORMATS)
def test_a_decode_loop_never_holds_the_dequantised_model(weights):
    """Eight layers in a loop, 1 MB dequantised each: memory beside the weights is that of two or three."""
    layers = [tuple(map(jnp.asarray, quantize(kernel_of(512, 512, seed=i), 1, weights))) for i in range(8)]

    def decode(x, layers, steps):
        def step(_, x):
            for codes, scale in layers:
                x = jnp.tanh(matmul(x, codes, scale, weights, jnp.float32))
            return x

        return jax.lax.fori_loop(0, steps, step, x)

    compiled = jax.jit(decode).lower(jnp.ones((1, 512)), layers, 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 << 20


def stored(loose: Any, boxed: Any, weights: str) -> tuple[Any, Any]:
    """A tree with every kernel quantised, and the tree with every kernel dequantised again, in fp64.

    loose: fp32 parameters. boxed: those of the quantised model, abstract, with their logical axes.
    """
    coded, dense = {}, {}
    for name, value in loose.items():
        if isinstance(value, dict):
            coded[name], dense[name] = stored(value, boxed[name], weights)
        elif name != "kernel":
            coded[name] = dense[name] = value
        else:
            scale = boxed["kernel_scale"]
            stacked = scale.names[0] == "layers"
            outputs = scale.value.ndim - 1 - stacked
            first, last = range(outputs), range(-outputs, 0)
            layers = [
                np.moveaxis(x, first, last) for x in (np.asarray(value) if stacked else [np.asarray(value)])
            ]
            inputs = layers[0].ndim - outputs
            rows = math.prod(layers[0].shape[:inputs])
            pairs = [quantize(layer, inputs, weights) for layer in layers]
            back = [plain(*pair, rows, weights).reshape(layers[0].shape) for pair in pairs]
            back = [np.moveaxis(x, last, first) for x in back]
            parts = dict(
                zip(("kernel_codes", "kernel_scale"), map(np.stack, zip(*pairs, strict=True)), strict=True)
            )
            coded |= {k: jnp.asarray(v if stacked else v[0]) for k, v in parts.items()}
            dense["kernel"] = (np.stack(back) if stacked else back[0]).astype(np.float32)
    return coded, dense


def models(attention: str, weights: str) -> tuple[InternVideo3, Any, InternVideo3, Any]:
    """A model with quantised weights, and one with the same weights dequantised."""
    loose, params = random_model(tiny_config(attention))
    model = InternVideo3(loose.config, Execution(weights=weights))
    coded, dense = stored(params, boxed_params(model), weights)
    return model, coded, loose, dense


@pytest.mark.medium
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_quantised_model_is_the_dequantised_one(attention, weights):
    """Logits of a whole sequence with a video, and of the same fed through a cache: 1e-4 on order 1."""
    model, coded, loose, dense = models(attention, weights)
    sample = conversation(model.config, [3, ("video", 2, 4, 4), 5])
    batch = collate([[sample]], model.config, length=32)

    def logits(model, params, cache):
        out = model.apply({"params": params}, batch, None, cache)
        return model.apply({"params": params}, out.hidden, method="logits")

    expected = logits(loose, dense, None)
    assert float(jnp.std(expected)) > 0.3
    assert difference(logits(model, coded, None), expected) <= 1e-4
    cache = init_cache(model.config.text_config, 1, 32, jnp.float32)
    real = slice(0, len(sample))
    assert difference(logits(model, coded, cache)[:, real], expected[:, real]) <= 1e-4


@pytest.mark.medium
@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_training_beside_quantised_weights(weights):
    """Gradients of what stays in floats (embeddings, norms, biases) pass through the frozen kernels."""
    model, coded, loose, dense = models("m2la", weights)
    batch = collate([[conversation(model.config, [3, ("video", 2, 4, 4), 5])]], model.config, length=32)

    def gradients(model, params):
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        frozen = ["kernel" in jax.tree_util.keystr(path) for path, _ in flat]

        def loss(trained):
            trained = iter(trained)
            leaves = [leaf if fixed else next(trained) for fixed, (_, leaf) in zip(frozen, flat, strict=True)]
            params = jax.tree.unflatten(tree, leaves)
            hidden = model.apply({"params": params}, batch).hidden
            return jnp.mean(model.apply({"params": params}, hidden, method="logits") ** 2)

        return jax.grad(loss)(
            [jnp.asarray(v) for fixed, (_, v) in zip(frozen, flat, strict=True) if not fixed]
        )

    got, expected = gradients(model, coded), gradients(loose, dense)
    assert len(got) > 20 and max(float(jnp.abs(g).max()) for g in expected) > 0.1
    for a, b in zip(got, expected, strict=True):
        assert difference(a, b) <= 1e-4 * max(1.0, float(jnp.abs(b).max()))


@pytest.mark.parametrize("weights", FORMATS)
def test_new_weights_have_the_usual_size(weights):
    """Uniform codes, with the standard deviation of a new kernel: 1/√K, ± 2 %."""
    how = FORMATS[weights]
    codes = how.init_codes(jax.random.key(0), how.codes_shape(256, (512,)), how.code_dtype)
    scale = jnp.full(how.scale_shape(256, (512,)), 1 / 16 / how.code_rms, jnp.bfloat16)
    assert codes.dtype == how.code_dtype
    assert float(jnp.std(dequantize(codes, scale, 256, weights, jnp.float32))) == pytest.approx(
        1 / 16, rel=0.02
    )


def test_which_parameters_are_quantised():
    """Every kernel and nothing else; the first input axis and the output axes keep their names."""
    loose, model = (InternVideo3(tiny_config(), Execution(weights=w)) for w in (None, "nf4"))
    flat = {
        run: {
            tuple(p.key for p in path): box
            for path, box in jax.tree_util.tree_flatten_with_path(
                boxed_params(m), is_leaf=lambda x: hasattr(x, "names")
            )[0]
        }
        for run, m in (("loose", loose), ("nf4", model))
    }
    for path, box in flat["loose"].items():
        if path[-1] != "kernel":
            assert flat["nf4"].pop(path).names == box.names
            continue
        codes = flat["nf4"].pop((*path[:-1], "kernel_codes"))
        scale = flat["nf4"].pop((*path[:-1], "kernel_scale"))
        assert codes.value.dtype == jnp.uint8 and scale.value.dtype == jnp.bfloat16
        names = [name for name in box.names if name not in ("head_dim",)]
        assert sorted(name for name in codes.names if name not in ("head_dim",)) == sorted(names)
        assert len(scale.names) == len(codes.names) and None in scale.names
    assert not flat["nf4"]


def test_an_unknown_format():
    with pytest.raises(UserError, match="weights 'fp8' are not one of int8, nf4"):
        Execution(weights="fp8")
