"""Latent compression compiled for chips that are not here, at the 8B's sizes: it fits and moves no cache."""

import jax
import numpy as np
import pytest
from chip import CHIPS, compile_for, moved_arrays, needs_compilers, struct

from kernels_pallas import choice
from kernels_pallas.latent_compress.ops import Affine, latent_compress, latent_compress_into
from kernels_pallas.latents import Latents, groups_of

pytestmark = [pytest.mark.slow, needs_compilers]

DIM, RANK, ROPE = 4096, 896, 128
MIB = 2**20

# Rows, new tokens, slots and layers; the 8B has 36 layers, and v5e 16 GB.
WORK = {
    "decode 1": (1, 1, 32768, 36),
    "decode 64": (64, 1, 4096, 8),
    "prefill 1024": (1, 1024, 32768, 36),
    "prefill 2048": (1, 2048, 131072, 16),
    "odd": (3, 100, 5000, 4),
}


def arguments(rows, tokens, affine):
    maps = Affine(struct((2, RANK, RANK)), struct((2, RANK))) if affine else None
    angles = struct((rows, tokens, ROPE // 2), "float32")
    modality = struct((rows, tokens), "int32") if affine else None
    kernel, bias = struct((RANK + ROPE, DIM)), struct((RANK + ROPE,))
    return struct((rows, tokens, DIM)), kernel, bias, angles, angles, maps, modality


def cache(layers, rows, capacity, kind):
    if kind == "bfloat16":
        return Latents(struct((layers, rows, capacity, RANK + ROPE)))
    # Seven groups would be laid out otherwise by XLA on a TPU, and so be copied: there are eight.
    scale = struct((layers, rows, groups_of(RANK) + 1, capacity), "float32")
    values = struct((layers, rows, capacity, RANK), kind)
    return Latents(values, scale, struct((layers, rows, capacity, ROPE)))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("chip", CHIPS)
def test_into_the_cache(chip, work, kind):
    rows, tokens, capacity, layers = WORK[work]

    def into(latents, layer, offsets, counts, *arguments):
        *most, affine, modality = arguments
        return latent_compress_into(
            latents, layer, offsets, counts, *most, affine=affine, modality=modality, implementation=kernel
        )

    kernel = "gpu" if chip == "h100" else "tpu"
    latents = cache(layers, rows, capacity, kind)
    nbytes = sum(np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize for x in latents if x is not None)
    numbers = struct((rows,), "int32")
    affine = kind == "int8"
    shapes = latents, struct((), "int32"), numbers, numbers, *arguments(rows, tokens, affine)
    compiled = compile_for(chip, into, *shapes, donate=(0,))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < (16 if affine and chip == "h100" else 4) * MIB
    smallest = min(np.prod(x.shape, dtype=np.int64) for x in latents if x is not None)
    assert not moved_arrays(compiled, smallest // layers)


@pytest.mark.parametrize("chip", CHIPS)
def test_in_a_loop_over_layers(chip):
    """As in a model: the cache is a loop's state, and is not copied around it either."""

    def layers(latents, offsets, counts, *arguments):
        def step(latents, layer):
            return latent_compress_into(latents, layer, offsets, counts, *arguments[:5])[0], None

        return jax.lax.scan(step, latents, np.arange(36, dtype=np.int32))[0]

    latents, numbers = cache(36, 1, 32768, "int8"), struct((1,), "int32")
    compiled = compile_for(chip, layers, latents, numbers, numbers, *arguments(1, 1, False), donate=(0,))
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * MIB
    assert not moved_arrays(compiled, 32768 * ROPE)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("chip", CHIPS)
def test_training(chip, affine):
    """64 K tokens, forward and backward: little more than what the gradients of an affine map need."""
    tokens = 65536

    def forward(x, kernel, bias, cos, sin, affine, modality):
        return latent_compress(x, kernel, bias, cos, sin, affine=affine, modality=modality)

    def step(dout, *arguments):
        out, back = jax.vjp(forward, *arguments)
        return out, back(dout)[:3]

    shapes = arguments(1, tokens, affine)
    name = "gpu" if chip == "h100" else "tpu"
    choice.forget()
    compiled = compile_for(chip, forward, *shapes)
    assert choice.taken() == {"latent_compress": name}
    latents = tokens * (RANK + ROPE) * 2
    assert compiled.memory_analysis().temp_size_in_bytes < (3 if affine and chip == "h100" else 1) * latents
    compiled = compile_for(chip, step, struct((1, tokens, RANK + ROPE)), *shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < (8 if affine else 3) * latents


def test_the_gpu_refuses_what_it_cannot_count():
    """Pallas' Triton counts places in int32 up to 4 GiB, which one-byte numbers overflow from 2 GiB."""
    latents = cache(36, 1, 131072, "int8")
    numbers = struct((1,), "int32")

    def into(latents, layer, offsets, counts, *arguments):
        return latent_compress_into(latents, layer, offsets, counts, *arguments[:5])

    choice.forget()
    compile_for("h100", into, latents, struct((), "int32"), numbers, numbers, *arguments(1, 1, False))
    assert choice.taken()["latent_compress_into"].startswith("xla (gpu: latents.values has 4227858432 bytes")
