"""One process of a container: what it is, which state it is in, how it ended.

The same class serves a container's init (``exec_id`` is empty) and its execs. The states are those of
containerd's Task API; what may follow what is a table, so an impossible order of events is an error with a
name and not a surprise later.
"""

from __future__ import annotations

import asyncio
import enum
import time

from kata.errors import NotFoundError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.engine.standard_streams.stdio import Stdio
    from kata.engine.standard_streams.streams import ProcessStreams


class ProcessState(enum.StrEnum):
    """Where a process is in its life, in runc's words, which are in ``state.json`` and in errors."""

    CREATED = "created"  # the guest holds it, and it has not executed its program
    RUNNING = "running"
    PAUSED = "paused"  # frozen, with all processes of its container
    STOPPED = "stopped"  # its end is on record
    DELETED = "deleted"  # a client has taken note of the end: no other call knows it


CREATED, RUNNING, PAUSED, STOPPED, DELETED = ProcessState

_NEXT: dict[ProcessState, frozenset[ProcessState]] = {
    CREATED: frozenset({RUNNING, STOPPED, DELETED}),
    RUNNING: frozenset({PAUSED, STOPPED}),
    PAUSED: frozenset({RUNNING, STOPPED}),
    STOPPED: frozenset({DELETED}),
    DELETED: frozenset(),
}

# containerd.task.v2's and containerd.v1.types' Status.
TASK_STATUS = {CREATED: 1, RUNNING: 2, STOPPED: 3, PAUSED: 4, DELETED: 3}

KILLED = 137
"""What a process ends as whose virtual machine went away: 128 + SIGKILL."""


class Process:
    """A process record.

    Args:
        container_id: Its container.
        exec_id: Empty for the init.
        stdio: Where its streams go.
        spec: For an exec, the OCI process object; the init's lies in the container's spec.
    """

    __slots__ = (
        "container_id",
        "ended",
        "error",
        "exec_id",
        "exit_status",
        "exited_at_ns",
        "lock",
        "oom_killed",
        "pid",
        "reaped",
        "spec",
        "started_at_ns",
        "state",
        "stdio",
        "streams",
        "watcher",
    )

    def __init__(
        self, container_id: str, exec_id: str, stdio: Stdio, spec: dict[str, Any] | None = None
    ) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.spec = spec
        self.state: ProcessState = CREATED
        self.pid = 0
        self.exit_status = 0
        self.exited_at_ns = 0
        self.started_at_ns = 0
        self.oom_killed = False
        self.error = ""
        self.reaped = asyncio.Event()  # set when the guest has said how it ended, or nobody will any more
        self.ended = asyncio.Event()  # set when the end is on record and may be told
        self.lock = asyncio.Lock()  # an end is not told while a start is being answered
        self.streams: ProcessStreams | None = None
        self.watcher: asyncio.Task[None] | None = None

    @property
    def label(self) -> str:
        """How errors name it."""
        if self.exec_id:
            return f"process {self.exec_id!r} of container {self.container_id!r}"
        return f"container {self.container_id!r}"

    @property
    def alive(self) -> bool:
        """Started and not ended."""
        return self.state in (RUNNING, PAUSED)

    def transition(self, state: ProcessState) -> None:
        """Go to *state*.

        Raises:
            StateError: The table does not allow it.
        """
        if state not in _NEXT[self.state]:
            raise StateError(f"{self.label} cannot go from {self.state} to {state}")
        self.state = state

    # ---- what a caller may ask for in which state, in runc's words ----

    def require_startable(self) -> None:
        """Raises `StateError` unless the process waits to be started."""
        if self.state != CREATED:
            raise StateError(f"cannot start a {self.state} process: {self.label}")

    def require_killable(self) -> None:
        """Raises `NotFoundError` (``process already finished``, which clients parse) if there is nothing to
        signal.
        """
        if self.state in (STOPPED, DELETED):
            raise NotFoundError(f"process already finished: {self.label}")
        if self.state == CREATED and self.exec_id:
            raise StateError(f"cannot kill a process that was not started: {self.label}")

    def require_deletable(self) -> None:
        """Raises `StateError` while the process lives."""
        if self.alive:
            raise StateError(f"cannot delete a {self.state} process: {self.label}", "kill it first")
        if self.state == DELETED:
            raise NotFoundError(f"{self.label} is deleted")

    def require_pausable(self) -> None:
        """Raises `StateError` unless running."""
        if self.state != RUNNING:
            raise StateError(f"cannot pause a {self.state} container: {self.label}")

    def require_resumable(self) -> None:
        """Raises `StateError` unless paused."""
        if self.state != PAUSED:
            raise StateError(f"cannot resume a {self.state} container: {self.label}")

    def require_terminal(self) -> None:
        """Raises `StateError` if there is no terminal to resize."""
        if not self.stdio.terminal:
            raise StateError(f"{self.label} has no terminal")

    # ---- transitions ----

    def start(self, pid: int) -> None:
        """Record that it runs; *pid* is a host process of this sandbox, never a guest's number."""
        self.transition(RUNNING)
        self.pid = pid
        self.started_at_ns = time.time_ns()

    def stop(self, status: int, at_ns: int, error: str = "") -> bool:
        """Take the end down. Returns False, and changes nothing, if it had ended before: the first reason
        stands.

        Args:
            status: Exit status, 0 to 255.
            at_ns: When, nanoseconds of the epoch.
            error: Why, when it was not the process's own doing.
        """
        if self.state in (STOPPED, DELETED):
            return False
        self.transition(STOPPED)
        self.exit_status = status
        self.exited_at_ns = at_ns
        self.error = error
        return True
