"""Processes that run one function on many tasks, each task with a time limit that a hung process cannot pass.

Each process has a pipe of its own, so one that is killed, by us or by anyone, takes only its task with it.
(In pools with shared queues, pebble's among them, a process killed at the wrong moment stops all.)
What the function does is the caller's business.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from typing import Any

from iv3jax.errors import UserError

_ATTEMPTS = 3
"""A process may be killed by the system for reasons that are not the task's."""
_STARTUP = 300.0


class TaskTimeoutError(Exception):
    """The task took longer than its limit, and its process was killed."""


class TaskDiedError(Exception):
    """The task's process died each time it was tried."""


class WorkersClosedError(Exception):
    """The workers were closed before the task was done."""


class Workers:
    """Runs `function(task)` for the tasks given to it, in order of submission, several at a time.

    Args:
        function: pickled once for each process. What it raises there ends the process, like a crash.
        count: processes; 0 runs the tasks in one thread of this process, where nothing can be killed, so
            that `timeout` is not kept and a hung task hangs for ever.
        timeout: seconds for each task.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, timeout: float):
        self._function, self._timeout = function, timeout
        self._tasks: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future] = set()
        self._processes: set[_Process] = set()
        self._closed = False
        run = self._run_here if count == 0 else self._run_apart
        self._threads = [
            threading.Thread(target=run, name=f"iv3-data-{i}", daemon=True) for i in range(max(count, 1))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Any) -> Future:
        """The result to come: the function's, or TaskTimeoutError, TaskDiedError, WorkersClosedError."""
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise WorkersClosedError
            self._open.add(future)
        self._tasks.put((task, future))
        return future

    def close(self) -> None:
        """Kills the processes and ends the threads; what is not done fails with WorkersClosedError."""
        with self._lock:
            self._closed = True
            processes, futures = list(self._processes), list(self._open)
        for future in futures:
            self._settle(future, error=WorkersClosedError())
        for process in processes:
            process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            # One that hangs in a task of its own process cannot be ended; it ends with the program.
            thread.join(5.0)

    def _settle(self, future: Future, result: Any = None, error: BaseException | None = None) -> None:
        with self._lock:
            if future not in self._open:
                return
            self._open.remove(future)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _each(self, call: Callable[[Any], Any]) -> None:
        """Takes tasks until the workers are closed."""
        while (item := self._tasks.get()) is not None:
            task, future = item
            try:
                if not self._closed:
                    self._settle(future, call(task))
            # Whatever it is belongs to who waits for the result.
            except BaseException as error:
                self._settle(future, error=error)

    def _run_here(self) -> None:
        self._each(self._function)

    def _run_apart(self) -> None:
        process: _Process | None = None

        def call(task: Any) -> Any:
            nonlocal process
            for _ in range(_ATTEMPTS):
                process = process or self._start()
                try:
                    return process.call(task, self._timeout)
                except TaskTimeoutError:
                    self._end(process)
                    process = None
                    raise
                except (EOFError, OSError):
                    self._end(process)
                    process = None
                    if self._closed:
                        raise WorkersClosedError from None
            raise TaskDiedError(f"the process that read it died {_ATTEMPTS} times")

        self._each(call)
        if process is not None:
            self._end(process)

    def _start(self) -> "_Process":
        for _ in range(_ATTEMPTS):
            # One at a time: multiprocessing's bookkeeping is not made for threads.
            with self._lock:
                if self._closed:
                    raise WorkersClosedError
                process = _Process(self._function)
                self._processes.add(process)
            if process.wait_ready():
                return process
            process.let_speak()
            self._end(process)
        # No task's fault.
        raise UserError("a data worker did not start; what it printed above says why, or set data.workers=0")

    def _end(self, process: "_Process") -> None:
        process.kill()
        with self._lock:
            self._processes.discard(process)


class _Process:
    """One process and our end of its pipe."""

    def __init__(self, function: Callable[[Any], Any]):
        # Not forked: jax's threads would be cut off in the middle of what they hold.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> bool:
        """Waits until the process has loaded the function; False if it ended or hangs instead."""
        try:
            return self._pipe.poll(_STARTUP) and self._pipe.recv() is None
        except (EOFError, OSError):
            return False

    def call(self, task: Any, timeout: float) -> Any:
        self._pipe.send(task)
        if not self._pipe.poll(timeout):
            raise TaskTimeoutError(f"not read after {timeout:g} seconds")
        return self._pipe.recv()

    def let_speak(self) -> None:
        """Gives it the time to print why it ends."""
        self._process.join(5.0)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """What a process does: tasks until the other end of its pipe is gone."""
    # A terminal sends it to every process; the trainer answers it, by closing us. (SIGTERM must end us: with
    # it multiprocessing ends its processes at exit, and waits. A scheduler's costs a new start, no sample.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(None)
        while True:
            pipe.send(function(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, also in the middle of a task that hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
