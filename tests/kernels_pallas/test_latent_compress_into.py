"""Latent compression into the cache: what is written, and that nothing else is, in every implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from test_latent_compress import IMPLEMENTATIONS, inputs

from kernels_pallas import blocks
from kernels_pallas.latent_compress import tpu
from kernels_pallas.latent_compress.ops import latent_compress_into
from kernels_pallas.latent_compress.reference import latent_compress_reference, write_reference
from kernels_pallas.latents import Latents, groups_of

pytestmark = pytest.mark.medium

KINDS = ("float32", "bfloat16", "int8", "float8_e4m3fn")

LAYER = 1
SMALL = {
    "tpu": {"window": 8, "scale_window": 16},
    "gpu": {"tokens": 16, "columns": 32, "depth": 16},
}


def cache(rows, capacity, rank, rope, kind, layers=2, seed=3):
    """A cache full of noise, so that a lost or a stray write shows."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=(layers, rows, *shape)), dtype)

    if kind in ("float32", "bfloat16"):
        return Latents(normal(capacity, rank + rope, dtype=kind))
    codes = jnp.clip(jnp.round(normal(capacity, rank) * 40), -127, 127).astype(kind)
    return Latents(codes, normal(groups_of(rank), capacity), normal(capacity, rope, dtype=jnp.bfloat16))


def into(implementation, latents, offsets, counts, arguments, layer=LAYER):
    *most, affine, modality = arguments
    with blocks.override("latent_compress_into", **SMALL.get(implementation, {})):
        return latent_compress_into(
            latents,
            layer,
            offsets,
            counts,
            *most,
            affine=affine,
            modality=modality,
            implementation=implementation,
        )


@jax.jit
def expected_from(latents, offsets, counts, arguments):
    latent = latent_compress_reference(*arguments)
    return write_reference(latents, LAYER, offsets, counts, latent)


def written_slots(latents, offsets, counts):
    """(L, B, S) bool, said once more in plain Python."""
    layers, rows, capacity = latents.values.shape[:3]
    mine = np.zeros((layers, rows, capacity), bool)
    for row, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        for slot in range(int(offset), int(offset) + int(count)):
            if 0 <= slot < capacity:
                mine[LAYER, row, slot] = True
    return mine


def check(latents, offsets, counts, arguments, actual, overflow):
    """What was not written, bit for bit; the rest within 1e-5 of the largest, or a rounding of its dtype.

    Codes may be the neighbours of the expected ones, where 1e-6 in the latent decides; at most one of 50 is.
    """
    offsets, counts = np.asarray(offsets), np.asarray(counts)
    mine = written_slots(latents, offsets, counts)
    np.testing.assert_array_equal(overflow, (counts > 0) & (offsets + counts > latents.capacity))
    expected = expected_from(latents, offsets, counts, arguments)
    assert [x is None for x in actual] == [x is None for x in latents]
    for name, before in latents._asdict().items():
        if before is None:
            continue
        after, want = getattr(actual, name), getattr(expected, name)
        assert after.dtype == before.dtype and after.shape == before.shape
        before, after, want = (np.asarray(x) for x in (before, after, want))
        if name == "scale":
            before, after, want = (np.swapaxes(x, -1, -2) for x in (before, after, want))
        np.testing.assert_array_equal(after[~mine].view(np.uint8), before[~mine].view(np.uint8))
        step = {"float32": 0, "bfloat16": 2**-7, "int8": 0, "float8_e4m3fn": 2**-3}[before.dtype.name]
        got, want = (x[mine].astype(np.float64) for x in (after, want))
        if before.dtype.itemsize == 1:
            assert np.all(np.abs(got - want) <= np.maximum(step * np.abs(want), 1.0 if step == 0 else 2**-9))
            assert np.sum(got != want) <= max(2, want.size / 50)
        elif want.size:
            limit = step * np.abs(want) + 1e-5 * max(1, np.abs(want).max())
            assert np.all(np.abs(got - want) <= limit)


