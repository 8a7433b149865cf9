"""The containerd Task API (``containerd.task.v2.Task``, and v3, which has the same words).

Its words are on one side, `Sandbox` and `Container` on the other.

Codes and phrases are runc's and containerd's, because their clients parse them.
"""

from __future__ import annotations

import asyncio
import json
import os

from kata import __version__, paths
from kata.engine.containers.container_kill import KILL_S
from kata.engine.containers.process import CREATED, DELETED, TASK_STATUS
from kata.engine.containers.process_end import timestamp
from kata.engine.containers.spec import refuse_foreign, resolve_sources
from kata.engine.launch import check_id
from kata.engine.standard_streams.stdio import parse_stdio
from kata.errors import ConfigError, NotFoundError, UnsupportedError
from kata.proto import google_pb, task_pb
from kata.ttrpc.server import finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kata.engine.access import MachineControl
    from kata.engine.containers.container import Container
    from kata.engine.containers.hostroot import HostRoot
    from kata.engine.lifecycle.life_events import LifeEvents
    from kata.engine.standard_streams.stdio import Stdio
    from kata.engine.tasks import Tasks
    from kata.journal import Journal
    from kata.proto.codec import Message
    from kata.settings import ClientPolicy, SandboxSettings
    from kata.ttrpc.server import Context

    class TaskSandbox(Protocol):
        """What the Task API takes of a sandbox: its containers, and its end."""

        id: str
        is_pod: bool
        client: ClientPolicy
        settings: SandboxSettings
        journal: Journal
        tasks: Tasks
        life_events: LifeEvents
        containers: dict[str, Container]

        @property
        def runtime(self) -> MachineControl:
            """The machine."""

        @property
        def ended(self) -> asyncio.Event:
            """Is set when nothing of the sandbox is left but this process."""

        def container(self, container_id: str, *, may_come: bool = False) -> Container:
            """The container with this id."""

        async def create(
            self,
            container_id: str,
            bundle: str,
            config: dict[str, Any],
            stdio: Stdio,
            root: HostRoot | None = None,
        ) -> Container:
            """Make a container."""

        def publish(self, topic: str, event: Message) -> None:
            """Tell what has happened to a task."""

        def end(self, grace_s: float = ...) -> None:
            """End the sandbox."""


SERVICE = "containerd.task.v2.Task"
SERVICE_3 = "containerd.task.v3.Task"
"""What containerd 2 calls it. No message differs from version 2's."""
_MAX_SPEC_BYTES = 16 << 20


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is not a JSON object")
    return found


def _read_config(bundle: str) -> dict[str, Any]:
    from kata import given_paths

    path = os.path.join(bundle, "config.json")
    try:
        raw = given_paths.read(path, _MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > _MAX_SPEC_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_SPEC_BYTES} bytes")
    return _json_object(raw, path)


def _let_go(stdio: Stdio) -> None:
    """Let go of the streams of a process that there will not be: their other ends may be waited for, by conmon."""
    stdio.close()
    if stdio.host_process is not None:
        stdio.host_process.close()


