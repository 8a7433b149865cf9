"""Links to an agent: through its own socket, or through the engine of a running sandbox."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod

from kata import paths
from kata.agent.client import Encoded
from kata.agent_ctl import address
from kata.agent_ctl.methods import HEALTH, nearest
from kata.errors import HostError, NotFoundError, UsageError, VMLostError
from kata.proto import sandbox_pb
from kata.ttrpc.status import ConnectionLost, ProtocolError
from kata.ttrpc.sync_client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ENGINE = "kata.sandbox.v1.Sandbox"


class Link(ABC):
    """A connection to an agent.

    Attributes:
        label: Description of the agent.
        container: Id of the default container; empty if there is none.
    """

    label = ""
    container = ""

    @abstractmethod
    def call(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """Make one call.

        Args:
            service: Full name of the service.
            method: Name of the method.
            payload: The encoded request.
            timeout_s: Seconds; None for no timeout.

        Returns:
            The encoded answer.

        Raises:
            TtrpcError: The status from the agent, or DEADLINE_EXCEEDED.
            VMLostError: The connection ended.
        """

    def raw(self) -> socket.socket | None:
        """Open a connection for bytes that are not calls; None if that is not possible."""
        return None

    def lost(self) -> str:
        """Why the agent has ended, as far as that is visible from outside; otherwise empty."""
        return ""

    @property
    def shared(self) -> bool:
        """Whether `raw` always returns the same stream (a serial port), which `call` uses as well."""
        return False

    def close(self) -> None:  # noqa: B027 - some have nothing to end
        """Close the link, and end everything that was started for it."""


class SocketLink(Link):
    """A link to an agent that accepts any number of connections.

    Args:
        label: Description of the agent.
        connect: Opens a connection.
    """

    def __init__(self, label: str, connect: Callable[[], socket.socket]) -> None:
        self.label = label
        self._connect = connect
        self._client: Client | None = Client(connect())

    def call(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """See `Link.call`."""
        if self._client is None:
            self._client = Client(self._connect())
        try:
            return self._client.call(service, method, Encoded(payload), Encoded, timeout_s).payload
        except ConnectionLost as error:
            # The next call opens a new connection.
            self._client.close()
            self._client = None
            raise lost_error(self.label, error) from None

    def raw(self) -> socket.socket:
        return self._connect()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def lost_error(label: str, error: ConnectionLost) -> VMLostError:
    """Make the error for a connection that ended.

    Args:
        label: Description of the agent.
        error: How the connection ended.
    """
    if isinstance(error, ProtocolError):
        return VMLostError(f"{label} broke the protocol: {error}")
    return VMLostError(f"the connection to {label} ended: {error}")


def to_server(where: address.Address, patience_s: float) -> Link:
    """Make a link to an agent's own socket.

    Args:
        where: The agent's address.
        patience_s: Seconds to retry.

    Raises:
        HostError: No agent listens there.
    """
    return SocketLink(str(where), lambda: address.connect(where, patience_s))


class EngineLink(Link):
    """A link to the agent of a running sandbox through its engine, which alone has a channel to the agent.

    Args:
        label: Description of the sandbox.
        container: Id of its container.
        sock_path: Path of the engine's socket.

    Raises:
        HostError: The socket cannot be used.
    """

    def __init__(self, label: str, container: str, sock_path: str) -> None:
        self.label = label
        self.container = container
        self._path = sock_path
        self._client = self._open()

    def _open(self) -> Client:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except PermissionError:
            sock.close()
            raise HostError(f"{self.label}: its engine accepts only root", "run it with sudo") from None
        except OSError as error:
            sock.close()
            raise HostError(
                f"{self.label}: its engine cannot be reached at {self._path}: {error.strerror}",
                "'kata ps' lists running containers; 'kata gc' removes what killed ones left behind",
            ) from None
        return Client(sock)

    def call(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """See `Link.call`."""
        request = sandbox_pb.AgentCallRequest(service=service, method=method, payload=payload)
        answer = sandbox_pb.AgentCallResponse
        try:
            return self._client.call(_ENGINE, "AgentCall", request, answer, timeout_s).payload
        except ConnectionLost as error:
            raise VMLostError(f"{self.label} has ended: {error}") from None

    def lost(self) -> str:
        return "" if os.path.exists(self._path) else f"{self.label} has ended"

    def close(self) -> None:
        self._client.close()


def to_sandbox(name: str) -> Link:
    """Make a link to the agent of a running sandbox.

    Args:
        name: The name of a container of `kata`, its id or the beginning of that, or a sandbox's id.

    Raises:
        NotFoundError: There is no such sandbox, or it is not running.
        UsageError: The beginning of an id is ambiguous.
        HostError: Its engine cannot be reached.
    """
    from kata.cli import records

    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"{name!r} is not the name of a sandbox", "'kata ps' lists them")
    found = records.find_or_none(name)
    identity = found.id if found is not None else _unique(name)
    if identity is None:
        known = [one.name for one in records.all_containers()]
        raise NotFoundError(
            f"there is no sandbox named {name!r}", nearest(name, known) or "'kata ps' lists running ones"
        )
    path = os.path.join(paths.sandbox_dir(identity), "engine.sock")
    if not os.path.exists(path):
        raise NotFoundError(f"sandbox {name} is not running", f"kata start {name}")
    return EngineLink(f"sandbox {name}", found.id if found is not None else "", path)


def _unique(beginning: str) -> str | None:
    """The id of the sandbox with this beginning; None if there is none."""
    try:
        fitting = [
            one
            for one in os.listdir(os.path.join(paths.run_dir(), "sandboxes"))
            if one.startswith(beginning)
        ]
    except FileNotFoundError:
        return None
    except PermissionError:
        raise HostError("only root can reach sandboxes", "run it with sudo") from None
    if beginning in fitting:
        return beginning
    if len(fitting) > 1:
        raise UsageError(f"{beginning!r} is the beginning of {len(fitting)} sandbox ids", "give more of it")
    return fitting[0] if fitting else None


def healthy(link: Link, timeout_s: float) -> None:
    """Call Health.Check. Returns when the agent is serving.

    Args:
        link: The agent.
        timeout_s: Seconds to wait for the answer.

    Raises:
        TtrpcError, VMLostError: It does not.
    """
    link.call(HEALTH, "Check", b"", timeout_s)
