"""The compiled step against plain gradients: packed or not, accumulated or not, on one device or eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.peers import conversation, even_config, random_model, tree_difference

from iv3jax.data.collate import collate
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.feeds import place_batch
from iv3jax.train.objective import supervised
from iv3jax.train.state import TrainState, new_state
from iv3jax.train.step import make_step

RATE = 1.0
"""Plain gradient descent with this rate, so that the change of the parameters is the gradient."""

TOLERANCE = 1e-5


def samples(config):
    """Eight conversations of different lengths, with and without media."""
    media = [[], [("image", 1, 4, 4)], [("video", 2, 4, 4)], []]
    return [conversation(config, [3 + i, *media[i % 4], 2 + i % 3], i) for i in range(8)]


def batch_of(config, rows):
    return collate(rows, config, length=64, chunks=3, chunk_patches=16)


def stepped(model, params, batch, sizes=None, accumulate=1, reduction="square"):
    """Metrics and gradients of one step."""
    count = int(np.prod(list((sizes or {"data": 1}).values())))
    mesh = make_mesh(jax.devices()[:count], **(sizes or {"data": 1}))
    shardings = param_shardings(boxed_params(model), mesh)
    placed = jax.device_put(params, shardings)
    optimizer = optax.sgd(RATE)
    step = make_step(optimizer, supervised(model, reduction), accumulate, shardings)
    with jax.set_mesh(mesh):
        state = new_state(placed, optimizer, 0, mesh)
        after, metrics = jax.jit(step)(state, {}, place_batch(batch, mesh))
    change = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), params, after.params)
    return jax.tree.map(float, metrics), change


@pytest.fixture(scope="module")
def tiny():
    return random_model(even_config("m2la"))


@pytest.fixture(scope="module")
def reference(tiny):
    """One sample a row, all rows at once, one device."""
    model, params = tiny
    return stepped(model, params, batch_of(model.config, [[s] for s in samples(model.config)]))


def same(got, expected):
    metrics, gradient = got
    assert metrics.loss == pytest.approx(expected[0].loss, abs=TOLERANCE)
    assert metrics.grad_norm == pytest.approx(expected[0].grad_norm, rel=TOLERANCE)
    assert metrics.weight == pytest.approx(expected[0].weight, rel=1e-6)
    assert metrics.applied == 1
    assert tree_difference(gradient, expected[1]) <= TOLERANCE


@pytest.mark.medium
def test_packed_rows_give_the_same_step(tiny, reference):
    """Loss and gradients of samples that share rows are those of samples alone."""
    model, params = tiny
    parts = samples(model.config)
    packed = [[parts[0], parts[3], parts[4]], [parts[1]], [parts[2], parts[7]], [parts[6], parts[5]]]
    same(stepped(model, params, batch_of(model.config, packed)), reference)


@pytest.mark.medium
@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulated_parts_give_the_same_step(tiny, reference, accumulate):
    """8 rows in 2 or 4 parts, whose trained tokens differ in number: the denominator is the whole step's."""
    model, params = tiny
    rows = [[s] for s in samples(model.config)]
    same(stepped(model, params, batch_of(model.config, rows), accumulate=accumulate), reference)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        ({"data": 2}, 1),
        pytest.param({"fsdp": 4}, 2, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 2),
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_give_the_same_step(tiny, reference, sizes, accumulate):
    """2, 4 and 8 fake devices, every axis of the mesh."""
    model, params = tiny
    rows = [[s] for s in samples(model.config)]
    same(stepped(model, params, batch_of(model.config, rows), sizes, accumulate), reference)


@pytest.mark.medium
def test_what_is_not_finite_changes_nothing(tiny):
    """Parameters and moments stay bit for bit, the step counts, and the metrics say so."""
    model, params = tiny
    batch = batch_of(model.config, [[samples(model.config)[1]]])
    # Of one dtype, and from one state, so that it is compiled once.
    batch = batch._replace(patches=batch.patches.astype(np.float32))
    broken = batch._replace(patches=np.full_like(batch.patches, np.nan))
    optimizer = optax.adam(1e-3)
    mesh = make_mesh(jax.devices()[:1])
    step = jax.jit(make_step(optimizer, supervised(model), 1, None))
    state = new_state(jax.tree.map(jnp.asarray, params), optimizer, 0, mesh)
    after, metrics = step(state, {}, broken)
    assert metrics.applied == 0 and not np.isfinite(metrics.loss)
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    again, metrics = step(state, {}, batch)
    assert metrics.applied == 1 and isinstance(again, TrainState)
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), again.params, params)
    assert max(jax.tree.leaves(moved)) > 0


def test_moments_lie_where_their_parameters_lie():
    """Adam's two moments of each weight have its sharding."""
    model = InternVideo3(even_config("m2la"))
    mesh = make_mesh(fsdp=4, tensor=2)
    shardings = param_shardings(boxed_params(model), mesh)
    params = jax.device_put(random_model(model.config)[1], shardings)
    state = new_state(params, optax.adam(1e-3), 0, mesh)
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        alike = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), moment, shardings)
        assert all(jax.tree.leaves(alike))
    split = [x for x in jax.tree.leaves(state.opt_state[0].mu) if not x.sharding.is_fully_replicated]
    assert len(split) > 10
