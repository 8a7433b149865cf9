"""A client's way to an engine that runs: blocking calls, no event loop, light to import.

Errors come back as the classes they were raised as on the other side, so that a client can tell "no such
command" from "no such container".
"""

from __future__ import annotations

import os

from kata.errors import (
    AgentError,
    AlreadyExistsError,
    CommandNotExecutableError,
    CommandNotFoundError,
    HostError,
    KataError,
    NotFoundError,
    ResourceExhaustedError,
    StateError,
    UnsupportedError,
    UsageError,
    VMLostError,
)
from kata.json_text import dumps
from kata.proto import task_pb
from kata.proto.google_pb import Any as AnyMessage
from kata.proto.google_pb import Empty
from kata.ttrpc.status import CANCELLED, ConnectionLost, TtrpcError
from kata.ttrpc.sync_client import Call, Client, connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from kata.proto import agentext_pb, sandbox_pb
    from kata.proto.codec import Message
    from kata.settings import EndpointSettings

    M = TypeVar("M", bound=Message)

TASK = "containerd.task.v2.Task"
PROCESSES_S = 20.0
"""How long an engine may take to list a container's processes, in seconds: it gives the guest 15."""
SANDBOX = "kata.sandbox.v1.Sandbox"
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

_BY_CODE: dict[int, type[KataError]] = {
    3: UsageError,
    5: NotFoundError,
    6: AlreadyExistsError,
    8: ResourceExhaustedError,
    9: StateError,
    12: UnsupportedError,
    14: VMLostError,
}
_NOT_FOUND = ("executable file not found in $PATH", "no such file or directory")
_NOT_EXECUTABLE = ("permission denied", "exec format error", "is a directory")


def to_error(error: TtrpcError) -> KataError:
    """The error that an engine's answer stands for."""
    message, hint = error.split_hint()
    if 'exec: "' in message:
        if any(words in message for words in _NOT_FOUND):
            return CommandNotFoundError(message, hint)
        if any(words in message for words in _NOT_EXECUTABLE):
            return CommandNotExecutableError(message, hint)
    if error.code == CANCELLED:  # by a server that ends
        return VMLostError("the container's engine ended while it was being asked", hint)
    kind = _BY_CODE.get(error.code)
    if kind is not None:
        return kind(message, hint)
    return AgentError(message, hint, code=error.code)


def _exec_request(
    container_id: str, exec_id: str, process: dict[str, Any], terminal: bool, streams: tuple[str, str, str]
) -> task_pb.ExecProcessRequest:
    stdin, stdout, stderr = streams
    spec = AnyMessage(type_url=PROCESS_TYPE, value=dumps(process).encode())
    return task_pb.ExecProcessRequest(
        id=container_id,
        exec_id=exec_id,
        terminal=terminal,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        spec=spec,
    )


class Running:
    """A process whose end was asked for before it is known: of `EngineClient.run` and `EngineClient.begin_wait`.

    Args:
        client: The connection; it has to stay open.
        added, started, ended: The calls that have been begun. None: it runs already.
    """

    __slots__ = ("_added", "_client", "_ended", "_started")

    def __init__(self, client: EngineClient, added: Call | None, started: Call | None, ended: Call) -> None:
        self._client = client
        self._added = added
        self._started = started
        self._ended = ended

    def started(self) -> None:
        """Wait until it runs. All its fifos have been opened then.

        Raises:
            KataError: As by `EngineClient.exec` and `EngineClient.start`.
        """
        if self._added is not None and self._started is not None:
            self._client.finish(self._added, Empty)
            self._client.finish(self._started, task_pb.StartResponse)

    def over(self) -> bool:
        """Whether `status` returns, or raises, at once. The connection's descriptor is readable when that may have
        changed.
        """
        return self._client.look(self._ended)

    def status(self) -> int:
        """As `EngineClient.wait`."""
        return self._client.finish(self._ended, task_pb.WaitResponse).exit_status


