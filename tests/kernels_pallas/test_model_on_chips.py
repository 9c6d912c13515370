"""The whole model on the kernels, compiled for chips that are not here: shapes only, nothing is run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from chip import compile_for, moved_arrays, needs_compilers
from jax.sharding import PartitionSpec

from iv3jax import ops
from iv3jax.bench.kernels import HEADS, NOPE, RANK, ROPE, VALUE, exchange
from iv3jax.chips import compile_on, devices
from iv3jax.models.batch import Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh, unbox
from iv3jax.train.objective import supervised

pytestmark = [pytest.mark.slow, needs_compilers]


def text_model(layers: int, run: Execution, **converted):
    """The 8B's decoder alone, with so many layers and what conversion may add, and its parameters' shapes."""
    config = preset("internvideo3_8b")
    text = dataclasses.replace(config.text_config, num_hidden_layers=layers, **converted)
    model = InternVideo3(dataclasses.replace(config, text_config=text, vision_config=None), run)
    return model, unbox(boxed_params(model))


def tokens(rows: int, length: int, labels: bool) -> Batch:
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Batch(ids, jax.ShapeDtypeStruct((3, rows, length), jnp.int32), ids, ids if labels else None)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("chip", ["v5p", "h100"])
@pytest.mark.parametrize("length", [1, 1024])
def test_a_step_over_the_cache_copies_none_of_it(chip, cache_dtype, length):
    """128 K tokens of context, one new token and a chunk of a prompt, layers as `iv3 ask` runs them: 36
    scanned ones on a TPU; on a GPU, where a scan copies each layer's weights, such that stand alone.
    """
    scanned = chip == "v5p"
    layers = 36 if scanned else 4
    run = Execution(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, scan_layers=scanned)
    model, params = text_model(layers, run)
    text = model.config.text_config
    cache = jax.eval_shape(lambda: init_cache(text, 1, 128 << 10, cache_dtype, scanned))

    def step(params, batch, cache):
        return model.apply({"params": params}, batch, None, cache)

    program = compile_for(chip, step, params, tokens(1, length, False), cache, donate=(2,))
    # A layer of the cache is 2²⁷ numbers; activations of a chunk are 2²², o_proj, laid out anew for it, 2²⁴.
    assert moved_arrays(program, 1 << 22 if length == 1 else 1 << 25) == []
    # Below half of what one layer of the cache takes, and the activations of a chunk.
    layer = cache.nbytes // layers
    assert program.memory_analysis().temp_size_in_bytes < layer // 2 + length * (1 << 20)


@pytest.mark.parametrize("chip", ["v5p", "h100"])
@pytest.mark.parametrize("length", [1, 1024])
def test_what_conversion_adds_copies_nothing_either(chip, length):
    """The same with a factor a token and key head in the cache, written beside the latents, with adapters,
    and with frequencies that each layer has chosen.
    """
    scanned = chip == "v5p"
    layers = 36 if scanned else 4
    run = Execution(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, scan_layers=scanned)
    chosen = tuple(tuple((5 * i + j) % 64 for j in range(64)) for i in range(layers))
    added = dict(use_qk_norm=True, latent_adapters=True, rope_frequency_list=chosen)
    model, params = text_model(layers, run, **added)
    cache = jax.eval_shape(lambda: init_cache(model.config.text_config, 1, 128 << 10, jnp.bfloat16, scanned))

    def step(params, batch, cache):
        return model.apply({"params": params}, batch, None, cache)

    program = compile_for(chip, step, params, tokens(1, length, False), cache, donate=(2,))
    # A layer's factors are 2²⁰ numbers, all layers' of a TPU 36 times that.
    assert moved_arrays(program, 1 << 22 if length == 1 else 1 << 25) == []


@pytest.mark.parametrize("chip", ["v5p", "h100"])
def test_training_two_layers_at_64k(chip):
    """Forward and backward of 65 536 packed tokens on one chip, everything recomputed."""
    model, params = text_model(2, Execution(dtype=jnp.bfloat16, remat="full"))

    objective = supervised(model)

    def mean(params, batch):
        weights = objective.weights(batch)
        return jnp.sum(objective.losses(params, batch, None) * weights) / jnp.sum(weights)

    def loss(params, batch):
        return jax.value_and_grad(mean)(params, batch)

    program = compile_for(chip, loss, params, tokens(1, 64 << 10, True))
    assert ops.taken()["latent_attention"] == ("tpu" if chip == "v5p" else "gpu")
    assert program.memory_analysis().temp_size_in_bytes < 40 << 30


@pytest.mark.parametrize("chip", ["v5p", "h100"])
def test_256k_over_four_chips(chip):
    """Attention of 262 144 tokens, forward and backward: latents travel, and nothing else of that size."""
    row = exchange(chip, 256 << 10, 4)
    assert row.forward <= row.limit < row.expanded / 7
    topology = {"v5p": "2x2x1", "h100": "1x1x4"}[chip]
    mesh = make_mesh(devices(chip, topology), context=4, fsdp=1)

    def loss(query, latent, kernel, segments, order):
        mask = ops.AttentionMask(segments, segments, order, order)
        return jnp.sum(ops.latent_attention(query, latent, kernel, mask).astype(jnp.float32))

    count = 256 << 10
    shapes = (
        jax.ShapeDtypeStruct((1, count, HEADS, NOPE + ROPE), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, count, RANK + ROPE), jnp.bfloat16),
        jax.ShapeDtypeStruct((HEADS, NOPE + VALUE, RANK), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, count), jnp.int32),
        jax.ShapeDtypeStruct((1, count), jnp.int32),
    )
    split = PartitionSpec(None, "context")
    specs = (split, split, PartitionSpec(), split, split)
    program = compile_on(chip, mesh, jax.grad(loss, (0, 1, 2)), specs, *shapes)
    assert program.memory_analysis().temp_size_in_bytes < 16 << 30
