"""One device against eight: the same logits and gradients, with parameters and activations really split.

Sums run in another order on a mesh: tolerance 1e-4 on values of order 1 to 10; 3e-6 is seen.
"""

import re
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from models.peers import (
    ATTENTIONS,
    CONVERTED,
    conversation,
    difference,
    even_config,
    random_model,
    tiny_config,
    tree_difference,
)

from iv3jax import sharding
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.models.batch import dealt
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import constrain, make_mesh, param_shardings, partition_spec, zigzag
from iv3jax.train.loss import cross_entropy, reduced, token_weights

TOLERANCE = 1e-4

MESHES = {
    "fsdp 4, tensor 2": dict(fsdp=4, tensor=2),
    "fsdp 2, tensor 4": dict(fsdp=2, tensor=4),
    "context 2, fsdp 2, tensor 2": dict(context=2, fsdp=2, tensor=2),
}


def batch_of(config, rows: int):
    """Rows with a video, an image or neither, two samples in the first."""
    samples = [
        conversation(config, [2, ("video", 2, 4, 4), 3], 1),
        conversation(config, [5, ("image", 1, 4, 4), 2], 2),
        conversation(config, [13], 3),
        conversation(config, [1, ("video", 3, 4, 4), 1], 4),
    ]
    packs = [[samples[0], samples[2]], [samples[1]], [samples[3]], [samples[2]]]
    return collate(packs[:rows], config, length=48, chunks=3, chunk_patches=16)


def computed(model, params, batch):
    """Loss, logits and gradients."""

    def loss(params):
        hidden = model.apply({"params": params}, batch).hidden
        losses = cross_entropy(model, params, hidden, batch.labels)
        weights = token_weights(batch.labels, batch.segment_ids, "square")
        logits = model.apply({"params": params}, hidden, method="logits")
        return reduced(losses, weights), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def config_of(attention: str):
    """An even config, "converted" being M²LA with all that a converted model may have."""
    return even_config("m2la", **CONVERTED["all"]) if attention == "converted" else even_config(attention)


@cache
def one_device(attention: str, rows: int):
    """The model, its weights, a batch and what one device computes."""
    model, params = random_model(config_of(attention))
    batch = batch_of(model.config, rows)
    return model, params, batch, computed(model, params, batch)(params)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "mesh", "rows"),
    [
        pytest.param("m2la", "fsdp 4, tensor 2", 4, marks=pytest.mark.slow),
        pytest.param("m2la", "fsdp 2, tensor 4", 3, marks=pytest.mark.slow),
        ("m2la", "context 2, fsdp 2, tensor 2", 4),
        pytest.param("gqa", "fsdp 4, tensor 2", 3, marks=pytest.mark.slow),
        pytest.param("gqa", "context 2, fsdp 2, tensor 2", 4, marks=pytest.mark.slow),
        pytest.param("converted", "context 2, fsdp 2, tensor 2", 4, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does(attention, mesh, rows):
    """Three rows divide by none of the meshes: activations are laid out otherwise, with the same values."""
    model, params, batch, ((loss, logits), gradients) = one_device(attention, rows)
    devices = make_mesh(**MESHES[mesh])
    shardings = param_shardings(boxed_params(model), devices)
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(devices):
        (got_loss, got_logits), got = computed(model, placed, batch)(placed)
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == 8
    assert difference(got_loss, loss) <= 1e-5
    assert difference(got_logits, logits) <= TOLERANCE
    assert tree_difference(got, gradients) <= TOLERANCE


@pytest.mark.medium
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(dict(context=4, tensor=2), marks=pytest.mark.slow), dict(context=2, fsdp=2, tensor=2)],
)
def test_tokens_dealt_in_zigzag_give_the_same_loss_and_gradients(sizes):
    """M²LA with the sequence split over the context axis, packs of several samples, latents exchanged."""
    model, params, batch, ((loss, _), gradients) = one_device("m2la", 4)
    mesh = make_mesh(**sizes)
    placed = jax.device_put(params, param_shardings(boxed_params(model), mesh))
    mixed = dealt(batch, zigzag(48, sizes["context"]))
    assert sorted(mixed.order[0]) == list(range(48)) and list(mixed.order[0]) != list(range(48))
    with jax.set_mesh(mesh):
        run = computed(model, placed, mixed)
        (got_loss, _), got = run(placed)
        text = run.lower(placed).compile().as_text()
    assert difference(got_loss, loss) <= 1e-5
    assert tree_difference(got, gradients) <= TOLERANCE
    # Rows of 48 gathered tokens: 21 numbers of a latent, never 16 of each head's key and value.
    gathered = re.findall(r"f32\[(\d+(?:,\d+)*)\]\S* all-gather\(", text)
    shapes = {tuple(int(n) for n in dims.split(",")) for dims in gathered}
    assert any(shape[-2:] == (48, 21) for shape in shapes)
    assert not any(shape[-3:] in ((48, 4, 16), (48, 2, 16)) for shape in shapes)


