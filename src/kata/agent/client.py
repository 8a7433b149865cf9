"""Calls to the agent in the guest, with plain arguments and our own errors.

What comes back was written by a hostile guest: numbers are range-checked where they are used as such, text
is escaped and bounded before it becomes part of a message.
"""

from __future__ import annotations

from kata.agent.text import escape_line
from kata.errors import (
    AgentError,
    AgentTimeoutError,
    CommandNotExecutableError,
    CommandNotFoundError,
    GuestProtocolError,
    KataError,
    VMLostError,
)
from kata.proto import agent_pb, agentext_pb, google_pb, health_pb, types_pb
from kata.ttrpc.status import DEADLINE_EXCEEDED, ConnectionLost, ProtocolError, TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeVar

    from kata.proto import oci_pb
    from kata.ttrpc.client import Client, Receiver, Stream
    from kata.ttrpc.messages import Decodable, Encodable

    D = TypeVar("D", bound=Decodable)
    Dial = Callable[[], Awaitable[Client]]

AGENT = "grpc.AgentService"
HEALTH = "grpc.Health"

CALL_S = 60.0
"""Seconds for an ordinary call: emulated guests on a busy host are slow."""
ASK_S = 15.0
"""Seconds for what only informs somebody (statistics, a terminal's size, a list of processes): nobody hangs for it."""
DIAL_S = 10.0
"""Seconds for a further connection; without it a stream goes over the common one."""
CONNECTIONS = "kata.streams.connections"
"""How an agent announces that a stream may have a connection of its own."""
NULL_STDIN = "kata.stdin.null"
"""How an agent announces that a process can have /dev/null as its standard input."""
PIDS_OF = "kata.pids.of"
"""How an agent announces that a container can join another one's PID namespace."""
DEVICE_LIMITS = "kata.device.limits"
"""How an agent announces that block I/O of a container's own disks can be limited, by the host's numbers of these."""
CREATE_S = 120.0
"""Seconds for CreateContainer, which mounts file systems."""

COMMAND_NOT_FOUND = ("executable file not found in $PATH", "no such file or directory")
COMMAND_NOT_EXECUTABLE = ("permission denied", "exec format error", "is a directory")


def command_error(message: str) -> CommandNotFoundError | CommandNotExecutableError | None:
    """The error for a command that could not be started, told by runc's words as clients do; else None."""
    if 'exec: "' not in message:
        return None
    if any(words in message for words in COMMAND_NOT_FOUND):
        return CommandNotFoundError(message, "check the spelling, and that the image has this program")
    if any(words in message for words in COMMAND_NOT_EXECUTABLE):
        return CommandNotExecutableError(
            message, "check the file's permissions and that it is built for this CPU"
        )
    return None


def hint_for(message: str) -> str:
    """What to do about a refusal of the agent's that a user's choice brings about; empty for any other."""
    if message.startswith(("unable to find user", "unable to find group")):
        return "name one that the image's /etc/passwd and /etc/group have, or give a number"
    return ""


class Encoded:
    """A message that is passed on unread.

    Args:
        payload: Its wire format.
    """

    __slots__ = ("payload",)

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def encode(self) -> bytes:
        """Wire format."""
        return self.payload

    @classmethod
    def decode(cls, data: bytes) -> Encoded:
        """From wire format, whatever it is."""
        return cls(data)


class Watcher:
    """Who is told when the guest is lost or lies; this one does nothing about it."""

    async def on_connection_lost(self, error: VMLostError) -> KataError:
        """The connection ended; the better account of it, if there is one."""
        return error

    def on_protocol_violation(self, error: GuestProtocolError) -> None:
        """The guest sent something that the protocol does not allow."""


class _Owner:
    """The receiver of a stream that has its connection to itself, which ends with it."""

    def __init__(self, receiver: Receiver, among: set[Client], client: Client) -> None:
        self._receiver = receiver
        self._among = among
        self._client = client

    def received(self, data: bytes) -> None:
        self._receiver.received(data)

    def ended(self, error: ConnectionLost | TtrpcError | None) -> None:
        self._receiver.ended(error)
        if self._client in self._among:
            self._among.discard(self._client)
            self._client.close()


