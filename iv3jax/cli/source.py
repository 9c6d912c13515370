"""Which model a command means, and how it is loaded for answering."""

from pathlib import Path
from typing import TYPE_CHECKING

from iv3jax.errors import UserError

if TYPE_CHECKING:
    from iv3jax.checkpoint.load import LoadedModel

DEMO_MODEL = Path("runs/demo/model")
"""Where launch/demo.sh leaves the model it trains, below the checkout."""


def load_model(name: str | None, random_weights: bool = False, weights: str | None = None) -> "LoadedModel":
    """The named model, or the demo's."""
    import jax

    from iv3jax.checkpoint.load import load
    from iv3jax.models.layers import Execution

    # Scanned layers compile sooner, but on all but a TPU XLA copies each one's weights before it uses them.
    run = Execution(scan_layers=jax.default_backend() == "tpu")
    return load(model_name(name), run=run, random_weights=random_weights, weights=weights)


def model_name(name: str | None) -> str:
    """The name, or the demo's folder."""
    if name is not None:
        return name
    for root in (Path(), Path(__file__).parents[2]):
        if (root / DEMO_MODEL).is_dir():
            return str(root / DEMO_MODEL)
    raise UserError(
        f"no --model was named and {DEMO_MODEL} is not there; run `bash launch/demo.sh`, which trains it, "
        "or name a model folder"
    )
