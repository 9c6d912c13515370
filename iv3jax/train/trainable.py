"""Which parameters a run trains, and the two halves of the tree that follow: trained and frozen.

A step differentiates by the trained half alone, and the optimiser sees nothing else, so a frozen parameter
costs no gradient and no moments, and stays as it is bit for bit.
"""

from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from iv3jax.checkpoint.lora import adapter_tensors
from iv3jax.checkpoint.names import Path, tensors
from iv3jax.checkpoint.patterns import chosen
from iv3jax.errors import UserError
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.lora import LEAVES

_CODES = ("kernel_codes", "kernel_scale")


def trainable(model: InternVideo3, frozen: Sequence[str] = ()) -> frozenset[Path]:
    """The paths of the parameters to train.

    Args:
        model: with low-rank additions these are all that is trained. Quantised kernels never are.
        frozen: patterns of the checkpoint's names (`checkpoint.patterns`) that stay: `model.visual.*`.

    Raises:
        UserError: a pattern that names nothing, or only some of the layers that one parameter stacks; or
            nothing is left to train.
    """
    config, run = model.config, model.run
    # An addition has its layer's name within its own, so that a pattern for the one is one for the other.
    named = [(t.name, t.path) for t in [*tensors(config, run.scan_layers), *adapter_tensors(config, run)]]
    stay = chosen(frozen, named, "frozen")
    kinds = LEAVES if run.lora is not None and run.lora.rank else None
    found = frozenset(
        path
        for path in flatten_dict(boxed_params(model))
        if path not in stay and path[-1] not in _CODES and (kinds is None or path[-1] in kinds)
    )
    if not found:
        weights = f" beside {run.weights} weights, which are not" if run.weights is not None else ""
        raise UserError(f"frozen: leaves nothing to be trained{weights}")
    return found


def split(params: Any, trained: frozenset[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested dicts, of arrays or of boxes → those to train and the others, each without the other's keys."""
    leaves = flatten_dict(params)
    return (
        unflatten_dict({path: x for path, x in leaves.items() if path in trained}),
        unflatten_dict({path: x for path, x in leaves.items() if path not in trained}),
    )


def join(trained: Any, frozen: Any) -> dict[str, Any]:
    """The whole again: what `split` has taken apart."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))
