"""Counts what XLA compiles, so that a speed is never the compiler's and a recompile never goes unseen."""

import time

import jax

_PREFIX = "/jax/core/compile/"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_totals = {"seconds": 0.0, "count": 0}


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_PREFIX):
        _totals["seconds"] += duration_secs
        _totals["count"] += event == _COMPILE


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Wall seconds since it was made, with the time spent tracing and compiling kept apart."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = dict(_totals)

    @property
    def seconds(self) -> float:
        """Seconds without tracing and compiling."""
        return max(time.perf_counter() - self._start - self.compile_seconds, 1e-9)

    @property
    def compile_seconds(self) -> float:
        """Seconds of tracing, lowering and compiling."""
        return float(_totals["seconds"] - self._before["seconds"])

    @property
    def compiles(self) -> int:
        """Programs compiled or fetched from the persistent cache."""
        return int(_totals["count"] - self._before["count"])
