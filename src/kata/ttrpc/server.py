"""A ttRPC server for asyncio.

Requests run in parallel, each in a task of its own; those of a connection begin in their order, each where the one
before it has first waited for something. A handler is a method of a service object::

    async def Create(self, request: CreateTaskRequest, context: Context) -> CreateTaskResponse: ...

An exception of the handler becomes a status (`status.describe`). When a call's time is up, the client gets
DEADLINE_EXCEEDED; when its connection has ended, it gets no answer. In both cases the handler is cancelled, unless it
is marked with `finish` because stopping half-way would do harm.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time

from kata.ttrpc import envelope, frame
from kata.ttrpc.status import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    ProtocolError,
    TtrpcError,
    describe,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Mapping
    from typing import Any, TypeVar

    from kata.ttrpc.messages import Encodable, MethodTable

    Handler = TypeVar("Handler", bound=Callable[..., Any])

_UCRED = struct.Struct("=iII")
"""``struct ucred`` of unix(7): pid, uid, gid; uid and gid are -1 for a socket without credentials."""
MAX_CALLS = 1024
"""Maximum number of calls in flight per connection; further ones are refused with RESOURCE_EXHAUSTED."""


def finish(handler: Handler) -> Handler:
    """Mark a handler that runs to its end even if no client waits for its answer any more."""
    handler.ttrpc_finish = True  # type: ignore[attr-defined]
    return handler


class Context:
    """The call that a handler serves.

    Attributes:
        service: Full name of the service.
        method: Name of the method.
        metadata: Values by key, in the order of arrival.
        deadline: Seconds by the event loop's clock; None when the caller has set no timeout.
    """

    __slots__ = ("deadline", "metadata", "method", "service")

    def __init__(
        self, service: str, method: str, metadata: dict[str, list[str]], deadline: float | None
    ) -> None:
        self.service = service
        self.method = method
        self.metadata = metadata
        self.deadline = deadline

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None when the caller has set no timeout."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())


class Server:
    """Serves a fixed set of services on any number of sockets and connections.

    Args:
        services: For each service's full name the table of its methods, and the object whose attributes of the same
            names are the handlers. A method without a handler is UNIMPLEMENTED.
        on_error: Called for logging: with context and exception when a handler raises an exception without a status
            (most likely a bug), and with None and a ProtocolError when a client breaks the protocol, whose connection
            is then closed.
        max_calls: Maximum number of calls in flight per connection.
        users: User ids whose processes may connect (by SO_PEERCRED, so only for unix sockets). Other peers are
            disconnected before any of their data is read. None admits every user.
        on_answer: Called with the method's name and the duration in nanoseconds when a handler has ended, however.

    Attributes:
        trace: Carries out all calls, if it is set: it is given handler, request and context, and returns the answer.
    """

    def __init__(
        self,
        services: Mapping[str, tuple[MethodTable, object]],
        on_error: Callable[[Context | None, Exception], None] | None = None,
        max_calls: int = MAX_CALLS,
        users: Collection[int] | None = None,
        on_answer: Callable[[str, int], None] | None = None,
    ) -> None:
        self.services = dict(services)
        self.on_answer = on_answer
        self.on_error = on_error
        self.max_calls = max_calls
        self.users = None if users is None else frozenset(users)
        self.trace: Callable[..., Coroutine[Any, Any, Encodable]] | None = None
        self._listeners: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()
        self._draining = False
        self._ended = asyncio.Event()

    async def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound stream socket, of which the server takes ownership."""
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_server(lambda: _Connection(self), sock=sock))

    async def serve(self, sock: socket.socket) -> None:
        """`start`, then wait for `shutdown`."""
        await self.start(sock)
        await self._ended.wait()

    async def attach(self, sock: socket.socket) -> None:
        """Serve a connection that is already established; returns at once."""
        await asyncio.get_running_loop().create_connection(lambda: _Connection(self), sock=sock)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    @property
    def calls(self) -> int:
        """Number of calls whose handlers are running."""
        return sum(len(connection.tasks) for connection in self._connections)

    async def shutdown(self, grace: float = 5.0) -> None:
        """Stop accepting connections, let the calls in flight end, deliver their answers and close.

        New calls on open connections are refused with UNAVAILABLE. A handler must not await this, since it waits for
        all handlers: it starts a task instead.

        Args:
            grace: Seconds that calls have to end before they are cancelled, and that clients have to read afterwards.
        """
        self._draining = True
        for listener in self._listeners:
            listener.close()
        running = [task for connection in self._connections for task in connection.tasks]
        if running:
            _, late = await asyncio.wait(running, timeout=grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=grace)
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        if connections:
            ends = [asyncio.ensure_future(connection.ended.wait()) for connection in connections]
            _, late_ends = await asyncio.wait(ends, timeout=grace)
            for end in late_ends:
                end.cancel()
            for connection in connections:
                connection.abort()
        self._ended.set()


class _Call:
    __slots__ = ("answered", "context", "finish", "task", "timer")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.answered = False
        self.finish = False
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


