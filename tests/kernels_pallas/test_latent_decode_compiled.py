"""latent_decode compiled for chips that are not here, at the 8B's sizes."""

import jax
import jax.numpy as jnp
import pytest
from chip import compile_for, moved_arrays, needs_compilers, struct

from iv3jax.chips import CHIPS
from kernels_pallas import choice
from kernels_pallas.latent_decode.ops import latent_decode
from kernels_pallas.latents import Latents

pytestmark = [pytest.mark.slow, needs_compilers]

HEADS, RANK, ROPE = 32, 896, 128
GROUPS = 8
"""Of scales: 7 are used. XLA lays out an argument with 7 otherwise than the kernel, and would copy it."""


def compiled(chip, rows, slots, kind, *, tokens=1, layers=1, rank=RANK, pages=None, groups=None):
    """A program that scans `layers` layers of a stacked cache with the chip's kernel."""
    owners = rows if pages is None else rows * pages
    if kind in ("int8", "float8_e4m3fn"):
        latents = Latents(
            struct((layers, owners, slots, rank), kind),
            struct((layers, owners, GROUPS, slots), "float32"),
            struct((layers, owners, slots, ROPE)),
        )
    else:
        latents = Latents(struct((layers, owners, slots, rank + ROPE), kind))
    queries = (rows, tokens, HEADS)
    dtype = "float32" if kind == "float32" else "bfloat16"
    extra = {}
    if pages is not None:
        extra["page_table"] = struct((rows, pages), "int32")
    if groups is not None:
        extra["logit_scale"] = struct((layers, owners, groups, slots), "float32")

    def program(q_latent, q_rope, latents, last, extra):
        def one(state, layer):
            found = latent_decode(q_latent, q_rope, latents, layer, last, 0.0625, **extra)
            return jax.tree.map(jnp.add, state, found), None

        zeros = jnp.zeros((*queries, rank)), jnp.zeros(queries)
        return jax.lax.scan(one, zeros, jnp.arange(layers, dtype=jnp.int32))[0]

    choice.forget()
    found = compile_for(
        chip,
        program,
        struct((*queries, rank), dtype),
        struct((*queries, ROPE), dtype),
        latents,
        struct((rows, tokens), "int32"),
        extra,
    )
    assert choice.taken()["latent_decode"] == CHIPS[chip].platform
    return found


def assert_moves_no_cache(found, rows, slots):
    """Nothing of the size of even one row's scales is copied."""
    assert not moved_arrays(found, rows * slots * GROUPS // 2)


def temporaries(found):
    return found.memory_analysis().temp_size_in_bytes


def partials(rows, tokens, splits, rank=RANK):
    """The most that parts of the context may take."""
    return splits * rows * tokens * HEADS * (rank + 2) * 4


LONG = [
    ("v5e", 1, 32768, "bfloat16"),
    ("v5e", 1, 524288, "bfloat16"),
    ("v5e", 64, 65536, "bfloat16"),
    ("v5e", 1, 524288, "int8"),
    ("v5e", 64, 131072, "int8"),
    ("v5e", 1, 131072, "float8_e4m3fn"),
    ("v5p", 1, 32768, "bfloat16"),
    ("v5p", 1, 524288, "bfloat16"),
    ("v5p", 64, 524288, "bfloat16"),
    ("v5p", 1, 524288, "int8"),
    ("v5p", 64, 524288, "int8"),
    ("v5p", 1, 131072, "float8_e4m3fn"),
    ("h100", 1, 32768, "bfloat16"),
    ("h100", 1, 524288, "bfloat16"),
    ("h100", 64, 524288, "bfloat16"),
    ("h100", 1, 524288, "int8"),
    ("h100", 64, 524288, "int8"),
    ("h100", 1, 524288, "float8_e4m3fn"),
]


@pytest.mark.parametrize(("chip", "rows", "slots", "kind"), LONG)
def test_long_contexts(chip, rows, slots, kind):
    found = compiled(chip, rows, slots, kind, layers=2 if rows == 1 else 1)
    assert_moves_no_cache(found, rows, slots)
    splits = {"v5e": 1, "v5p": 2 if rows == 1 else 1, "h100": max(1, 132 // rows)}[chip]
    # Beside the parts: the sum over layers, their merging and the queries in the kernel's order.
    assert temporaries(found) <= partials(rows, 1, splits) + 4 * partials(rows, 1, 1)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "h100"])
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 2000, "kind": "bfloat16", "tokens": 16},
        {"slots": 8192, "kind": "float32", "tokens": 4},
        {"slots": 100, "kind": "int8", "tokens": 3},
        {"slots": 256, "kind": "bfloat16", "pages": 512, "groups": 8},
        {"slots": 4096, "kind": "int8", "groups": 32},
        {"slots": 4096, "kind": "bfloat16", "rank": 384},
    ],
    ids=["many queries", "fp32", "short", "pages and norms", "norms of each head", "a smaller rank"],
)
def test_options(chip, options):
    compiled(chip, 4, **options)
