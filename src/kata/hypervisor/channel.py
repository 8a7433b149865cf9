"""How an agent is reached from the host.

=========  ==========================================================================================
serial     a virtio-serial port: one stream, which is there before the guest is
vsock      a socket address of the guest's (AF_VSOCK): as many connections as wanted
hvsock     a unix socket of the monitor, where ``CONNECT PORT`` asks for a port of the guest (hybrid vsock)
unix       a unix socket on which the agent itself listens
=========  ==========================================================================================
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod

from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

AGENT_PORT = 1024
"""Where the agent listens."""
RETRY_S = 0.01
_LONGEST_REPLY = 64


class Channel(ABC):
    """A way to an agent.

    Attributes:
        kind: As in the table above.
        is_single: There is one stream for everything, and no second connection.
    """

    kind = ""
    is_single = False

    @property
    def url(self) -> str:
        """The address, as `kata.agent_ctl.address` reads it; empty for a channel that only we have."""
        return ""

    @abstractmethod
    async def connect(self, port: int = AGENT_PORT) -> socket.socket:
        """A connection to a guest that may still be booting: tries until somebody listens there.

        The caller bounds the time, and ends this when the machine ends.

        Args:
            port: The guest's port.

        Returns:
            The connected, non-blocking socket; it is the caller's.

        Raises:
            HostError: This host cannot make such connections.
        """


class SerialChannel(Channel):
    """A serial channel.

    Args:
        take: Hands over our end of it, or raises `HypervisorError` when it was handed over before.
    """

    kind = "serial"
    is_single = True

    def __init__(self, take: Callable[[], int]) -> None:
        self._take = take

    def take(self) -> socket.socket:
        """Our end; it is the caller's.

        Raises:
            HypervisorError: It was taken before.
        """
        import socket

        return socket.socket(fileno=self._take())

    async def connect(self, port: int = AGENT_PORT) -> socket.socket:
        """The channel; see `Channel.connect`."""
        sock = self.take()
        sock.setblocking(False)
        return sock


class VsockChannel(Channel):
    """A guest's vsock.

    Args:
        cid: Its context id.
    """

    kind = "vsock"

    def __init__(self, cid: int) -> None:
        self.cid = cid

    @property
    def url(self) -> str:
        """See `Channel.url`."""
        return f"vsock://{self.cid}:{AGENT_PORT}"

    async def connect(self, port: int = AGENT_PORT) -> socket.socket:
        """See `Channel.connect`."""
        from kata.hypervisor import vsock

        return await vsock.connect(self.cid, port)


class UnixChannel(Channel):
    """A unix socket on which the agent listens.

    Args:
        path: Its path.
    """

    kind = "unix"

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def url(self) -> str:
        """See `Channel.url`."""
        return f"unix://{self.path}"

    async def connect(self, port: int = AGENT_PORT) -> socket.socket:
        """See `Channel.connect`."""
        return await _connect_unix(self.path, None)


class HybridVsockChannel(UnixChannel):
    """A hybrid vsock. Source: Firecracker's docs/vsock.md, which Cloud Hypervisor follows.

    Args:
        path: The monitor's unix socket.
    """

    kind = "hvsock"

    @property
    def url(self) -> str:
        """See `Channel.url`."""
        return f"hvsock://{self.path}:{AGENT_PORT}"

    async def connect(self, port: int = AGENT_PORT) -> socket.socket:
        """See `Channel.connect`."""
        return await _connect_unix(self.path, port)


_NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)
"""The socket is not there, nobody listens, or its queue is full."""


async def _connect_unix(path: str, port: int | None) -> socket.socket:
    """A connection to a unix socket, and through it to a port of the guest if there is one.

    Raises:
        HostError: It cannot be reached, or does not answer as a hybrid vsock.
    """
    import asyncio
    import socket

    loop = asyncio.get_running_loop()
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, path)
            if port is None or await _ask_for(sock, port):
                return sock
            sock.close()
        except OSError as error:
            sock.close()
            if error.errno not in _NOT_YET and not isinstance(error, ConnectionError):
                raise HostError(f"cannot connect to the agent at {path}: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        await asyncio.sleep(RETRY_S)


async def _ask_for(sock: socket.socket, port: int) -> bool:
    """Ask for a port of the guest; False if nobody listens there (yet): the socket is closed then.

    Raises:
        HostError: The answer is none.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, f"CONNECT {port}\n".encode())
    reply = bytearray()
    # Byte by byte: what follows the line is the agent's.
    while not reply.endswith(b"\n") and len(reply) < _LONGEST_REPLY:
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            return False
        reply += byte
    if not reply.startswith(b"OK ") or not reply.endswith(b"\n"):
        shown = reply.decode("ascii", "backslashreplace").strip()
        raise HostError(f"the monitor answered {shown!r} where a hybrid vsock says OK")
    return True