def peer_user(sock: socket.socket) -> int:
    """User id that the process at the other end of a unix socket had when it connected; -1 for any other socket."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(data)[1])
    except (OSError, AttributeError):
        return -1


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = frame.Parser()
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, _Call] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()

    # ---- the transport's side ----

    def connection_made(self, transport: Any) -> None:
        users = self._server.users
        if users is not None:
            user = peer_user(transport.get_extra_info("socket"))
            if user not in users:
                self._report(None, ProtocolError(f"a process of user {user} has connected, and may not"))
                transport.abort()
                return
        self._transport = transport
        self._server._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        try:
            for item in self._parser.feed(data):
                self._take(item)
        except ProtocolError as error:
            self._report(None, error)
            self.abort()

    def pause_writing(self) -> None:
        # Take no further requests from a client that does not read its answers.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server._connections.discard(self)
        self.ended.set()
        for call in list(self._calls.values()):
            call.answered = True
            if call.task is not None and not call.finish:
                call.task.cancel()

    def close(self) -> None:
        """Close after everything has been written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    # ---- calls ----

    def _take(self, item: frame.Frame) -> None:
        stream = item.stream
        if item.kind != frame.REQUEST or stream in self._calls:
            raise ProtocolError(f"unexpected frame {item!r}")
        if stream % 2 == 0:
            self._refuse(stream, INVALID_ARGUMENT, "stream numbers of clients are odd")
            return
        try:
            request = envelope.Request.decode(item.data)
        except ValueError as error:
            self._refuse(stream, INVALID_ARGUMENT, f"malformed request: {error}")
            return
        entry = self._server.services.get(request.service)
        if entry is None:
            self._refuse(stream, UNIMPLEMENTED, f"service {request.service} is not here")
            return
        table, handlers = entry
        handler = getattr(handlers, request.method, None) if request.method in table else None
        if handler is None:
            self._refuse(stream, UNIMPLEMENTED, f"method {request.service}.{request.method} is not here")
            return
        if self._server._draining:
            self._refuse(stream, UNAVAILABLE, "the server is about to end")
            return
        if len(self._calls) >= self._server.max_calls:
            self._refuse(stream, RESOURCE_EXHAUSTED, f"{self._server.max_calls} calls are in flight already")
            return
        request_class, response_class = table[request.method]
        try:
            message = request_class.decode(request.payload)
        except ValueError as error:
            self._refuse(stream, INVALID_ARGUMENT, f"malformed {request_class.__name__}: {error}")
            return
        self._start(stream, request, handler, message, response_class)

    def _start(
        self,
        stream: int,
        request: envelope.Request,
        handler: Callable[..., Coroutine[Any, Any, Encodable]],
        message: object,
        response_class: type[Encodable],
    ) -> None:
        loop = asyncio.get_running_loop()
        metadata: dict[str, list[str]] = {}
        for key, value in request.metadata:
            metadata.setdefault(key, []).append(value)
        seconds = request.timeout_nano / 1e9
        deadline = loop.time() + seconds if seconds > 0 else None
        call = _Call(Context(request.service, request.method, metadata, deadline))
        call.finish = getattr(handler, "ttrpc_finish", False)
        self._calls[stream] = call
        call.task = loop.create_task(self._run(stream, call, handler, message, response_class))
        self.tasks.add(call.task)
        call.task.add_done_callback(self.tasks.discard)
        if deadline is not None:
            call.timer = loop.call_at(deadline, self._too_late, stream, call)

    async def _run(
        self,
        stream: int,
        call: _Call,
        handler: Callable[..., Coroutine[Any, Any, Encodable]],
        message: object,
        response_class: type[Encodable],
    ) -> None:
        began_ns = time.monotonic_ns()
        try:
            trace = self._server.trace
            if trace is None:
                answer = await handler(message, call.context)
            else:
                answer = await trace(handler, message, call.context)
            if not isinstance(answer, response_class):
                raise TypeError(f"{call.context.method} returned {type(answer).__name__}")
            response = envelope.Response(answer.encode())
        except asyncio.CancelledError:
            if call.answered:
                raise
            response = envelope.Response(code=CANCELLED, message="the server has cancelled the call")
        except Exception as error:
            if not isinstance(error, TtrpcError) and not hasattr(error, "grpc_code"):
                self._report(call.context, error)
            told = describe(error)
            response = envelope.Response(code=told.code, message=told.message, details=told.details)
        finally:
            if call.timer is not None:
                call.timer.cancel()
            self._calls.pop(stream, None)
            if self._server.on_answer is not None:
                self._server.on_answer(call.context.method, time.monotonic_ns() - began_ns)
        if not call.answered:
            call.answered = True
            self._send(stream, response)

    def _too_late(self, stream: int, call: _Call) -> None:
        if call.answered:
            return
        call.answered = True
        text = f"{call.context.method} did not end in time"
        self._send(stream, envelope.Response(code=DEADLINE_EXCEEDED, message=text))
        if call.task is not None and not call.finish:
            call.task.cancel()

    def _report(self, context: Context | None, error: Exception) -> None:
        if self._server.on_error is not None:
            self._server.on_error(context, error)

    def _refuse(self, stream: int, code: int, message: str) -> None:
        self._send(stream, envelope.Response(code=code, message=message))

    def _send(self, stream: int, response: envelope.Response) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = response.encode()
        if len(data) > frame.MAX_DATA:
            text = f"the answer has {len(data)} bytes and does not fit into a frame"
            data = envelope.Response(code=RESOURCE_EXHAUSTED, message=text).encode()
        self._transport.write(frame.encode(stream, frame.RESPONSE, data))
