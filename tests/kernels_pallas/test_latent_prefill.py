"""latent_prefill: every version against the reference, interpreted; its errors."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import prefill_cases as cases
import pytest
from chip import struct
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from iv3jax.chips import CHIPS
from kernels_pallas.blocks import override
from kernels_pallas.choice import taken, target
from kernels_pallas.latent_prefill import gpu, tpu
from kernels_pallas.latent_prefill.ops import latent_prefill
from kernels_pallas.latent_prefill.reference import latent_prefill_reference
from kernels_pallas.latents import Latents, scale_rows

QUICK = 1
"""How many of cases.CASES are tested with the quick tests."""


@pytest.fixture
def small_blocks():
    with (
        override("latent_prefill", q=16, k=16, step=8),
        override("latent_prefill_gpu", stretch=24),
        override("latent_attention_gpu", forward_q=16, forward_k=8),
    ):
        yield


@functools.cache
def expected(case, dtype="float32"):
    """The fp32 reference on arguments rounded to dtype."""

    def wide(x):
        return x.astype(jnp.float32) if x is not None and x.dtype == jnp.bfloat16 else x

    return jax.jit(latent_prefill_reference)(*jax.tree.map(wide, cases.arguments_of(case, dtype)))


def error(found, case, dtype="float32"):
    """Largest difference from the reference relative to the largest value, of outputs and log-sum-exps."""
    (out, lse), (want, logs) = found, expected(case, dtype)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert out.shape == want.shape and lse.shape == logs.shape == out.shape[:3]
    unseen = np.asarray(cases.arguments_of(case)[4]) < 0
    assert unseen.any() == (case.rows > 3) and not np.asarray(out)[unseen].any()
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(unseen[..., None], lse.shape))

    def apart(x, y):
        x, y = (np.asarray(z, np.float64)[~unseen] for z in (x, y))
        return np.abs(x - y).max() / np.abs(y).max()

    return max(apart(out, want), apart(lse, logs))


def parameters():
    for number, case in enumerate(cases.CASES):
        yield pytest.param(case, id=str(case), marks=[] if number < QUICK else pytest.mark.medium)


def called(arguments, implementation):
    *arguments, logit_scale = arguments
    call = jax.jit(partial(latent_prefill, implementation=implementation))
    return call(*arguments, logit_scale=logit_scale)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("case", list(parameters()))
def test_values(case, implementation, small_blocks):
    assert error(called(cases.arguments_of(case), implementation), case) <= 1e-5
    assert taken()["latent_prefill"].startswith(implementation)


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_bf16_at_the_released_dims(implementation):
    """Expanded keys and values and the probabilities are rounded to bf16, in the chips' own blocks."""
    out = called(cases.arguments_of(cases.LARGE, "bfloat16"), implementation)
    assert error(out, cases.LARGE, "bfloat16") <= 1e-2


@pytest.mark.medium
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_bf16_over_a_quantised_cache(stored):
    """Against the reference on the same codes: the TPU multiplies the exact codes, then scales."""
    case = cases.Case(tokens=20, slots=64, rank=256, n=16, e=16, v=16, stored=stored)
    for implementation in ("xla", "tpu"):
        out = called(cases.arguments_of(case, "bfloat16"), implementation)
        assert error(out, case, "bfloat16") <= 2e-2


@pytest.mark.medium
def test_no_races():
    """Two cores share the heads."""
    case = cases.Case(tokens=12, slots=20, rank=16, rows=1, groups=1)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with override("latent_prefill", q=16, k=16, step=8):
        out = jax.jit(partial(tpu.latent_prefill_tpu, interpret=interpret))(*cases.arguments_of(case))
    assert error(out, case) <= 1e-5
    assert not interpret_pallas_call.races.races_found


@pytest.mark.medium
def test_slots_that_nobody_sees_may_hold_anything(small_blocks):
    arguments = cases.arguments_of(cases.Case(tokens=20, slots=64, rank=128, rows=1))
    latents = arguments[1]
    poisoned = Latents(latents.values.at[:, :, 20:].set(1e30))
    for implementation in ("xla", "tpu", "gpu"):
        found = called((arguments[0], poisoned, *arguments[2:]), implementation)
        for seen, clean in zip(found, called(arguments, implementation), strict=True):
            np.testing.assert_array_equal(seen, clean)


def test_errors():
    query, latents, _, kernel, slots, _ = cases.arguments_of(cases.CASES[0])
    scale = jnp.ones((cases.LAYERS, 5, 3, 70))
    codes = Latents(latents.values[..., :130].astype(jnp.int8), scale[:, :, :2], latents.values[..., :4])
    assert scale_rows(130) == 2

    def fails(text, *arguments, **options):
        with pytest.raises(ValueError, match=text):
            latent_prefill(*arguments, **options)

    fails(r"query is float32\[5, 33, 48\]; accepted is", query.reshape(5, 33, -1), latents, 1, kernel, slots)
    fails(r"kernel is float32\[3, 14, 130\]", query, latents, 1, kernel[:3], slots)
    fails(
        r"latents.values is float32\[3, 4, 70, 134\]", query, Latents(latents.values[:, :4]), 1, kernel, slots
    )
    fails(
        r"latents.values is int8",
        query,
        latents._replace(values=latents.values.astype(jnp.int8)),
        1,
        kernel,
        slots,
    )
    fails(r"latents.scale is float32\[3, 5, 3, 70\]", query, codes._replace(scale=scale), 1, kernel, slots)
    fails(r"latents.k_rope is None", query, codes._replace(k_rope=None), 1, kernel, slots)
    fails(r"query_slots is float32\[5, 33\]", query, latents, 1, kernel, slots.astype(jnp.float32))
    fails(r"query_slots is int32\[5, 32\]", query, latents, 1, kernel, slots[:, 1:])
    fails(r"layer has shape \[1\]", query, latents, jnp.ones(1, jnp.int32), kernel, slots)
    fails(r"logit_scale is float32\[3, 5, 3, 70\]", query, latents, 1, kernel, slots, logit_scale=scale)
    fails("implementation is 'cuda'", query, latents, 1, kernel, slots, implementation="cuda")


def test_refusals():
    def why(module, tokens_dtype="bfloat16", n=128, e=128, v=128, rank=896, slots=64):
        query, kernel = struct((1, 8, 4, n + e), tokens_dtype), struct((4, n + v, rank))
        if module is gpu:
            return gpu.refusal(query, kernel, e)
        return tpu.refusal(query, Latents(struct((2, 1, slots, rank + e))), kernel, e)

    assert why(tpu, n=3, e=5, v=7, rank=9, slots=1) is None and why(gpu, n=3, e=5, v=7) is None
    with target(CHIPS["v5e"]):
        assert why(tpu) is None
        assert why(tpu, n=64) == "n is 64; a TPU takes multiples of 128"
        assert why(tpu, rank=200) == "r is 200; a TPU takes multiples of 128"
        assert why(tpu, slots=65) == "latents has 65 slots; a TPU takes multiples of 8"
    with target(CHIPS["h100"]):
        assert why(gpu, rank=200) is None
        assert why(gpu, v=96) == "v is 96; a GPU takes powers of two from 16"
