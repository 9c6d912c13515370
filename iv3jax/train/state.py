"""The state of a run: all that a step changes, and so all that a checkpoint must hold beside the feed's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv3jax.sharding import unbox
from iv3jax.typing import Array, Params


class TrainState(NamedTuple):
    """What a step takes and gives.

    Attributes:
        params: those that are trained.
        opt_state: the optimiser's.
        step: () int32, steps that are done.
        rng: raw key data; a step's own key is it folded with `step`.
    """

    params: Params
    opt_state: Any
    step: Array
    rng: Array


def new_state(params: Params, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step; moments lie where their parameters lie."""
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.jit(optimizer.init, out_shardings=state_shardings(params, optimizer, mesh))(params)
    step, rng = jax.device_put((jnp.int32(0), jax.random.key_data(jax.random.key(seed))), whole)
    return TrainState(params, opt_state, step, rng)


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Where each part of the optimiser's state lies: with the parameter of its name and shape, or whole.

    Args:
        params: arrays or shapes, with their shardings.
    """
    places = {
        _names(path): (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = places.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def state_shapes(
    boxed: Params, shardings: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> dict[str, Any]:
    """A TrainState's fields as shapes with shardings, to be restored or compiled for.

    Args:
        boxed: abstract parameters that are trained. shardings: theirs.
    """

    def shaped(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(shaped, unbox(boxed), shardings)
    places = state_shardings(params, optimizer, mesh)
    opt_state = jax.tree.map(shaped, jax.eval_shape(optimizer.init, params), places)
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return dict(params=params, opt_state=opt_state, step=shaped(step, whole), rng=shaped(key, whole))


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
