"""Latent compression for training: values and gradients of every implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv3jax.models.rope import Rope, rotate_interleaved
from kernels_pallas import blocks, choice
from kernels_pallas.choice import Chip
from kernels_pallas.latent_compress.ops import Affine, latent_compress
from kernels_pallas.latent_compress.reference import latent_compress_reference

pytestmark = pytest.mark.medium

IMPLEMENTATIONS = ("xla", "tpu", "gpu")

# B, T, D, r, e, bias, affine
SHAPES = {
    "one token": (1, 1, 32, 128, 32, True, False),
    "odd": (2, 13, 24, 130, 6, True, True),
    "no bias": (3, 5, 40, 16, 8, False, False),
    "rank 1024": (1, 9, 16, 1024, 128, True, False),
    "rank 896": (1, 3, 48, 896, 128, False, True),
}


def inputs(rows, tokens, dim, rank, rope, bias=True, affine=False, dtype="float32", seed=0):
    """x, kernel, bias, cos, sin, affine, modality, so scaled that latents are about 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    angles = rng.uniform(0, 2 * np.pi, (rows, tokens, rope // 2))
    maps = Affine(normal(2, rank, rank, scale=rank**-0.5), normal(2, rank))
    return (
        normal(rows, tokens, dim),
        normal(rank + rope, dim, scale=dim**-0.5),
        normal(rank + rope) if bias else None,
        jnp.asarray(np.cos(angles), jnp.float32),
        jnp.asarray(np.sin(angles), jnp.float32),
        maps if affine else None,
        jnp.asarray(rng.integers(0, 2, (rows, tokens)), jnp.int32) if affine else None,
    )


def call(implementation, x, kernel, bias, cos, sin, affine, modality):
    small = {"tpu": {"tokens": 8}, "gpu": {"tokens": 16, "columns": 32, "depth": 16}}
    with blocks.override("latent_compress", **small.get(implementation, {})):
        return latent_compress(
            x, kernel, bias, cos, sin, affine=affine, modality=modality, implementation=implementation
        )


reference = jax.jit(latent_compress_reference)


def close(actual, expected, tolerance=1e-5):
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def test_reference_is_the_models_arithmetic():
    x, kernel, bias, cos, sin, affine, modality = arguments = inputs(2, 7, 24, 20, 12, affine=True)
    z = np.einsum("btd,wd->btw", x, kernel, dtype=np.float64) + np.asarray(bias, np.float64)
    for row, token in np.ndindex(2, 7):
        m = int(modality[row, token])
        z[row, token, :20] = affine.matrix[m] @ z[row, token, :20] + affine.bias[m]
    k_rope = rotate_interleaved(jnp.asarray(z[..., 20:], jnp.float32), Rope(cos, sin))
    close(reference(*arguments), np.concatenate([z[..., :20], k_rope], axis=-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, shape):
    arguments = inputs(*SHAPES[shape])
    close(jax.jit(partial(call, implementation))(*arguments), reference(*arguments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    """Within 1 % of the largest: the result is rounded, and under an affine map what goes into it."""
    arguments = inputs(2, 9, 64, 130, 16, affine=True, dtype="bfloat16")
    out = jax.jit(partial(call, implementation))(*arguments)
    assert out.dtype == jnp.bfloat16
    close(out, reference(*arguments), 1e-2)


def gradients(function, arguments, cotangent):
    """Of x, kernel, bias and affine."""
    x, kernel, bias, cos, sin, affine, modality = arguments

    def loss(x, kernel, bias, affine):
        return jnp.sum(function(x, kernel, bias, cos, sin, affine, modality) * cotangent)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, kernel, bias, affine)


@pytest.mark.parametrize("shape", ["one token", "odd", "no bias", "rank 896"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation, shape):
    arguments = inputs(*SHAPES[shape])
    rows, tokens, _, rank, rope = SHAPES[shape][:5]
    cotangent = np.random.default_rng(1).normal(size=(rows, tokens, rank + rope)).astype(np.float32)
    expected = gradients(latent_compress_reference, arguments, cotangent)
    actual = gradients(lambda *a: call(implementation, *a), arguments, cotangent)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(close, actual, expected)


def test_gradients_in_bfloat16():
    """Within 2 % of the largest."""
    arguments = inputs(2, 9, 64, 130, 16, affine=True, dtype="bfloat16")
    cotangent = np.random.default_rng(1).normal(size=(2, 9, 146)).astype(np.float32)
    expected = gradients(latent_compress_reference, arguments, cotangent)
    actual = gradients(lambda *a: call("xla", *a), arguments, cotangent)
    assert [a.dtype for a in jax.tree.leaves(actual)] == [a.dtype for a in jax.tree.leaves(expected)]
    jax.tree.map(lambda a, b: close(a, b, 2e-2), actual, expected)


def test_a_named_tpu_refuses_odd_sizes():
    x, kernel, bias, cos, sin, *_ = inputs(1, 4, 128, 130, 128)
    with choice.target(Chip("tpu", "v5p")):
        with pytest.raises(ValueError, match="implementation 'tpu': r is 130; a TPU takes multiples of 128"):
            jax.eval_shape(lambda x: latent_compress(x, kernel, bias, cos, sin, implementation="tpu"), x)
        assert jax.eval_shape(lambda x: latent_compress(x, kernel, bias, cos, sin), x).shape == (1, 4, 258)
        assert choice.taken()["latent_compress"].startswith("xla (tpu: r is 130")
        huge = (
            jax.ShapeDtypeStruct((1, 4, 2**14), jnp.float32),
            jax.ShapeDtypeStruct((1024, 2**14), jnp.float32),
        )
        angles = jax.ShapeDtypeStruct((1, 4, 64), jnp.float32)
        jax.eval_shape(lambda x, k, a: latent_compress(x, k, None, a, a), *huge, angles)
        assert "MiB of VMEM" in choice.taken()["latent_compress"]


WRONG = {
    "x is": lambda a: a | {"x": a["x"][0]},
    "x's dtype is int8; accepted is float32 or bfloat16": lambda a: a | {"x": a["x"].astype(jnp.int8)},
    r"kernel is \(40, 23\); accepted is \(r\+e, D=24\)": lambda a: a | {"kernel": a["kernel"][:, 1:]},
    "kernel's dtype is bfloat16; accepted is x's, float32": lambda a: (
        a | {"kernel": a["kernel"].astype(jnp.bfloat16)}
    ),
    "bias is": lambda a: a | {"bias": a["bias"][1:]},
    "cos is": lambda a: a | {"cos": a["cos"][:, 1:]},
    "cos's dtype is bfloat16; accepted is float32": lambda a: a | {"cos": a["cos"].astype(jnp.bfloat16)},
    "sin is": lambda a: a | {"sin": a["sin"][..., 1:]},
    "affine.matrix is": lambda a: a | {"affine": Affine(jnp.zeros((1, 32, 32)), jnp.zeros((2, 32)))},
    "affine.bias is": lambda a: a | {"affine": Affine(jnp.zeros((2, 32, 32)), jnp.zeros((2, 31)))},
    r"modality is None; accepted is \(B=2, T=5\)": lambda a: a | {"modality": None},
    "modality is .*; accepted is None without affine": lambda a: a | {"affine": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    names = ("x", "kernel", "bias", "cos", "sin", "affine", "modality")
    arguments = dict(zip(names, inputs(2, 5, 24, 32, 8, affine=True), strict=True))
    with pytest.raises(ValueError, match=f"latent_compress: {message}"):
        latent_compress(**WRONG[message](arguments))
