"""FLOPs from formulas against the products that are really in the traced model."""

import math
from dataclasses import replace

import jax
import pytest

from iv3jax.models.batch import fake_batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import preset
from iv3jax.sharding import unbox
from iv3jax.train.config import TrainConfig
from iv3jax.train.flops import flops_per_token
from iv3jax.train.objective import supervised

ROWS, LENGTH, CHUNKS, GRID = 2, 128, 6, (4, 4)


def products(jaxpr) -> float:
    """FLOPs of all dot_generals of a jaxpr, loops multiplied out, of a conditional the largest branch."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (inner, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in inner)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inside = [products(sub) for sub in jaxprs(eqn.params.values())]
        total += times * (max(inside, default=0.0) if eqn.primitive.name == "cond" else sum(inside))
    return total


def jaxprs(values):
    for value in values:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from jaxprs(value)


def counted(name: str):
    """FLOPs a token of the traced forward pass, and of the traced gradients, nothing recomputed."""
    config = preset(name)
    model = InternVideo3(config)
    params = unbox(boxed_params(model))
    batch = fake_batch(config, ROWS, LENGTH, CHUNKS, GRID)
    goal = supervised(model)

    def loss(params):
        return goal.losses(params, batch, jax.random.key(0)).sum()

    tokens = ROWS * LENGTH
    both = jax.make_jaxpr(loss)(params), jax.make_jaxpr(jax.grad(loss))(params)
    return [products(traced.jaxpr) / tokens for traced in both]


@pytest.mark.parametrize("name", ["tiny", "tiny_gqa"])
def test_formulas_are_the_products_of_the_model(name):
    """In XLA every key of the row is computed, so a sample of 2T−1 tokens is what its attention takes."""
    config = TrainConfig(length=LENGTH, chunks=CHUNKS, chunk_patches=16)
    got = flops_per_token(preset(name), config, 2 * LENGTH - 1, steps_of_tower=1)
    forward, gradients = counted(name)
    assert sum(got.forward.values()) == pytest.approx(forward, rel=1e-9)
    # Pixels have no gradient: that of the patch embedding's inputs is not there.
    vision = preset(name).vision_config
    pixels = 2.0 * vision.patch_dim * vision.hidden_size * CHUNKS * 16 / LENGTH
    assert got.training - pixels == pytest.approx(gradients, rel=1e-9)


def test_the_8b_at_64k():
    """Counted by hand: 15 GFLOPs of the layers' products, 29 of attention over 32 K keys on average."""
    config = TrainConfig(
        preset="internvideo3_8b", length=65536, chunks=64, chunk_patches=4096, remat="full", dtype="bfloat16"
    )
    got = flops_per_token(preset("internvideo3_8b"), config, 65536)
    layer = 4096 * (32 * 256 + 896 + 128 + 32 * 128 + 3 * 12288) + 896 * 32 * 256
    assert got.forward["decoder"] == 2 * 36 * layer
    assert got.forward["attention"] == pytest.approx(36 * 2 * 32 * 384 * 32768.5)
    assert got.forward["head"] == 2 * 4096 * 151936
    tower = 1536 * 1152 * 2 + 27 * (2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 1152 * 4096)
    tower += 4 * 2 * 4608 * (4608 + 4096) / 4
    assert got.forward["tower"] == 4 * tower
    assert got.training == pytest.approx(3 * sum(got.forward.values()))
    # Everything forward again, the tower twice, and logits in both kernels of the backward pass.
    again = got.forward["attention"] * 2 + 36 * 2 * 32 * (2 * 256 + 128) * 32768.5 - got.forward["attention"]
    again += got.forward["decoder"] + got.forward["head"] + 2 * got.forward["tower"]
    assert got.executed - got.training == pytest.approx(again)


def test_recomputing_context_and_low_rank_additions_change_what_is_executed():
    shape = preset("internvideo3_8b")
    config = TrainConfig(length=65536, chunks=64, chunk_patches=4096, remat="none")
    plain = flops_per_token(shape, config, 65536)
    again = flops_per_token(shape, replace(config, remat="full"), 65536)
    split = flops_per_token(shape, config, 65536, context=8)
    small = flops_per_token(shape, config, 65536, kernels=False, tower=False)
    forward = plain.forward
    assert again.executed - plain.executed == pytest.approx(
        forward["decoder"] + forward["attention"] + forward["tower"]
    )
    # Seven more devices expand the same latents: 2·r·H·(n+v) a token and layer, forward and twice backward.
    assert split.executed - plain.executed == pytest.approx(7 * 3 * 36 * 2 * 896 * 32 * 256)
    assert plain.training - small.training == pytest.approx(
        forward["decoder"] + forward["head"] + 2 * forward["tower"]
    )
    assert again.training == split.training == plain.training
