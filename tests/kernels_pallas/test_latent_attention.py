"""latent_attention: every version against the fp32 reference, values and gradients, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    LARGE,
    Case,
    cotangents_of,
    expected,
    inputs_of,
    mask_of,
    worst,
)
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import override
from kernels_pallas.choice import Chip, taken, target
from kernels_pallas.latent_attention import tpu_backward, tpu_forward
from kernels_pallas.latent_attention.ops import latent_attention, latent_attention_with_lse
from kernels_pallas.latent_attention.visible import visible_keys, visible_queries, wholly_visible
from kernels_pallas.mask import AttentionMask

SMALL = {
    **{"forward_queries": 8, "forward_keys": 16, "forward_compute": 8},
    **{"dq_queries": 8, "dq_keys": 16, "dq_compute": 8},
    **{"dkv_queries": 16, "dkv_keys": 8, "dkv_compute": 8},
}
OF_128 = dict.fromkeys(SMALL, 128)


def errors(case, implementation, dtype=jnp.float32, blocks=SMALL, lost_lse=None):
    """Worst error of out, lse and each gradient; `lost_lse` is the cotangent of an lse of −inf."""
    mask, wanted = mask_of(case), expected(case, dtype)
    dout, dlse = cotangents_of(case)
    if lost_lse is not None:
        dlse = jnp.where(jnp.isneginf(wanted[0][1]), lost_lse, dlse)

    def attend(query, kv, k_rope, logit_scale):
        return latent_attention_with_lse(
            query, kv, k_rope, mask, logit_scale=logit_scale, implementation=implementation
        )

    @jax.jit
    def both(inputs, cotangents):
        found, pull = jax.vjp(attend, *inputs)
        return found, pull(cotangents)

    with override("latent_attention_tpu", **blocks):
        found = both(inputs_of(case, dtype), (dout.astype(dtype), dlse))
    assert found[0][0].dtype == dtype and found[0][1].dtype == jnp.float32
    return [worst(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)]


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_is_the_reference(case):
    assert max(errors(case, "xla")) < 1e-5


def test_xla_in_blocks_of_queries_is_the_reference():
    assert max(errors(Case("cache", 1300, 100, rows=1, heads=2, groups=1), "xla")) < 1e-5


def test_tpu_is_the_reference_on_a_small_case():
    assert max(errors(Case("shard", tokens=22, keys=44, groups=2, rows=1), "tpu")) < 1e-5


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tpu_is_the_reference(case):
    assert max(errors(case, "tpu")) < 1e-5


@pytest.mark.medium
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_tpu_with_the_released_dims(dtype, tolerance):
    assert max(errors(LARGE, "tpu", dtype, OF_128)) < tolerance


def test_xla_in_bf16():
    assert max(errors(LARGE, "xla", jnp.bfloat16)) < 1e-2


@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.medium)])
def test_what_comes_back_to_an_lse_of_no_keys_is_ignored(implementation):
    case = Case("cache", tokens=9, keys=20, rows=1)
    assert bool(jnp.isneginf(expected(case)[0][1]).any())
    assert max(errors(case, implementation, lost_lse=jnp.nan)) < 1e-5


@pytest.mark.medium
def test_tpu_has_no_races():
    case = Case("packed", tokens=20, keys=20, rows=1, groups=1, n=4, e=4, v=4)
    # Two cores share what is declared parallel, as a v5p's do.
    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    inputs, mask = inputs_of(case), mask_of(case)
    (wanted_out, wanted_lse), wanted = expected(case)
    dout, dlse = cotangents_of(case)
    dlse = jnp.where(jnp.isneginf(wanted_lse), 0, dlse)
    delta = ((wanted_out * dout).sum(-1) - dlse).swapaxes(1, 2)
    with override("latent_attention_tpu", **SMALL):
        out, lse = tpu_forward.forward(*inputs, mask, interpret=simulated)
        assert not interpret_pallas_call.races.races_found
        found = tpu_backward.backward(*inputs, mask, lse, delta, dout, interpret=simulated)
        assert not interpret_pallas_call.races.races_found
    pairs = zip((out, lse.swapaxes(1, 2), *found), (wanted_out, wanted_lse, *wanted), strict=True)
    assert max(worst(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("blocks", [(8, 16), (16, 8)])
@pytest.mark.parametrize("case", [LARGE, *(CASES[i] for i in (3, 5, 7, 9, 11))], ids=str)
def test_lists_hold_every_visible_block(case, blocks):
    mask, keys = mask_of(case), case.keys

    @jax.jit
    def lists(mask):
        functions = (visible_keys, visible_queries, wholly_visible)
        return [function(mask, keys, *blocks) for function in functions]

    queries_of, keys_of, whole = lists(mask)
    shape = (case.rows, -(-case.tokens // blocks[0]), blocks[0], -(-keys // blocks[1]), blocks[1])
    dense = np.zeros((case.rows, shape[1] * shape[2], shape[3] * shape[4]), bool)
    dense[:, : case.tokens, :keys] = mask.dense(keys)
    dense = dense.reshape(shape)
    listed = _dense(queries_of, shape[3])
    assert (listed >= dense.any((2, 4))).all()
    assert (listed == _dense(keys_of, shape[1]).swapaxes(1, 2)).all()
    assert (np.asarray(whole) <= dense.all((2, 4))).all()


def _dense(visible, others):
    """(B, own blocks, other blocks) bool of lists; what follows the last one fetches nothing new."""
    blocks, counts = np.asarray(visible.blocks), np.asarray(visible.counts)
    dense = np.zeros((*counts.shape, others), bool)
    for place in np.ndindex(counts.shape):
        count = counts[place]
        dense[*place, blocks[place][:count]] = True
        assert dense[place].sum() == count
        assert (blocks[place][count:] == (blocks[place][count - 1] if count else 0)).all()
    return dense


def test_lists_of_a_causal_sequence_and_of_packed_samples_are_exact():
    slots = jnp.arange(64)[None]
    segments = 1 + slots // 16
    mask = mask_of(Case("causal", 64, 64, rows=1))
    counts = jax.jit(lambda mask: visible_keys(mask, 64, 16, 16).counts)
    np.testing.assert_array_equal(counts(mask), [[1, 2, 3, 4]])
    packed = mask._replace(query_segments=segments, key_segments=segments)
    np.testing.assert_array_equal(counts(packed), [[1, 1, 1, 1]])
    np.testing.assert_array_equal(counts(mask._replace(query_segments=0 * segments)), [[0, 0, 0, 0]])
    whole = jax.jit(lambda mask: wholly_visible(mask, 64, 16, 16))(mask)
    np.testing.assert_array_equal(whole[0], np.tri(4, k=-1, dtype=bool))


def replaced(**changes):
    """Arguments of a call that would be accepted but for the changes."""
    query, kv, k_rope, _ = inputs_of(CASES[4])
    return {"query": query, "kv": kv, "k_rope": k_rope, "mask": mask_of(CASES[4])} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((2, 64, 12))}, r"query is \(2, 64, 12\); accepted is \(B, T, H, n\+e\)"),
        (
            {"query": jnp.zeros((2, 64, 4, 12), jnp.int8)},
            "query is int8; accepted is float32, bfloat16 or float16",
        ),
        ({"query": jnp.zeros((2, 64, 4, 4))}, r"query is .*; accepted is more dims than k_rope's e = 4"),
        (
            {"kv": jnp.zeros((2, 64, 4, 16), jnp.bfloat16)},
            "kv is bfloat16; accepted is query's dtype float32",
        ),
        ({"kv": jnp.zeros((2, 64, 3, 16))}, r"kv is \(2, 64, 3, 16\); accepted is \(2, S, 4, n\+v\)"),
        ({"kv": jnp.zeros((2, 64, 4, 8))}, "with n = 8 and v at least 1"),
        ({"k_rope": jnp.zeros((2, 63, 4))}, r"k_rope is \(2, 63, 4\); accepted is \(2, 64, e\)"),
        ({"k_rope": jnp.zeros((2, 64, 4, 1))}, r"k_rope is .*; accepted is \(B, S, e\)"),
        ({"mask": mask_of(CASES[3])}, r"mask.query_segments is int32\(2, 50\); accepted is int32\(2, 64\)"),
        (
            {"mask": mask_of(CASES[4])._replace(key_slots=jnp.zeros((2, 64)))},
            r"mask.key_slots is float32\(2, 64\); accepted is int32\(2, 64\)",
        ),
        (
            {"logit_scale": jnp.ones((2, 3, 64))},
            r"logit_scale is .*; accepted is float32\(2, G, 64\) with G dividing the 4 heads",
        ),
        ({"logit_scale": jnp.ones((2, 2, 64), jnp.bfloat16)}, r"logit_scale is bfloat16\(2, 2, 64\)"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; accepted are None, 'xla', 'tpu', 'gpu'"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        latent_attention(**replaced(**changes))


def test_a_tpu_refuses_dims_that_are_no_multiple_of_128():
    accepted = replaced()
    with target(Chip("tpu", "v5e")):
        with pytest.raises(ValueError, match=r"'tpu': n is 8; accepted are multiples of 128"):
            latent_attention(**accepted, implementation="tpu")
        with pytest.raises(ValueError, match="'gpu' does not run on this tpu"):
            latent_attention(**accepted, implementation="gpu")
        jax.eval_shape(lambda: latent_attention(**accepted))
        assert taken()["latent_attention"].startswith("xla (tpu: n is 8")


def test_a_tpu_refuses_more_pairs_of_blocks_than_fit_its_scalar_memory():
    long = jax.ShapeDtypeStruct((1, 2**20, 1, 256), jnp.bfloat16)

    def attend(query, kv):
        segments = jnp.ones(query.shape[:2], jnp.int32)
        return latent_attention(query, kv, kv[:, :, 0, :128], AttentionMask(segments, segments))

    with target(Chip("tpu", "v5e")):
        jax.eval_shape(attend, long, long)
        assert "1048576 pairs of blocks; accepted are 240000" in taken()["latent_attention"]
