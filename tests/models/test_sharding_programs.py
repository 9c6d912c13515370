"""What the compiler makes of a training step on eight devices, from its text: weights are gathered, a layer's
when it is needed, activations stay where they are, and no device does another's part of the tower.
"""

import re
from collections import Counter
from functools import cache

import pytest
from models.peers import even_config
from models.steps import LENGTH, fake_mesh, kernels, sent, step_of, text_of

pytestmark = pytest.mark.medium

LAYERS = 3


@cache
def program(accumulate: int, **sizes):
    """The step and its text on a mesh, each compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        step = step_of(patch, even_config(), fake_mesh(**sizes), accumulate=accumulate)
        return step, text_of(step)


def compiled(accumulate: int = 1, **sizes):
    return program(accumulate, **sizes)


def test_a_layers_weights_are_gathered_for_it_and_again_for_its_backward_pass():
    step, text = compiled(fsdp=8)
    gathers = Counter()
    for one in sent(text):
        if one.kind == "all-gather" and "/language_model/while" in one.name:
            assert len(one.shapes) == 1 and one.group == 8
            # XLA may gather a layer's slice of a stack before or after it drops the stack's axis.
            shape = one.shapes[0]
            gathers[shape[1:] if shape[0] == 1 else shape] += one.times
    # kv_b_proj has an odd rank, which nothing divides: every device has it whole.
    shapes = [s for path, s in kernels(step, "language_model").items() if "kv_b_proj" not in path]
    assert gathers == {s: 2 * LAYERS * n for s, n in Counter(shapes).items()}


@pytest.mark.parametrize(
    "sizes",
    [dict(fsdp=8), pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow), dict(fsdp=4, context=2)],
)
def test_activations_are_not_summed_up_or_gathered(sizes):
    """Of what has tokens, only ids, segments and latents are gathered. Embeddings change places."""
    _, text = compiled(**sizes)
    tokens = (LENGTH, LENGTH // sizes.get("context", 1))
    for one in sent(text):
        moved = [shape for shape in one.shapes if set(shape) & set(tokens)]
        if moved and one.kind != "all-to-all":
            assert one.kind in ("all-gather", "reduce-scatter"), one
            latent = all(shape[-1] == 21 for shape in moved)
            assert latent or (one.kind == "all-gather" and all(s[-1] in (1, *tokens) for s in moved)), one
            assert not latent or sizes.get("context")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)])
def test_the_tower_is_not_replicated_work(sizes):
    """8 rows of 4 chunks of 16 patches, or as many as the mesh has rows: an eighth of them on each device."""
    step, text = compiled(**sizes)
    patches = step.arguments[2].patches.shape
    here = patches[0] * patches[1] * patches[2] // 8
    hidden = 24
    found = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(.*blocks/linear_fc1", text)
    rows = {dims for dims in (tuple(map(int, d.split(","))) for d in found) if dims[-1] == hidden}
    assert (here, hidden) in rows
    assert max(dims[0] for dims in rows) == here


def test_the_tower_and_the_head_are_gathered_once():
    """Whatever loops there are inside: the tower's steps and blocks, the head's pieces of the logits."""
    _, text = compiled(fsdp=8)
    others = [one for one in sent(text) if "/language_model/while" not in one.name]
    assert {one.times for one in others} == {1}
    gathered = Counter(s for one in others if one.kind == "all-gather" for s in one.shapes)
    assert gathered[(96, 24)] == 1
    assert gathered[(3, 3, 4, 4, 16)] == gathered[(3, 24, 16)] == 1


@pytest.mark.slow
def test_accumulating_gathers_no_more_than_as_many_steps_would():
    _, once = compiled(1, fsdp=8)
    _, thrice = compiled(3, fsdp=8)

    def gathers(text):
        found = Counter()
        for one in sent(text):
            if one.kind in ("all-gather", "all-to-all"):
                for shape in one.shapes:
                    found[shape] += one.times
        return found

    one, three = gathers(once), gathers(thrice)
    assert three.keys() == one.keys()
    assert all(three[shape] <= 3 * one[shape] for shape in one)


def test_steps_on_every_mesh_take_the_bytes_that_their_shapes_say():
    step, _ = compiled(fsdp=4, context=2)
    kernel = step.arguments[0].params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32, 3)
    assert step.arguments[2].order.shape == (4, LENGTH)
