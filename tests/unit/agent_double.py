"""An agent without a guest: the protocol's answers, from processes that are scripts in this file.

It stands in for the guest where the engine's own behaviour is tested, and for faults that a real guest does not
commit: answers that lie, streams that do not end, silence.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from kata.errors import KataError, VMLostError
from kata.hypervisor.base import DiskError, Ended
from kata.hypervisor.channel import SerialChannel
from kata.proto import agent_pb, agentext_pb, google_pb, health_pb, types_pb
from kata.ttrpc.server import Server
from kata.ttrpc.status import INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE, TtrpcError

PIPE_BYTES = 1 << 16


class Pipe:
    """A pipe of the guest: bounded, with an end."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = False
        self.changed = asyncio.Event()

    def _change(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        while data:
            while len(self.data) >= PIPE_BYTES and not self.closed:
                await self.changed.wait()
            if self.closed:
                raise TtrpcError(13, "broken pipe")
            room = PIPE_BYTES - len(self.data)
            self.data += data[:room]
            data = data[room:]
            self._change()

    async def read(self, size: int) -> bytes:
        while not self.data and not self.closed:
            await self.changed.wait()
        taken = bytes(self.data[:size])
        del self.data[:size]
        self._change()
        return taken

    def close(self) -> None:
        self.closed = True
        self._change()


class Scripted:
    """A process whose first argument names what it does."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.stdin, self.stdout, self.stderr = Pipe(), Pipe(), Pipe()
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.signals: list[int] = []
        self.size = (0, 0)

    def start(self) -> None:
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        name, *rest = self.argv
        status = 0
        if name == "exit":
            status = int(rest[0])
        elif name == "say":
            await self.stdout.write(rest[0].encode())
            await self.stderr.write(rest[1].encode())
        elif name == "flood":
            left = int(rest[0])
            while left:
                piece = bytes(min(left, 1 << 16))
                await self.stdout.write(piece)
                left -= len(piece)
        elif name == "cat":
            while data := await self.stdin.read(1 << 16):
                await self.stdout.write(data)
        elif name == "sleep":
            await asyncio.Event().wait()
        self.end(status)

    def end(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()

    def signal(self, number: int) -> None:
        self.signals.append(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            if self.task is not None:
                self.task.cancel()
            self.end(128 + number)


class AgentDouble:
    """The services of an agent."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.requests: dict[str, Any] = {}
        self.processes: dict[tuple[str, str], Scripted] = {}
        self.paused: set[str] = set()
        self.oom: asyncio.Queue[str] = asyncio.Queue()
        self.fault: Callable[[str], Coroutine[Any, Any, None]] | None = None
        """Awaited before each call with the method's name: may raise, or never return."""
        self.serving = asyncio.Event()
        self.serving.set()
        self.says = ""  # what it answers to GetMetrics
        self.usage: agent_pb.StatsContainerResponse | None = None  # what it answers to StatsContainer

    def server(self) -> Server:
        return Server(
            {
                "grpc.AgentService": (agent_pb.SERVICES["grpc.AgentService"], self),
                "grpc.Health": (health_pb.SERVICES["grpc.Health"], self),
                "kata.agent.v1.Boot": (agentext_pb.SERVICES["kata.agent.v1.Boot"], self),
                "kata.agent.v1.Processes": (agentext_pb.SERVICES["kata.agent.v1.Processes"], self),
            },
            max_calls=4096,
        )

    async def _enter(self, request: Any, context: Any) -> None:
        self.calls.append(context.method)
        self.requests[context.method] = request
        if self.fault is not None:
            await self.fault(context.method)

    def _process(self, container_id: str, exec_id: str) -> Scripted:
        found = self.processes.get((container_id, "" if exec_id == container_id else exec_id))
        if found is None:
            raise TtrpcError(NOT_FOUND, f"no process {exec_id} in {container_id}")
        return found

    async def Check(self, request: Any, context: Any) -> health_pb.HealthCheckResponse:
        await self._enter(request, context)
        await self.serving.wait()
        return health_pb.HealthCheckResponse(status=1)

    async def Times(self, request: Any, context: Any) -> agentext_pb.BootTimesResponse:
        await self._enter(request, context)
        return agentext_pb.BootTimesResponse(kernel_ns=1000, ready_ns=2000)

    async def _empty(self, request: Any, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        return google_pb.Empty()

    CreateSandbox = DestroySandbox = SetGuestDateTime = ReseedRandomDev = CopyFile = UpdateContainer = _empty

    async def UpdateInterface(self, request: Any, context: Any) -> types_pb.Interface:
        await self._enter(request, context)
        return types_pb.Interface()

    async def UpdateRoutes(self, request: Any, context: Any) -> agent_pb.Routes:
        await self._enter(request, context)
        return agent_pb.Routes()

    async def GetGuestDetails(self, request: Any, context: Any) -> agent_pb.GuestDetailsResponse:
        await self._enter(request, context)
        return agent_pb.GuestDetailsResponse(agent_details=agent_pb.AgentDetails(version="double"))

    async def GetOOMEvent(self, request: Any, context: Any) -> agent_pb.OOMEvent:
        return agent_pb.OOMEvent(container_id=await self.oom.get())

    async def CreateContainer(
        self, request: agent_pb.CreateContainerRequest, context: Any
    ) -> google_pb.Empty:
        await self._enter(request, context)
        assert request.OCI is not None
        assert request.OCI.Process is not None
        self._make(request.container_id, "", request.OCI.Process.Args)
        return google_pb.Empty()

    def _make(self, container_id: str, exec_id: str, argv: list[str]) -> Scripted:
        if argv[0] == "missing":
            text = 'exec: "missing": executable file not found in $PATH'
            raise TtrpcError(NOT_FOUND, f"unable to start container process: {text}")
        if argv[0] == "forbidden":
            raise TtrpcError(7, 'unable to start container process: exec: "forbidden": permission denied')
        made = self.processes[container_id, exec_id] = Scripted(argv)
        return made

    async def StartContainer(self, request: agent_pb.StartContainerRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        self._process(request.container_id, "").start()
        return google_pb.Empty()

    async def ExecProcess(self, request: agent_pb.ExecProcessRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        assert request.process is not None
        self._make(request.container_id, request.exec_id, request.process.Args).start()
        return google_pb.Empty()

    async def SignalProcess(self, request: agent_pb.SignalProcessRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        self._process(request.container_id, request.exec_id).signal(request.signal)
        if request.signal == signal.SIGKILL and not request.exec_id:
            for (container_id, _), process in self.processes.items():
                if container_id == request.container_id:
                    process.signal(signal.SIGKILL)
        return google_pb.Empty()

    async def Signal(self, request: agentext_pb.SignalProcessesRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        for (container_id, _), process in self.processes.items():
            if container_id == request.container_id:
                process.signal(request.signal)
        return google_pb.Empty()

    async def List(self, request: Any, context: Any) -> agentext_pb.ListProcessesResponse:
        await self._enter(request, context)
        return agentext_pb.ListProcessesResponse()

    async def WaitProcess(self, request: Any, context: Any) -> agent_pb.WaitProcessResponse:
        await self._enter(request, context)
        status = await self._process(request.container_id, request.exec_id).status
        if not request.exec_id or request.exec_id == request.container_id:
            for (container_id, exec_id), process in self.processes.items():
                if container_id == request.container_id and exec_id:
                    process.signal(signal.SIGKILL)
        return agent_pb.WaitProcessResponse(status=status)

    async def RemoveContainer(self, request: Any, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        for key in [key for key in self.processes if key[0] == request.container_id]:
            self.processes.pop(key).end(137)
        return google_pb.Empty()

    async def PauseContainer(self, request: Any, context: Any) -> google_pb.Empty:
        self.paused.add(request.container_id)
        return await self._empty(request, context)

    async def ResumeContainer(self, request: Any, context: Any) -> google_pb.Empty:
        self.paused.discard(request.container_id)
        return await self._empty(request, context)

    async def StatsContainer(self, request: Any, context: Any) -> agent_pb.StatsContainerResponse:
        await self._enter(request, context)
        if (request.container_id, "") not in self.processes:
            raise TtrpcError(INVALID_ARGUMENT, "no such container")
        if self.usage is not None:
            return self.usage
        pids = agent_pb.PidsStats(current=3)
        return agent_pb.StatsContainerResponse(cgroup_stats=agent_pb.CgroupStats(pids_stats=pids))

    async def GetMetrics(self, request: Any, context: Any) -> agent_pb.Metrics:
        await self._enter(request, context)
        return agent_pb.Metrics(metrics=self.says)

    async def ReadStdout(
        self, request: agent_pb.ReadStreamRequest, context: Any
    ) -> agent_pb.ReadStreamResponse:
        await self._enter(request, context)
        process = self._process(request.container_id, request.exec_id)
        return agent_pb.ReadStreamResponse(data=await process.stdout.read(request.len))

    async def ReadStderr(
        self, request: agent_pb.ReadStreamRequest, context: Any
    ) -> agent_pb.ReadStreamResponse:
        await self._enter(request, context)
        process = self._process(request.container_id, request.exec_id)
        return agent_pb.ReadStreamResponse(data=await process.stderr.read(request.len))

    async def WriteStdin(
        self, request: agent_pb.WriteStreamRequest, context: Any
    ) -> agent_pb.WriteStreamResponse:
        await self._enter(request, context)
        await self._process(request.container_id, request.exec_id).stdin.write(request.data)
        return agent_pb.WriteStreamResponse(len=len(request.data))

    async def CloseStdin(self, request: agent_pb.CloseStdinRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        self._process(request.container_id, request.exec_id).stdin.close()
        return google_pb.Empty()

    async def TtyWinResize(self, request: agent_pb.TtyWinResizeRequest, context: Any) -> google_pb.Empty:
        await self._enter(request, context)
        process = self._process(request.container_id, request.exec_id)
        process.size = (request.row, request.column)
        if process.status.done():
            raise TtrpcError(UNAVAILABLE, "no tty")
        return google_pb.Empty()


class MachineDouble:
    """A hypervisor that is only a socket pair and a fate."""

    pid = 2**22  # above pid_max: no process of this host has it
    version = "1.2.3"

    def __init__(self, agent: AgentDouble) -> None:
        self.agent = agent
        self.extra_memory_mib = 0
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.server = agent.server()
        self.closed = False
        self.counted: dict[str, dict[str, int]] = {}
        """What it says that it has counted."""
        ours, theirs = socket.socketpair()
        self.channel = SerialChannel(ours.detach)
        self._served = asyncio.create_task(self.server.attach(theirs))

    async def wait(self) -> Ended:
        return await asyncio.shield(self.ended)

    def die(self, error: KataError | None = None) -> None:
        """End as a hypervisor that was killed."""
        if not self.ended.done():
            died = error or VMLostError("the virtual machine ended: QEMU was killed by signal 9")
            self.ended.set_result(Ended(-9, "crashed", died))
        self.drop()

    def drop(self) -> None:
        """Cut the connection to the agent."""
        for connection in list(self.server._connections):
            connection.abort()

    async def stop(self, grace_s: float = 0.0) -> Ended:
        if not self.ended.done():
            self.ended.set_result(Ended(0, "stopped", None))
        self.drop()
        return await self.wait()

    def close(self) -> None:
        self.closed = True

    def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
        self.disk_fails = callback

    def on_traffic(self, callback: Callable[[str, bytes], None] | None) -> None:
        self.traffic: Any = callback

    def console_tail(self, limit: int = 4096) -> str:
        return "console says hello"

    async def processors(self) -> list[str]:
        return []

    async def confined(self) -> None:
        pass

    async def counters(self) -> dict[str, dict[str, int]]:
        return dict(self.counted)

    async def metrics(self) -> dict[str, int]:
        return {"rss_bytes": 1}
