"""What is frozen stays, has no moments and costs no gradient; what is trained follows the same gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from models.low_rank import base_params, joined, low_rank_model, random_additions
from models.peers import conversation, even_config, tiny_config

from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.layers import Execution
from iv3jax.models.lora import LEAVES
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.loss import cross_entropy, reduced, token_weights
from iv3jax.train.optimizer import OptimizerConfig, make_optimizer
from iv3jax.train.trainable import join, split, trainable

ADAMW = OptimizerConfig(kind="adamw", learning_rate=0.01, weight_decay=0.1, warmup=0.0)


def names(model: InternVideo3, *frozen: str) -> set[str]:
    """The parameters that are trained, as text."""
    return {"/".join(path) for path in trainable(model, frozen)}


def everything(model: InternVideo3) -> set[str]:
    return {"/".join(path) for path in flatten_dict(boxed_params(model))}


def batch_of(config: Any):
    rows = [[conversation(config, [3, ("image", 1, 4, 4), 6 + i], i)] for i in range(4)]
    return collate(rows, config, length=20, chunks=1, chunk_patches=16)


def step_of(model: InternVideo3, optimizer: optax.GradientTransformation, batch: Any):
    """(trained, frozen, state) → gradients, and trained and state after them."""

    def loss(trained: Any, frozen: Any) -> jax.Array:
        params = join(trained, frozen)
        hidden = model.apply({"params": params}, batch).hidden
        losses = cross_entropy(model, params, hidden, batch.labels)
        return reduced(losses, token_weights(batch.labels, batch.segment_ids, "token"))

    @jax.jit
    def step(trained: Any, frozen: Any, state: Any):
        gradients = jax.grad(loss)(trained, frozen)
        updates, state = optimizer.update(gradients, state, trained)
        return gradients, optax.apply_updates(trained, updates), state

    return step


def test_patterns():
    """Names are the checkpoint's, whole or from a dot on; several patterns add up."""
    model = InternVideo3(tiny_config())
    whole = everything(model)
    assert names(model) == whole
    assert names(model, "model.visual.*") == {name for name in whole if not name.startswith("visual/")}
    assert names(model, "lm_head.weight", "*.bias") == {
        name for name in whole if name != "lm_head/kernel" and not name.endswith("/bias")
    }
    gone = {"language_model/layers/self_attn/q_proj/kernel", "embed_tokens/embedding"}
    assert names(model, "q_proj.weight", "model.language_model.embed_tokens.*") == whole - gone
    # One by one they are all of a parameter's layers, too.
    assert names(model, *(f"layers.{i}.mlp.up_proj.weight" for i in range(3))) == whole - {
        "language_model/layers/mlp/up_proj/kernel"
    }


def test_layers_that_stand_alone_are_frozen_one_by_one():
    model = InternVideo3(tiny_config("gqa"), Execution(scan_layers=False))
    got = names(model, "model.language_model.layers.0.*")
    assert got == {name for name in everything(model) if not name.startswith("language_model/layers_0/")}


def test_errors():
    model = InternVideo3(tiny_config())
    with pytest.raises(
        UserError, match=r"frozen: 'model.vision.\*' names .*; did you mean 'model.visual.\*'\?"
    ):
        trainable(model, ("model.vision.*",))
    with pytest.raises(UserError, match=r"did you mean 'q_proj.weight'\?"):
        trainable(model, ("q_prj.weight",))
    with pytest.raises(
        UserError,
        match=r"some of model.language_model.layers.\*.* without model.language_model.layers.1.*write \*",
    ):
        trainable(model, ("layers.0.mlp.up_proj.weight",))
    with pytest.raises(UserError, match="frozen: leaves nothing to be trained"):
        trainable(model, ("*",))


def test_low_rank_additions_are_all_that_is_trained():
    model = low_rank_model(tiny_config("gqa"), weights="nf4")
    added = {name for name in everything(model) if name.split("/")[-1] in LEAVES}
    assert names(model) == added
    # A pattern for a layer is one for its additions.
    assert names(model, "model.visual.*") == {name for name in added if not name.startswith("visual/")}


def test_quantised_kernels_are_never_trained():
    model = InternVideo3(tiny_config("gqa"), Execution(weights="int8"))
    assert names(model) == {name for name in everything(model) if "kernel_" not in name}
    with pytest.raises(UserError, match="leaves nothing to be trained beside int8 weights"):
        trainable(model, ("*.norm*", "*norm.weight", "*.bias", "*embed*"))


def test_split_and_join():
    model = InternVideo3(tiny_config())
    params = base_params(model.config)
    chosen = trainable(model, ("model.visual.*",))
    trained, frozen = split(params, chosen)
    assert set(frozen) == {"visual"} and set(trained) == set(params) - {"visual"}
    whole = join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    boxes = split(boxed_params(model), chosen)
    assert [set(flatten_dict(x)) for x in boxes] == [set(flatten_dict(x)) for x in (trained, frozen)]


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_stay_and_have_no_state(kind: str):
    """Three steps without the tower and the embeddings: the first gradients are those of a full run."""
    model = InternVideo3(tiny_config())
    batch, params = batch_of(model.config), base_params(model.config)
    chosen = trainable(model, ("model.visual.*", "embed_tokens.weight"))
    trained, frozen = split(params, chosen)
    before = jax.device_get(frozen)
    config = ADAMW if kind == "adamw" else OptimizerConfig(warmup=0.0)
    optimizer = make_optimizer(config, 10, split(boxed_params(model), chosen)[0])
    state = optimizer.init(trained)
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert held and not any("visual" in path or "embed_tokens" in path for path in held)
    step = step_of(model, optimizer, batch)
    start = trained
    gradients, trained, state = step(trained, frozen, state)
    for _ in range(2):
        _, trained, state = step(trained, frozen, state)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), trained, start)
    assert min(jax.tree.leaves(moved)) > 0
    if kind == "adamw":
        full = make_optimizer(config, 10, boxed_params(model))
        every, _, _ = step_of(model, full, batch)(params, {}, full.init(params))
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), gradients, split(every, chosen)[0])


@pytest.mark.slow
def test_low_rank_training_on_a_mesh():
    """fsdp 4, tensor 2 against one device: additions are split as their kernels are; gradients to 1e-5."""
    model = low_rank_model(even_config())
    batch, params = batch_of(model.config), joined(base_params(model.config), random_additions(model))
    chosen = trainable(model)
    optimizer = make_optimizer(ADAMW, 10, split(boxed_params(model), chosen)[0])
    step = step_of(model, optimizer, batch)
    trained, frozen = split(params, chosen)
    gradients, one, _ = step(trained, frozen, optimizer.init(trained))
    mesh = make_mesh(fsdp=4, tensor=2)
    trained, frozen = split(jax.device_put(params, param_shardings(boxed_params(model), mesh)), chosen)
    with jax.set_mesh(mesh):
        found, many, _ = step(trained, frozen, optimizer.init(trained))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, gradients)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-3), many, one)
    up = many["language_model"]["layers"]["mlp"]["up_proj"]
    assert up["lora_a"].addressable_shards[0].data.shape == (3, 3, 24 // 4)
    assert up["lora_b"].addressable_shards[0].data.shape == (3, 32 // 2, 3)
