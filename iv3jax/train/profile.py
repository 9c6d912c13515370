"""Profiler traces on demand: `echo 3 > OUT/profile` traces the next three steps of a run that is going on."""

from pathlib import Path
from types import TracebackType

import jax

REQUEST = "profile"


class Profiler:
    """Looks for OUT/profile before each step; its number of steps (1 without) are traced to OUT/traces."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._until: int | None = None

    def at(self, step: int) -> None:
        """To be called before a step, with its number."""
        if self._until is not None and step >= self._until:
            self._stop()
        if self._out is None or self._until is not None or not (request := self._out / REQUEST).exists():
            return
        text = request.read_text().strip()
        request.unlink(missing_ok=True)
        jax.profiler.start_trace(str(self._out / "traces"))
        self._until = step + (int(text) if text.isdecimal() and int(text) else 1)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._until = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._until is not None:
            self._stop()
