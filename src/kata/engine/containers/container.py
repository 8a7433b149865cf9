"""One container of a sandbox: from the bundle to the last of its processes.

The one place where create, start, exec, kill and delete happen; every client ends up here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from kata.agent.client import NULL_STDIN
from kata.engine.containers import spec
from kata.engine.containers.container_kill import SIGKILL, Killer
from kata.engine.containers.container_parts import ContainerParts, has_no_input
from kata.engine.containers.container_record import ContainerRecord
from kata.engine.containers.process import CREATED, DELETED, PAUSED, RUNNING, Process
from kata.engine.containers.process_end import EndOfProcesses
from kata.engine.containers.records import rfc3339
from kata.engine.containers.taskpid import TaskPid, of_path
from kata.engine.standard_streams import stream_setup
from kata.errors import (
    AgentError,
    AlreadyExistsError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
)
from kata.proto import events_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from kata.agent.client import AgentClient
    from kata.engine.access import EtcAccess, MachineControl, StreamAccess
    from kata.engine.containers.hostroot import HostRoot
    from kata.engine.containers.snapshot_root import LayerDisks
    from kata.engine.forwarding.sockets import SocketForwardingState
    from kata.engine.lifecycle.resize import MachineResizer
    from kata.engine.standard_streams.stdio import Stdio
    from kata.engine.standard_streams.streams import ProcessStreams
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.journal import Journal
    from kata.proto import oci_pb
    from kata.proto.codec import Message
    from kata.settings import ClientPolicy, SandboxSettings

    class ContainerHost(StreamAccess, EtcAccess, Protocol):
        """What a container takes of its sandbox."""

        id: str
        client: ClientPolicy
        identity: dict[str, Any]
        tasks: Tasks
        timings: Timings
        journal: Journal
        resizer: MachineResizer

        @property
        def runtime(self) -> MachineControl:
            """The machine."""

        @property
        def settings(self) -> SandboxSettings:
            """What the client wants."""

        @property
        def containers(self) -> Mapping[str, Container]:
            """The containers of the same machine, by their ids."""

        def publish(self, topic: str, event: Message) -> None:
            """Tell what has happened to a task."""

        def has_others(self, container: Container) -> bool:
            """Whether the machine is shared with others that run."""

        def process_ended(self, container: Container, process: Process) -> None:
            """The end of a process has been reported."""

        def health_changed(self, container: Container, status: str) -> None:
            """Its health check has come to another conclusion."""

        def layer_disks(self) -> LayerDisks:
            """The images of snapshots' layers that the machine has as disks."""

        def socket_forwarding(self) -> SocketForwardingState:
            """What all sockets of the host that containers reach have in common."""

        async def network_up(self) -> None:
            """Return when the guest's network is as it should be."""

        async def names_up(self, config: dict[str, Any]) -> None:
            """Return when a container of this specification can ask for names."""