class TaskService:
    """The handlers.

    Args:
        sandbox: What they act on.
    """

    def __init__(self, sandbox: TaskSandbox) -> None:
        self._sandbox = sandbox

    @finish
    async def Create(
        self, request: task_pb.CreateTaskRequest, context: Context
    ) -> task_pb.CreateTaskResponse:
        check_id(request.id)
        if request.checkpoint:
            raise UnsupportedError(
                "a container cannot be restored from a checkpoint: its virtual machine has none"
            )
        config = await self._sandbox.tasks.run_blocking(_read_config, request.bundle)
        stdio = await self._stdio(request)
        try:
            root = self._prepare(request, config, stdio)
            container = await self._sandbox.create(request.id, request.bundle, config, stdio, root)
        except BaseException:
            _let_go(stdio)
            if not self._sandbox.containers:
                await self._give_up()
            raise
        container.serve_host_process("")
        return task_pb.CreateTaskResponse(pid=container.init.pid)

    def _prepare(
        self, request: task_pb.CreateTaskRequest, config: dict[str, Any], stdio: Stdio
    ) -> HostRoot | None:
        """Change a specification as its client needs it; the root directory, where that is one of the host's.

        Raises:
            KataError: It asks for what there is not in a guest.
        """
        if stdio.host_process is not None and self._sandbox.containers:
            from kata.engine.containers.host_process import as_member

            as_member(config, self._sandbox.id)
        if not self._sandbox.client.foreign_specs:
            return None
        resolve_sources(config, request.bundle)
        refuse_foreign(config)
        sysctls = self._sandbox.settings.sysctls
        if sysctls:  # of a pod that has no container of its own to set them
            linux = config.setdefault("linux", {})
            linux["sysctl"] = {**sysctls, **(linux.get("sysctl") or {})}
        return self._host_root(request, config)

    async def _stdio(self, request: task_pb.CreateTaskRequest | task_pb.ExecProcessRequest) -> Stdio:
        """The streams of a process: what the client names, or what a process of the host hands over.

        Raises:
            KataError: They are of a kind that there is not, or the process does not hand them over.
        """
        if not request.stdin.startswith(paths.HANDOVER):
            return parse_stdio(request.terminal, request.stdin, request.stdout, request.stderr)
        from kata.engine.containers import host_process

        tasks = self._sandbox.tasks
        process = await tasks.run_blocking(host_process.take, request.stdin.removeprefix(paths.HANDOVER))
        process.record(self._sandbox.journal)
        cgroup = self._sandbox.runtime.machine.cgroup
        if (
            cgroup is not None
        ):  # it counts as the sandbox's; in the background, since that takes the kernel a while
            tasks.create_task(tasks.run_blocking(cgroup.join, [process.pid]))
        return process.stdio(request.terminal)

    def _host_root(self, request: task_pb.CreateTaskRequest, config: dict[str, Any]) -> HostRoot:
        """The root directory in the bundle, with what the client wants mounted there."""
        from kata.engine.containers.hostroot import HostRoot

        path = str((config.get("root") or {}).get("path") or "rootfs")
        return HostRoot(
            os.path.join(request.bundle, path),
            request.rootfs,
            self._sandbox.journal,
            self._sandbox.runtime.machine.host,
        )

    async def _give_up(self) -> None:
        """A person's sandbox is of no use without its container: nothing of it is left when they read why."""
        if self._sandbox.client.ends_with_init:
            self._sandbox.end()
            await self._sandbox.ended.wait()

    @finish
    async def Start(self, request: task_pb.StartRequest, context: Context) -> task_pb.StartResponse:
        container = self._sandbox.container(request.id)
        try:
            process = await container.start(request.exec_id)
        except BaseException:
            if (
                request.exec_id
                and (own := container.process(request.exec_id).stdio.host_process) is not None
            ):
                own.close()
            if not request.exec_id and container.init.state == CREATED:
                await self._give_up()
            raise
        return task_pb.StartResponse(pid=process.pid)

    @finish
    async def Exec(self, request: task_pb.ExecProcessRequest, context: Context) -> google_pb.Empty:
        if request.spec is None:
            raise ConfigError("an exec needs a process specification")
        config = _json_object(request.spec.value, "the process specification")
        container = self._sandbox.container(request.id)
        stdio = await self._stdio(request)
        try:
            container.add_exec(request.exec_id, stdio, config)
        except BaseException:
            _let_go(stdio)
            raise
        container.serve_host_process(request.exec_id)
        return google_pb.Empty()

    @finish
    async def Kill(self, request: task_pb.KillRequest, context: Context) -> google_pb.Empty:
        container = self._sandbox.container(request.id)
        await container.kill(request.exec_id, request.signal, request.all)
        return google_pb.Empty()

    async def Wait(self, request: task_pb.WaitRequest, context: Context) -> task_pb.WaitResponse:
        process = self._sandbox.container(request.id).process(request.exec_id)
        await process.ended.wait()
        return task_pb.WaitResponse(
            exit_status=process.exit_status, exited_at=timestamp(process.exited_at_ns)
        )

    @finish
    async def Delete(self, request: task_pb.DeleteRequest, context: Context) -> task_pb.DeleteResponse:
        sandbox = self._sandbox
        container = sandbox.container(request.id)
        if request.exec_id:
            process = await container.delete_exec(request.exec_id)
        else:
            process = container.init
            await container.stop_unstarted()
            async with process.lock:
                process.require_deletable()
                process.transition(DELETED)
            if sandbox.settings.container is None or container.id != sandbox.id:
                # Otherwise it is kept as long as its directory is.
                sandbox.life_events.record("container.deleted", container=container.id)
            if sandbox.client.ends_with_init and container.id == sandbox.id:
                # Deleted means for a person: nothing of it is left on this host.
                sandbox.end()
                await sandbox.ended.wait()
            else:
                await container.remove()
                container.close()
            sandbox.containers.pop(container.id, None)
        answer = task_pb.DeleteResponse(
            pid=process.pid, exit_status=process.exit_status, exited_at=timestamp(process.exited_at_ns)
        )
        if not request.exec_id:  # of an exec that is deleted, clients of runc's shim are not told either
            self._publish_delete(container.id, answer)
        return answer

    def _publish_delete(self, container_id: str, answer: task_pb.DeleteResponse) -> None:
        from kata.proto import events_pb

        event = events_pb.TaskDelete(
            container_id=container_id,
            pid=answer.pid,
            exit_status=answer.exit_status,
            exited_at=answer.exited_at,
            id=container_id,
        )
        self._sandbox.publish("/tasks/delete", event)

    async def State(self, request: task_pb.StateRequest, context: Context) -> task_pb.StateResponse:
        container = self._sandbox.container(request.id)
        process = container.process(request.exec_id)
        stdio = process.stdio
        return task_pb.StateResponse(
            id=request.id,
            bundle=container.bundle,
            pid=process.pid,
            status=TASK_STATUS[process.state],
            stdin=stdio.stdin.text,
            stdout=stdio.stdout.text,
            stderr=stdio.stderr.text,
            terminal=stdio.terminal,
            exit_status=process.exit_status,
            exited_at=timestamp(process.exited_at_ns),
            exec_id=request.exec_id,
        )

    async def Pids(self, request: task_pb.PidsRequest, context: Context) -> task_pb.PidsResponse:
        self._sandbox.container(request.id)
        # Only pids of this host: a guest's number would name a stranger's process here.
        return task_pb.PidsResponse(processes=[task_pb.ProcessInfo(pid=self._sandbox.runtime.host_pid)])

    @finish
    async def Pause(self, request: task_pb.PauseRequest, context: Context) -> google_pb.Empty:
        await self._sandbox.container(request.id).pause()
        return google_pb.Empty()

    @finish
    async def Resume(self, request: task_pb.ResumeRequest, context: Context) -> google_pb.Empty:
        await self._sandbox.container(request.id).resume()
        return google_pb.Empty()

    async def Checkpoint(self, request: task_pb.CheckpointTaskRequest, context: Context) -> google_pb.Empty:
        self._sandbox.container(request.id)
        raise UnsupportedError("a container in a virtual machine cannot be checkpointed by its processes")

    async def ResizePty(self, request: task_pb.ResizePtyRequest, context: Context) -> google_pb.Empty:
        container = self._sandbox.container(request.id, may_come=True)
        await container.resize(request.exec_id, request.height, request.width)
        return google_pb.Empty()

    @finish
    async def CloseIO(self, request: task_pb.CloseIORequest, context: Context) -> google_pb.Empty:
        process = self._sandbox.container(request.id, may_come=True).process(request.exec_id)
        if request.stdin and process.streams is not None and process.streams.input is not None:
            process.streams.input.end_of_input()
        return google_pb.Empty()

    @finish
    async def Update(self, request: task_pb.UpdateTaskRequest, context: Context) -> google_pb.Empty:
        if request.resources is None:
            raise ConfigError("an update needs resources")
        resources = _json_object(request.resources.value, "the resources")
        await self._sandbox.container(request.id).update(resources)
        return google_pb.Empty()

    async def Stats(self, request: task_pb.StatsRequest, context: Context) -> task_pb.StatsResponse:
        from kata.engine.services import stats

        container = self._sandbox.container(request.id)
        if not (container.init.alive or container.init.state == CREATED):
            raise NotFoundError(f"no statistics: {container.init.label} has ended")
        agent = await self._sandbox.runtime.ready()
        answer = await agent.stats(container.id)
        shape_v2 = self._sandbox.client.host_shaped_stats and stats.host_has_v2()
        return task_pb.StatsResponse(stats=stats.metrics(answer, shape_v2=shape_v2))

    async def Connect(self, request: task_pb.ConnectRequest, context: Context) -> task_pb.ConnectResponse:
        container = self._sandbox.containers.get(request.id)
        pid = self._sandbox.runtime.host_pid if container is None else container.task_pid
        return task_pb.ConnectResponse(shim_pid=os.getpid(), task_pid=pid, version=__version__)

    async def Shutdown(self, request: task_pb.ShutdownRequest, context: Context) -> google_pb.Empty:
        sandbox = self._sandbox
        if sandbox.is_pod or (sandbox.containers and not request.now):
            return google_pb.Empty()  # as runc's shim: it still serves containers; and a pod outlives them
        # *now* is an order, which does not wait for the guest.
        sandbox.end(KILL_S) if request.now else sandbox.end()
        await asyncio.wait_for(sandbox.ended.wait(), 60)
        return google_pb.Empty()