# T, S, rank, e, offsets, counts, affine
CASES = {
    "one token": (1, 40, 130, 8, [0, 39, 40, 7, -1, 17], [1, 1, 1, 0, 1, 1], False),
    "a few": (5, 40, 16, 8, [0, 37, 40, 6, -3, 12, -9], [5, 5, 2, 3, 4, 0, 5], True),
    "odd capacity": (3, 21, 256, 4, [18, 19, 20], [3, 3, 3], False),
    "more than a cache": (29, 20, 130, 8, [-4, 3, 0], [29, 29, 20], False),
    "one row": (19, 64, 1024, 8, [13], [17], True),
    "whole windows": (5, 48, 130, 8, [0, 43, 40, 6, -3, 48], [5, 5, 0, 3, 4, 5], False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.medium
def test_writes(implementation, case, kind):
    run_case(implementation, case, kind)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_writes_a_few(implementation, kind):
    run_case(implementation, "a few", kind)


@pytest.mark.parametrize("case", ["a few", "more than a cache", "one row"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_tpu_tile_by_tile(monkeypatch, case, kind):
    """Many tokens are compressed window by window, not all at once."""
    monkeypatch.setattr(tpu, "_TOGETHER", 0)
    run_case("tpu", case, kind)


def run_case(implementation, case, kind, run=None):
    tokens, capacity, rank, rope, offsets, counts, affine = CASES[case]
    rows = len(offsets)
    arguments = inputs(rows, tokens, 24, rank, rope, affine=affine)
    latents = cache(rows, capacity, rank, rope, kind)
    offsets, counts = jnp.asarray(offsets, jnp.int32), jnp.asarray(counts, jnp.int32)
    actual, overflow = (run or jax.jit(partial(into, implementation)))(latents, offsets, counts, arguments)
    check(latents, offsets, counts, arguments, actual, overflow)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_offsets(implementation, kind):
    """Generated offsets and counts, far outside too; one program for all."""
    arguments = inputs(3, 11, 16, 130, 8)
    latents = cache(3, 27, 130, 8, kind)
    compiled = jax.jit(partial(into, implementation))
    rows = st.lists(st.tuples(st.integers(-40, 60), st.integers(0, 11)), min_size=3, max_size=3)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(rows)
    def holds(rows):
        offsets, counts = (jnp.asarray(x, jnp.int32) for x in zip(*rows, strict=True))
        check(latents, offsets, counts, arguments, *compiled(latents, offsets, counts, arguments))

    holds()


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("case", ["whole windows", "one row"])
def test_tpu_has_no_races(monkeypatch, case, kind):
    if case == "one row":
        monkeypatch.setattr(tpu, "_TOGETHER", 0)
    interpret = pltpu.InterpretParams(detect_races=True)

    def run(latents, offsets, counts, arguments):
        with blocks.override("latent_compress_into", **SMALL["tpu"]):
            layer = jnp.int32(LAYER)
            out = tpu.latent_compress_into(latents, layer, offsets, counts, *arguments, interpret=interpret)
        return out, (counts > 0) & (offsets + counts > latents.capacity)

    run_case("tpu", case, kind, run)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_broken_row_stays_alone(implementation):
    """NaN in one row's hidden states reaches no other row and no other slot."""
    x, *rest = inputs(3, 2, 16, 16, 8)
    x = x.at[1, 0].set(jnp.nan)
    latents = cache(3, 24, 16, 8, "float32")
    offsets, counts = jnp.array([7, 3, 5], jnp.int32), jnp.array([2, 2, 2], jnp.int32)
    written, _ = jax.jit(partial(into, implementation))(latents, offsets, counts, (x, *rest))
    expected = np.zeros(latents.values.shape, bool)
    expected[LAYER, 1, 3] = True
    np.testing.assert_array_equal(np.isnan(written.values), expected)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_xla_writes_in_place(kind, tokens):
    """Through a loop over layers, as the model does it; temporaries are below a twentieth of the cache."""
    arguments = inputs(2, tokens, 16, 128, 32)
    latents = cache(2, 4096, 128, 32, kind)
    if latents.k_rope is not None:
        # XLA on a CPU copies what is bfloat16.
        latents = latents._replace(k_rope=latents.k_rope.astype(jnp.float32))
    offsets, counts = jnp.array([5, 9], jnp.int32), jnp.array([tokens, 1], jnp.int32)

    def layers(latents):
        def step(latents, layer):
            return into("xla", latents, offsets, counts, arguments, layer)[0], None

        return jax.lax.scan(step, latents, jnp.arange(2))[0]

    compiled = jax.jit(layers, donate_argnums=0).lower(latents).compile()
    nbytes = sum(x.nbytes for x in latents if x is not None)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < nbytes / 20
    written = compiled(jax.tree.map(jnp.copy, latents))
    np.testing.assert_array_equal(written.values[0, :, :5], latents.values[0, :, :5])
    assert not np.array_equal(written.values[:, 0, 5], latents.values[:, 0, 5])


def changed(latents, **arrays):
    return {"latents": latents._replace(**arrays)}


WRONG = {
    "latents.values' dtype is int32": lambda q: changed(q, values=q.values.astype(jnp.int32)),
    r"latents.values is .*; accepted is \(L, B=2, S, 32\)": lambda q: changed(q, values=q.values[..., 1:]),
    "latents is int8 with .'scale'.; accepted is both": lambda q: changed(q, k_rope=None),
    "latents is bfloat16 with .*; accepted is neither": lambda q: changed(
        q, values=jnp.zeros((2, 2, 9, 40), jnp.bfloat16)
    ),
    "latents.scale is": lambda q: changed(q, scale=q.scale[:, :, :, 1:]),
    "latents.scale's dtype is bfloat16": lambda q: changed(q, scale=q.scale.astype(jnp.bfloat16)),
    "latents.k_rope is": lambda q: changed(q, k_rope=q.k_rope[..., 1:]),
    "latents.k_rope's dtype is int8": lambda q: changed(q, k_rope=q.k_rope.astype(jnp.int8)),
    r"offsets is \(1,\); accepted is \(B=2,\)": lambda q: {"offsets": jnp.zeros((1,), jnp.int32)},
    "counts's dtype is float32; accepted is int32": lambda q: {"counts": jnp.zeros((2,), jnp.float32)},
    "x's dtype is int8": lambda q: {"x": jnp.zeros((2, 3, 24), jnp.int8)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    names = ("x", "kernel", "bias", "cos", "sin", "affine", "modality")
    arguments = dict(zip(names, inputs(2, 3, 24, 32, 8), strict=True))
    latents = cache(2, 9, 32, 8, "int8")
    zero = jnp.zeros((2,), jnp.int32)
    arguments |= {"latents": latents, "layer": 0, "offsets": zero, "counts": zero} | WRONG[message](latents)
    with pytest.raises(ValueError, match=f"latent_compress_into: {message}"):
        latent_compress_into(**arguments)
