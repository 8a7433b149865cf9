"""The HTTP that monitors of rust-vmm's family speak on a unix socket: one connection, one request at a time.

They answer every request with a status and, where they have something to say, a JSON document; the connection stays.
Sources: Cloud Hypervisor's docs/api.md and openapi/cloud-hypervisor.yaml, Firecracker's swagger/firecracker.yaml, and
RFC 9112 for the messages.
"""

from __future__ import annotations

import asyncio
import json
import os

from kata.errors import HypervisorError
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

TIMEOUT_S = 30.0
"""For an answer. Steps that take longer by their nature are given more."""
MAX_HEAD = 16 << 10
MAX_BODY = 4 << 20
_MAX_WORDS = 500
_MAX_DIGITS = 20


class Refused(HypervisorError):
    """The monitor answered that it will not.

    Attributes:
        status: Of its answer.
        words: What it said, bounded, with control characters escaped.
    """

    def __init__(self, message: str, status: int, words: str) -> None:
        super().__init__(message)
        self.status = status
        self.words = words


class ApiClient:
    """A connection to a monitor's API.

    Args:
        sock: The connected, non-blocking socket; it is this object's.
        title: The monitor's name in sentences.
        prefix: What every path begins with.
    """

    def __init__(self, sock: socket.socket, title: str, prefix: str = "/") -> None:
        self._sock = sock
        self._title = title
        self._prefix = prefix
        self._lock = asyncio.Lock()
        self._rest = b""
        self.is_lost = False
        """The connection is of no use any more: it was closed, or what came was no answer, or none came in time."""

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = 0.0,
    ) -> Any:
        """Ask for something. Who is cancelled while waiting for the answer does not take it from the connection: it
        is read all the same, before the next request.

        Args:
            method: ``GET``, ``PUT`` or ``PATCH``.
            path: What, without the prefix.
            body: A JSON value; None sends none.
            fds: Descriptors that go with the request (unix(7), SCM_RIGHTS); they stay the caller's.
            timeout_s: How long an answer is waited for; 0 for `TIMEOUT_S`.

        Returns:
            The JSON value of the answer; None when it has none.

        Raises:
            Refused: It answered with an error.
            HypervisorError: It did not answer in time, or what it said was no answer, or it is gone.
        """
        timeout_s = timeout_s or TIMEOUT_S
        own = [Fd(os.dup(fd)) for fd in fds]  # the caller may be gone before they are sent
        asking = asyncio.ensure_future(self._call(method, path, body, own, timeout_s))
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(asking)

    async def _call(self, method: str, path: str, body: Any, fds: Sequence[Fd], timeout_s: float) -> Any:
        try:
            async with self._lock:
                status, content = await self._ask(method, path, body, fds, timeout_s)
        finally:
            for fd in fds:
                fd.close()
        if not 200 <= status < 300:
            said = words_of(content)
            raise Refused(f"{self._title} refused {method} {path}: {said or status}", status, said)
        return self._parsed(method, path, content) if content else None

    async def _ask(
        self, method: str, path: str, body: Any, fds: Sequence[Fd], timeout_s: float
    ) -> tuple[int, bytes]:
        if self.is_lost:
            raise HypervisorError(f"{self._title} is not connected any more ({method} {path})")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(method, path, body, [fd.raw for fd in fds])
        except TimeoutError:
            self.is_lost = True
            raise HypervisorError(
                f"{self._title} did not answer {method} {path} within {timeout_s:g} s",
                "The machine is of no use any more: stop it.",
            ) from None
        except (OSError, EOFError) as error:
            self.is_lost = True
            raise HypervisorError(
                f"{self._title} went away while it was to answer {method} {path}: {error or 'end of file'}"
            ) from error
        except BaseException:
            self.is_lost = True  # the answer may still come, and would be taken for that to the next request
            raise

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.is_lost = True
        self._sock.close()

    async def _exchange(self, method: str, path: str, body: Any, fds: Sequence[int]) -> tuple[int, bytes]:
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if content else ""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{about}\r\n"
        await self._send(head.encode() + content, fds)
        return await self._answer(f"{method} {path}")

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        if fds:
            import array
            import socket

            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            # Nothing is under way, so a request of this size fits into the socket's buffer.
            data = data[self._sock.sendmsg([data], rights) :]
        await loop.sock_sendall(self._sock, data)

    async def _answer(self, asked: str) -> tuple[int, bytes]:
        while b"\r\n\r\n" not in self._rest:
            if len(self._rest) > MAX_HEAD:
                raise self._nonsense(asked, self._rest)
            await self._more()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *fields = head.split(b"\r\n")
        version, _, rest = first.partition(b" ")
        number = rest.partition(b" ")[0]
        if not version.startswith(b"HTTP/1.") or not number.isdigit() or len(number) != 3:
            raise self._nonsense(asked, head)
        length = 0
        for field in fields:
            name, _, value = field.partition(b":")
            if name.strip().lower() == b"content-length":
                # Python makes no number of thousands of digits.
                if not value.strip().isdigit() or len(value) > _MAX_DIGITS or int(value) > MAX_BODY:
                    raise self._nonsense(asked, head)
                length = int(value)
        while len(self._rest) < length:
            await self._more()
        content, self._rest = self._rest[:length], self._rest[length:]
        return int(number), content

    async def _more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
        if not data:
            raise EOFError
        self._rest += data

    def _parsed(self, method: str, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._nonsense(f"{method} {path}", content) from None

    def _nonsense(self, asked: str, said: bytes) -> HypervisorError:
        return HypervisorError(
            f"{self._title} answered {asked} with nonsense: {_shown(said.decode('utf-8', 'replace'))}"
        )


def words_of(content: bytes) -> str:
    """What a monitor's error says: the strings in its JSON document, each once, or the text itself.

    Cloud Hypervisor sends a list of sentences, from the outermost error to its cause, Firecracker an object with
    ``fault_message``.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return _shown(content.decode("utf-8", "replace"))
    if isinstance(document, dict):
        document = [value for value in document.values() if isinstance(value, str)]
    if not isinstance(document, list):
        document = [document]
    # A sentence may carry a stack trace behind an empty line.
    sentences = [str(part).partition("\n\n")[0].strip() for part in document]
    return _shown(": ".join(dict.fromkeys(filter(None, sentences))))


def _shown(text: str) -> str:
    cut = text.strip()[:_MAX_WORDS]
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in cut)
