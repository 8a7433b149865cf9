"""A ttRPC client for asyncio: many calls in flight on one connection, unary and streaming.

The server may be hostile. Each message is bounded by the frame size. A violation of the protocol (an answer to an
unknown call, data of an unknown stream, a malformed envelope or payload) closes the connection and fails every call
with `ProtocolError`.
"""

from __future__ import annotations

import asyncio
from collections import deque

from kata.ttrpc import envelope, frame
from kata.ttrpc.calls import decoded, encoded, response_in
from kata.ttrpc.status import (
    DEADLINE_EXCEEDED,
    RESOURCE_EXHAUSTED,
    ConnectionLost,
    ProtocolError,
    TtrpcError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping
    from typing import Any, Protocol

    from kata.ttrpc.messages import Encodable, R

    class Receiver(Protocol):
        """Takes the messages of a streaming call. Its methods are called in the event loop and must not block."""

        def received(self, data: bytes) -> None:
            """Take one message. The protocol has no flow control, so the receiver bounds how much it keeps.

            Raises:
                ProtocolError: The server was not allowed to send this; the connection ends.
            """

        def ended(self, error: ConnectionLost | TtrpcError | None) -> None:
            """The call is over: None when the server ended it successfully. Called once."""


__all__ = ["Client", "ConnectionLost", "ProtocolError", "Stream", "TtrpcError"]

MAX_CALLS = 1024
MAX_BYTES = 64 << 20
MAX_ABANDONED = 1 << 16
"""Abandoned calls whose answers are still outstanding; a server that leaves more of them unanswered is broken."""


_LATE = envelope.Response(code=DEADLINE_EXCEEDED)
"""Stands for a response that did not arrive in time."""


def _give_up(answer: asyncio.Future[envelope.Response | None]) -> None:
    if not answer.done():
        answer.set_result(_LATE)


class Client:
    """One connection, made by `connect` or `over_streams`.

    A call beyond `max_calls` or `max_bytes` waits for room within its timeout. Without a timeout, a call beyond
    `max_calls` fails at once: all those in flight may be long polls, and then the wait would never end.

    Args:
        max_calls: Maximum number of calls in flight.
        max_bytes: Maximum number of request bytes in flight.
    """

    def __init__(self, max_calls: int = MAX_CALLS, max_bytes: int = MAX_BYTES) -> None:
        self.max_calls = max_calls
        self.max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._parser = frame.Parser()
        self._transport: asyncio.WriteTransport | None = None
        self._reader: asyncio.Task[None] | None = None
        self._next = 1
        self._calls: dict[int, asyncio.Future[envelope.Response | None]] = {}
        # Those of them that were made before there was a client, until somebody waits for the answer.
        self._made: dict[int, asyncio.Future[envelope.Response | None]] = {}
        # Sizes of abandoned requests: until they are answered, they may still wait in our buffer.
        self._abandoned: dict[int, int] = {}
        self._streams: dict[int, Receiver] = {}
        self._bytes = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._error: ConnectionLost | None = None
        self._ended = asyncio.Event()

    @classmethod
    async def connect(
        cls,
        sock: socket.socket,
        max_calls: int = MAX_CALLS,
        max_bytes: int = MAX_BYTES,
        *,
        made: Iterable[int] = (),
    ) -> Client:
        """Make a client over a connected stream socket, of which it takes ownership.

        Args:
            sock: The socket.
            max_calls: See the class.
            max_bytes: See the class.
            made: Streams of calls that were written to the socket before, to be waited for by `call`.
        """
        client = cls(max_calls, max_bytes)
        for number in made:
            client._calls[number] = client._made[number] = client._loop.create_future()
            client._next = max(client._next, number + 2)
        await client._loop.create_connection(lambda: _Receiver(client), sock=sock)
        return client

    @classmethod
    def over_streams(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_calls: int = MAX_CALLS,
        max_bytes: int = MAX_BYTES,
    ) -> Client:
        """Make a client over a pair of streams, which may have carried other data before."""
        client = cls(max_calls, max_bytes)
        client._transport = writer.transport

        async def pump() -> None:
            try:
                while data := await reader.read(1 << 18):
                    client._feed(data)
                client._end_of_stream()
            except OSError as error:
                client._fail(ConnectionLost(f"the connection ended: {error}"))

        client._reader = client._loop.create_task(pump())
        return client

    async def call(
        self,
        service: str,
        method: str,
        request: Encodable,
        response: type[R],
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        stream: int = 0,
    ) -> R:
        """Make one call and wait for its answer.

        Args:
            service: Full name of the service, including its package.
            method: Name of the method.
            request: Anything with `encode`.
            response: Class of the answer.
            timeout: Seconds, also sent to the server. None waits as long as the connection lives.
            metadata: Sent as the protocol's metadata.
            stream: The call was made before there was a client, on this stream (`connect`): nothing is sent.

        Returns:
            The decoded answer.

        Raises:
            TtrpcError: The status from the server; DEADLINE_EXCEEDED; or RESOURCE_EXHAUSTED for a request that does
                not fit into a frame or that exceeds `max_calls`.
            ConnectionLost: The connection ended; ProtocolError when the server broke the protocol.
        """
        if stream:
            answer = await self._wait_for(stream, 0, self._made.pop(stream), timeout)
        else:
            data = encoded(service, method, request, timeout, metadata)
            answer = await self._send_and_wait(data, timeout)
        if answer is _LATE:
            raise TtrpcError(DEADLINE_EXCEEDED, f"{method} was not answered in time")
        if answer is None:
            raise self._failure()
        try:
            return decoded(answer, response, method)
        except ProtocolError as error:
            self._fail(error)
            raise self._failure() from None

    def open(self, service: str, method: str, first: bytes, receiver: Receiver) -> Stream:
        """Begin a streaming call.

        Args:
            service: As for `call`.
            method: As for `call`.
            first: The first message, encoded.
            receiver: Takes the server's messages and the end of the call.

        Returns:
            The sending side of the call.

        Raises:
            TtrpcError: RESOURCE_EXHAUSTED when too many calls are in flight.
            ConnectionLost: The connection has ended.
        """
        if self._error is not None or self._transport is None:
            raise self._failure()
        if len(self._calls) + len(self._streams) >= self.max_calls:
            raise TtrpcError(RESOURCE_EXHAUSTED, f"{self.max_calls} calls are in flight already")
        number = self._next
        self._next += 2
        self._streams[number] = receiver
        data = envelope.Request(service, method, first, 0, ()).encode()
        self._transport.write(frame.encode(number, frame.REQUEST, data, frame.REMOTE_OPEN))
        return Stream(self, number)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._error is not None

    @property
    def is_full(self) -> bool:
        """Whether calls wait for room. Otherwise what was called has been written, in the order of the calls."""
        return bool(self._waiters)

    async def wait_closed(self) -> ConnectionLost:
        """Wait for the end of the connection. Returns the reason."""
        await self._ended.wait()
        return self._failure()

    def close(self) -> None:
        """End the connection; calls in flight fail with ConnectionLost."""
        self._fail(ConnectionLost("the connection was closed here"))

    # ---- calls ----

    async def _send_and_wait(self, data: bytes, timeout: float | None) -> envelope.Response | None:
        """Send a request and wait for its response. Returns None when the connection ended, `_LATE` after the
        timeout."""
        size = len(data)
        if self._error is None and not self._room(size):
            before = self._loop.time()
            try:
                async with asyncio.timeout(timeout):
                    await self._wait_for_room(size, timeout is not None)
            except TimeoutError:
                return _LATE
            if timeout is not None:
                timeout -= self._loop.time() - before
        if self._error is not None or self._transport is None:
            return None
        stream = self._next
        self._next += 2
        answer: asyncio.Future[envelope.Response | None] = self._loop.create_future()
        self._calls[stream] = answer
        self._bytes += size
        self._transport.write(frame.encode(stream, frame.REQUEST, data))
        # There may be room for the next waiting call as well.
        self._next_turn()
        return await self._wait_for(stream, size, answer, timeout)

    async def _wait_for(
        self, stream: int, size: int, answer: asyncio.Future[envelope.Response | None], timeout: float | None
    ) -> envelope.Response | None:
        """Wait for the response to a call of this size; see `_send_and_wait`."""
        # Not `asyncio.timeout`, which costs an empty call a tenth of its time.
        timer = None if timeout is None else self._loop.call_later(timeout, _give_up, answer)
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()
            if self._calls.pop(stream, None) is None:
                self._bytes -= size
            else:
                # Its answer may still arrive, and must not be taken for a protocol error.
                self._abandoned[stream] = size
                if len(self._abandoned) > MAX_ABANDONED:
                    self._fail(ConnectionLost(f"the server left {MAX_ABANDONED} calls without an answer"))
            self._next_turn()

    async def _wait_for_room(self, size: int, waits: bool) -> None:
        while self._error is None and not self._room(size):
            if not waits and len(self._calls) >= self.max_calls:
                raise TtrpcError(RESOURCE_EXHAUSTED, f"{self.max_calls} calls are in flight already")
            turn = self._loop.create_future()
            self._waiters.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiters:
                    self._waiters.remove(turn)
                else:
                    self._next_turn()
                raise

    def _room(self, size: int) -> bool:
        return len(self._calls) + len(self._streams) < self.max_calls and (
            not self._bytes or self._bytes + size <= self.max_bytes
        )

    def _next_turn(self) -> None:
        while self._waiters:
            turn = self._waiters.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    # ---- what arrives ----

    def _feed(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            for item in self._parser.feed(data):
                self._take(item)
        except ProtocolError as error:
            self._fail(error)

    def _take(self, item: frame.Frame) -> None:
        if item.kind == frame.DATA and item.stream in self._streams:
            if not item.flags & frame.NO_DATA:
                self._streams[item.stream].received(item.data)
            return
        response = response_in(item)
        if item.stream in self._streams:
            failed = TtrpcError(response.code, response.message, response.details)
            self._streams.pop(item.stream).ended(failed if response.code else None)
            self._next_turn()
            return
        answer = self._calls.pop(item.stream, None)
        if answer is None:
            size = self._abandoned.pop(item.stream, None)
            if size is None:
                raise ProtocolError(f"the server answered call {item.stream}, which nobody made")
            self._bytes -= size
            self._next_turn()
        elif not answer.done():
            answer.set_result(response)

    def _end_of_stream(self) -> None:
        cut = " in the middle of an answer" if self._parser.pending else ""
        self._fail(ConnectionLost(f"the server closed the connection{cut}"))

    def _fail(self, error: ConnectionLost) -> None:
        """End the connection for `error`, unless it has ended."""
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.abort()
        if self._reader is not None and self._reader is not asyncio.current_task(self._loop):
            self._reader.cancel()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_result(None)
        self._calls.clear()
        self._abandoned.clear()
        streams = list(self._streams.values())
        self._streams.clear()
        for receiver in streams:
            receiver.ended(self._failure())
        for turn in self._waiters:
            if not turn.done():
                turn.set_result(None)
        self._waiters.clear()
        self._ended.set()

    def _failure(self) -> ConnectionLost:
        # A new exception for every raise: tasks must not share a traceback.
        error = self._error or ConnectionLost("the connection ended")
        return type(error)(*error.args)


class Stream:
    """The sending side of a streaming call that `Client.open` has begun."""

    __slots__ = ("_client", "_number")

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self._number = number

    def send(self, message: bytes, tail: bytes | memoryview[int] = b"", *, last: bool = False) -> None:
        """Send an encoded message. Does nothing when the call is over.

        Args:
            message: The message, or its beginning. Empty together with *last* sends only the end of the stream.
            tail: The rest of the message; passing it separately saves the caller a copy.
            last: No message follows.
        """
        client = self._client
        if client._transport is None or self._number not in client._streams:
            return
        flags = (frame.REMOTE_CLOSED if last else 0) | (0 if message else frame.NO_DATA)
        client._transport.write(frame.encode(self._number, frame.DATA, message, flags, tail))


class _Receiver(asyncio.Protocol):
    """The client's end of a socket transport."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def connection_made(self, transport: Any) -> None:
        self._client._transport = transport

    def data_received(self, data: bytes) -> None:
        self._client._feed(data)

    def eof_received(self) -> None:
        self._client._end_of_stream()

    def connection_lost(self, error: Exception | None) -> None:
        text = f": {error}" if error else ""
        self._client._fail(ConnectionLost(f"the connection ended{text}"))
