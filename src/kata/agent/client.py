"""Calls to the agent in the guest, with plain arguments and our own errors.

Answers come from a hostile guest: numbers are range-checked before they are used, text is escaped and bounded before it
becomes part of a message.
"""

from __future__ import annotations

import time

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
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from typing import Protocol, TypeVar

    from kata.metrics.histogram import Durations
    from kata.proto import oci_pb
    from kata.ttrpc.client import Client, Receiver, Stream
    from kata.ttrpc.messages import Decodable, Encodable

    class CallSpan(Protocol):
        """The span of a call (`kata.tracing.Span`)."""

        def header(self) -> str:
            """What the agent is told of it."""

        def end(self, end_ns: int = 0, error: str = "") -> None:
            """The call has ended."""

    D = TypeVar("D", bound=Decodable)
    Dial = Callable[[], Awaitable[Client]]

AGENT = "grpc.AgentService"
HEALTH = "grpc.Health"

CALL_S = 60.0
"""Timeout of an ordinary call, in seconds: emulated guests on a busy host are slow."""
ASK_S = 15.0
"""Timeout, in seconds, of calls that only carry information (statistics, a terminal's size, a list of processes): a
client should not hang for them."""
CLOCK_CALL_S = 10.0
"""Timeout, in seconds, of a look at the guest's clock: one that took longer says nothing."""
DIAL_S = 10.0
"""Timeout, in seconds, for opening a further connection; if that fails, the stream uses the shared one."""
STREAMS = "kata.streams"
"""Feature of an agent: it offers direct streams (`kata.agent.streams`), and begins with the calls of a connection in
their order."""
CONNECTIONS = "kata.streams.connections"
"""Feature of an agent: a stream may have a connection of its own."""
NULL_STDIN = "kata.stdin.null"
"""Feature of an agent: a process can have /dev/null as its standard input."""
PIDS_OF = "kata.pids.of"
"""Feature of an agent: a container can join another one's PID namespace."""
DEFAULT_ERRNO = "kata.seccomp.default_errno"
"""Feature of an agent: a seccomp profile's default action has the error number that the profile names."""
DEVICE_LIMITS = "kata.device.limits"
"""Feature of an agent: block I/O of a container's own disks can be limited, by the host's device numbers."""
VERSION = "kata.version"
"""Feature of an agent: its program says its version also as a container's first process."""
LAYERS = "kata.layers"
"""Feature of an agent: what was written to a container's writable layer can be read out."""
MAX_LAYER = 3 << 20
"""Maximum length of a part of that, encoded."""
TRACE_HEADER = "traceparent"
"""Key of a call's metadata: the span that it is a part of, in the form of W3C Trace Context."""
MAX_STATS = 256 << 10
"""Maximum length of a container's figures, encoded: what is in them takes forty times as much room when it is decoded,
and a real guest needs some KiB.
"""
CREATE_S = 120.0
"""Timeout, in seconds, of CreateContainer, which mounts file systems."""

COMMAND_NOT_FOUND = ("executable file not found in $PATH", "no such file or directory")
COMMAND_NOT_EXECUTABLE = ("permission denied", "exec format error", "is a directory")


def command_error(message: str) -> CommandNotFoundError | CommandNotExecutableError | None:
    """The error for a command that could not be started, or None for any other message.

    Args:
        message: The agent's message. It is in runc's words, by which clients too recognise these errors.
    """
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
    """The hint for an agent's refusal that is caused by a user's choice; empty for any other message."""
    if message.startswith(("unable to find user", "unable to find group", "uids and gids must be")):
        return "name one that the image's /etc/passwd and /etc/group have, or give a number"
    return ""


class Encoded:
    """A message that is passed on without decoding it.

    Args:
        payload: The encoded message.
    """

    __slots__ = ("payload",)

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def encode(self) -> bytes:
        """Wire format."""
        return self.payload

    @classmethod
    def decode(cls, data: bytes) -> Encoded:
        """Wrap *data*, which is not checked."""
        return cls(data)


class Watcher:
    """Is notified when the connection to the guest ends or the guest breaks the protocol. This one does nothing."""

    async def on_connection_lost(self, error: VMLostError) -> KataError:
        """The connection ended. Returns the error to raise: a more precise one than *error* if the cause is known."""
        return error

    def on_protocol_violation(self, error: GuestProtocolError) -> None:
        """The guest broke the protocol."""


