"""A client of engines' management sockets for commands and tests: blocking, bounded in time and in what it takes in.

The server is `kata.engine.services.management`; the paths that it answers are a table in ``docs/reference.md``.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import time

from kata import sysio
from kata.errors import (
    HostError,
    KataError,
    NotFoundError,
    ResourceExhaustedError,
    StateError,
    UnsupportedError,
    UsageError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ANSWER = 16 << 20
"""Bytes of an answer that are taken in at most."""
TIMEOUT_S = 30.0
_PIECE = 1 << 16
_MAX_HEAD = 1 << 13
_ERRORS: dict[int, type[KataError]] = {
    400: UsageError,
    404: NotFoundError,
    409: StateError,
    413: ResourceExhaustedError,
    501: UnsupportedError,
}


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("sandbox", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with sysio.SocketName(self._path) as name:
            self.sock.connect(name)


def request(
    path: str, method: str, target: str, body: bytes | None = None, timeout_s: float = TIMEOUT_S
) -> tuple[int, dict[str, str], bytes]:
    """Ask an engine.

    Args:
        path: Its management socket, of any length.
        method: ``GET``, ``PUT`` or ``POST``.
        target: Path and parameters, percent-encoded.
        body: What is sent.
        timeout_s: How long all of it may take, in seconds.

    Returns:
        The answer's status, its headers by their names in lower case, and its content.

    Raises:
        NotFoundError: There is no such socket.
        HostError: Nobody listens there, it may not be opened, or there is no (valid) answer in time.
    """
    give_up = time.monotonic() + timeout_s
    connection = _Connection(path, timeout_s)
    with _explained(path, target, timeout_s), contextlib.closing(connection):
        headers = {"Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        found = bytearray()
        while piece := answer.read1(_PIECE):
            found += piece
            if len(found) > MAX_ANSWER:
                raise HostError(f"the engine's answer to {target} is longer than {MAX_ANSWER} bytes")
            if time.monotonic() > give_up:
                raise TimeoutError
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, bytes(found)


@contextlib.contextmanager
def _explained(path: str, target: str, timeout_s: float) -> Iterator[None]:
    """Make errors of a conversation those of `request`."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"no engine is running at {path}", "kata ps") from None
    except TimeoutError:
        raise HostError(
            f"the engine did not answer {target} within {timeout_s:g} s",
            f"it is busy, hangs or is stopped: see {os.path.dirname(path)}/engine.log",
        ) from None
    except PermissionError:
        raise HostError(f"{path} may not be opened", "Sandboxes are root's: run it with sudo.") from None
    except OSError as error:
        raise HostError(f"cannot reach the engine at {path}: {error.strerror or error}", "kata gc") from None
    except http.client.HTTPException as error:
        raise HostError(f"the answer from {path} is not HTTP: {error!r}") from None


def get(path: str, target: str, timeout_s: float = TIMEOUT_S) -> tuple[int, dict[str, str], bytes]:
    """`request` with GET."""
    return request(path, "GET", target, None, timeout_s)


def content(path: str, method: str, target: str, body: bytes | None = None) -> bytes:
    """The content of an answer that says that all went well.

    Raises:
        KataError: What the engine says otherwise; and see `request`.
    """
    status, _, found = request(path, method, target, body)
    if status == 200:
        return found
    raise _error(status, target, found)


def _error(status: int, target: str, content: bytes) -> KataError:
    message, _, hint = content.decode("utf-8", "replace").rstrip("\n").partition("\nhint: ")
    return _ERRORS.get(status, KataError)(message or f"the engine answered {target} with {status}", hint)


def take_over(path: str, target: str, protocol: str) -> socket.socket:
    """Ask an engine to go on in another protocol.

    Args:
        path: Its management socket, of any length.
        target: What is asked for, by POST.
        protocol: What is spoken on the connection from then on.

    Returns:
        The connection, which blocks without end.

    Raises:
        KataError: What the engine says otherwise; and see `request`.
    """
    connection = _Connection(path, TIMEOUT_S)
    with _explained(path, target, TIMEOUT_S):
        connection.connect()
        sock: socket.socket = connection.sock
        try:
            headers = f"Host: sandbox\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\nContent-Length: 0\r\n"
            sock.sendall(f"POST {target} HTTP/1.1\r\n{headers}\r\n".encode())
            head = bytearray()
            while not head.endswith(b"\r\n\r\n"):
                # Byte by byte: what follows belongs to the other protocol.
                byte = sock.recv(1)
                if not byte or len(head) >= _MAX_HEAD:
                    raise http.client.BadStatusLine(bytes(head[:80]).decode("latin-1"))
                head += byte
            words = head.split(b" ", 2)
            status = int(words[1]) if len(words) > 2 and words[1].isdigit() else 0
            if status != http.client.SWITCHING_PROTOCOLS:
                sock.shutdown(socket.SHUT_WR)
                found = bytearray()
                while (piece := sock.recv(_PIECE)) and len(found) < _MAX_HEAD:
                    found += piece
                raise _error(status, target, bytes(found))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return sock
