"""The model through every implementation of its kernels, interpreted on a CPU: the same hidden states."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import CONVERTED, conversation, difference, even_config, random_model

from iv3jax import ops
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution


@cache
def tiny(what=None):
    """A model with two key heads' worth of everything, its weights, and two rows of 70 and 3 tokens.

    `what` names what a converted model has besides.
    """
    model, params = random_model(even_config("m2la", **CONVERTED.get(what, {})))
    samples = [conversation(model.config, [n], n) for n in (70, 3)]
    return model, params, collate([[s] for s in samples], model.config, length=72)


def fed(implementation, cache_dtype, what=None):
    """Hidden states of a chunk of 72 tokens, then of one token a row, over a cache."""
    model, params, batch = tiny(what)
    model = InternVideo3(model.config, Execution(implementation=implementation))
    cache = init_cache(model.config.text_config, 2, 80, cache_dtype)
    step = jax.jit(lambda batch, cache: model.apply({"params": params}, batch, None, cache))
    first = step(batch, cache)
    one = batch._replace(
        input_ids=batch.input_ids[:, :1],
        positions=batch.positions[:, :, :1] + 70,
        segment_ids=np.ones((2, 1), np.int32),
        visual_index=None,
    )
    second = step(one, first.cache)
    real = np.asarray(batch.segment_ids) != 0
    return np.asarray(first.hidden)[real], np.asarray(second.hidden), second.cache


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("cache_dtype", "what"),
    [("float32", None), ("int8", None), ("float8_e4m3fn", None), ("float32", "all")],
)
def test_over_a_cache(implementation, cache_dtype, what):
    expected = fed("xla", cache_dtype, what)
    ops_before = dict(ops.taken())
    got = fed(implementation, cache_dtype, what)
    assert ops.taken() != ops_before
    for op in ("latent_compress_into", "latent_prefill", "latent_decode"):
        assert ops.taken()[op] == f"{implementation}, interpreted"
    # A code that is rounded the other way moves what is quantised by one part in 127, fp8's by one in 16.
    tolerance = {"float32": 1e-5, "int8": 2e-3, "float8_e4m3fn": 2e-2}[cache_dtype]
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        assert difference(ours, theirs) <= tolerance
    assert got[2].length.tolist() == expected[2].length.tolist() == [71, 4]


@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("what", [None, "all"])
def test_whole_sequences_and_their_gradients(implementation, what):
    model, params, batch = tiny(what)

    def loss(params, implementation):
        model_of = InternVideo3(model.config, Execution(implementation=implementation))
        hidden = model_of.apply({"params": params}, batch).hidden
        return jnp.sum(jnp.where(batch.segment_ids[..., None] != 0, hidden, 0) ** 2)

    both = [jax.jit(jax.value_and_grad(lambda p, i=i: loss(p, i)))(params) for i in ("xla", implementation)]
    assert difference(both[1][0], both[0][0]) <= 1e-5 * abs(float(both[0][0]))
    for ours, theirs in zip(*map(jax.tree.leaves, (both[1][1], both[0][1])), strict=True):
        assert difference(ours, theirs) <= 1e-4 * max(1.0, float(jnp.max(jnp.abs(theirs))))


def test_unknown_implementation():
    with pytest.raises(UserError, match="implementation 'cuda' is not one of xla, tpu, gpu"):
        Execution(implementation="cuda")
