"""Whole training steps compiled for a mesh, and their collectives: what tests of sharded programs share."""

import importlib.util

import jax
import pytest

from iv3jax.hlo import Collective, collectives
from iv3jax.sharding import MESH_AXES, make_mesh
from iv3jax.train import plan as plan_module
from iv3jax.train.config import TrainConfig
from iv3jax.train.optimizer import OptimizerConfig
from iv3jax.train.plan import Planned, planned

has_compilers = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))
needs_compilers = pytest.mark.skipif(not has_compilers, reason="needs libtpu and jax-cuda12-plugin")

LENGTH = 88
"""Tokens of a row: a number that is no size of a weight in the tiny configs."""


def step_of(monkeypatch, shape, mesh, **config) -> Planned:
    """The step of a model of that shape, as the loop makes it, with a row for each part of the batch."""
    monkeypatch.setattr(plan_module, "preset", lambda _: shape)
    given = dict(length=LENGTH, chunks=4, chunk_patches=16, remat="full", dtype="float32") | config
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return planned(TrainConfig(rows=rows, optimizer=OptimizerConfig(kind="adamw"), **given), mesh)


def fake_mesh(**sizes):
    """A mesh of the fake devices of these tests, one of each axis that is not named."""
    return make_mesh(**dict.fromkeys(MESH_AXES, 1) | sizes)


def text_of(step: Planned) -> str:
    """The step compiled for the devices that are here."""
    places = jax.tree.map(lambda x: x.sharding, step.arguments[0])
    with jax.set_mesh(step.mesh):
        jitted = jax.jit(step.function, donate_argnums=(0,), out_shardings=(places, None))
        return jitted.lower(*step.arguments).compile().as_text()


def sent(text: str) -> list[Collective]:
    """The collectives that move anything: over more than one device."""
    return [one for one in collectives(text) if one.group > 1]


def kernels(step: Planned, part: str) -> dict[str, tuple[int, ...]]:
    """Path → whole shape, of one layer, of the kernels below `part`."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.arguments[0].params):
        keys = [key.key for key in path]
        if part in keys and keys[-1] == "kernel":
            found["/".join(keys)] = leaf.shape[1:]
    return found
