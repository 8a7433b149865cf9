"""What every part of an engine needs to work: a helper thread, tasks that report their failure, and the log."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kata.agent.text import escape_line
from kata.engine.log import EngineLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, TypeVar

    T = TypeVar("T")


class Tasks:
    """The engine's helper thread, background tasks and log.

    Args:
        sandbox_id: Its sandbox, for the log.
        log_fifo: Where containerd looks for a shim's log; empty for none.

    Attributes:
        lines: The log.
    """

    __slots__ = ("_tasks", "_thread", "lines")

    def __init__(self, sandbox_id: str, log_fifo: str = "") -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lines = EngineLog(sandbox_id, log_fifo)
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

    def log(self, text: str, level: str = "warning") -> None:
        """Write a line to the engine's log, with the time before it; see `EngineLog.write`."""
        self.lines.write(text, level)

    def set_level(self, level: str) -> None:
        """How much the log shows from now on: ``debug``, ``info`` or ``warning``."""
        self.lines.set_level(level)
        self.lines.write(f"the log has lines of level {level} and above now", "info")
