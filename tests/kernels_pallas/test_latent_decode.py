"""latent_decode: every implementation against the plain form, on a CPU (kernels interpreted)."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import Case, assert_same
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import override
from kernels_pallas.latent_attention.reference import latent_attention_reference
from kernels_pallas.latent_decode import tpu, xla
from kernels_pallas.latent_decode.ops import latent_decode
from kernels_pallas.latent_decode.reference import latent_decode_reference
from kernels_pallas.latents import Latents
from kernels_pallas.mask import AttentionMask
from kernels_pallas.merge import merge

FP32 = 1e-5
BF16 = 2e-2
"""Of the largest output: queries, weights and latents are rounded to 8 bits."""

SMALL = {"tpu": {"block": 32, "chunk": 16}, "gpu": {"block": 16, "queries": 16}}


@pytest.fixture(autouse=True)
def small_blocks_in_xla(monkeypatch):
    """32 slots, the least; and none of these small caches is looked at as a whole."""
    monkeypatch.setattr(xla, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(xla, "_PLAIN_BYTES", 0)


def call(implementation, args, **kwargs):
    """latent_decode, compiled as one program: eagerly, each of its small steps would be."""
    with override("latent_decode", **SMALL.get(implementation, {})):
        jitted = jax.jit(lambda x: latent_decode(*x, args[5], **kwargs, implementation=implementation))
        return jitted(args[:5])


def run(case, implementation, **options):
    with override("latent_decode", **SMALL.get(implementation, {})):
        return case.run(implementation, **options)


def generated(count, seed):
    """Odd shapes of all kinds."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        heads = int(rng.choice([1, 2, 3, 5, 8, 16, 64]))
        groups = [g for g in range(1, heads + 1) if heads % g == 0]
        pages = [None, None, 1, 3][number % 4]
        yield Case(
            rows=int(rng.integers(1, 4)),
            tokens=int(rng.choice([1, 1, 2, 3])),
            heads=heads,
            rank=int(rng.choice([128, 200, 256, 384, 896, 1024])),
            rope=int(rng.choice([16, 64, 128])),
            slots=int(rng.choice([1, 7, 16, 33, 64, 71])),
            layers=int(rng.integers(1, 4)),
            layer=0,
            kind=["float32", "int8", "float32", "float8_e4m3fn", "bfloat16"][number % 5],
            groups=int(rng.choice(groups)) if number % 3 == 0 else None,
            pages=pages,
            seed=number,
        )


PLAIN = [
    Case(),
    Case(rows=3, tokens=3, heads=5, rank=72, rope=24, slots=37, groups=5),
    Case(rank=200, tokens=2, slots=100, kind="int8", groups=2),
    Case(slots=20, pages=3, tokens=2, kind="int8"),
]


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("case", PLAIN, ids=["plain", "odd", "int8", "pages"])
def test_values(implementation, case):
    assert_same(run(case, implementation), case.reference(), FP32)


@pytest.mark.parametrize("sizes", [{"slots": 50}, {"slots": 16, "pages": 3}, {"slots": 40, "pages": 2}])
def test_xla_in_several_blocks(sizes):
    """Of 20 rows, XLA takes 32 slots at a time: the last block is moved back, or has pages too many."""
    case = Case(rows=20, heads=2, rank=16, rope=16, groups=2, **sizes)
    assert_same(case.run("xla"), case.reference(), FP32)


