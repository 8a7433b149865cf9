"""Health checks: a command that is run in a container again and again, and what its outcomes say of the container.

They are the engine's, since no other process lives as long as the container does. Imported only for a container that
has a check.

Source: Dockerfile reference, "HEALTHCHECK"; ``State.Health`` of ``GET /containers/{id}/json`` in the Docker Engine API.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from kata import sysio
from kata.engine.containers.process import RUNNING
from kata.engine.containers.records import rfc3339, write_json
from kata.engine.standard_streams.stdio import Descriptor, Null, Stdio
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kata.engine.containers.process import Process
    from kata.engine.tasks import Tasks
    from kata.settings import HealthSettings

    class CheckedContainer(Protocol):
        """What checks take of a container."""

        init: Process

        @property
        def config(self) -> dict[str, Any]:
            """Its specification."""

        def add_exec(self, exec_id: str, stdio: Stdio, process_spec: dict[str, Any]) -> Process:
            """Take an exec down."""

        async def start(self, exec_id: str) -> Process:
            """Start it."""

        async def kill(self, exec_id: str, signal: int, everything: bool) -> None:
            """Signal it."""

        async def delete_exec(self, exec_id: str) -> Process:
            """Forget it."""


FILE_NAME = "health.json"
"""In the container's directory: ``Status``, ``FailingStreak`` and ``Log``, as Docker has them."""
STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"
_KEPT = 5
_OUTPUT = 4096
_KILLED_S = 5.0
"""How long the end of a check is waited for that was killed."""


class HealthChecks:
    """The checks of one container, from its start to its end.

    Args:
        container: The container.
        wanted: What is run, and how often.
        path: The file that its health is written to.
        tasks: The engine's.
        on_change: Is called with the new status.
    """

    def __init__(
        self,
        container: CheckedContainer,
        wanted: HealthSettings,
        path: str,
        tasks: Tasks,
        on_change: Callable[[str], None],
    ) -> None:
        self._container = container
        self._wanted = wanted
        self._path = path
        self._tasks = tasks
        self._on_change = on_change
        self._health: dict[str, Any] = {"Status": STARTING, "FailingStreak": 0, "Log": []}
        self._number = 0

    async def run(self) -> None:
        """Check, until the container has ended."""
        began = time.monotonic()
        await self._write()
        while await self._is_due():
            if self._container.init.state != RUNNING:
                continue  # a paused one is not asked
            result = await self._check()
            if self._container.init.ended.is_set():
                return
            self._take(result, starting=time.monotonic() - began < self._wanted.start_period_s)
            await self._write()

    async def _is_due(self) -> bool:
        """Wait for the next check; false if the container has ended."""
        try:
            await asyncio.wait_for(self._container.init.ended.wait(), self._wanted.interval_s)
        except TimeoutError:
            return True
        return False

    def _take(self, result: dict[str, Any], *, starting: bool) -> None:
        """Draw the conclusion of an outcome.

        Args:
            result: The outcome.
            starting: In the start period: before the first success, failures do not count.
        """
        health = self._health
        before = health["Status"]
        health["Log"] = [*health["Log"], result][-_KEPT:]
        if result["ExitCode"] == 0:
            health["FailingStreak"] = 0
            health["Status"] = HEALTHY
        elif not (starting and before == STARTING):
            health["FailingStreak"] += 1
            if health["FailingStreak"] >= self._wanted.retries:
                health["Status"] = UNHEALTHY
        if health["Status"] != before:
            self._on_change(health["Status"])

    async def _write(self) -> None:
        try:
            await self._tasks.run_blocking(write_json, self._path, self._health)
        except OSError as error:
            self._tasks.log(f"a container's health cannot be recorded: {error}")

    # ---- one check ----

    async def _check(self) -> dict[str, Any]:
        began_ns = time.time_ns()
        self._number += 1
        exec_id = f"health-{os.getpid()}-{self._number}"
        with _Output() as output:
            status, said = await self._run(exec_id, output)
            return {
                "Start": rfc3339(began_ns),
                "End": rfc3339(time.time_ns()),
                "ExitCode": status,
                "Output": output.text() + said,
            }

    async def _run(self, exec_id: str, output: _Output) -> tuple[int, str]:
        """Run the command; its exit status (-1 if it took too long), and what there is to say of it."""
        config = {
            key: value
            for key, value in (self._container.config.get("process") or {}).items()
            if key != "consoleSize"
        }
        config.update(args=self._wanted.command, terminal=False)
        timeout_s = self._wanted.timeout_s
        until = time.monotonic() + timeout_s
        process = None
        try:
            process = self._container.add_exec(exec_id, output.stdio(), config)
            await asyncio.wait_for(self._container.start(exec_id), timeout_s)
            await asyncio.wait_for(process.ended.wait(), max(0.0, until - time.monotonic()))
            return process.exit_status, ""
        except TimeoutError:
            with contextlib.suppress(KataError):
                await self._container.kill(exec_id, sysio.SIGKILL, False)
            if process is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.ended.wait(), _KILLED_S)
            return -1, f"Health check exceeded timeout ({timeout_s:g}s)"
        except KataError as error:
            return int(getattr(error, "exit_code", 1)), error.message[:_OUTPUT]
        finally:
            if process is not None:
                with contextlib.suppress(KataError):
                    await self._container.delete_exec(exec_id)


class _Output:
    """The beginning of what a command writes; the rest is read and dropped."""

    def __init__(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reading, self._writing = sysio.Fd(reading), sysio.Fd(writing)
        self._data = b""
        asyncio.get_running_loop().add_reader(reading, self._read)

    def stdio(self) -> Stdio:
        """The streams of a command, once."""
        second = os.dup(self._writing.raw)
        os.set_inheritable(second, False)
        return Stdio(False, Null(), Descriptor(self._writing.detach()), Descriptor(second))

    def text(self) -> str:
        """What was written so far."""
        self._read()
        return self._data[:_OUTPUT].decode("utf-8", "replace")

    def _read(self) -> None:
        while self._reading.is_open:
            try:
                piece = os.read(self._reading.raw, 1 << 16)
            except BlockingIOError:
                return
            if not piece:
                self._close_reader()
                return
            self._data = (self._data + piece)[:_OUTPUT]

    def _close_reader(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reading.raw)
        self._reading.close()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reading.is_open:
            self._close_reader()
        if self._writing.is_open:
            self._writing.close()