@pytest.mark.medium
def test_dealt_tokens_on_one_device():
    model, params, batch, ((loss, logits), _) = one_device("m2la", 4)
    order = np.random.default_rng(0).permutation(48)
    (got, moved), _ = computed(model, params, dealt(batch, order))(params)
    assert difference(got, loss) <= 1e-5
    assert difference(moved, logits[:, order]) <= TOLERANCE


def test_zigzag_gives_every_device_the_same_work():
    order = zigzag(24, 3)
    assert order.tolist()[:8] == [0, 1, 2, 3, 20, 21, 22, 23] and sorted(order) == list(range(24))
    assert len({int(np.sum(part + 1)) for part in order.reshape(3, -1)}) == 1
    with pytest.raises(UserError, match="make the length a multiple of 6"):
        zigzag(20, 3)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "cache_dtype"), [("m2la", "float32"), ("m2la", "int8"), ("converted", "float32")]
)
def test_decoding_over_a_split_cache(attention, cache_dtype):
    """Slots over a context axis: the tokens of one device, prompts longer and shorter than a part."""
    model, params = random_model(config_of(attention))
    samples = [conversation(model.config, [n], n) for n in (3, 90)]
    batch = collate([[s] for s in samples], model.config, length=96)
    once = partial(generate, max_new_tokens=9, stop_ids=[], capacity=110, cache_dtype=cache_dtype)
    expected = once(model, params, batch)
    mesh = make_mesh(context=4, tensor=2)
    placed = jax.device_put(params, param_shardings(boxed_params(model), mesh))
    with jax.set_mesh(mesh):
        got = once(model, placed, batch)
        cache = init_cache(model.config.text_config, 2, 110, cache_dtype)
    assert got.tokens == expected.tokens
    assert cache.capacity == 112
    assert {x.data.shape[2] for x in cache.entries["latent"].addressable_shards} == {28}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "mesh"),
    [("m2la", "fsdp 4, tensor 2"), ("gqa", "fsdp 2, tensor 4"), ("gqa", "context 2, fsdp 2, tensor 2")],
)
def test_every_weight_is_split_as_the_rules_say(attention, mesh):
    """Each device has 1/(fsdp·context) of a width, 1/tensor of heads, units and vocabulary: real shards."""
    sizes = dict(data=1, fsdp=1, context=1, tensor=1) | MESHES[mesh]
    model, params = random_model(even_config(attention))
    placed = jax.device_put(params, param_shardings(boxed_params(model), make_mesh(**MESHES[mesh])))
    # Weights are split over the context axis as well, where it divides them.
    f, t = sizes["fsdp"] * sizes["context"], sizes["tensor"]
    layers, tower = placed["language_model"]["layers"], placed["visual"]["tower"]
    shapes = {
        "embed": (placed["embed_tokens"]["embedding"], (96 // t, 24 // f)),
        "head": (placed["lm_head"]["kernel"], (96 // t, 24 // f)),
        "up": (layers["mlp"]["up_proj"]["kernel"], (3, 32 // t, 24 // f)),
        "down": (layers["mlp"]["down_proj"]["kernel"], (3, 24 // f, 32 // t)),
        "norm": (placed["language_model"]["norm"]["scale"], (24,)),
        "qkv": (tower["blocks"]["qkv"]["kernel"], (3, 3, 4 // t, 4, 16 // f)),
        "proj": (tower["blocks"]["proj"]["kernel"], (3, 16 // f, 4 // t, 4)),
        "merger": (tower["deepstack_merger_list"]["linear_fc1"]["kernel"], (2, 64 // t, 64 // f)),
    }
    attention_weights = layers["self_attn"]
    if attention == "m2la":
        shapes["q"] = (attention_weights["q_proj"]["kernel"], (3, 4 // t, 14, 24 // f))
        shapes["kv_a"] = (attention_weights["kv_a_proj_with_mqa"]["kernel"], (3, 21, 24 // f))
        shapes["kv_b"] = (attention_weights["kv_b_proj"]["kernel"], (3, 4 // t, 16, 13))
    else:
        shapes["q"] = (attention_weights["q_proj"]["kernel"], (3, 8 // t, 8, 24 // f))
        shapes["k"] = (attention_weights["k_proj"]["kernel"], (3, 4 // t, 8, 24 // f))
    for name, (array, shape) in shapes.items():
        assert {s.data.shape for s in array.addressable_shards} == {shape}, name
        assert len({s.device for s in array.addressable_shards}) == 8


def test_constrain_splits_activations_and_leaves_out_what_does_not_divide():
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    with jax.set_mesh(mesh):
        place = jax.jit(lambda x: constrain(x, "batch", "sequence", "act_heads"))
        even, odd = place(jnp.zeros((4, 6, 8))), place(jnp.zeros((3, 6, 7)))
    assert even.addressable_shards[0].data.shape == (2, 3, 4)
    assert odd.addressable_shards[0].data.shape == (3, 3, 7)
    assert even.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp", "context", "tensor")), 3)
    alone = jnp.zeros((4, 6, 8))
    assert constrain(alone, "batch", "sequence", "act_heads") is alone
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"2 axis names for an array of shape \(4, 6, 8\)"),
    ):
        constrain(alone, "batch", "sequence")


def test_colliding_rules_raise(monkeypatch):
    with pytest.raises(ValueError, match=r"axes \('heads', 'mlp'\) use mesh axis 'tensor' twice"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="use mesh axis 'fsdp' twice"):
        partition_spec(("batch", None, "embed"))
    with pytest.raises(ValueError, match="logical axis 'colour' has no rule"):
        partition_spec(("embed", "colour"))
    # A rule that makes two axes of a weight collide is met when that weight is placed.
    monkeypatch.setitem(sharding.RULES, "mlp", ("fsdp",))
    with pytest.raises(ValueError, match="use mesh axis 'fsdp' twice"):
        param_shardings(boxed_params(InternVideo3(even_config())), make_mesh(fsdp=8))


def test_specs():
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("fsdp", "context"), ("tensor",), None
    )
    assert partition_spec(("batch", None, "sequence")) == PartitionSpec(("data", "fsdp"), None, ("context",))
    assert partition_spec(("batch", "embed"), ("data", "tensor")) == PartitionSpec(("data",), None)


def test_every_logical_axis_of_a_weight_has_a_rule_and_is_used():
    names = set()
    for attention in (*ATTENTIONS, "converted"):
        boxes = jax.tree.leaves(
            boxed_params(InternVideo3(config_of(attention))), is_leaf=lambda x: hasattr(x, "names")
        )
        assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
        names |= {name for box in boxes for name in box.names}
    weights = list(sharding.RULES)[: list(sharding.RULES).index("batch")]
    assert names - {None} == set(weights)


def test_a_mesh_that_does_not_divide_names_every_weight():
    """20 wide over 8, 3 heads and 97 tokens over nothing: all that does not fit in one line."""
    model = InternVideo3(tiny_config("m2la"))
    with pytest.raises(UserError) as caught:
        param_shardings(boxed_params(model), make_mesh(fsdp=4, tensor=2))
    text = str(caught.value)
    assert (
        text.startswith("mesh {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 2} does not divide ")
        and "\n" not in text
    )
    named = {part.split(" (")[0] for part in text.split("does not divide ")[1].split("; ")}
    attention = "language_model/layers/self_attn"
    assert named == {
        "embed_tokens/embedding",
        "lm_head/kernel",
        f"{attention}/q_proj/kernel",
        f"{attention}/q_proj/bias",
        f"{attention}/kv_b_proj/kernel",
        f"{attention}/o_proj/kernel",
    }
    assert "lm_head/kernel (vocab 97 over tensor 2)" in text


def test_make_mesh():
    assert dict(make_mesh().shape) == dict(data=1, fsdp=8, context=1, tensor=1)
    assert dict(make_mesh(tensor=2, context=2).shape) == dict(data=1, fsdp=2, context=2, tensor=2)
    assert dict(make_mesh(jax.devices()[:3]).shape) == dict(data=1, fsdp=3, context=1, tensor=1)
    assert make_mesh(fsdp=4, tensor=2).axis_names == ("data", "fsdp", "context", "tensor")
    devices = np.asarray(make_mesh(fsdp=4, tensor=2).devices)
    assert len(set(devices.flat)) == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(expert=2), "mesh axis 'expert' is unknown; there are data, fsdp, context, tensor"),
        (dict(tensor=3), "needs 3 devices, but there are 8"),
        (dict(fsdp=4, tensor=4), "needs 16 devices, but there are 8"),
        (dict(fsdp=2, tensor=2), "needs 4 devices, but there are 8"),
        (dict(tensor=16), "needs 16 devices, but there are 8"),
        (dict(tensor=0), "mesh axis 'tensor' has size 0; it must be 1 or more"),
        (dict(tensor=-2), "mesh axis 'tensor' has size -2"),
        (dict(tensor=2, fsdp=-4), "mesh axis 'fsdp' has size -4"),
    ],
)
def test_make_mesh_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_an_axis_that_a_weight_can_do_without_is_left_out():
    """Where context does not divide a width, or neither axis a rank, the weight is split by what does."""
    boxed = boxed_params(InternVideo3(even_config()))
    layers = param_shardings(boxed, make_mesh(fsdp=2, context=4))["language_model"]["layers"]
    spec = {name: layers["self_attn"][name]["kernel"].spec for name in ("q_proj", "kv_b_proj")}
    # 24 over 2·4, and a rank of 13.
    assert spec["q_proj"] == PartitionSpec(None, ("tensor",), None, ("fsdp", "context"))
    assert spec["kv_b_proj"] == PartitionSpec(None, ("tensor",), None, None)
    odd = param_shardings(boxed, make_mesh(fsdp=1, context=8))["visual"]["tower"]["patch_embed"]["kernel"]
    assert odd.spec == PartitionSpec(("fsdp", "context"), None)


def test_slices_are_joined_by_the_data_axis(monkeypatch):
    """Two slices of four: what is not data stays inside of one."""

    class Chip:
        def __init__(self, number):
            self.id = number
            self.slice_index, self.process_index, self.platform = number // 4, number // 4, "cpu"
            self.device_kind = "a chip"

    chips = [Chip(n) for n in range(8)]
    with pytest.raises(UserError, match="mesh axis 'data' has size 1; over 2 slices it must be a multiple"):
        make_mesh(chips, fsdp=8)
    mesh = make_mesh(chips, data=2, context=2)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, context=2, tensor=1)
    assert set(slices[0].flat) == {0} and set(slices[1].flat) == {1}