class AgentClient:
    """One connection to one agent.

    Every method raises `AgentError` (or a subclass) with the agent's words, `AgentTimeoutError` when it does not
    answer, `VMLostError` when the connection is gone, and `GuestProtocolError` when the answer is not one.

    Args:
        client: The connected ttRPC client.
        watcher: Is told of the last two.
        dial: Makes a further connection to the same agent, for a stream of its own; None where there is only one
            channel.

    Attributes:
        features: What the agent can beyond the protocol, once `negotiate_features` has asked.
    """

    def __init__(self, client: Client, watcher: Watcher | None = None, dial: Dial | None = None) -> None:
        self._client = client
        self._watcher = watcher or Watcher()
        self._dial = dial
        self._own: set[Client] = set()
        self.features: frozenset[str] = frozenset()

    async def call(
        self,
        service: str,
        method: str,
        request: Encodable,
        answer: type[D],
        timeout_s: float | None = CALL_S,
    ) -> D:
        """One call; None as *timeout_s* waits for ever."""
        try:
            return await self._client.call(service, method, request, answer, timeout=timeout_s)
        except TtrpcError as error:
            if error.code == DEADLINE_EXCEEDED and timeout_s is not None:
                raise AgentTimeoutError(
                    f"the agent did not answer {method} within {timeout_s:g} s", code=error.code
                ) from None
            failed: ConnectionLost | TtrpcError = error
        except ConnectionLost as error:
            failed = error
        raise await self.explain(failed)

    async def explain(self, error: ConnectionLost | TtrpcError) -> KataError:
        """Our error for one of the connection's, which the watcher is told of."""
        if isinstance(error, TtrpcError):
            text = escape_line(error.message)
            return command_error(text) or AgentError(text, hint_for(text), code=error.code)
        if isinstance(error, ProtocolError):
            return self._protocol_violation(escape_line(str(error)))
        lost = VMLostError(f"the connection to the agent ended: {escape_line(str(error))}")
        return await self._watcher.on_connection_lost(lost)

    async def open(self, service: str, method: str, first: bytes, receiver: Receiver) -> Stream:
        """Begin a streaming call; its end comes to the receiver, for `explain` to put into words.

        Where the agent takes further connections the call gets one, which ends with it: then neither answers nor
        other streams stand behind its data.
        """
        client = await self._further() or self._client
        if client is not self._client:
            receiver = _Owner(receiver, self._own, client)
        try:
            return client.open(service, method, first, receiver)
        except (TtrpcError, ConnectionLost) as error:
            failed = error
        raise await self.explain(failed)

    async def _further(self) -> Client | None:
        """A connection for one stream; None if it has to be the common one."""
        if self._dial is None or CONNECTIONS not in self.features:
            return None
        from asyncio import wait_for

        try:
            client = await wait_for(self._dial(), DIAL_S)
        except (OSError, KataError, TimeoutError):
            return None
        self._own.add(client)
        return client

    async def negotiate_features(self) -> None:
        """Ask what the agent can beyond the protocol: `features` afterwards. An agent that does not say has
        none.
        """
        try:
            details = (await self.details()).agent_details
        except AgentError:
            return
        if details is not None:
            self.features = frozenset(details.extra_features)

    def _protocol_violation(self, what: str) -> GuestProtocolError:
        error = GuestProtocolError(f"the agent broke the protocol: {what}")
        self._watcher.on_protocol_violation(error)
        return error

    async def _empty(self, method: str, request: Encodable, timeout_s: float | None = CALL_S) -> None:
        await self.call(AGENT, method, request, google_pb.Empty, timeout_s)

    def close(self) -> None:
        """End the connections; calls in flight fail."""
        self._client.close()
        for client in tuple(self._own):
            client.close()

    # ---- health ----

    async def check(self, timeout_s: float | None) -> None:
        """Health.Check; returns when the agent serves."""
        await self.call(HEALTH, "Check", health_pb.CheckRequest(), health_pb.HealthCheckResponse, timeout_s)

    # ---- sandbox ----

    async def create_sandbox(self, request: agent_pb.CreateSandboxRequest) -> None:
        await self._empty("CreateSandbox", request, CREATE_S)

    async def destroy_sandbox(self, timeout_s: float = CALL_S) -> None:
        await self._empty("DestroySandbox", agent_pb.DestroySandboxRequest(), timeout_s)

    async def set_time(self, now_ns: int) -> None:
        """Set the guest's clock; *now_ns* counts from the epoch."""
        request = agent_pb.SetGuestDateTimeRequest(Sec=now_ns // 10**9, Usec=now_ns % 10**9 // 1000)
        await self._empty("SetGuestDateTime", request)

    async def reseed(self, data: bytes) -> None:
        """Give the guest's kernel randomness."""
        await self._empty("ReseedRandomDev", agent_pb.ReseedRandomDevRequest(data=data))

    async def update_interface(self, interface: types_pb.Interface) -> None:
        request = agent_pb.UpdateInterfaceRequest(interface=interface)
        await self.call(AGENT, "UpdateInterface", request, types_pb.Interface)

    async def update_routes(self, routes: Sequence[types_pb.Route]) -> None:
        request = agent_pb.UpdateRoutesRequest(routes=agent_pb.Routes(Routes=list(routes)))
        await self.call(AGENT, "UpdateRoutes", request, agent_pb.Routes)

    async def add_neighbors(self, neighbors: Sequence[types_pb.ARPNeighbor]) -> None:
        wrapped = agent_pb.ARPNeighbors(ARPNeighbors=list(neighbors))
        await self._empty("AddARPNeighbors", agent_pb.AddARPNeighborsRequest(neighbors=wrapped))

    async def copy_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a small file below the guest's share directory, owned by root."""
        request = agent_pb.CopyFileRequest(
            path=path, file_size=len(content), file_mode=0o100000 | mode, dir_mode=0o755, data=content
        )
        await self._empty("CopyFile", request)

    async def details(self, timeout_s: float = CALL_S) -> agent_pb.GuestDetailsResponse:
        request = agent_pb.GuestDetailsRequest()
        return await self.call(AGENT, "GetGuestDetails", request, agent_pb.GuestDetailsResponse, timeout_s)

    async def oom_event(self) -> str:
        """Wait for the next out-of-memory kill; the container's id."""
        request = agent_pb.GetOOMEventRequest()
        return (await self.call(AGENT, "GetOOMEvent", request, agent_pb.OOMEvent, None)).container_id

    # ---- containers and processes ----

    async def create_container(self, request: Encodable, timeout_s: float = 0) -> None:
        """Make a container; *request* is a `create_request`, encoded beforehand or not."""
        await self._empty("CreateContainer", request, timeout_s or CREATE_S)

    async def start_container(self, container_id: str) -> None:
        await self._empty("StartContainer", agent_pb.StartContainerRequest(container_id=container_id))

    async def remove_container(self, container_id: str, timeout_s: int = 30) -> None:
        request = agent_pb.RemoveContainerRequest(container_id=container_id, timeout=timeout_s)
        await self._empty("RemoveContainer", request, timeout_s + 5.0)

    async def exec_process(
        self, container_id: str, exec_id: str, process: oci_pb.Process, *, no_stdin: bool = False
    ) -> None:
        """Make and start a further process; *no_stdin* gives it /dev/null, if the agent can (`NULL_STDIN`)."""
        request = agent_pb.ExecProcessRequest(
            container_id=container_id, exec_id=exec_id, process=process, no_stdin=no_stdin
        )
        await self._empty("ExecProcess", request)

    async def signal(
        self, container_id: str, exec_id: str, number: int, timeout_s: float | None = CALL_S
    ) -> None:
        request = agent_pb.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=number)
        await self._empty("SignalProcess", request, timeout_s)

    async def signal_all(self, container_id: str, number: int, timeout_s: float | None = CALL_S) -> None:
        """To every process of a container, also to those that its processes have started (`kata.processes`)."""
        request = agentext_pb.SignalProcessesRequest(container_id=container_id, signal=number)
        await self.call("kata.agent.v1.Processes", "Signal", request, google_pb.Empty, timeout_s)

    async def wait(self, container_id: str, exec_id: str) -> int:
        """The process's exit status, 0 to 255; waits for ever."""
        request = agent_pb.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        status = (await self.call(AGENT, "WaitProcess", request, agent_pb.WaitProcessResponse, None)).status
        if not 0 <= status <= 255:
            raise self._protocol_violation(f"a process ended with status {status}")
        return status

    async def pause(self, container_id: str) -> None:
        await self._empty("PauseContainer", agent_pb.PauseContainerRequest(container_id=container_id))

    async def resume(self, container_id: str) -> None:
        await self._empty("ResumeContainer", agent_pb.ResumeContainerRequest(container_id=container_id))

    async def update(self, container_id: str, resources: oci_pb.LinuxResources) -> None:
        request = agent_pb.UpdateContainerRequest(container_id=container_id, resources=resources)
        await self._empty("UpdateContainer", request)

    async def stats(self, container_id: str) -> agent_pb.StatsContainerResponse:
        request = agent_pb.StatsContainerRequest(container_id=container_id)
        return await self.call(AGENT, "StatsContainer", request, agent_pb.StatsContainerResponse, ASK_S)

    async def resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        request = agent_pb.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._empty("TtyWinResize", request, ASK_S)

    # ---- streams: as slow as the process and the reader want, so no deadline ----

    async def read(self, container_id: str, exec_id: str, name: str, size: int) -> bytes:
        """The next piece of ``stdout`` or ``stderr``, at most *size* bytes; empty at the end."""
        request = agent_pb.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        method = "ReadStdout" if name == "stdout" else "ReadStderr"
        data = (await self.call(AGENT, method, request, agent_pb.ReadStreamResponse, None)).data
        if len(data) > size:
            raise self._protocol_violation(f"{method} gave {len(data)} bytes instead of at most {size}")
        return data

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> None:
        """Write all of *data*; returns when it is in the process's pipe."""
        while data:
            request = agent_pb.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
            answer = await self.call(AGENT, "WriteStdin", request, agent_pb.WriteStreamResponse, None)
            if not 0 < answer.len <= len(data):
                raise self._protocol_violation(f"{answer.len} of {len(data)} bytes were written")
            data = data[answer.len :]

    async def set_processors(self, count: int) -> None:
        """Have the guest use so many of its processors (`kata.machine`)."""
        request = agentext_pb.SetProcessorsRequest(count=count)
        await self.call("kata.agent.v1.Machine", "SetProcessors", request, google_pb.Empty)

    async def prepare_network(self, request: agentext_pb.PrepareNetworkRequest) -> list[tuple[int, str]]:
        """Set kernel parameters, with a device before its interface comes up (`kata.network`).

        Returns:
            Of what the guest's kernel has refused: position in the request, and why.
        """
        return await self._refusals("Prepare", request)

    async def route(self, request: agentext_pb.RouteRequest) -> list[tuple[int, str]]:
        """Remove and add routes and rules (`kata.network`); as `prepare_network`, the rules behind the routes."""
        return await self._refusals("Route", request)

    async def hide_interface(self, device_path: str) -> None:
        """Take an interface away whose device stays (`kata.network`)."""
        request = agentext_pb.HideInterfaceRequest(device_path=device_path)
        await self.call("kata.agent.v1.Network", "Hide", request, google_pb.Empty)

    async def _refusals(self, method: str, request: Encodable) -> list[tuple[int, str]]:
        from kata.agent.text import escape_line

        answer = await self.call("kata.agent.v1.Network", method, request, agentext_pb.NetworkRefusals)
        return [(one.position, escape_line(one.reason, 200)) for one in answer.refused]

    async def memory_total(self) -> int:
        """``MemTotal`` of the guest, in bytes."""
        found = await self.call(AGENT, "GetMetrics", agent_pb.GetMetricsRequest(), agent_pb.Metrics)
        _before, _, after = found.metrics.partition('kata_guest_meminfo{item="mem_total"} ')
        word = after.partition("\n")[0]
        if not word.isdecimal():
            raise self._protocol_violation(f"its memory is {word[:40]!r}")
        return int(word)

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        await self._empty(
            "CloseStdin", agent_pb.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        )


