"""The scheduler's request to leave: noticed on any host, acted on by all after the same step.

Saving, and leaving with `Preemption.exit_code`, is the loop's; starting the run again is the launcher's.
"""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Slurm's, Kubernetes' and `kill`'s; that of `sbatch --signal=USR1@…`; Ctrl-C's."""


class Preemption:
    """Within it, SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop between two steps.

        with Preemption() as preemption:
            for step in …:
                …
                if preemption.requested(step):
                    save and leave with preemption.exit_code

    A second Ctrl-C is Python's KeyboardInterrupt. Schedulers signal a job's data workers too, and the steps
    until the agreed one need their batches: they must ignore the signal or be started again. To be entered
    after `distributed.start` and on the main thread, as Python allows no other to handle signals.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """What the process should exit with after it was stopped: 130 after Ctrl-C, otherwise 75."""
        return 130 if self._received == signal.SIGINT else EXIT_CODE

    def requested(self, step: int) -> bool:
        """Whether every host is to stop after this step; the same answer on all of them.

        Called by all hosts after every step. With several processes the coordination service agrees on a
        step that none has passed, in the background: it takes about a second and costs no collective.

        Args:
            step: grows by one from call to call, and is the same on all hosts.
        """
        if jax.distributed.is_initialized():
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
            return self._agreed
        return self._received is not None

    def __enter__(self) -> "Preemption":
        for name in SIGNALS:
            # With several processes jax itself listens for SIGTERM, and the others are turned into it.
            if name != signal.SIGTERM or not jax.distributed.is_initialized():
                self._before[name] = signal.signal(name, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)
        # Not print: it may be in the middle of printing.
        os.write(2, f"{self._received.name}: saving after this step, then leaving\n".encode())
        if number == signal.SIGINT:
            signal.signal(number, self._before[self._received])
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
