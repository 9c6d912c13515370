"""Meshes and the one table that maps logical axes to mesh axes. Models name logical axes only.

Mesh axes: `data` (replicas), `fsdp` (weights gathered per layer, batch split), `context` (the sequence
split, and weights as over fsdp), `tensor` (heads, hidden units and vocabulary split). Where the devices are
of several slices, joined by a slower network, `data` goes over the slices.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from iv3jax.errors import UserError
from iv3jax.typing import Array, Params

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "embed": ("fsdp", "context"),
    "rank": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),
    "modality": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "norm": (),
    "three": (),
    "positions": (),
    # activations
    "batch": ("data", "fsdp"),
    "replicas": ("data",),
    "sequence": ("context",),
    "slots": ("context",),
    "hidden": (),
    "hidden_parts": ("fsdp",),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    # Vision chunks are independent of each other, so every axis shares the tower's work.
    "chunk_groups": ("data", "fsdp", "context", "tensor"),
}
"""Logical axis → the mesh axes that split it."""

WHERE_IT_DIVIDES = {"embed": ("context",), "rank": ("fsdp", "context")}
"""Mesh axes that split a weight only where they divide it, elsewhere each device has that part of it."""


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (default: all). Axes not named get size 1; `fsdp` takes what is left.

    Neighbours on an axis are neighbours in the network as far as a pod's shape allows.

    Raises:
        UserError: an unknown axis, a size below 1, sizes that do not multiply to the number of devices, or
            several slices that `data` is no multiple of.
    """
    devices = list(jax.devices() if devices is None else devices)
    if unknown := set(sizes) - set(MESH_AXES):
        raise UserError(f"mesh axis {sorted(unknown)[0]!r} is unknown; there are {', '.join(MESH_AXES)}")
    if small := [axis for axis, size in sizes.items() if size < 1]:
        raise UserError(f"mesh axis {small[0]!r} has size {sizes[small[0]]}; it must be 1 or more")
    named = math.prod(sizes.values())
    if "fsdp" not in sizes and len(devices) % named == 0:
        sizes["fsdp"] = len(devices) // named
        named = len(devices)
    if named != len(devices):
        raise UserError(f"a mesh of {sizes} needs {named} devices, but there are {len(devices)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError(
            f"mesh axis 'data' has size {shape[0]}; over {slices} slices it must be a multiple of that"
        )
    if slices > 1:
        inside = (shape[0] // slices, *shape[1:])
        places = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(places, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def partition_spec(names: Sequence[str | None], mesh_axes: Sequence[str] = MESH_AXES) -> PartitionSpec:
    """Logical axis names of one array → its PartitionSpec.

    Raises:
        ValueError: a name without a rule, or two axes of the array that want the same mesh axis.
    """
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule in iv3jax.sharding.RULES")
        axes = tuple(a for a in RULES[name] if a in mesh_axes) if name is not None else ()
        if collision := used.intersection(axes):
            raise ValueError(f"axes {tuple(names)} use mesh axis {sorted(collision)[0]!r} twice")
        used.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def constrain(x: Array, *names: str | None) -> Array:
    """Asks the compiler to lay `x` out by its logical axes, under the ambient mesh; else nothing.

    A mesh axis that does not divide its dim is left out: this says where an activation lives, never
    what it is, and a prompt of one row must run on a mesh meant for many.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = _auto_axes(mesh)
    if not left:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names for an array of shape {x.shape}")
    entries = []
    for size, axes in zip(x.shape, partition_spec(names, left), strict=True):
        entries.append(axes if size % _parts(mesh, axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def _auto_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that the compiler lays arrays out over: inside `split` and `with_weights` not all."""
    if mesh.empty:
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)


def gathered(kernel: Array, *names: str | None) -> Array:
    """A weight as a product needs it: whole over the axes that split tokens, under the ambient mesh.

    Said here because the compiler, left alone, may rather move activations, or gather a weight twice for one
    backward pass.
    """
    return constrain(kernel, *(None if name in WHERE_IT_DIVIDES else name for name in names))


def axes_over(name: str, *sizes: int) -> tuple[str, ...]:
    """The mesh axes that split a logical axis: all of its rule's, or none if a size does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else tuple(a for a in RULES[name] if mesh.shape.get(a, 1) > 1)
    return axes if all(size % _parts(mesh, axes) == 0 for size in sizes) else ()


Axes = Sequence[str | None]
"""The logical axes of one array."""


def split(
    function: Callable[..., Any], inputs: Sequence[Axes | None], outputs: Sequence[Axes], *args: Array | None
) -> Any:
    """function(*args) on every device's own part of the arguments; as it is without a mesh or inside another.

    What the compiler cannot split by itself, a kernel above all, is called so. A logical axis of which some
    size does not divide stays whole.

    Args:
        function: takes and returns parts. Collectives name the mesh axes that `axes_over` gives.
        inputs: the logical axes of each argument; None for one that is None.
        outputs: those of each result, of which there are two or more, or one alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not _auto_axes(mesh):
        return function(*args)
    sizes: dict[str, set[int]] = {}
    for names, x in zip(inputs, args, strict=True):
        if x is not None and names is not None:
            for name, size in zip(names, x.shape, strict=True):
                if name is not None:
                    sizes.setdefault(name, set()).add(size)

    def spec(names: Axes | None) -> PartitionSpec | None:
        if names is None:
            return None
        return PartitionSpec(*(name and (axes_over(name, *sizes[name]) or None) for name in names))

    given = [i for i, x in enumerate(args) if x is not None]

    def called(*parts: Array | None) -> Any:
        full: list[Array | None] = [None] * len(args)
        for i, part in zip(given, parts, strict=True):
            full[i] = part
        return function(*full)

    specs = tuple(spec(names) for names in outputs)
    return jax.shard_map(
        called,
        mesh=mesh,
        in_specs=tuple(spec(inputs[i]) for i in given),
        out_specs=specs if len(specs) > 1 else specs[0],
        check_vma=False,
    )(*(args[i] for i in given))


def with_weights(
    function: Callable[..., Any],
    weights: Any,
    inputs: Sequence[Axes],
    outputs: Sequence[Axes],
    *args: Array,
    over: Sequence[str] = MESH_AXES,
) -> Any:
    """function(weights, *args) with whole weights on every device, and its own part of the arguments.

    The weights are gathered once and their gradients are summed over the devices once, whatever loops
    `function` has inside. As it is without a mesh, and on a device's own part of something larger.

    Args:
        weights: a pytree of arrays, in the dtype they are to be sent in.
        inputs: the logical axes of each argument; one of which some size does not divide stays whole.
        outputs: those of each result, of which there are two or more, or one alone.
        over: mesh axes that `function` sees a part of; what the others split is the compiler's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not _auto_axes(mesh):
        return function(weights, *args)
    sizes: dict[str, set[int]] = {}
    for names, x in zip(inputs, args, strict=True):
        for name, size in zip(names, x.shape, strict=True):
            if name is not None:
                sizes.setdefault(name, set()).add(size)

    def spec(names: Axes) -> PartitionSpec:
        return PartitionSpec(*(name and (axes_over(name, *sizes[name]) or None) for name in names))

    places = tuple(spec(names) for names in outputs)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(spec(names) for names in inputs)),
        out_specs=places if len(places) > 1 else places[0],
        # All axes are function's where the compiler would have nothing to split over the others.
        axis_names=frozenset(
            MESH_AXES if all(mesh.shape[a] == 1 for a in set(MESH_AXES) - set(over)) else over
        ),
        check_vma=False,
    )(weights, *args)


def gradients_first(weights: Sequence[Array], axes: Sequence[Axes], x: Array) -> tuple[list[Array], Array]:
    """The weights and x as they are. Backwards, x's gradient waits for those of the weights.

    They are then summed up over the devices and laid out as the weights are, and what they were made of is
    gone. Else the compiler makes them at its leisure, and keeps activations, or a whole fp32 sum, through the
    backward pass of all that comes before x. Weights that need no gradients get none.

    Args:
        axes: the logical axes of each weight.
    """
    tied: tuple[list[Array], Array] = _gradients_first(tuple(map(tuple, axes)), list(weights), x)
    return tied


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients_first(axes: tuple[Axes, ...], weights: list[Array], x: Array) -> tuple[list[Array], Array]:
    # Forwards, too: what is gathered of a weight is then not kept for the next time that it is used.
    tied: tuple[list[Array], Array] = jax.lax.optimization_barrier((weights, x))
    return tied


def _in_order(axes: tuple[Axes, ...], weights: list[Any], x: Any) -> tuple[tuple[list[Array], Array], Any]:
    # Which have gradients is known here only; kept as structure, for it is no array.
    moving = [() if weight.perturbed else None for weight in weights]
    return _gradients_first(axes, [weight.value for weight in weights], x.value), moving


def _one_after_another(axes: tuple[Axes, ...], moving: Any, given: tuple[list[Any], Any]) -> tuple[list, Any]:
    by_weights, by_x = given
    found = {
        i: constrain(gradient, *names)
        for i, (gradient, names, moves) in enumerate(zip(by_weights, axes, moving, strict=True))
        if moves is not None and not isinstance(gradient, SymbolicZero)
    }
    if not isinstance(by_x, SymbolicZero):
        found, by_x = jax.lax.optimization_barrier((found, by_x))
    return [found.get(i) for i in range(len(axes))], by_x


_gradients_first.defvjp(_in_order, _one_after_another, symbolic_zeros=True)


def whole_parts(name: str, size: int) -> int:
    """The size rounded up to what the ambient mesh splits a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _parts(mesh, tuple(a for a in RULES[name] if a in mesh.shape))
    return -(-size // parts) * parts


def zigzag(length: int, parts: int) -> np.ndarray:
    """(length,) int32: the order in which equal shards of a causal sequence have equal work.

    Of 2·parts chunks shard i holds chunk i and chunk 2·parts−1−i, one early and one late.

    Raises:
        UserError: a length that 2·parts does not divide.
    """
    if length % (2 * parts):
        raise UserError(
            f"a sequence of {length} tokens is not split over {parts} devices in zig-zag; "
            f"make the length a multiple of {2 * parts}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def param_shardings(boxed: Params, mesh: Mesh) -> Params:
    """Shardings of parameters, abstract or real, still in the boxes that carry their logical axes.

    Mesh axes of WHERE_IT_DIVIDES are left out where they do not.

    Raises:
        UserError: a dim that its mesh axes do not divide, all of them named at once.
    """
    problems: list[str] = []

    def one(path: tuple, box: nn.LogicallyPartitioned) -> NamedSharding:
        entries: list[tuple[str, ...] | None] = []
        spec = partition_spec(box.names, mesh.axis_names)
        for size, axes, name in zip(box.value.shape, spec, box.names, strict=True):
            kept = axes or ()
            for axis in reversed(WHERE_IT_DIVIDES.get(name, ())):
                if size % _parts(mesh, kept):
                    kept = tuple(a for a in kept if a != axis)
            if size % _parts(mesh, kept):
                key = "/".join(str(getattr(p, "key", p)) for p in path)
                problems.append(f"{key} ({name} {size} over {kept} {_parts(mesh, kept)})")
            entries.append(kept or None)
        return NamedSharding(mesh, PartitionSpec(*entries))

    shardings = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)
    if problems:
        raise UserError(f"mesh {dict(mesh.shape)} does not divide {'; '.join(problems)}")
    return shardings


def _parts(mesh: Mesh | jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """How many pieces one entry of a PartitionSpec cuts a dim into."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def unbox(boxed: Params) -> Params:
    """The same tree without the boxes that carry logical axes."""
    return jax.tree.map(lambda box: box.value if _is_box(box) else box, boxed, is_leaf=_is_box)


def _is_box(x: object) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)