def create_request(
    container_id: str,
    spec: oci_pb.Spec,
    storages: list[agent_pb.Storage],
    devices: list[agent_pb.Device],
    *,
    shares_pids: bool = False,
    no_stdin: bool = False,
    pids_of: str = "",
) -> agent_pb.CreateContainerRequest:
    """The request for a container whose init is named after it, as the original's hosts do.

    Args:
        container_id: Its id.
        spec: The specification as the guest is to see it.
        storages: What has to be mounted before.
        devices: Disks of the machine that it gets as devices.
        shares_pids: It joins the sandbox's PID namespace.
        no_stdin: Its standard input is /dev/null, if the agent can (`NULL_STDIN`).
        pids_of: The container whose PID namespace it joins (only with `PIDS_OF`); empty for none.
    """
    return agent_pb.CreateContainerRequest(
        container_id=container_id,
        exec_id=container_id,
        devices=devices,
        storages=storages,
        OCI=spec,
        sandbox_pidns=shares_pids,
        no_stdin=no_stdin,
        pids_of=pids_of,
    )


async def boot_times(agent: AgentClient) -> agentext_pb.BootTimesResponse | None:
    """When the guest's kernel and agent were ready, by the guest's clock; None if this agent does not
    tell.
    """
    request = agentext_pb.BootTimesRequest()
    try:
        return await agent.call("kata.agent.v1.Boot", "Times", request, agentext_pb.BootTimesResponse, 10.0)
    except AgentError:
        return None
