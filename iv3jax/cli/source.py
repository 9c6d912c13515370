"""Which model a command means, and how it is loaded for answering."""

from pathlib import Path
from typing import TYPE_CHECKING

from iv3jax.errors import UserError

if TYPE_CHECKING:
    from iv3jax.checkpoint.load import LoadedModel

DEMO_MODEL = Path("runs/demo/model")
"""Where launch/demo.sh leaves the model it trains, below the checkout."""

DIGITS_MODEL = Path("runs/digits/model")
"""Where `iv3 train --config digits --out runs/digits` leaves one."""


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
    return name or _made(DEMO_MODEL, "bash launch/demo.sh")


def digits_name(name: str | None) -> str:
    """The name, or the folder of a model that answers the digits' questions in one look."""
    return name or _made(DIGITS_MODEL, f"iv3 train --config digits --out {DIGITS_MODEL.parent}")


def _made(place: Path, command: str) -> str:
    for root in (Path(), Path(__file__).parents[2]):
        if (root / place).is_dir():
            return str(root / place)
    raise UserError(
        f"no --model was named and {place} is not there; run `{command}`, which trains it, or name a model "
        "folder"
    )
