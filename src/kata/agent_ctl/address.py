"""Addresses of agents, and connecting to them.

=========================  ============================================================================
``vsock://CID:PORT``       a guest's vsock; the port may be left out
``unix://PATH``            a unix socket; ``unix://@NAME`` is an abstract one
``hvsock://PATH:PORT``     hybrid vsock: the unix socket of Cloud Hypervisor or Firecracker, where
                           ``CONNECT PORT`` asks for a port of the guest; the port may be left out
=========================  ============================================================================
"""

from __future__ import annotations

import socket
import time

from kata import paths
from kata.agent_ctl.methods import nearest
from kata.errors import HostError, UsageError
from kata.hypervisor import vsock
from kata.hypervisor.channel import AGENT_PORT

_SCHEMES = ("vsock", "unix", "hvsock")
_RETRY_S = 0.05
_LONGEST_REPLY = 64


class Address:
    """An agent's address.

    Attributes:
        scheme: ``vsock``, ``unix`` or ``hvsock``.
        path: Path of the unix socket; with a leading ``@`` its abstract name.
        cid: Context id of the vsock.
        port: Port of the vsock.
    """

    __slots__ = ("cid", "path", "port", "scheme")

    def __init__(self, scheme: str, *, path: str = "", cid: int = 0, port: int = AGENT_PORT) -> None:
        self.scheme = scheme
        self.path = path
        self.cid = cid
        self.port = port

    def __str__(self) -> str:
        if self.scheme == "vsock":
            return f"vsock://{self.cid}:{self.port}"
        return f"unix://{self.path}" if self.scheme == "unix" else f"hvsock://{self.path}:{self.port}"


def parse(text: str, hybrid: bool = False, hybrid_port: int = AGENT_PORT) -> Address:
    """Parse an address.

    Args:
        text: An address as in the table above.
        hybrid: ``unix://PATH`` means the socket of a hybrid vsock.
        hybrid_port: The guest's port in that case.

    Raises:
        UsageError: It is malformed.
    """
    scheme, found, rest = text.partition("://")
    if not found:
        hint = (
            f"did you mean unix://{text}?"
            if "/" in text
            else "vsock://CID:PORT, unix://PATH or hvsock://PATH:PORT"
        )
        raise UsageError(f"{text!r} is not an agent's address", hint)
    if scheme not in _SCHEMES:
        hint = nearest(scheme, _SCHEMES) or "vsock://CID:PORT, unix://PATH or hvsock://PATH:PORT"
        raise UsageError(f"{text!r}: there is no scheme {scheme!r}", hint)
    if scheme == "vsock":
        cid, has_port, port = rest.partition(":")
        return Address("vsock", cid=_cid(cid, text), port=_port(port, text) if has_port else AGENT_PORT)
    if scheme == "hvsock":
        path, has_port, port = rest.rpartition(":")
        if not has_port or "/" in port:
            path, port = rest, str(AGENT_PORT)
        return Address("hvsock", path=_path(path, text), port=_port(port, text))
    if hybrid:
        return Address("hvsock", path=_path(rest, text), port=hybrid_port)
    return Address("unix", path=_path(rest, text))


def _path(path: str, text: str) -> str:
    if not path or path == "@":
        raise UsageError(f"{text!r} has no path", "for example unix:///run/agent.sock")
    if len(path.encode("utf-8", "surrogateescape")) > paths.MAX_SOCKET_PATH or "\0" in path:
        raise UsageError(f"{text!r}: the path of a unix socket has at most {paths.MAX_SOCKET_PATH} bytes")
    return path


def _cid(cid: str, text: str) -> int:
    if cid == "-1":
        raise UsageError(
            f"{text!r}: -1 is only for listening; a guest has a CID of its own", "vsock://3:1024"
        )
    if not cid.isdecimal() or not 1 <= int(cid) < 0xFFFFFFFF:
        raise UsageError(f"{text!r}: {cid!r} is not a context id", "a number from 1, as in vsock://3:1024")
    return int(cid)


def _port(port: str, text: str) -> int:
    if not port.isdecimal() or int(port) >= 0xFFFFFFFF:
        raise UsageError(f"{text!r}: {port!r} is not a port number", f"the agent's port is {AGENT_PORT}")
    return int(port)


def connect(address: Address, patience_s: float) -> socket.socket:
    """Connect to an agent.

    While a guest boots, nothing listens in it yet: vsock refuses the connection, and a hybrid vsock's socket is closed
    without an answer. In both cases it is retried with a new connection. A unix socket is tried once.

    Args:
        address: The agent's address.
        patience_s: Seconds to retry.

    Raises:
        HostError: No agent listens there, or not in time.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _try(address, max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                reason = "there is no such socket"
            elif isinstance(error, TimeoutError):
                reason = "it did not answer in time"
            else:
                reason = error.strerror or str(error)
            again = address.scheme == "hvsock" and isinstance(error, _Hungup)
            again = again or (address.scheme == "vsock" and error.errno in vsock.NOT_YET)
        if not again or time.monotonic() + _RETRY_S >= deadline:
            hints = {
                "vsock": "is the guest running, and is vhost_vsock loaded?",
                "unix": "is the agent running? `kata-agent --server unix://PATH` listens on a path",
                "hvsock": "is the agent listening on that port in the guest?",
            }
            raise HostError(f"cannot connect to {address}: {reason}", hints[address.scheme])
        time.sleep(_RETRY_S)


class _Hungup(ConnectionError):
    """A hybrid vsock's socket was closed without an answer."""


def _try(address: Address, timeout_s: float) -> socket.socket:
    family = socket.AF_VSOCK if address.scheme == "vsock" else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        if address.scheme == "vsock":
            sock.connect((address.cid, address.port))
        else:
            path = address.path
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
        if address.scheme == "hvsock":
            _handshake(sock, address.port)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _handshake(sock: socket.socket, port: int) -> None:
    """Ask for a port of the guest: ``CONNECT port``, answered by ``OK`` and the other end's port.

    Source: Firecracker's docs/vsock.md, which Cloud Hypervisor follows.
    """
    try:
        sock.sendall(f"CONNECT {port}\n".encode())
        reply = bytearray()
        # Byte by byte, because what follows the line belongs to the agent's protocol.
        while not reply.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                raise _Hungup("the socket was closed without an answer: nobody listens on that port")
            reply += byte
            if len(reply) > _LONGEST_REPLY:
                break
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _Hungup("the socket was closed without an answer: nobody listens on that port") from error
    if not reply.startswith(b"OK ") or not reply.endswith(b"\n"):
        shown = reply[:_LONGEST_REPLY].decode("ascii", "backslashreplace").strip()
        raise OSError(f"it answered {shown!r} instead of OK, as a hybrid vsock does")
