"""QEMU's control protocol: a small client for asyncio over a connected socket.

Source: QEMU's ``docs/interop/qmp-spec.rst``. Messages are lines of JSON; an answer carries the id of its
command; anything with ``event`` in it was not asked for.
"""

from __future__ import annotations

import asyncio
import json
import socket

from kata.errors import HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MAX_MESSAGE = 8 << 20


class Framer:
    """Bytes to messages; no I/O."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes in.

        Returns:
            The messages that are complete now.

        Raises:
            HypervisorError: That was not QMP.
        """
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        if len(rest) > MAX_MESSAGE:
            raise HypervisorError(f"QEMU sent a control message of more than {MAX_MESSAGE} bytes")
        self._buffer = rest
        messages = []
        for line in lines:
            if not line.strip():
                continue
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                raise HypervisorError(f"QEMU sent something that is not QMP: {bytes(line[:80])!r}")
            messages.append(message)
        return messages


class QmpClient(asyncio.Protocol):
    """One control connection.

    Args:
        on_event: Called with the name and data of each event.
    """

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        self._framer = Framer()
        self._on_event = on_event
        self._transport: asyncio.Transport | None = None
        self._sock: socket.socket | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._lost: Exception | None = None
        self._greeting: asyncio.Future[dict[str, Any]] | None = None
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended."""

    @classmethod
    async def connect(
        cls,
        fd: int,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        timeout_s: float = 30.0,
        told: Sequence[str] = (),
    ) -> QmpClient:
        """Take over a connected socket and agree on capabilities.

        Args:
            fd: The descriptor; it belongs to the client from here on.
            on_event: As for the class.
            timeout_s: How long QEMU may take to answer (it greets when its machine is built).
            told: Names of the commands, numbered from 1, that were sent before; the first agrees on capabilities.

        Raises:
            HypervisorError: QEMU ended, did not answer in time, or does not speak QMP.
        """
        loop = asyncio.get_running_loop()
        client = cls(on_event)
        client._greeting = loop.create_future()
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        client._sock = sock
        sent = [client._expect() for _ in told]
        await loop.create_connection(lambda: client, sock=sock)
        try:
            greeting = await asyncio.wait_for(client._greeting, timeout_s)
            version = greeting["QMP"]["version"]["qemu"]
            client.version = (int(version["major"]), int(version["minor"]), int(version["micro"]))
            if not told:
                await client.execute("qmp_capabilities", timeout_s=timeout_s)
            for number, (name, answer) in enumerate(zip(told, sent, strict=True), 1):
                _value(name, await asyncio.wait_for(answer, timeout_s))
                client._pending.pop(number, None)
        except (KeyError, TypeError, ValueError) as error:
            client.close()
            raise HypervisorError(f"QEMU's greeting cannot be understood ({error!r})") from error
        except (TimeoutError, HypervisorError) as error:
            client.close()
            if isinstance(error, HypervisorError):
                raise
            raise HypervisorError(
                f"QEMU did not answer on its control channel for {timeout_s:g} s"
            ) from None
        return client

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        timeout_s: float = 10.0,
        *,
        fd: int | None = None,
    ) -> Any:
        """Run a command.

        Args:
            command: Its name.
            arguments: Its arguments.
            timeout_s: How long the answer may take.
            fd: A descriptor that goes with it; it stays the caller's.

        Returns:
            The value of its answer.

        Raises:
            HypervisorError: It was refused, not answered in time, or QEMU is gone (that, at once).
        """
        if self._lost is not None or self._transport is None:
            raise HypervisorError(f"cannot run {command}: the connection to QEMU has ended")
        future = self._expect()
        number = self._next_id
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        try:
            line = json.dumps(message).encode() + b"\n"
            if fd is not None:
                await self._send_with(fd, line)
            else:
                self._transport.write(line)
            answer = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise HypervisorError(f"QEMU did not answer {command} for {timeout_s:g} s") from None
        finally:
            self._pending.pop(number, None)
        return _value(command, answer)

    def _expect(self) -> asyncio.Future[Any]:
        """A place for the answer to the next command."""
        self._next_id += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[self._next_id] = future
        return future

    async def _send_with(self, fd: int, line: bytes) -> None:
        """Send a message with a descriptor, which has to go in one piece, after what was said before."""
        assert self._transport is not None
        assert self._sock is not None
        while self._transport.get_write_buffer_size():
            await asyncio.sleep(0.005)
        try:
            sent = socket.send_fds(self._sock, [line], [fd])
        except OSError as error:
            raise HypervisorError(f"cannot send QEMU a descriptor: {error.strerror}") from error
        self._transport.write(line[sent:])

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self._lost is None and self._transport is not None

    def close(self) -> None:
        """End the connection; what is still waiting fails."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(HypervisorError("the connection to QEMU was closed"))

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            messages = self._framer.feed(data)
        except HypervisorError as error:
            self._fail(error)
            if self._transport is not None:
                self._transport.abort()
            return
        for message in messages:
            self._dispatch(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._fail(HypervisorError("the connection to QEMU has ended"))

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            if self._on_event is not None:
                data = message.get("data")
                self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
        elif "QMP" in message:
            if self._greeting is not None and not self._greeting.done():
                self._greeting.set_result(message)
        else:
            number = message.get("id")
            future = self._pending.get(number) if isinstance(number, int) else None
            if future is not None and not future.done():
                future.set_result(message)

    def _fail(self, error: Exception) -> None:
        if self._lost is None:
            self._lost = error
        if not self.lost.done():
            self.lost.set_result(None)
        waiting = [*self._pending.values()]
        if self._greeting is not None:
            waiting.append(self._greeting)
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # a greeting that nobody waits for any more is no news


def _value(command: str, answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise HypervisorError(f"QEMU refused {command}: {_words(answer['error'])}")
    return answer.get("return")


def _words(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("desc") or error.get("class") or error)[:1000]
    return str(error)[:1000]