class EngineClient:
    """A connection to one engine.

    Every call may be made from any thread, also while another waits. They raise the `KataError` that the
    engine answered with, and `VMLostError` when the engine is gone.

    Args:
        sock_path: The engine's socket.

    Raises:
        NotFoundError: There is no such socket.
        HostError: Nobody listens on it (the engine was killed), or it may not be opened.
    """

    def __init__(self, sock_path: str) -> None:
        self.sock_path = sock_path
        try:
            self._client: Client = connect(sock_path)
        except FileNotFoundError:
            raise NotFoundError(f"no engine is running at {sock_path}") from None
        except OSError as error:
            raise HostError(f"cannot reach the engine at {sock_path}: {error.strerror}", "kata gc") from None

    def fileno(self) -> int:
        """The connection's descriptor; readable at its end (and when an answer to a call in flight has
        come).
        """
        return self._client.fileno()

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self, service: str, method: str, request: Message, answer: type[M], timeout: float | None = None
    ) -> M:
        """Any call of the two services."""
        try:
            return self._client.call(service, method, request, answer, timeout=timeout)
        except (TtrpcError, ConnectionLost) as error:
            raise self._explain(error) from None

    def _explain(self, error: TtrpcError | ConnectionLost) -> KataError:
        if isinstance(error, TtrpcError):
            return to_error(error)
        return VMLostError(
            "the container's engine ended while it was being asked",
            f"its last words may be in {os.path.dirname(self.sock_path)}/engine.log",
        )

    def _task(self, method: str, request: Message, answer: type[M], timeout: float | None = None) -> M:
        return self.call(TASK, method, request, answer, timeout)

    # ---- the life of a container ----

    def create(
        self,
        container_id: str,
        bundle: str,
        *,
        terminal: bool = False,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
    ) -> int:
        """Boot, if need be, and make the container; its host pid. When it returns, all fifos have been
        opened.
        """
        request = task_pb.CreateTaskRequest(
            id=container_id, bundle=bundle, terminal=terminal, stdin=stdin, stdout=stdout, stderr=stderr
        )
        return self._task("Create", request, task_pb.CreateTaskResponse).pid

    def exec(
        self,
        container_id: str,
        exec_id: str,
        process: dict[str, Any],
        *,
        terminal: bool = False,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        """Add a process (an OCI process object); `start` runs it. When it returns, all fifos have been
        opened.
        """
        request = _exec_request(container_id, exec_id, process, terminal, (stdin, stdout, stderr))
        self._task("Exec", request, Empty)

    def run(
        self,
        container_id: str,
        exec_id: str,
        process: dict[str, Any],
        *,
        terminal: bool = False,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
    ) -> Running:
        """`exec`, `start` and `wait` in one message: returns at once, before any of them is answered."""
        request = _exec_request(container_id, exec_id, process, terminal, (stdin, stdout, stderr))
        try:
            added, started, ended = self._client.begin(
                (
                    (TASK, "Exec", request),
                    (TASK, "Start", task_pb.StartRequest(id=container_id, exec_id=exec_id)),
                    (TASK, "Wait", task_pb.WaitRequest(id=container_id, exec_id=exec_id)),
                )
            )
        except (TtrpcError, ConnectionLost) as error:
            raise self._explain(error) from None
        return Running(self, added, started, ended)

    def begin_wait(self, container_id: str, exec_id: str = "") -> Running:
        """`wait`, for a process that runs: returns at once."""
        try:
            (ended,) = self._client.begin(
                ((TASK, "Wait", task_pb.WaitRequest(id=container_id, exec_id=exec_id)),)
            )
        except ConnectionLost as error:
            raise self._explain(error) from None
        return Running(self, None, None, ended)

    def begin_delete(self, container_id: str, exec_id: str) -> None:
        """`delete` an exec, without waiting for it: the engine forgets it also when this connection has ended.
        Nothing is raised.
        """
        try:
            self._client.begin(((TASK, "Delete", task_pb.DeleteRequest(id=container_id, exec_id=exec_id)),))
        except ConnectionLost:
            pass  # it has ended itself

    def finish(self, call: Call, answer: type[M]) -> M:
        """The answer to a call that was begun (`Running`)."""
        try:
            return self._client.finish(call, answer)
        except (TtrpcError, ConnectionLost) as error:
            raise self._explain(error) from None

    def look(self, call: Call) -> bool:
        """Whether a call that was begun is answered, or never will be. Does not wait."""
        return self._client.look(call)

    def start(self, container_id: str, exec_id: str = "") -> int:
        """Run the init or an exec; its host pid.

        Raises:
            CommandNotFoundError, CommandNotExecutableError: Of an exec; `create` raises them for the init.
        """
        return self._task(
            "Start", task_pb.StartRequest(id=container_id, exec_id=exec_id), task_pb.StartResponse
        ).pid

    def wait(self, container_id: str, exec_id: str = "", timeout: float | None = None) -> int:
        """The exit status, once the process has ended and its output has been delivered."""
        request = task_pb.WaitRequest(id=container_id, exec_id=exec_id)
        return self._task("Wait", request, task_pb.WaitResponse, timeout).exit_status

    def kill(
        self,
        container_id: str,
        signal: int,
        exec_id: str = "",
        *,
        everything: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Send a signal; one that is not answered in time is on its way all the same."""
        request = task_pb.KillRequest(id=container_id, exec_id=exec_id, signal=signal, all=everything)
        self._task("Kill", request, Empty, timeout)

    def delete(self, container_id: str, exec_id: str = "") -> int:
        """Forget an exec, or take the container down; its exit status. For the `kata` command nothing of the
        sandbox is left on the host when this returns.
        """
        request = task_pb.DeleteRequest(id=container_id, exec_id=exec_id)
        return self._task("Delete", request, task_pb.DeleteResponse).exit_status

    def state(
        self, container_id: str, exec_id: str = "", timeout: float | None = None
    ) -> task_pb.StateResponse:
        request = task_pb.StateRequest(id=container_id, exec_id=exec_id)
        return self._task("State", request, task_pb.StateResponse, timeout)

    def pids(self, container_id: str) -> list[int]:
        answer = self._task("Pids", task_pb.PidsRequest(id=container_id), task_pb.PidsResponse)
        return [one.pid for one in answer.processes]

    def pause(self, container_id: str) -> None:
        self._task("Pause", task_pb.PauseRequest(id=container_id), Empty)

    def resume(self, container_id: str, timeout: float | None = None) -> None:
        self._task("Resume", task_pb.ResumeRequest(id=container_id), Empty, timeout)

    def close_stdin(self, container_id: str, exec_id: str = "") -> None:
        """End of file for the process, after what is in its stdin fifo."""
        self._task("CloseIO", task_pb.CloseIORequest(id=container_id, exec_id=exec_id, stdin=True), Empty)

    def resize(self, container_id: str, rows: int, columns: int, exec_id: str = "") -> None:
        request = task_pb.ResizePtyRequest(id=container_id, exec_id=exec_id, width=columns, height=rows)
        self._task("ResizePty", request, Empty)

    def stats(self, container_id: str) -> AnyMessage | None:
        """An Any of ``io.containerd.cgroups.v1.Metrics`` (`kata.proto.cgroups_v1_pb`)."""
        return self._task("Stats", task_pb.StatsRequest(id=container_id), task_pb.StatsResponse).stats

    def update(self, container_id: str, resources: dict[str, Any]) -> None:
        """Change limits (an OCI LinuxResources object)."""
        wrapped = AnyMessage(type_url=RESOURCES_TYPE, value=dumps(resources).encode())
        self._task("Update", task_pb.UpdateTaskRequest(id=container_id, resources=wrapped), Empty)

    def connect(self, container_id: str) -> task_pb.ConnectResponse:
        return self._task("Connect", task_pb.ConnectRequest(id=container_id), task_pb.ConnectResponse)

    def shutdown(self, container_id: str, *, now: bool = False, timeout: float | None = None) -> None:
        """Take the sandbox down if it has no containers, or *now*, and wait for its end, for `timeout` seconds."""
        self._task("Shutdown", task_pb.ShutdownRequest(id=container_id, now=now), Empty, timeout)

    def discard(self, removed: str = "", timeout: float | None = None) -> None:
        """Have the sandbox end at once: what its containers wrote to their own disks is not needed any more.

        Args:
            removed: The name of the sandbox's own container, if that is to be removed as well. Nothing of either is
                left then when this returns, unless it could not be removed, or the engine is of an earlier version.
            timeout: Seconds. The sandbox ends all the same.
        """
        from kata.proto import sandbox_pb

        self.call(SANDBOX, "Discard", sandbox_pb.DiscardRequest(removed=removed), Empty, timeout)

    # ---- what containerd has no words for ----

    def connect_network(self, endpoint: EndpointSettings) -> None:
        """Put the sandbox into a further network of `kata network`."""
        from kata.proto import sandbox_pb

        values = {name: getattr(endpoint, name) for name in endpoint.__slots__}
        request = sandbox_pb.ConnectNetworkRequest(**values)
        self.call(SANDBOX, "ConnectNetwork", request, Empty)

    def disconnect_network(self, network: str) -> None:
        """Take the sandbox out of a network, by its name."""
        from kata.proto import sandbox_pb

        request = sandbox_pb.DisconnectNetworkRequest(network=network)
        self.call(SANDBOX, "DisconnectNetwork", request, Empty)

    def attach(
        self, container_id: str, exec_id: str = "", *, stdin: str = "", stdout: str = "", stderr: str = ""
    ) -> None:
        """Take part in a process's streams through fifos, which have been opened when this returns."""
        from kata.proto import sandbox_pb

        request = sandbox_pb.AttachRequest(
            id=container_id, exec_id=exec_id, stdin=stdin, stdout=stdout, stderr=stderr
        )
        self.call(SANDBOX, "Attach", request, Empty)

    def processes(self, container_id: str) -> list[agentext_pb.ProcessInfo]:
        """The processes in the guest, by the guest's numbers."""
        from kata.proto import agentext_pb

        request = agentext_pb.ListProcessesRequest(container_id=container_id)
        answer = self.call(SANDBOX, "Processes", request, agentext_pb.ListProcessesResponse, PROCESSES_S)
        return answer.processes

    def timings(self) -> sandbox_pb.TimingsResponse:
        """By which path the machine started, and where the time went, relative to ``request_started_ns``."""
        from kata.proto import sandbox_pb

        return self.call(SANDBOX, "Timings", sandbox_pb.TimingsRequest(), sandbox_pb.TimingsResponse)

    def describe(self) -> dict[str, Any]:
        """The sandbox's facts; ``error`` says why the machine was lost, if it was."""
        import json

        from kata.proto import sandbox_pb

        answer = self.call(SANDBOX, "Describe", sandbox_pb.DescribeRequest(), sandbox_pb.DescribeResponse)
        found: dict[str, Any] = json.loads(answer.json)
        return found
