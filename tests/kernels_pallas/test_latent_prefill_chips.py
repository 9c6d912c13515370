"""latent_prefill compiled for chips that are not here, at the released 8B's sizes."""

import pytest
from chip import CHIPS, compile_for, moved_arrays, needs_compilers, struct

from kernels_pallas.choice import taken
from kernels_pallas.latent_prefill.gpu import EXPANDED
from kernels_pallas.latent_prefill.ops import latent_prefill
from kernels_pallas.latents import Latents, scale_rows

LAYERS, HEADS, RANK, NOPE, ROPE, VALUE = 2, 32, 896, 128, 128, 128

pytestmark = [pytest.mark.slow, needs_compilers]


def cache(slots, stored, rows):
    if stored in ("bfloat16", "float32"):
        return Latents(struct((LAYERS, rows, slots, RANK + ROPE), stored))
    return Latents(
        struct((LAYERS, rows, slots, RANK), stored),
        struct((LAYERS, rows, scale_rows(RANK), slots), "float32"),
        struct((LAYERS, rows, slots, ROPE)),
    )


def compiled(chip, tokens, slots, stored="bfloat16", rows=1, groups=0):
    """Queries as q_proj gives them and outputs as o_proj takes them: heads side by side."""
    dtype = "float32" if stored == "float32" else "bfloat16"

    def call(query, latents, layer, kernel, query_slots, logit_scale):
        query = query.reshape(rows, tokens, HEADS, NOPE + ROPE)
        out, lse = latent_prefill(query, latents, layer, kernel, query_slots, logit_scale=logit_scale)
        return out.reshape(rows, tokens, HEADS * VALUE), lse

    program = compile_for(
        chip,
        call,
        struct((rows, tokens, HEADS * (NOPE + ROPE)), dtype),
        cache(slots, stored, rows),
        struct((), "int32"),
        struct((HEADS, NOPE + VALUE, RANK), dtype),
        struct((rows, tokens), "int32"),
        struct((LAYERS, rows, groups, slots), "float32") if groups else None,
    )
    assert taken()["latent_prefill"] == ("gpu" if chip == "h100" else "tpu")
    return program


def check(chip, program, slots, rows=1):
    """No copy as large as one layer's latents; besides, only what a version says it needs."""
    assert not moved_arrays(program, rows * slots * RANK)
    temporaries = program.memory_analysis().temp_size_in_bytes
    if chip == "h100":
        # The stretch that is expanded, its latents, and the outputs of a few merged parts.
        assert temporaries <= 2 * EXPANDED
    else:
        assert temporaries <= 16 * 2**20


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize(("tokens", "slots"), [(1024, 32768), (2048, 131072), (2048, 524288)])
def test_sizes(chip, stored, tokens, slots):
    check(chip, compiled(chip, tokens, slots, stored), slots)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "options",
    [
        {"stored": "float8_e4m3fn"},
        {"stored": "float32"},
        {"rows": 4, "groups": 8},
        {"stored": "int8", "rows": 2, "groups": 4, "tokens": 1000, "slots": 32776},
        {"tokens": 5000},
    ],
    ids=str,
)
def test_other_types_and_odd_lengths(chip, options):
    options = {"tokens": 1024, "slots": 32768} | options
    check(chip, compiled(chip, **options), options["slots"], options.get("rows", 1))
