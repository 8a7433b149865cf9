"""The end of a process: waiting for it in the guest, and what follows from it, in order.

Its output is delivered, its end recorded, then published, then reported to who waits; the ends of a container's execs
before that of its init.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata.engine.containers.process import CREATED, KILLED, STOPPED
from kata.engine.containers.records import rfc3339
from kata.errors import KataError
from kata.proto import events_pb, google_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from kata.agent.client import AgentClient
    from kata.engine.access import MachineControl
    from kata.engine.containers.container_kill import Killer
    from kata.engine.containers.container_record import ContainerRecord
    from kata.engine.containers.process import Process
    from kata.engine.tasks import Tasks
    from kata.proto.codec import Message

EXECS_END_S = 2.0
"""How long an ended init waits for the ends of its container's execs, in seconds: they die with it."""
OOM_NOTICE_S = 0.1
"""How long an exit of 137 waits for a notice of the guest that its memory was short, in seconds."""


def timestamp(ns: int) -> google_pb.Timestamp | None:
    """The protocol's form of nanoseconds of the epoch; absent for 0."""
    return google_pb.Timestamp(seconds=ns // 10**9, nanos=ns % 10**9) if ns else None


class EndOfProcesses:
    """Sees the processes of one container end.

    Args:
        init: Its first process.
        execs: Its others, by their ids.
        machine: The machine it is in.
        tasks: The engine's.
        record: Where the init's end is written down.
        killer: Knows whether the init was told to die.
        publish: Is given (topic, event).
        on_init_gone: Called when nobody of the container is left in the guest.
        before_end: Awaited then, before the container's end is told. Does not raise.
        on_reported: Called with the process when its end has been reported.
    """

    def __init__(
        self,
        init: Process,
        execs: Mapping[str, Process],
        machine: MachineControl,
        tasks: Tasks,
        record: ContainerRecord,
        killer: Killer,
        publish: Callable[[str, Message], None],
        *,
        on_init_gone: Callable[[], None],
        before_end: Callable[[], Awaitable[None]],
        on_reported: Callable[[Process], None],
    ) -> None:
        self._id = init.container_id
        self._init = init
        self._execs = execs
        self._machine = machine
        self._tasks = tasks
        self._record = record
        self._killer = killer
        self._publish = publish
        self._on_init_gone = on_init_gone
        self._before_end = before_end
        self._on_reported = on_reported
        self._oom = asyncio.Event()

    async def watch(
        self, process: Process, agent: AgentClient, waiting: Awaitable[int] | None = None
    ) -> None:
        """Wait for the end of a process and carry out what follows from it.

        Args:
            process: The process.
            agent: The agent that has made it.
            waiting: `AgentClient.wait` of the process, if that has begun.
        """
        try:
            status, error = await (waiting or agent.wait(self._id, process.exec_id or self._id)), ""
        except KataError as problem:
            # The guest did not say how it ended, so it did not end well.
            if not self._machine.is_lost:
                await self._machine.await_exit_reason(f"the agent lost {process.label}: {problem.message}")
            status, error = KILLED, self._machine.lost_reason or problem.message
        process.reaped.set()
        at_ns = time.time_ns()
        async with process.lock:
            try:
                await self._ended(process, status, at_ns, error)
            except Exception as problem:  # a process whose end is never told would hang every client
                self._tasks.log(f"the end of {process.label} was not recorded whole: {problem!r}")
                if process.stop(status, at_ns, error):
                    self._publish_exit(process)
            finally:
                process.ended.set()
        self._on_reported(process)

    async def _ended(self, process: Process, status: int, at_ns: int, error: str) -> None:
        streams = process.streams
        if streams is not None:
            if process.state == CREATED:
                streams.close()
            else:
                await streams.finish()
        if not process.exec_id:
            self._on_init_gone()
            await self._init_ending(status)
            await self._before_end()
        if not process.stop(status, at_ns, error):
            return
        if not process.exec_id:
            try:
                self._record.close_log()
                await self._record.write(
                    status=STOPPED,
                    exit_code=status,
                    finished_at=rfc3339(at_ns),
                    error=error,
                    oom_killed=process.oom_killed,
                    disk_error=self._machine.disk_error,
                )
            finally:
                self._publish_exit(process)
        else:
            self._publish_exit(process)

    def _publish_exit(self, process: Process) -> None:
        self._publish(
            "/tasks/exit",
            events_pb.TaskExit(
                container_id=self._id,
                id=process.exec_id or self._id,
                pid=process.pid,
                exit_status=process.exit_status,
                exited_at=timestamp(process.exited_at_ns),
            ),
        )

    async def _init_ending(self, status: int) -> None:
        """The init is gone, and with it its PID namespace: the ends of its execs are reported before its own."""
        ends = [asyncio.ensure_future(one.ended.wait()) for one in self._execs.values() if one.alive]
        if ends:
            await asyncio.wait(ends, timeout=EXECS_END_S)
            for end in ends:
                end.cancel()
        if status == KILLED and not (self._oom.is_set() or self._killer.requested or self._machine.is_lost):
            try:
                await asyncio.wait_for(self._oom.wait(), OOM_NOTICE_S)
            except TimeoutError:
                pass
        self._init.oom_killed = self._oom.is_set()

    def out_of_memory(self, crio_bundle: str = "") -> None:
        """The guest's kernel killed something of this container for want of memory.

        Args:
            crio_bundle: The container's bundle if CRI-O made it. CRI-O takes no events: it looks for an empty file
                ``oom`` there when the container has ended.
        """
        self._oom.set()
        if crio_bundle:
            try:
                os.close(
                    os.open(os.path.join(crio_bundle, "oom"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
                )
            except OSError as error:
                self._tasks.log(f"container {self._id}: CRI-O is not told of the OOM kill: {error.strerror}")
        self._publish("/tasks/oom", events_pb.TaskOOM(container_id=self._id))