@pytest.mark.parametrize("extra", [{}, {"pages": 5}, {"kind": "int8", "groups": 2}])
def test_xla_reads_of_each_row_its_own_blocks(extra):
    """One row of five is far longer, one sees nothing: what no row needs is not touched, not a number."""
    last = ((269, 270), (3, 4), (-1, -1), (64, 40), (31, 32))
    slots = 60 if "pages" in extra else 300
    case = Case(rows=5, tokens=2, slots=slots, last=last, **extra)
    expected = case.reference()
    args, kwargs = case.arguments()
    if not extra:
        needed = -(-(np.max(last, axis=1) + 1) // 32) * 32
        unread = np.arange(slots)[:, None] >= needed[:, None, None]
        args = (*args[:2], Latents(np.where(unread, np.float32(np.nan), args[2].values)), *args[3:])
    assert_same(call("xla", args, **kwargs), expected, FP32)


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_generated_shapes(implementation):
    for case in generated(10, seed=4):
        if case.heads * case.tokens <= tpu.MOST_QUERIES:
            assert_same(run(case, implementation, splits=1 + case.seed % 3), case.reference(), FP32)


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_bf16_queries(implementation, kind):
    case = Case(kind=kind, queries="bfloat16", rank=256, slots=70, last=((69,), (30,)))
    assert_same(run(case, implementation), case.reference(), BF16)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_rows_that_see_nothing_are_zero(implementation):
    case = Case(rows=3, tokens=2, last=((-1, -1), (-1, 0), (49, -1)))
    out, lse = run(case, implementation, splits=2)
    assert_same((out, lse), case.reference(), FP32)
    assert np.isneginf(lse[0]).all() and np.isneginf(lse[1, 0]).all() and np.isfinite(lse[1, 1]).all()


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_splits_change_nothing(implementation):
    case = Case(rows=2, slots=120, last=((119,), (17,)))
    expected = case.reference()
    for splits in (3, 1000):
        assert_same(run(case, implementation, splits=splits), expected, FP32)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_slots_that_nothing_sees_are_not_looked_at(implementation):
    case = Case(rows=2, slots=70, last=((40,), (3,)))
    args, kwargs = case.arguments()
    seen = np.arange(70)[:, None] <= np.asarray([40, 3])[:, None, None]
    poisoned = Latents(np.where(seen, args[2].values, np.float32(np.nan)))
    found = call(implementation, (*args[:2], poisoned, *args[3:]), **kwargs)
    assert_same(found, case.reference(), FP32)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_slots_past_the_capacity_are_as_the_last(implementation):
    case, past = Case(last=((49,), (49,))), Case(last=((50,), (1000,)))
    assert_same(run(past, implementation), case.reference(), FP32)


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_the_layer_may_come_from_a_scan(implementation):
    case = Case(layers=3)
    (q_latent, q_rope, latents, _, last, scale), _ = case.arguments()

    def one(_, layer):
        with override("latent_decode", **SMALL.get(implementation, {})):
            out = latent_decode(q_latent, q_rope, latents, layer, last, scale, implementation=implementation)
        return None, out

    outs, lses = jax.jit(lambda: jax.lax.scan(one, None, jnp.arange(3, dtype=jnp.int32))[1])()
    for layer in range(3):
        assert_same((outs[layer], lses[layer]), Case(layers=3, layer=layer).reference(), FP32)


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_two_rows_share_a_page(implementation):
    args, _ = Case(rows=2, slots=16, pages=3, last=((40,), (47,))).arguments()
    shared = np.asarray([[0, 1, 2], [0, 1, 3]], np.int32)
    found = call(implementation, args, page_table=shared)
    values = args[2].values
    own = np.stack([values[:, [0, 1, 2]], values[:, [0, 1, 3]]], axis=1).reshape(2, 2, 48, -1)
    expected = jax.jit(lambda x: latent_decode_reference(*x, None, None, scale=args[5]))(
        (*args[:2], Latents(own), *args[3:5])
    )
    assert_same(found, [x[0] for x in expected], FP32)


def test_parts_of_a_context_merge_exactly():
    case = Case(rows=2, tokens=2, slots=90, last=((89, 40), (-1, 10)))
    (q_latent, q_rope, latents, layer, last, scale), _ = case.arguments()
    parts = []
    for start in range(0, 90, 30):
        part = Latents(latents.values[:, :, start : start + 30])
        parts.append(call("xla", (q_latent, q_rope, part, layer, np.maximum(last - start, -1), scale)))
    found = jax.jit(merge)(*(np.stack(x) for x in zip(*parts, strict=True)))
    assert_same(found, case.reference(), FP32)


def test_merging_has_finite_gradients_where_nothing_is_seen():
    outs, lses = jnp.ones((2, 3, 4)), jnp.asarray([[-jnp.inf, 0.0, 1.0], [-jnp.inf, -jnp.inf, 2.0]])

    def total(outs, lses):
        out, lse = merge(outs, lses)
        return jnp.sum(out) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(outs, lses)
    assert all(np.isfinite(g).all() for g in gradients)


def test_it_is_the_expanded_attention():
    """Absorbed and expanded forms of the same layer (SPEC §2), so that scale and order of dims are pinned."""
    rng = np.random.default_rng(0)
    heads, rank, n, e, slots = 3, 32, 16, 8, 21
    shapes = [(heads, n, rank), (1, slots, rank), (1, slots, e), (1, 1, heads, n), (1, 1, heads, e)]
    last = np.asarray([[13]], np.int32)

    @jax.jit
    def both(w_uk, c, k_rope, q_nope, q_rope):
        latents = Latents(jnp.concatenate([c, k_rope], axis=-1)[None])
        q_latent = jnp.einsum("bthn,hnr->bthr", q_nope, w_uk)
        mask = AttentionMask(jnp.ones((1, 1), jnp.int32), None, last)
        values = jnp.broadcast_to(c[:, :, None], (1, slots, heads, rank))
        kv = jnp.concatenate([jnp.einsum("bsr,hnr->bshn", c, w_uk), values], axis=-1)
        query = jnp.concatenate([q_nope, q_rope], axis=-1)
        return (
            latent_decode(q_latent, q_rope, latents, 0, last, (n + e) ** -0.5)[0],
            latent_attention_reference(query, kv, k_rope, mask)[0],
        )

    out, expected = both(*(rng.standard_normal(shape, np.float32) for shape in shapes))
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.medium
@pytest.mark.parametrize("case", [Case(tokens=2, slots=70), Case(slots=40, kind="int8", groups=2)])
def test_no_races(case):
    (*args, scale), kwargs = case.arguments()
    strict = pltpu.InterpretParams(detect_races=True)
    with override("latent_decode", **SMALL["tpu"]):
        kernel = partial(tpu.latent_decode, scale=scale, splits=2, interpret=strict)
        parts = jax.jit(kernel)(*args, kwargs["logit_scale"], kwargs["page_table"])
    assert_same(merge(*parts), case.reference(), FP32)
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def changed(**changes):
    args, kwargs = Case(**changes.pop("case", {})).arguments()
    names = ("q_latent", "q_rope", "latents", "layer", "query_slots", "scale")
    return dict(zip(names, args, strict=True)) | kwargs | changes


QUANTIZED = changed(case={"kind": "int8"})["latents"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_latent": jnp.zeros((2, 4, 128))}, "q_latent is float32[2, 4, 128]"),
        ({"q_latent": jnp.zeros((2, 0, 4, 128))}, "q_latent is float32[2, 0, 4, 128]"),
        ({"q_rope": jnp.zeros((2, 1, 3, 64))}, "q_rope is float32[2, 1, 3, 64]; accepted is (2, 1, 4, e)"),
        ({"q_rope": jnp.zeros((2, 1, 4, 64), jnp.int32)}, "q_rope is int32"),
        ({"latents": Latents(jnp.zeros((2, 2, 50, 191)))}, "latents.values is float32[2, 2, 50, 191]"),
        ({"latents": Latents(jnp.zeros((2, 2, 50, 192), jnp.int8))}, "latents.values is int8"),
        ({"latents": Latents(jnp.zeros((2, 2, 0, 192)))}, "at least one slot"),
        ({"latents": QUANTIZED._replace(k_rope=None)}, "one of scale and k_rope"),
        (
            {"latents": QUANTIZED._replace(scale=jnp.zeros((2, 2, 0, 50)))},
            "of 0 groups; accepted is at least 1",
        ),
        ({"latents": QUANTIZED._replace(k_rope=jnp.zeros((2, 2, 49, 64)))}, "latents.k_rope is float32"),
        ({"layer": 1.0}, "layer is float32[]; accepted is one integer"),
        ({"query_slots": jnp.zeros((2,), jnp.int32)}, "query_slots is int32[2]; accepted is (2, 1) of int32"),
        ({"query_slots": jnp.zeros((2, 1))}, "query_slots is float32"),
        ({"logit_scale": jnp.ones((2, 2, 3, 50))}, "logit_scale is of 3 groups; accepted is a divisor of 4"),
        ({"logit_scale": jnp.ones((2, 2, 4, 49))}, "logit_scale is float32[2, 2, 4, 49]"),
        ({"page_table": jnp.zeros((3, 1), jnp.int32)}, "page_table is int32[3, 1]; accepted is (2, P)"),
        ({"splits": 0}, "splits is 0; accepted is None or at least 1"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; accepted are None, 'xla', 'tpu', 'gpu'"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=f"latent_decode: .*{re.escape(message)}"):
        latent_decode(**changed(**changes))


def test_too_many_queries_for_a_tpu():
    args, _ = Case(tokens=9, heads=64, rank=16, rope=16, slots=4, rows=1).arguments()
    with pytest.raises(ValueError, match="9 queries × 64 heads a row; at most 512"):
        latent_decode(*args, implementation="tpu")
    latent_decode(*args)
