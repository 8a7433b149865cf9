"""What of a container is on the host's disk: ``state.json``, and the log of its output."""

from __future__ import annotations

import errno
import os

from kata.engine.containers.records import StateFile, write_json
from kata.engine.standard_streams.logfile import LogFile
from kata.engine.standard_streams.streams import Log
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.engine.tasks import Tasks
    from kata.settings import ContainerSettings

START_NAME = "start.json"
"""The start ledger of a container that had the sandbox started, in its directory."""


class ContainerRecord:
    """The record of one container. One that its client's settings do not describe has none.

    Args:
        container_id: Its id.
        described: What its client wants recorded; None for nothing.
        identity: The engine, as `StateFile` names it.
        tasks: The engine's.

    Attributes:
        log: Where its output goes besides, if anywhere.
    """

    __slots__ = ("_directory", "_file", "_id", "_tasks", "log")

    def __init__(
        self, container_id: str, described: ContainerSettings | None, identity: dict[str, Any], tasks: Tasks
    ) -> None:
        self._id = container_id
        self._tasks = tasks
        path = self._directory = ""
        self.log: Log | None = None
        if described is not None:
            if described.record_state:
                path = os.path.join(described.directory, "state.json")
                # What goes with the container needs no times.
                self._directory = "" if described.auto_remove else described.directory
            wanted = described.log
            if wanted is not None:
                self.log = Log(LogFile(wanted.path, wanted.max_bytes, wanted.files, tasks.log))
        self._file = StateFile(path, identity)

    def close_log(self) -> None:
        """There is no more output."""
        if self.log is not None:
            self.log.close()

    async def reserve(self) -> None:
        """Take the room on disk that writing the end will need.

        Raises:
            HostError: There is none.
        """
        try:
            await self._tasks.run_blocking(self._file.reserve)
        except OSError as error:
            raise self.unwritable(error) from error

    def write_later(self, **changed: Any) -> None:
        """Write ``state.json`` without waiting for the disk; the order of writes is kept."""
        self._tasks.create_task(self.write(**changed))

    def keep_start(self, record: dict[str, Any]) -> None:
        """Write the start ledger (`kata.engine.timings`) beside ``state.json``, without waiting for it."""
        if self._directory:
            self._tasks.create_task(self._keep_start(record))

    async def _keep_start(self, record: dict[str, Any]) -> None:
        path = os.path.join(self._directory, START_NAME)
        try:
            await self._tasks.run_blocking(lambda: write_json(path, record))
        except OSError as error:
            self._tasks.log(f"cannot keep the times of the start of container {self._id}: {error}")

    async def write(self, **changed: Any) -> OSError | None:
        """Write ``state.json``.

        Returns:
            None, or what kept it from being written, which has been logged.
        """
        try:
            await self._tasks.run_blocking(lambda: self._file.write(**changed))
        except OSError as error:
            self._tasks.log(f"cannot write the state of container {self._id}: {error}")
            return error
        return None

    def unwritable(self, error: OSError) -> HostError:
        """The error for a caller whose container must not run unrecorded."""
        hint = (
            "free some space ('kata gc', 'kata rmi')" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        )
        return HostError(f"the state of container {self._id} cannot be recorded: {error.strerror}", hint)
