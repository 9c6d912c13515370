"""Muon takes each kernel as the matrix that it is; AdamW is PyTorch's; schedules are their formulas."""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from iv3jax.errors import UserError
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import preset
from iv3jax.sharding import unbox
from iv3jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer


@pytest.fixture(scope="module")
def boxed() -> dict:
    """Attention with cached norms and adapters."""
    tiny = preset("tiny")
    text = dataclasses.replace(
        tiny.text_config, use_qk_norm=True, latent_adapters=True, kv_lora_rank=24, num_hidden_layers=2
    )
    model = InternVideo3(dataclasses.replace(tiny, text_config=text))
    return boxed_params(model)["language_model"]["layers"]["self_attn"]


def drawn(boxed: dict, seed: int = 0) -> dict:
    """Normal numbers for every parameter."""
    leaves, tree = jax.tree.flatten(unbox(boxed))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


@pytest.mark.parametrize(
    ("module", "batch"), [("q_expand", (2, 4)), ("kv_adapters", (2, 2)), ("kv_a_proj_with_mqa", (2,))]
)
def test_muon_evens_the_singular_values_of_each_matrix(boxed: dict, module: str, batch: tuple[int, ...]):
    gradients = drawn(boxed)
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10, boxed)
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(gradients), gradients)
    kernel = np.asarray(updates[module]["kernel"])
    assert kernel.shape[: len(batch)] == batch
    values = np.linalg.svd(kernel.reshape(-1, *kernel.shape[-2:]), compute_uv=False)
    # Newton and Schulz' five steps leave them within a factor of two of each other.
    assert values.min() > 0.4 * values.max()
    assert jnp.isfinite(kernel).all()


def applied(optimizer: optax.GradientTransformation, gradients: dict, state: Any, params: dict):
    """Parameters and state after a step."""
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def demo_recipe(steps: int) -> optax.GradientTransformation:
    """The defaults, spelled out, for the two kernels and the bias below."""

    def schedule(peak: float) -> optax.Schedule:
        warm, down = round(steps * 0.02), round(steps * 0.7)
        rise, fall = optax.linear_schedule(0.0, peak, warm), optax.linear_schedule(peak, 0.0, down)
        return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warm, steps - down])

    numbers = {
        "o_proj": {"kernel": contrib.MuonDimensionNumbers((2, 3), (1,))},
        "q_proj": {"kernel": contrib.MuonDimensionNumbers((3,), (1, 2)), "bias": None},
    }
    muon = contrib.muon(
        schedule(0.01),
        adam_learning_rate=schedule(0.003),
        muon_weight_dimension_numbers=numbers,
        consistent_rms=None,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@pytest.mark.medium
def test_the_demos_recipe_is_the_default_bit_for_bit(boxed: dict):
    """100 steps, of which two warm up and seventy decay."""
    part = {name: boxed[name] for name in ("o_proj", "q_proj")}
    params = [drawn(part), drawn(part)]
    optimizers = [make_optimizer(OptimizerConfig(), 100, part), demo_recipe(100)]
    states = [jax.jit(optimizer.init)(params[0]) for optimizer in optimizers]
    steps = [jax.jit(partial(applied, optimizer)) for optimizer in optimizers]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for step in range(100):
        gradients = drawn(part, step)
        for i in range(2):
            params[i], states[i] = steps[i](gradients, states[i], params[i])
    jax.tree.map(np.testing.assert_array_equal, params[0], params[1])
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])


def toy() -> dict:
    """One of each: a matrix, low-rank additions, an embedding, a bias, a norm."""
    shapes = {
        "mlp": {"kernel": (4, 5), "lora_a": (2, 5), "lora_b": (4, 2), "bias": (4,)},
        "norm": {"scale": (5,)},
        "embed_tokens": {"embedding": (7, 5)},
    }
    make = lambda shape: nn.LogicallyPartitioned(  # noqa: E731
        jax.ShapeDtypeStruct(shape, jnp.float32), ("norm",) * len(shape)
    )
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


ADAMW = OptimizerConfig(kind="adamw", learning_rate=0.02, schedule="cosine", weight_decay=0.3, warmup=0.1)