class _Owner:
    """The receiver of a stream with a connection of its own, which is closed when the stream ends."""

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

    Every method raises `AgentError` (or a subclass) with the agent's message, `AgentTimeoutError` when the agent does
    not answer in time, `VMLostError` when the connection has ended, and `GuestProtocolError` when the answer is
    invalid.

    Args:
        client: The connected ttRPC client.
        watcher: Is notified of `VMLostError` and `GuestProtocolError`.
        dial: Opens a further connection to the same agent, for a single stream; None where there is only one channel.
        durations: Is given how long each call took, by its method; those of other services than `AGENT` have that
            service's name and a slash before it.

    Attributes:
        features: The agent's extensions of the protocol (``AgentDetails.extra_features``); empty until
            `negotiate_features` was called.
        calls_made: Calls of `AGENT` that were written to the connection before there was a client, method to stream.
            The first call of each such method is that one, and waits for its answer.
        trace: Begins the span of a call (service, method, timeout), or says that it has none; None where there is no
            tracing.
    """

    def __init__(
        self,
        client: Client,
        watcher: Watcher | None = None,
        dial: Dial | None = None,
        durations: Durations | None = None,
    ) -> None:
        self._client = client
        self.durations = durations
        self._watcher = watcher or Watcher()
        self._dial = dial
        self._own: set[Client] = set()
        self.features: frozenset[str] = frozenset()
        self.calls_made: dict[str, int] = {}
        self.trace: Callable[[str, str, float | None], CallSpan | None] | None = None

    @property
    def client(self) -> Client:
        """The connection, for another one of these: when this one is not used any more."""
        return self._client

    async def call(
        self,
        service: str,
        method: str,
        request: Encodable,
        answer: type[D],
        timeout_s: float | None = CALL_S,
        metadata: Mapping[str, str] | None = None,
    ) -> D:
        """Make one call.

        Args:
            service: Full name of the service.
            method: Name of the method.
            request: The request.
            answer: Class of the answer.
            timeout_s: Seconds; None waits as long as the connection lives.
            metadata: Sent along; a call with some is not traced.

        Returns:
            The decoded answer.

        Raises:
            KataError: See the class.
        """
        stream = self.calls_made.pop(method, 0) if self.calls_made and service == AGENT else 0
        if self.trace is not None and metadata is None and not stream:
            span = self.trace(service, method, timeout_s)
            if span is not None:
                return await self._traced(span, service, method, request, answer, timeout_s)
        began_ns = time.monotonic_ns()
        try:
            return await self._client.call(
                service, method, request, answer, timeout=timeout_s, metadata=metadata, stream=stream
            )
        except TtrpcError as error:
            if error.code == DEADLINE_EXCEEDED and timeout_s is not None:
                raise AgentTimeoutError(
                    f"the agent did not answer {method} within {timeout_s:g} s", code=error.code
                ) from None
            failed: ConnectionLost | TtrpcError = error
        except ConnectionLost as error:
            failed = error
        finally:
            if self.durations is not None:
                name = method if service == AGENT else f"{service}/{method}"
                self.durations.add(name, time.monotonic_ns() - began_ns)
        raise await self.explain(failed)

    async def _traced(
        self,
        span: CallSpan,
        service: str,
        method: str,
        request: Encodable,
        answer: type[D],
        timeout_s: float | None,
    ) -> D:
        """`call`, with a span that the agent is told of."""
        try:
            metadata = {TRACE_HEADER: span.header()}
            given = await self.call(service, method, request, answer, timeout_s, metadata)
        except BaseException as error:
            span.end(error=str(error) or type(error).__name__)
            raise
        span.end()
        return given

    async def explain(self, error: ConnectionLost | TtrpcError) -> KataError:
        """Turn an error of the connection into one of ours, and notify the watcher where it has to know.

        Args:
            error: The error that ended a call or stream.

        Returns:
            The error to raise.
        """
        if isinstance(error, TtrpcError):
            text = escape_line(error.message)
            return command_error(text) or AgentError(text, hint_for(text), code=error.code)
        if isinstance(error, ProtocolError):
            return self._protocol_violation(escape_line(str(error)))
        lost = VMLostError(f"the connection to the agent ended: {escape_line(str(error))}")
        return await self._watcher.on_connection_lost(lost)

    async def open(self, service: str, method: str, first: bytes, receiver: Receiver) -> Stream:
        """Begin a streaming call.

        If the agent accepts further connections, the stream gets one of its own, so that other calls do not queue
        behind its data. That connection is closed when the stream ends.

        Args:
            service: Full name of the service.
            method: Name of the method.
            first: The first message, encoded.
            receiver: Takes the messages, and the end of the call, whose error `explain` translates.

        Returns:
            The sending side.

        Raises:
            KataError: See the class.
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
        """Open a connection for one stream; None if the stream has to use the shared one."""
        if self._dial is None or CONNECTIONS not in self.features:
            return None
        from asyncio import wait_for

        try:
            client = await wait_for(self._dial(), DIAL_S)
        except (OSError, KataError, TimeoutError):
            return None
        self._own.add(client)
        return client

    @property
    def takes_calls_in_order(self) -> bool:
        """Whether what is said of a process right behind the call that makes it is taken for that process: the agent
        begins with calls in their order (an agent with direct streams does), and all of them go over one connection,
        where none waits for room.
        """
        return STREAMS in self.features and CONNECTIONS not in self.features and not self._client.is_full

    async def negotiate_features(self) -> None:
        """Ask the agent for its extensions of the protocol and set `features`. An agent that does not answer the
        question has none."""
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

    async def set_time(self, now_ns: int) -> None:
        """Set the guest's clock to *now_ns*, nanoseconds since the epoch."""
        request = agent_pb.SetGuestDateTimeRequest(Sec=now_ns // 10**9, Usec=now_ns % 10**9 // 1000)
        await self._empty("SetGuestDateTime", request)

    async def reseed(self, data: bytes, timeout_s: float | None = CALL_S) -> None:
        """Add random bytes to the entropy pool of the guest's kernel."""
        await self._empty("ReseedRandomDev", agent_pb.ReseedRandomDevRequest(data=data), timeout_s)

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
        await self.copy(request)

    async def copy(self, request: agent_pb.CopyFileRequest) -> None:
        """Write a piece of a file, a directory or a symbolic link below the guest's share directory."""
        await self._empty("CopyFile", request)

    async def details(self, timeout_s: float = CALL_S) -> agent_pb.GuestDetailsResponse:
        request = agent_pb.GuestDetailsRequest()
        return await self.call(AGENT, "GetGuestDetails", request, agent_pb.GuestDetailsResponse, timeout_s)

    async def oom_event(self) -> str:
        """Wait, without a timeout, for the next out-of-memory kill. Returns the container's id."""
        request = agent_pb.GetOOMEventRequest()
        return (await self.call(AGENT, "GetOOMEvent", request, agent_pb.OOMEvent, None)).container_id

    # ---- containers and processes ----

    async def create_container(self, request: Encodable, timeout_s: float = 0) -> None:
        """Create a container.

        Args:
            request: Made by `create_request`; may be encoded already (`Encoded`).
            timeout_s: Seconds; 0 is `CREATE_S`.
        """
        await self._empty("CreateContainer", request, timeout_s or CREATE_S)

    async def start_container(self, container_id: str) -> None:
        await self._empty("StartContainer", agent_pb.StartContainerRequest(container_id=container_id))

    async def remove_container(self, container_id: str, timeout_s: int = 30) -> None:
        request = agent_pb.RemoveContainerRequest(container_id=container_id, timeout=timeout_s)
        await self._empty("RemoveContainer", request, timeout_s + 5.0)

    async def exec_process(
        self, container_id: str, exec_id: str, process: oci_pb.Process, *, no_stdin: bool = False
    ) -> None:
        """Create and start a further process.

        Args:
            container_id: The container.
            exec_id: Id of the new process.
            process: Its specification.
            no_stdin: Its standard input is /dev/null, if the agent supports that (`NULL_STDIN`).
        """
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
        """Send a signal to every process of a container, including those started by its processes (feature
        `kata.processes`)."""
        request = agentext_pb.SignalProcessesRequest(container_id=container_id, signal=number)
        await self.call("kata.agent.v1.Processes", "Signal", request, google_pb.Empty, timeout_s)

    async def read_layer(
        self, directory: str, position: bytes, timeout_s: float, *, without_data: bool = False
    ) -> agentext_pb.ReadLayerResponse:
        """Read the next part of a directory tree of the guest (feature `LAYERS`)."""
        request = agentext_pb.ReadLayerRequest(directory=directory, next=position, without_data=without_data)
        answer = await self.call("kata.agent.v1.Layers", "Read", request, Encoded, timeout_s)
        if len(answer.payload) > MAX_LAYER:
            raise self._protocol_violation(f"a part of a layer has {len(answer.payload)} bytes")
        try:
            return agentext_pb.ReadLayerResponse.decode(answer.payload)
        except ValueError as error:
            raise self._protocol_violation(f"a part of a layer is malformed: {error}") from None

    async def trim_layer(self, directory: str) -> None:
        """Have the disk that a directory of the guest is on told what is not used (feature `LAYERS`)."""
        request = agentext_pb.TrimLayerRequest(directory=directory)
        await self.call("kata.agent.v1.Layers", "Trim", request, google_pb.Empty)

    async def wait(self, container_id: str, exec_id: str) -> int:
        """Wait, without a timeout, for a process to end. Returns its exit status, 0 to 255."""
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

    async def stats(
        self, container_id: str, timeout_s: float | None = ASK_S
    ) -> agent_pb.StatsContainerResponse:
        request = agent_pb.StatsContainerRequest(container_id=container_id)
        answer = await self.call(AGENT, "StatsContainer", request, Encoded, timeout_s)
        if len(answer.payload) > MAX_STATS:
            raise self._protocol_violation(f"the figures of a container have {len(answer.payload)} bytes")
        try:
            return agent_pb.StatsContainerResponse.decode(answer.payload)
        except ValueError as error:
            raise self._protocol_violation(f"the figures of a container are malformed: {error}") from None

    async def metrics(self, timeout_s: float | None = ASK_S) -> str:
        """What the agent and the guest's kernel report of themselves: Prometheus' text format, not checked."""
        answer = await self.call(
            AGENT, "GetMetrics", agent_pb.GetMetricsRequest(), agent_pb.Metrics, timeout_s
        )
        return answer.metrics

    async def resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        request = agent_pb.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._empty("TtyWinResize", request, ASK_S)

    # ---- streams: as slow as the process and the reader want, so no deadline ----

    async def read(self, container_id: str, exec_id: str, name: str, size: int) -> bytes:
        """Read the next data of ``stdout`` or ``stderr`` (*name*): at most *size* bytes, empty at end of file."""
        request = agent_pb.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        method = "ReadStdout" if name == "stdout" else "ReadStderr"
        data = (await self.call(AGENT, method, request, agent_pb.ReadStreamResponse, None)).data
        if len(data) > size:
            raise self._protocol_violation(f"{method} gave {len(data)} bytes instead of at most {size}")
        return data

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> None:
        """Write all of *data* to standard input. Returns when it is in the process's pipe."""
        while data:
            request = agent_pb.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
            answer = await self.call(AGENT, "WriteStdin", request, agent_pb.WriteStreamResponse, None)
            if not 0 < answer.len <= len(data):
                raise self._protocol_violation(f"{answer.len} of {len(data)} bytes were written")
            data = data[answer.len :]

    async def set_processors(self, count: int) -> None:
        """Set how many of its processors the guest uses (feature `kata.machine`)."""
        request = agentext_pb.SetProcessorsRequest(count=count)
        await self.call("kata.agent.v1.Machine", "SetProcessors", request, google_pb.Empty)

    async def clock(self, add_ns: int) -> agentext_pb.ClockResponse:
        """Add to the guest's clock, unless it has the host's as a device, and read it (feature `kata.clock`)."""
        request = agentext_pb.ClockRequest(add_ns=add_ns)
        return await self.call(
            "kata.agent.v1.Machine", "Clock", request, agentext_pb.ClockResponse, CLOCK_CALL_S
        )

    async def prepare_network(self, request: agentext_pb.PrepareNetworkRequest) -> list[tuple[int, str]]:
        """Set kernel parameters of the network; those of an interface before it comes up (feature `kata.network`).

        Returns:
            For each parameter that the guest's kernel refused: its position in the request, and the reason.
        """
        return await self._refusals("Prepare", request)

    async def route(self, request: agentext_pb.RouteRequest) -> list[tuple[int, str]]:
        """Remove and add routes and rules (feature `kata.network`).

        Returns:
            As for `prepare_network`; positions of rules count on after those of the routes.
        """
        return await self._refusals("Route", request)

    async def hide_interface(self, device_path: str) -> None:
        """Remove an interface from the guest by unbinding its driver; the device stays (feature `kata.network`).

        Args:
            device_path: PCI path of the device. It is no error if there is none.
        """
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
    """Build the request for a container. The exec id of its init is the container's id, as Kata's agent expects.

    Args:
        container_id: Id of the container.
        spec: The specification as the guest is to see it.
        storages: What the agent mounts first.
        devices: Disks of the machine that the container gets as devices.
        shares_pids: It joins the sandbox's PID namespace.
        no_stdin: Its standard input is /dev/null, if the agent supports that (`NULL_STDIN`).
        pids_of: Id of the container whose PID namespace it joins (only with `PIDS_OF`); empty for none.
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
    """When the guest's kernel and agent were ready, by the guest's clock; None if this agent does not report it."""
    request = agentext_pb.BootTimesRequest()
    try:
        return await agent.call("kata.agent.v1.Boot", "Times", request, agentext_pb.BootTimesResponse, 10.0)
    except AgentError:
        return None
