"""Which implementation runs, and what is said of it."""

import jax.numpy as jnp
import pytest

from kernels_pallas import blocks, choice
from kernels_pallas.choice import Chip, Version
from kernels_pallas.latent_compress.ops import latent_compress


def versions(tpu=None, gpu=None):
    return {
        "xla": Version(lambda x: ("xla", x)),
        "tpu": Version(lambda x, interpret: ("tpu", x, interpret), tpu),
        "gpu": Version(lambda x, interpret: ("gpu", x, interpret), gpu),
    }


@pytest.fixture(autouse=True)
def log():
    choice.forget()


def test_on_a_cpu():
    assert choice.chip().platform == "cpu"
    assert choice.run("op", None, versions(), 1) == ("xla", 1)
    assert choice.taken() == {"op": "xla"}
    assert choice.run("op", "tpu", versions(), 1) == ("tpu", 1, True)
    assert choice.taken() == {"op": "tpu, interpreted"}
    assert choice.run("op", "gpu", versions(), 1) == ("gpu", 1, True)


def test_on_a_chip():
    with choice.target(Chip("tpu", "v5p")):
        assert choice.run("op", None, versions(), 1) == ("tpu", 1, False)
        assert choice.run("op", "xla", versions(), 1) == ("xla", 1)
        assert choice.run("op", None, versions(tpu="rank is 3; accepted are multiples of 128"), 1)[0] == "xla"
        assert choice.taken() == {"op": "xla (tpu: rank is 3; accepted are multiples of 128)"}
        with pytest.raises(ValueError, match=r"op: implementation 'gpu' does not run on this tpu \(v5p\)"):
            choice.run("op", "gpu", versions(), 1)
    assert choice.chip().platform == "cpu"


def test_refusals():
    with pytest.raises(ValueError, match="implementation is 'cuda'; accepted are None, 'xla', 'tpu', 'gpu'"):
        choice.run("op", "cuda", versions(), 1)
    with pytest.raises(ValueError, match="op: implementation 'tpu': rank is 3"):
        choice.run("op", "tpu", versions(tpu="rank is 3"), 1)


def test_float16_is_for_xla():
    x = jnp.zeros((1, 2, 8), jnp.float16)
    angles = jnp.ones((1, 2, 2))
    given = (x, jnp.zeros((12, 8), jnp.float16), None, angles, angles)
    assert latent_compress(*given).dtype == jnp.float16
    for name in ("tpu", "gpu"):
        with pytest.raises(ValueError, match="x is float16; kernels take float32 and bfloat16"):
            latent_compress(*given, implementation=name)


def test_block_sizes(monkeypatch):
    monkeypatch.setitem(blocks.TABLE["v5p"], ("op", "heads32"), {"query": 8})
    heuristic = {"query": 1, "key": 2}
    assert blocks.pick("op", "heads32", heuristic) == heuristic
    with choice.target(Chip("tpu", "v5p")):
        assert blocks.pick("op", "heads32", heuristic) == {"query": 8, "key": 2}
        assert blocks.pick("op", "heads1", heuristic) == heuristic
        with blocks.override("op", key=5), blocks.override("other", key=7):
            assert blocks.pick("op", "heads32", heuristic) == {"query": 8, "key": 5}
    with blocks.override("op", keys=5), pytest.raises(ValueError, match="unknown block size 'keys'"):
        blocks.pick("op", "heads32", heuristic)
