"""Generated masks and inputs that every version of latent_attention is tested on.

Lengths are odd on purpose: no multiple of the small blocks that tests choose.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.latent_attention.reference import latent_attention_reference
from kernels_pallas.mask import AttentionMask


@dataclass(frozen=True)
class Case:
    """Sizes as in kernels_pallas/latent_attention/ops.py.

    mask: "whole" (all of one sample, not causal), "causal", "packed" (causal inside segments, padding between
    and after), "packed_whole" (not causal), "zigzag" (packed, tokens in zig-zag order), "shard" (the queries
    are one zig-zag shard of the keys), "cache" (key_segments None, a last slot for each query, some −1),
    "nothing" (nobody sees anybody).
    groups: rows of the logit scale; 0 is none.
    """

    mask: str
    tokens: int = 37
    keys: int = 37
    rows: int = 2
    heads: int = 2
    n: int = 8
    e: int = 4
    v: int = 8
    groups: int = 0
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-S{self.keys}-B{self.rows}-H{self.heads}-{self.n}+{self.e}+{self.v}"
        return f"{self.mask}-{sizes}" + (f"-G{self.groups}" if self.groups else "")


CASES = (
    Case("whole", tokens=1, keys=1, rows=1, heads=1),
    Case("causal", tokens=1, keys=1, rows=3),
    Case("causal"),
    Case("packed", tokens=50, keys=50, heads=3, n=16, e=8, v=12),
    Case("packed", tokens=64, keys=64, heads=4, groups=2),
    Case("packed_whole", tokens=45, keys=61, groups=1),
    Case("zigzag", tokens=48, keys=48, groups=2),
    Case("shard", tokens=24, keys=96, heads=2),
    Case("shard", tokens=22, keys=88, heads=4, n=4, e=12, v=20, groups=4),
    Case("cache", tokens=5, keys=70, groups=1),
    Case("cache", tokens=70, keys=33),
    Case("nothing", tokens=19, keys=21, groups=2),
    Case("packed", tokens=20, keys=20, rows=1, heads=64, n=4, e=4, v=4),
)

LARGE = Case("zigzag", tokens=300, keys=300, rows=1, heads=2, n=128, e=128, v=128, groups=2)
"""The released model's dims: what chips compile, in the fewest tokens with several blocks of 128."""


def mask_of(case: Case) -> AttentionMask:
    """The case's mask; rows of a batch differ."""
    rng = np.random.default_rng(case.seed)
    rows, tokens, keys = case.rows, case.tokens, case.keys
    ones = np.ones((rows, tokens), np.int32)
    slots = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    if case.mask == "whole":
        return _mask(ones, np.ones((rows, keys)))
    if case.mask == "causal":
        return _mask(ones, np.ones((rows, keys)), slots, slots)
    if case.mask == "nothing":
        return _mask(ones * 2, np.ones((rows, keys)))
    if case.mask == "cache":
        return _mask(rng.integers(0, 3, (rows, tokens)), None, rng.integers(-1, keys, (rows, tokens)))
    if case.mask == "packed_whole":
        return _mask(_packed(rng, rows, tokens), _packed(rng, rows, keys))
    segments = _packed(rng, rows, keys)
    key_slots = np.broadcast_to(np.arange(keys, dtype=np.int32), (rows, keys))
    if case.mask == "packed":
        return _mask(segments, segments, key_slots, key_slots)
    order = zigzag(keys, shards=4)
    segments, key_slots = segments[:, order], key_slots[:, order]
    part = slice(tokens, 2 * tokens) if case.mask == "shard" else slice(None)
    return _mask(segments[:, part], segments, key_slots[:, part], key_slots)


def zigzag(tokens: int, shards: int) -> np.ndarray:
    """The order in which shard i of a causal sequence holds its i-th and its i-th last part."""
    parts = np.array_split(np.arange(tokens), 2 * shards)
    return np.concatenate([np.concatenate([parts[i], parts[-1 - i]]) for i in range(shards)])


def inputs_of(case: Case, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple:
    """(query, kv, k_rope, logit_scale) of the case."""
    rng = np.random.default_rng(case.seed + 1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    logit_scale = None
    if case.groups:
        logit_scale = jnp.asarray(rng.uniform(0.3, 2.0, (case.rows, case.groups, case.keys)), jnp.float32)
    return (
        normal(case.rows, case.tokens, case.heads, case.n + case.e),
        normal(case.rows, case.keys, case.heads, case.n + case.v),
        normal(case.rows, case.keys, case.e),
        logit_scale,
    )


def cotangents_of(case: Case) -> tuple[jax.Array, jax.Array]:
    """Gradients that arrive at out (B, T, H, v) and lse (B, T, H), fp32."""
    rng = np.random.default_rng(case.seed + 2)
    shape = (case.rows, case.tokens, case.heads)
    return (
        jnp.asarray(rng.normal(size=(*shape, case.v)), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
    )


@cache
def expected(case: Case, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple:
    """The reference's ((out, lse), (dquery, dkv, dk_rope, dlogit_scale)), fp32, on inputs rounded to dtype.

    An lse of −inf has no gradient.
    """
    query, kv, k_rope, logit_scale = inputs_of(case, dtype)
    mask = mask_of(case)
    wide = tuple(x.astype(jnp.float32) for x in (query, kv, k_rope))

    @jax.jit
    def both(wide: tuple, logit_scale: jax.Array | None) -> tuple:
        def function(query, kv, k_rope, logit_scale):
            return latent_attention_reference(query, kv, k_rope, mask, logit_scale)

        found, pull = jax.vjp(function, *wide, logit_scale)
        return found, pull(cotangents_of(case))

    return both(wide, logit_scale)


def worst(found: jax.Array, wanted: jax.Array) -> float:
    """Largest difference relative to the largest entry wanted; infinities must be the same ones."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
    finite = np.isfinite(wanted)
    assert np.isfinite(found[finite]).all()
    if not finite.any():
        return 0.0
    return float(np.abs(found[finite] - wanted[finite]).max() / max(np.abs(wanted[finite]).max(), 1e-6))


def _mask(queries, keys, query_slots=None, key_slots=None) -> AttentionMask:
    def whole(x):
        return None if x is None else jnp.asarray(x, jnp.int32)

    return AttentionMask(whole(queries), whole(keys), whole(query_slots), whole(key_slots))


def _packed(rng: np.random.Generator, rows: int, tokens: int) -> np.ndarray:
    """(rows, tokens): samples of random lengths with padding between and after; a last row is all padding."""
    segments = np.zeros((rows, tokens), np.int32)
    for row in segments[: max(rows - 1, 1)]:
        cuts = np.sort(rng.integers(0, tokens + 1, 4))
        for number, (start, end) in enumerate(pairwise(cuts), 1):
            row[start:end] = number if number != 2 else 0
        row[: cuts[0]] = 7
    return segments
