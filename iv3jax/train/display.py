"""What a run shows while it runs: a bar on a terminal, else a line every PLAIN_EVERY steps."""

import math
import sys
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 25
"""Steps between two lines of progress where there is no terminal to draw a bar on."""


class Display:
    """Progress of `steps` steps, `done` of them done before. `quiet` shows nothing: all hosts but one."""

    def __init__(self, title: str, steps: int, done: int = 0, quiet: bool = False) -> None:
        self._title, self._steps, self._done, self._quiet = title, steps, done, quiet
        self._loss = math.nan
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns) if sys.stdout.isatty() and not quiet else None

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._steps, completed=self._done, numbers="compiling"
            )
        else:
            self.say(f"{self._title}: {self._steps} steps" + (f", {self._done} done" if self._done else ""))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, flush=True)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Reports a finished step; the loss shown is smoothed over about 20 steps.

        Args:
            numbers: loss, grad_norm, learning_rate, tokens_per_second, wait_share, compiles, and the mean
                reward of rollouts, if there were any.
        """
        loss = numbers["loss"]
        self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        reward = f"reward {numbers['reward']:.3f} · " if "reward" in numbers else ""
        text = reward + (
            f"loss {self._loss:.3f} · |g| {numbers['grad_norm']:.2g} · lr {numbers['learning_rate']:.2g} · "
            f"{numbers['tokens_per_second']:,.0f} tokens/s · waiting {numbers['wait_share']:.0%} · "
            f"{numbers['compiles']:.0f} compiles"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif step % PLAIN_EVERY == 0 or step == self._steps:
            self.say(f"{self._title}: step {step}/{self._steps} {text}")
