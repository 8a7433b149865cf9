"""What every part of an engine needs to work: a helper thread, tasks that report their failure, and the log."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from kata.agent.text import escape_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeVar

    T = TypeVar("T")


class Tasks:
    """The engine's helper thread, background tasks and log.

    Args:
        sandbox_id: Its sandbox, for the lines that containerd gets.
        log_fifo: Where containerd looks for a shim's log; empty for none.
    """

    __slots__ = ("_log_fifo", "_sandbox_id", "_tasks", "_thread")

    def __init__(self, sandbox_id: str, log_fifo: str = "") -> None:
        self._sandbox_id = sandbox_id
        self._tasks: set[asyncio.Task[Any]] = set()
        self._log_fifo = _open_log_fifo(log_fifo)
        self._thread = ThreadPoolExecutor(1, "helper")

    async def run_blocking(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run something that blocks, in the one helper thread: in the order of the calls.

        Args:
            work: What to call.
            arguments: With what.

        Returns:
            What it returns; what it raises is raised.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def create_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let *work* run on its own; what it raises is written to the engine's log."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log(f"{type(error).__name__}: {escape_line(str(error))}")

    def log(self, text: str) -> None:
        """Write a line to the engine's log, with the time before it."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        sys.stderr.write(f"{stamp} {text}\n")
        sys.stderr.flush()
        if self._log_fifo is not None:
            try:
                os.write(self._log_fifo, f"{stamp} kata {self._sandbox_id}: {text}\n".encode())
            except OSError:
                pass  # full, or nobody reads: the engine does not wait for a reader, and our own log has it


def _open_log_fifo(path: str) -> int | None:
    """Where containerd looks for a shim's log; None when there is none, or no reader."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if path else None
    except OSError:
        return None
