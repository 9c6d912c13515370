"""Muon takes each kernel as the matrix that it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import preset
from iv3jax.sharding import unbox
from iv3jax.train.optimizer import OptimizerConfig, make_optimizer


@pytest.fixture(scope="module")
def updates() -> dict:
    """The first update of attention with cached norms and adapters, for random gradients."""
    tiny = preset("tiny")
    text = dataclasses.replace(
        tiny.text_config, use_qk_norm=True, latent_adapters=True, kv_lora_rank=24, num_hidden_layers=2
    )
    model = InternVideo3(dataclasses.replace(tiny, text_config=text))
    boxed = boxed_params(model)["language_model"]["layers"]["self_attn"]
    leaves, tree = jax.tree.flatten(unbox(boxed))
    rng = np.random.default_rng(0)
    drawn = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10, boxed)
    found, _ = jax.jit(optimizer.update)(drawn, jax.jit(optimizer.init)(drawn), drawn)
    return found


@pytest.mark.parametrize(
    ("module", "batch"), [("q_expand", (2, 4)), ("kv_adapters", (2, 2)), ("kv_a_proj_with_mqa", (2,))]
)
def test_muon_evens_the_singular_values_of_each_matrix(
    updates: dict, module: str, batch: tuple[int, ...]
) -> None:
    kernel = np.asarray(updates[module]["kernel"])
    assert kernel.shape[: len(batch)] == batch
    values = np.linalg.svd(kernel.reshape(-1, *kernel.shape[-2:]), compute_uv=False)
    # Newton and Schulz' five steps leave them within a factor of two of each other.
    assert values.min() > 0.4 * values.max()
    assert jnp.isfinite(kernel).all()