class Container:
    """A container.

    Args:
        sandbox: Whose it is.
        container_id: Its id.
        bundle: Directory of its ``config.json``.
        config: The content of that.
        stdio: Where its init's streams go.
        root: Its root directory on the host, where a client hands one over; otherwise the settings say.

    Attributes:
        oom_kills_counted: Number of processes killed for want of memory by the last count of the guest's kernel.
    """

    def __init__(
        self,
        sandbox: ContainerHost,
        container_id: str,
        bundle: str,
        config: dict[str, Any],
        stdio: Stdio,
        root: HostRoot | None = None,
    ) -> None:
        self.sandbox = sandbox
        self.id = container_id
        self.bundle = bundle
        self._parts = ContainerParts(sandbox, container_id, bundle, config, root)
        self.init = Process(container_id, "", stdio)
        self.execs: dict[str, Process] = {}
        self.created_at_ns = 0
        self.oom_kills_counted = 0
        self._oom_kills_reported = 0
        described = sandbox.settings.container if container_id == sandbox.id else None
        self.record = ContainerRecord(container_id, described, sandbox.identity, sandbox.tasks)
        self._killer = Killer(
            self.init,
            self.execs,
            sandbox.runtime,
            sandbox.tasks,
            sandbox.client,
            lambda: sandbox.has_others(self),
        )
        self._ends = EndOfProcesses(
            self.init,
            self.execs,
            sandbox.runtime,
            sandbox.tasks,
            self.record,
            self._killer,
            lambda topic, event: sandbox.publish(topic, event),
            on_init_gone=self._parts.close_relay,
            before_end=self._parts.carry_back,
            on_reported=self._reported,
        )
        self._task_pid: TaskPid | None = None
        self._described = described

    @property
    def config(self) -> dict[str, Any]:
        """Its specification."""
        return self._parts.config

    def volume_in_guest(self, path: str) -> str:
        """See `ContainerParts.volume_in_guest`."""
        return self._parts.volume_in_guest(path)

    @property
    def task_pid(self) -> int:
        """The number on the host that stands for its processes, and for their namespaces."""
        if self.init.stdio.host_process is not None:
            return self.init.stdio.host_process.pid
        return self._task_pid.pid if self._task_pid is not None else self.sandbox.runtime.host_pid

    # ---- create ----

    async def create(self) -> None:
        """Make it in the guest, up to the point where only `start` is missing.

        Raises:
            KataError: Whatever went wrong; nothing of the container is left then.
        """
        sandbox = self.sandbox
        self.init.streams = stream_setup.open_streams(sandbox, self.init, self.record.log)
        try:
            await self.init.streams.ready()
            await self.record.reserve()
            agent = await self._parts.create(self.init, self._whose_pids)
        except BaseException:
            self.init.streams.abandon()
            self.record.close_log()
            raise
        self.created_at_ns = time.time_ns()
        # A machine that waited was started outside of its sandbox's network namespace; the engine is in that.
        is_elsewhere = sandbox.runtime.machine.waiting is not None and sandbox.settings.network.path
        if is_elsewhere or spec.container_type(self.config) == "pod_container":
            self._task_pid = TaskPid()
        self.init.pid = self.task_pid
        if self.has_process:
            self.init.watcher = asyncio.create_task(self._ends.watch(self.init, agent))
            sandbox.tasks.create_task(self._close_unused_stdin(self.init, agent))
        self.record.write_later(status=CREATED, pid=self.init.pid, created_at=rfc3339(self.created_at_ns))
        stdio = self.init.stdio
        sandbox.publish(
            "/tasks/create",
            events_pb.TaskCreate(
                container_id=self.id,
                bundle=self.bundle,
                io=events_pb.TaskIO(
                    stdin=stdio.stdin.text,
                    stdout=stdio.stdout.text,
                    stderr=stdio.stderr.text,
                    terminal=stdio.terminal,
                ),
                pid=self.init.pid,
            ),
        )

    def _whose_pids(self, path: str) -> str:
        """The container whose PID namespace a path means; empty where it is the pod's own, or none.

        Raises:
            UnsupportedError: It is no process of this sandbox.
        """
        pid = of_path(path)
        if not path or pid == self.sandbox.runtime.host_pid or spec.created_by_crio(self.config):
            return ""  # CRI-O names the pod's by a path of its own making
        for one in self.sandbox.containers.values():
            if one is not self and one.task_pid == pid:
                return "" if spec.container_type(one.config) == "pod_sandbox" else one.id
        raise UnsupportedError(
            f"the container asks for the PID namespace {path}, and no container of its pod has that one",
            "The container whose processes are wanted has to be running, and in the same pod.",
        )

    @property
    def has_process(self) -> bool:
        """Whether it has more than files: a spec without a process is for looking at those."""
        return bool(self.config.get("process"))

    async def _close_unused_stdin(self, process: Process, agent: AgentClient) -> None:
        """An agent that cannot give /dev/null to a process without input has given it a pipe: its end comes at once."""
        if has_no_input(process) and NULL_STDIN not in agent.features:
            try:
                await agent.close_stdin(self.id, process.exec_id or self.id)
            except KataError:
                pass  # it has ended already

    # ---- start, exec ----

    def process(self, exec_id: str) -> Process:
        """The init for an empty id, otherwise that exec.

        Raises:
            NotFoundError: There is none.
        """
        if not exec_id:
            return self.init
        found = self.execs.get(exec_id)
        if found is None:
            raise NotFoundError(f"process {exec_id!r} does not exist in container {self.id!r}")
        return found

    def add_exec(self, exec_id: str, stdio: Stdio, process_spec: dict[str, Any]) -> Process:
        """Take an exec down; `start` makes it.

        Raises:
            AlreadyExistsError: The id is taken.
            StateError: The container is paused or has ended.
            KataError: A stream cannot be opened (said at the start where fifos are held), or the specification is
                malformed.
        """
        if not exec_id or exec_id in self.execs or exec_id == self.id:
            raise AlreadyExistsError(f"process id {exec_id!r} is taken in container {self.id!r}")
        if self.init.state not in (CREATED, RUNNING):
            raise StateError(f"cannot exec in a {self.init.state} container: {self.id!r}")
        spec.process_message(process_spec)  # what is malformed is said now, not at the start
        process = Process(self.id, exec_id, stdio, process_spec)
        if not self.sandbox.client.holds_fifos:
            process.streams = stream_setup.open_streams(self.sandbox, process, None)
        self.execs[exec_id] = process
        self.sandbox.publish(
            "/tasks/exec-added", events_pb.TaskExecAdded(container_id=self.id, exec_id=exec_id)
        )
        return process

    async def start(self, exec_id: str) -> Process:
        """Start the init or an exec; its pid is set when this returns.

        Raises:
            NotFoundError: No such process.
            StateError: It was started before.
            KataError: The command cannot be executed, the guest refused, or the machine is gone.
        """
        process = self.process(exec_id)
        async with process.lock:
            process.require_startable()
            agent = await self.sandbox.runtime.ready()
            if exec_id:
                await self._start_exec(process, agent)
            else:
                await self._start_init(process, agent)
        return process

    async def _start_init(self, process: Process, agent: AgentClient) -> None:
        if not self.has_process:
            raise StateError(f"container {self.id!r} has no process to start")
        await self.sandbox.network_up()
        await self.sandbox.names_up(self.config)
        began = time.monotonic_ns()
        starting = asyncio.ensure_future(agent.start_container(self.id))
        if process.streams is not None:
            process.streams.start()  # right behind the start, not a round trip later
        await starting
        self.sandbox.timings.add("process", began)
        self.sandbox.runtime.machine.free_boot_slot()
        process.start(self.task_pid)
        self.sandbox.publish("/tasks/start", events_pb.TaskStart(container_id=self.id, pid=process.pid))
        # Before the answer: whoever asks about the container next looks there.
        started_at = rfc3339(process.started_at_ns)
        failure = await self.record.write(status=RUNNING, pid=process.pid, started_at=started_at)
        if failure is not None:
            # It would be taken for one that does not run, by `kata ps` as by `kata gc`.
            with contextlib.suppress(KataError):  # it may have ended already
                await self._killer.kill_init()
            raise self.record.unwritable(failure)
        self.record.keep_start(self.sandbox.timings.record())
        try:
            await self._parts.run_hooks("poststart", "running", self.task_pid)
        except KataError:
            with contextlib.suppress(KataError):  # it may have ended already
                await self._killer.kill_init()
            raise
        self._check_health()

    def _check_health(self) -> None:
        """From now on, see how it is."""
        if self._described is None or self._described.health is None or not self._described.record_state:
            return
        from kata.engine.containers import health

        path = os.path.join(self._described.directory, health.FILE_NAME)
        checks = health.HealthChecks(
            self,
            self._described.health,
            path,
            self.sandbox.tasks,
            lambda status: self.sandbox.health_changed(self, status),
        )
        self.sandbox.tasks.create_task(checks.run())

    async def _start_exec(self, process: Process, agent: AgentClient) -> None:
        config = dict(process.spec or {})
        config["terminal"] = process.stdio.terminal
        try:
            if process.streams is None:
                # Not before, as with runc: a client whose containerd dies between the two calls would wait for
                # the end of fifos that we hold, and nobody would ever start or delete the exec.
                process.streams = stream_setup.open_streams(self.sandbox, process, None)
            await process.streams.ready()
            message = spec.process_message(config)
            try:
                waiting = await self._make_exec(process, process.streams, message, agent)
            except AgentError as error:
                what = f"process {process.exec_id!r} of container {self.id!r}"
                raise spec.explain_size(error, what, {"process": config}) from None
        except BaseException as error:
            # As with runc: it can be deleted, and never ran.
            process.stop(getattr(error, "exit_code", 255), time.time_ns(), str(error))
            process.ended.set()
            if process.streams is not None:
                process.streams.abandon()
            raise
        own = process.stdio.host_process
        process.start(self.sandbox.runtime.host_pid if own is None else own.pid)
        if process.streams is not None:
            process.streams.start()
        process.watcher = asyncio.create_task(self._ends.watch(process, agent, waiting))
        self.sandbox.publish(
            "/tasks/exec-started",
            events_pb.TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=process.pid),
        )
        self.sandbox.tasks.create_task(self._close_unused_stdin(process, agent))

    async def _make_exec(
        self, process: Process, streams: ProcessStreams, message: oci_pb.Process, agent: AgentClient
    ) -> asyncio.Future[int] | None:
        """Have the guest make an exec, and ask for its output and its end right behind that, not a round trip later.

        Returns:
            The call that waits for its end; None where that has not been made.

        Raises:
            KataError: The guest has refused; its streams are to be abandoned.
        """
        making = asyncio.ensure_future(
            agent.exec_process(self.id, process.exec_id, message, no_stdin=has_no_input(process))
        )
        await asyncio.sleep(0)  # it is written now, unless it waits for room
        if not agent.takes_calls_in_order:
            await making
            return None
        waiting = asyncio.ensure_future(agent.wait(self.id, process.exec_id))
        streams.start_outputs()
        try:
            await making
        except BaseException:
            waiting.add_done_callback(_pass_over)
            waiting.cancel()
            raise
        return waiting

    def serve_host_process(self, exec_id: str) -> None:
        """Have the process of the host that stands for the init, or for an exec, pass on what it is signalled with."""
        process = self.process(exec_id)
        own = process.stdio.host_process
        if own is None:
            return

        async def kill(signal: int) -> None:
            if exec_id and own.was_killed and process.state == CREATED:
                try:
                    await self.delete_exec(exec_id)  # nobody will start it: its streams are let go of
                    own.close()
                    return
                except StateError:
                    pass  # it was just being started
            await self._killer.kill(process, signal, everything=False)

        async def resize(rows: int, columns: int) -> None:
            await self.resize(exec_id, rows, columns)

        own.serve(kill, resize, self.sandbox.tasks)

    def _reported(self, process: Process) -> None:
        if process.stdio.host_process is not None:
            process.stdio.host_process.end(process.exit_status)
            if process.exec_id:  # the OCI command line deletes no exec: its caller has been told of the end
                self.sandbox.tasks.create_task(self._forget_exec(process.exec_id))
        self.sandbox.process_ended(self, process)

    async def _forget_exec(self, exec_id: str) -> None:
        try:
            await self.delete_exec(exec_id)
        except KataError:
            pass  # it has been deleted meanwhile

    # ---- what else one can do to it ----

    @property
    def oom_kills(self) -> int:
        """Number of processes killed for want of memory, as far as that is known. The guest reports each, but many at
        once only once; its kernel's count lacks those of the agent, and ends with the container.
        """
        return max(self.oom_kills_counted, self._oom_kills_reported)

    def out_of_memory(self) -> None:
        """The guest's kernel killed something of this container for want of memory."""
        self._oom_kills_reported += 1
        self._ends.out_of_memory(self.bundle if spec.created_by_crio(self.config) else "")

    async def kill(self, exec_id: str, signal: int, everything: bool) -> None:
        """Send a signal to the init (empty *exec_id*) or an exec; see `Killer.kill`.

        Raises:
            NotFoundError: No such process, or ``process already finished``.
            KataError: As by `Killer.kill`.
        """
        await self._killer.kill(self.process(exec_id), signal, everything=everything)

    async def pause(self) -> None:
        """Freeze every process.

        Raises:
            StateError: It does not run.
            KataError: The guest refused.
        """
        async with self.init.lock:
            self.init.require_pausable()
            await (await self.sandbox.runtime.ready()).pause(self.id)
            self.init.transition(PAUSED)
        self._freezer_changed(PAUSED, "/tasks/paused", events_pb.TaskPaused(container_id=self.id))

    async def resume(self) -> None:
        """Thaw every process.

        Raises:
            StateError: It is not paused.
            KataError: The guest refused.
        """
        async with self.init.lock:
            self.init.require_resumable()
            await (await self.sandbox.runtime.ready()).resume(self.id)
            self.init.transition(RUNNING)
        self._freezer_changed(RUNNING, "/tasks/resumed", events_pb.TaskResumed(container_id=self.id))

    def _freezer_changed(self, status: str, topic: str, event: Message) -> None:
        self.record.write_later(status=status)
        self.sandbox.publish(topic, event)

    async def resize(self, exec_id: str, rows: int, columns: int) -> None:
        """Tell a process's terminal its size. A process that has ended does not care.

        Raises:
            KataError: It has no terminal, or the guest refused.
        """
        process = self.process(exec_id)
        process.require_terminal()
        if process.alive or (process.state == CREATED and not exec_id):
            agent = await self.sandbox.runtime.ready()
            await agent.resize(self.id, exec_id or self.id, rows, columns)

    async def update(self, resources: dict[str, Any]) -> None:
        """Change the limits of the container in the guest, and the machine with them.

        Raises:
            KataError: They are malformed, the machine cannot become so large, or the guest refused; nothing is changed
                then.
        """
        spec.resources_message(resources)  # what is malformed is said before anything is done
        if self.init.state not in (CREATED, RUNNING, PAUSED):
            raise StateError(f"cannot update a {self.init.state} container: {self.id!r}")
        await self._parts.update(resources)

    async def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that has ended or was never started.

        Raises:
            KataError: No such process, or it lives.
        """
        process = self.process(exec_id)
        async with process.lock:
            process.require_deletable()
            process.transition(DELETED)
            if process.streams is not None:
                process.streams.close()
            self.execs.pop(exec_id, None)
            process.stdio.close()
        return process

    async def stop_unstarted(self) -> None:
        """End an init that was created and never started, so that the container can be deleted."""
        if self.has_process and self.init.state == CREATED and not self.init.ended.is_set():
            try:
                await self.kill("", SIGKILL, everything=True)
            except KataError:
                pass  # it has ended meanwhile, or the machine has
            await self.init.ended.wait()

    async def remove(self) -> None:
        """Take what is left of it out of the guest: its mounts are synced and undone. Once; never raises."""
        await self._parts.remove()
        if self._task_pid is not None:
            self._task_pid.end()

    def close(self) -> None:
        """Let go of every stream, delivered or not."""
        self._parts.close_relay()
        for process in (self.init, *self.execs.values()):
            if process.streams is not None:
                process.streams.close()


def _pass_over(call: asyncio.Future[int]) -> None:
    """Take note of the failure of a call that nobody waits for any more."""
    if not call.cancelled():
        call.exception()
