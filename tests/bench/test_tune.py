"""The tuner: it finds the fastest sizes, steps over what does not compile, and says where it cannot run."""

import math

import jax
import jax.numpy as jnp
import pytest

from iv3jax.bench import tune
from iv3jax.chips import CHIPS
from iv3jax.errors import UserError
from kernels_pallas import blocks
from kernels_pallas.choice import target

OPERATIONS = {f"latent_{name}" for name in ("compress", "compress_into", "decode", "prefill", "attention")}


def test_it_walks_downhill():
    def seconds(sizes):
        if sizes["key"] > 512:
            return math.inf
        return 1 + abs(math.log2(sizes["query"] / 1024)) + abs(math.log2(sizes["key"] / 256)) / 2

    best, before, after, tried = tune.descend({"query": 128, "key": 512}, seconds)
    assert best == {"query": 1024, "key": 256} and before == 4.5 and after == 1 and tried == 8


def test_noise_is_no_gain():
    best, *_ = tune.descend({"query": 128}, lambda sizes: 1 - 1e-3 * math.log2(sizes["query"]))
    assert best == {"query": 128}


def test_it_measures_what_was_overridden():
    seen = []

    def call():
        size = blocks.pick("op", "rank7", {"query": 4})["query"]
        seen.append(size)
        if size > 8:
            raise RuntimeError("does not fit")
        return jnp.zeros(())

    (row,) = tune.tune(call)
    assert (row.op, row.key) == ("op", "rank7") and {4, 8} <= set(seen) and row.tried >= 2
    assert set(row.blocks) == {"query"} and row.after <= row.before
    assert "'rank7'): {'query':" in tune.format_table({"rows": [vars(row)]})


@pytest.mark.slow
def test_every_operation_is_traced_with_sizes_of_the_table():
    """On each chip; nothing is compiled or run."""
    for name, made_for in CHIPS.items():
        with target(made_for):
            blocks.asked.clear()
            for call in tune.operations(256, 512):
                jax.eval_shape(call)
            asked = {op.removesuffix("_tpu").removesuffix("_gpu") for op in blocks.asked}
            assert asked == OPERATIONS
            known = blocks.TABLE[name]
            assert known and all(sizes for sizes in known.values())
            for row in [(op, key) for op, (key, _) in blocks.asked.items() if (op, key) in known]:
                assert blocks.asked[row[0]][1] == known[row]


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match="measured on a TPU or GPU, and this machine has neither"):
        tune.bench_tune()