def test_adamw_is_pytorchs():
    """20 steps with clipping, warm-up, a cosine and groups as transformers' trainer makes them: 1e-6."""
    torch = pytest.importorskip("torch")
    boxed, steps = toy(), 20
    params = drawn(boxed)
    paths = [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
    kept = [path[-1] in ("bias", "scale") for path in paths]
    groups = [
        {"params": [p for p, no in zip(theirs, kept, strict=True) if not no], "weight_decay": 0.3},
        {"params": [p for p, no in zip(theirs, kept, strict=True) if no], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(ADAMW, steps, boxed)
    state, update = jax.jit(optimizer.init)(params), jax.jit(partial(applied, optimizer))
    for step in range(steps):
        gradients = drawn(boxed, 100 + step)
        params, state = update(gradients, state, params)
        for parameter, gradient in zip(theirs, jax.tree.leaves(gradients), strict=True):
            parameter.grad = torch.tensor(np.asarray(gradient))
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for group in reference.param_groups:
            group["lr"] = cosine(step, steps, 0.02, 0.0)
        reference.step()
    for path, mine, parameter in zip(paths, jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(mine, parameter.detach().numpy(), atol=1e-6, err_msg=str(path))


def cosine(step: int, steps: int, peak: float, final: float, warmup: float = 0.1) -> float:
    """The formula of a cosine after a straight rise."""
    warm = round(steps * warmup)
    if step < warm:
        return peak * step / warm
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@pytest.mark.parametrize("final", [0.0, 0.001])
def test_cosine(final: float):
    config = dataclasses.replace(ADAMW, final_learning_rate=final)
    for peak in (None, 0.5):
        schedule = learning_rate(config, 50, peak)
        scale = 1 if peak is None else peak / 0.02
        for step in range(52):
            expected = scale * cosine(min(step, 50), 50, 0.02, final)
            assert float(schedule(step)) == pytest.approx(expected, abs=scale * 1e-8)


def test_constant_and_linear():
    """Up in 10 steps of 100, down in 60 to a tenth."""
    config = OptimizerConfig(learning_rate=0.02, final_learning_rate=0.002, warmup=0.1, decay=0.6)
    schedule = learning_rate(config, 100)
    for step in range(102):
        fallen = 0.02 - 0.018 * min(step - 40, 60) / 60
        expected = 0.02 * step / 10 if step < 10 else 0.02 if step < 40 else fallen
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_first_moments_in_bf16(kind: str, boxed: dict):
    """The first moments are bf16 and nothing else is; updates differ by what bf16 rounds, 2⁻⁸ relative."""
    part = {name: boxed[name] for name in ("o_proj", "q_proj")}
    updates, states = [], []
    for dtype in ("bfloat16", "float32"):
        config = OptimizerConfig(kind=kind, moment_dtype=dtype, warmup=0.0)
        optimizer = make_optimizer(config, 100, part)
        params = drawn(part)
        state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
        for step in range(5):
            found, state = update(drawn(part, step), state, params)
        updates.append(found)
        states.append(state)
    own, plain = (jax.tree_util.tree_leaves_with_path(state) for state in states)
    halves = {jax.tree_util.keystr(path) for path, x in own if x.dtype == jnp.bfloat16}
    assert halves == {jax.tree_util.keystr(path) for path, _ in own if ".mu" in jax.tree_util.keystr(path)}
    assert len(halves) == 3 and all(x.dtype != jnp.bfloat16 for _, x in plain)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates[1]))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *updates)
    assert 0 < max(jax.tree.leaves(apart)) < 0.03 * largest


def test_no_clipping():
    """Gradients of any size pass; by default their norm is one at most."""
    gradients = jax.tree.map(lambda x: 100 * x, drawn(toy()))
    clipped, free = (make_optimizer(dataclasses.replace(ADAMW, clip=clip), 10, toy()) for clip in (1.0, 0.0))
    norms = []
    for optimizer in (clipped, free):
        state = jax.jit(lambda g, o=optimizer: o.update(g, o.init(g), g)[1])(gradients)
        norms.append(float(optax.tree.norm(optax.tree.get(state, "mu"))))
    assert norms[0] == pytest.approx(0.1, rel=1e-5)
    assert norms[1] == pytest.approx(0.1 * float(optax.tree.norm(gradients)), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(kind="sgd"), "optimizer.kind 'sgd' is not one of muon, adamw"),
        (dict(schedule="linear"), "optimizer.schedule 'linear' is not one of constant_linear, cosine"),
        (dict(moment_dtype="bf16"), "optimizer.moment_dtype 'bf16' is not one of float32, bfloat16"),
        (dict(warmup=0.5, decay=0.7), "optimizer.warmup 0.5 and decay 0.7 are no shares of the steps"),
        (dict(weight_decay=0.1), "optimizer.weight_decay is AdamW's"),
    ],
)
def test_errors(fields: dict, text: str):
    with pytest.raises(UserError, match=text):
        OptimizerConfig(**fields)
