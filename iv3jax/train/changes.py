"""What may change in a config between two parts of one run, and what would make it another run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from iv3jax.errors import UserError
from iv3jax.paths import AnyPath
from iv3jax.train.config import TrainConfig, build

FREE = (
    "mesh",
    "checkpoint",
    "held_out.every",
    "held_out.batches",
    "remat",
    "on_nonfinite",
    "data.workers",
    "data.timeout",
    "traces",
)
"""Fields, or groups of them, that change how a run is computed and not what."""


def check_changes(before: Mapping[str, Any], config: TrainConfig, folder: AnyPath) -> None:
    """Refuses a config under which a checkpoint would not go on as the run it is of.

    Args:
        before: the config that the checkpoint records.

    Raises:
        UserError: names the first field that differs, with both values; a field that there is no more.
    """
    now = json.loads(json.dumps(asdict(config)))
    # Fields that came later had no other value than their default.
    before = json.loads(json.dumps(asdict(build(TrainConfig, before, str(folder)))))
    for name, old, new in _differences(before, now):
        if not any(name == free or name.startswith(f"{free}.") for free in FREE):
            raise UserError(
                f"{folder}: its checkpoints are of a run with {name} = {old!r}, not {new!r}; take the old "
                "value, or another --out (init=THIS_RUN goes on from its parameters)"
            )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**now, **before}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name, before, now
