"""Figures of a long bench, kept as they are found, so that one that was stopped goes on."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iv3jax.compiles import Stopwatch


class Cells:
    """Finished figures of a folder, each a JSON file; delete one to measure it anew."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under that name, or is now."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            watch = Stopwatch()
            value = measure()
            part = path.with_suffix(".part")
            part.write_text(json.dumps(value))
            os.replace(part, path)
            print(f"{name}: {watch.seconds:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())
