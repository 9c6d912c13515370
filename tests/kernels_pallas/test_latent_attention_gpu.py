"""latent_attention's Triton kernels: values and gradients, interpreted; programs for an H100."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import pytest
from chip import compile_for, needs_compilers, struct

from iv3jax.chips import CHIPS
from kernels_pallas.blocks import override
from kernels_pallas.choice import target
from kernels_pallas.latent_attention import gpu, gpu_backward
from kernels_pallas.mask import AttentionMask

pytestmark = pytest.mark.medium

SMALL = {"forward_q": 16, "forward_k": 8, "dq_q": 8, "dq_k": 16, "dkv_q": 16, "dkv_k": 8}
QUICK = (1, 4)
"""Of cases.CASES: one token; packed with a logit scale."""


def errors(case, dtype=jnp.float32):
    """Errors of out, lse, dquery, dkv, dk_rope and, where there is one, dlogit_scale."""
    mask = cases.mask_of(case)
    (want_out, want_lse), want = cases.expected(case, dtype)

    @jax.jit
    def both(arguments, dout, dlse):
        out, lse = gpu.forward(*arguments, mask, interpret=True)
        delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1) - dlse
        gradients = gpu_backward.backward(
            *arguments, mask, lse, delta.swapaxes(1, 2), dout.astype(dtype), interpret=True
        )
        return out, lse, gradients

    out, lse, gradients = both(cases.inputs_of(case, dtype), *cases.cotangents_of(case))
    assert out.dtype == dtype and lse.dtype == jnp.float32
    found = [cases.worst(out, want_out), cases.worst(lse.swapaxes(1, 2), want_lse)]
    for x, y in zip(gradients, want, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            found.append(cases.worst(x, y))
    return found


def parameters():
    for number, case in enumerate(cases.CASES):
        yield pytest.param(case, id=str(case), marks=[] if number in QUICK else pytest.mark.medium)


@pytest.mark.parametrize("case", list(parameters()))
def test_values_and_gradients(case):
    with override("latent_attention_gpu", **SMALL):
        assert max(errors(case)) <= 1e-5


@pytest.mark.medium
@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (32, 2)])
def test_a_program_of_the_key_kernel_adds_up_several_heads(programs, parts, monkeypatch):
    case = cases.CASES[4]
    monkeypatch.setattr(gpu_backward, "_PROGRAMS", programs)
    assert gpu_backward._parts(case.rows, -(-case.keys // SMALL["dkv_k"]), case.heads) == parts
    with override("latent_attention_gpu", **SMALL):
        assert max(errors(case)) <= 1e-5


@pytest.mark.medium
def test_bf16_at_the_released_dims():
    """Probabilities and their gradients are rounded to bf16 before they are multiplied."""
    out, lse, *gradients = errors(cases.LARGE, jnp.bfloat16)
    assert out <= 5e-3 and lse <= 1e-5 and max(gradients) <= 1.5e-2


def test_refusals():
    def why(n, e, v, dtype="bfloat16"):
        shapes = (1, 8, 2, n + e), (1, 8, 2, n + v), (1, 8, e)
        return gpu.refusal(*(struct(shape, dtype) for shape in shapes))

    assert why(24, 8, 12) is None
    with target(CHIPS["h100"]):
        assert why(128, 64, 32) is None
        assert why(96, 64, 32) == "n is 96; a GPU takes powers of two from 16"
        assert why(128, 8, 32) == "e is 8; a GPU takes powers of two from 16"
        assert why(128, 64, 48) == "v is 48; a GPU takes powers of two from 16"


def test_heads_are_divided_over_programs_only_when_keys_are_few():
    assert gpu_backward._parts(1, 65536 // 64, 32) == 1
    assert gpu_backward._parts(1, 32768 // 64, 32) == 2
    assert gpu_backward._parts(4, 2048 // 64, 32) == 8
    assert gpu_backward._parts(1, 1, 6) == 6


def compiled(tokens, keys, heads, dtype="bfloat16", groups=0):
    """Forward and backward together, causal inside segments, the keys' slots given (a zig-zag shard)."""
    n = e = v = 128

    def both(query, kv, k_rope, logit_scale, segments, slots, key_segments, key_slots, dout):
        mask = AttentionMask(segments, key_segments, slots, key_slots)
        out, lse = gpu.forward(query, kv, k_rope, logit_scale, mask, interpret=False)
        gradients = gpu_backward.backward(
            query, kv, k_rope, logit_scale, mask, lse, lse, dout, interpret=False
        )
        return out, lse, gradients

    return compile_for(
        "h100",
        both,
        struct((1, tokens, heads, n + e), dtype),
        struct((1, keys, heads, n + v), dtype),
        struct((1, keys, e), dtype),
        struct((1, groups, keys), "float32") if groups else None,
        *(struct((1, size), "int32") for size in (tokens, tokens, keys, keys)),
        struct((1, tokens, heads, v), dtype),
    )


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize(
    ("tokens", "keys", "heads"), [(65536, 65536, 32), (65536, 65536, 8), (65536, 262144, 32)]
)
def test_h100_at_long_contexts(tokens, keys, heads):
    """All that is in memory besides arguments and results is lists of blocks."""
    program = compiled(tokens, keys, heads)
    assert program.as_text().count("xla.gpu.triton") >= 3
    lists = 3 * 4 * (tokens // 64) * (keys // 64)
    assert program.memory_analysis().temp_size_in_bytes <= 2 * lists


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize(
    ("tokens", "dtype", "groups"), [(1000, "bfloat16", 8), (2048, "float32", 2), (2049, "float16", 0)]
)
def test_h100_at_odd_lengths_and_other_types(tokens, dtype, groups):
    compiled(tokens, tokens + 3, 8, dtype, groups)
