"""What pods run, compiled for chips that are not here: two layers of the 8B's width and of its tower.

What the tests of eight fake devices say of a CPU's programs holds for these.
"""

import dataclasses
from collections import Counter

import pytest
from models.steps import kernels, needs_compilers, sent, step_of

from iv3jax.chips import devices
from iv3jax.models import layers
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh
from iv3jax.train import loss

pytestmark = [pytest.mark.slow, needs_compilers]

LENGTH = 8192 + 512
"""Tokens of a row, of which no weight has as many."""


def small_8b():
    shape = preset("internvideo3_8b")
    text = dataclasses.replace(shape.text_config, num_hidden_layers=2)
    tower = dataclasses.replace(shape.vision_config, depth=2, deepstack_visual_indexes=(0, 1))
    return dataclasses.replace(shape, text_config=text, vision_config=tower)


@pytest.mark.parametrize(
    ("chip", "topology", "sizes"),
    [
        ("v5p", "2x2x1", dict(fsdp=4)),
        ("v5e", "2x4", dict(fsdp=4, context=2)),
        ("h100", "1x1x4", dict(fsdp=4)),
    ],
)
def test_a_step_gathers_weights_and_scatters_gradients(monkeypatch, chip, topology, sizes):
    mesh = make_mesh(devices(chip, topology), **sizes)
    config = dict(length=LENGTH, chunks=8, chunk_patches=4096, dtype="bfloat16", preset="internvideo3_8b")
    step = step_of(monkeypatch, small_8b(), mesh, **config)
    program = step.compiled(chip)
    found = sent(program.as_text())
    gathered = Counter()
    for one in found:
        for shape in one.shapes:
            if one.kind == "all-gather" and "/language_model/while" in one.name:
                gathered[tuple(n for n in shape if n > 1)] += one.times
    for shape in kernels(step, "mlp").values():
        # Once forward and once backward in each of two layers; gate and up have the same shape.
        assert gathered[shape] >= 4, (shape, gathered)
    # Gradients of the layers' kernels are summed up where they lie.
    summed = [one for one in found if one.kind in ("reduce-scatter", "all-reduce") and one.bytes > 1 << 24]
    assert summed and all(one.kind == "reduce-scatter" for one in summed if "/mlp/" in one.name)
    # Hidden states only change places; ids, whose last axis is that of tokens, may be gathered.
    tokens = {LENGTH, LENGTH // sizes.get("context", 1)}
    wide = [one for one in found if any(tokens & set(s[:-1]) and s[-1] >= 4096 for s in one.shapes)]
    assert {one.kind for one in wide} <= {"all-to-all"}, wide
    # The tower's weights once for all of its steps; where a row is split, DeepStack's two levels one by one.
    times = {one.times for one in found if "visual" in one.name and one.kind == "all-gather"}
    assert times == ({1, 2} if "context" in sizes else {1})


def test_a_step_that_makes_gradients_in_order_takes_less_memory(monkeypatch):
    mesh = make_mesh(devices("v5p", "2x2x1"), fsdp=4)
    config = dict(length=LENGTH, chunks=0, dtype="bfloat16", preset="internvideo3_8b")

    def peak():
        step = step_of(monkeypatch, small_8b(), mesh, **config)
        return step.compiled("v5p").memory_analysis().peak_memory_in_bytes

    ordered = peak()
    for module in (layers, loss):
        monkeypatch.setattr(module, "gradients_first", lambda weights, axes, x: (list(weights), x))
    hidden_units = LENGTH * preset("internvideo3_8b").text_config.intermediate_size * 2
    assert ordered + hidden_units < peak()
