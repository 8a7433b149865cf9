"""A ttRPC client for programs without an event loop.

Made for commands that live for milliseconds: it imports three built-in modules and starts no thread. Several threads
may call at the same time. One of the waiting threads reads for all of them; when it has its own answer, another one
takes over.
"""

from __future__ import annotations

import select
from _thread import allocate_lock
from time import monotonic

from kata.ttrpc import envelope, frame
from kata.ttrpc.calls import decoded, encoded, response_in
from kata.ttrpc.status import (
    DEADLINE_EXCEEDED,
    ConnectionLost,
    ProtocolError,
    TtrpcError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kata.ttrpc.messages import Encodable, R, Socket

__all__ = ["Call", "Client", "ConnectionLost", "ProtocolError", "TtrpcError", "connect"]

_CHUNK = 1 << 16


class Call:
    """One call in flight, of `Client.begin`.

    Its `wake` is a lock that stays locked until the thread that waits for its answer, if one does, has something to do.
    """

    __slots__ = ("method", "response", "stream", "waited_for", "wake")

    def __init__(self, stream: int, method: str) -> None:
        self.stream = stream
        self.method = method
        self.response: envelope.Response | None = None
        self.waited_for = False
        self.wake = allocate_lock()
        self.wake.acquire()


def connect(path: str) -> Client:
    """Connect to the server that listens on the unix socket `path`.

    Raises:
        OSError: No server listens there.
    """
    # `socket` is a wrapper that costs 10 ms of imports, none of which is needed here.
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return Client(sock)


class Client:
    """One connection.

    Args:
        sock: A connected stream socket. The client takes ownership of it and makes it non-blocking.
    """

    def __init__(self, sock: Socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._parser = frame.Parser()
        self._next = 1
        self._calls: dict[int, Call] = {}
        self._abandoned: set[int] = set()
        self._error: ConnectionLost | None = None
        # Protects all attributes above; never held while blocking.
        self._state = allocate_lock()
        # Whether a thread is reading for all threads; only that one uses the poll object.
        self._reading = False
        self._readable = select.poll()
        self._readable.register(sock.fileno(), select.POLLIN)
        # Held while a frame is written.
        self._writing = allocate_lock()

    def call(
        self,
        service: str,
        method: str,
        request: Encodable,
        response: type[R],
        timeout: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> R:
        """Make one call and wait for its answer.

        Args:
            service: Full name of the service, including its package.
            method: Name of the method.
            request: Anything with `encode`.
            response: Class of the answer.
            timeout: Seconds, also sent to the server. None waits as long as the connection lives.
            metadata: Sent as the protocol's metadata.

        Returns:
            The decoded answer.

        Raises:
            TtrpcError: The status from the server; DEADLINE_EXCEEDED; or RESOURCE_EXHAUSTED for a request that does
                not fit into a frame.
            ConnectionLost: The connection ended; ProtocolError when the server broke the protocol.
        """
        deadline = None if timeout is None else monotonic() + timeout
        data = encoded(service, method, request, timeout, metadata)
        return self._finish(self._begin([(method, data)], deadline)[0], response, deadline)

    def begin(self, calls: Iterable[tuple[str, str, Encodable]]) -> list[Call]:
        """Make calls without waiting for any answer. The server begins with them in this order.

        Args:
            calls: For each the full name of its service, its method and its request, as for `call`.

        Returns:
            Each of them, for `finish`.

        Raises:
            TtrpcError: A request does not fit into a frame; none is made then.
            ConnectionLost: The connection has ended.
        """
        data = [(method, encoded(service, method, request)) for service, method, request in calls]
        return self._begin(data, None)

    def finish(self, call: Call, response: type[R], timeout: float | None = None) -> R:
        """Wait for the answer of a call that was begun. Once for each; see `call`.

        Args:
            call: The call, of `begin`.
            response: Class of the answer.
            timeout: Seconds, from now on. None waits as long as the connection lives.
        """
        return self._finish(call, response, None if timeout is None else monotonic() + timeout)

    def look(self, call: Call) -> bool:
        """Whether `finish` would return at once. Takes in what has arrived, unless another thread does, and does not
        wait for more.
        """
        with self._state:
            if call.response is not None or self._error is not None:
                return True
            if self._reading:
                return False
            self._reading = True
        try:
            self._read()
        finally:
            with self._state:
                self._reading = False
                self._next_reader()
                found = call.response is not None or self._error is not None
        return found

    def _finish(self, call: Call, response: type[R], deadline: float | None) -> R:
        try:
            self._wait(call, deadline)
        finally:
            with self._state:
                if self._calls.pop(call.stream, None) is not None:
                    # Its answer may still arrive, and must not be taken for a protocol error.
                    self._abandoned.add(call.stream)
                if not self._reading:
                    # This applies after a timeout too: this thread may just have been chosen as the reader.
                    self._next_reader()
        answer = call.response
        if answer is None:
            raise self._failure()
        try:
            return decoded(answer, response, call.method)
        except ProtocolError as error:
            raise self._fail(error) from None

    def _next_reader(self) -> None:
        """Another waiting thread, any of them, has to read now. Called with `_state` locked."""
        for other in self._calls.values():
            if other.waited_for:
                _wake(other)
                break

    def close(self) -> None:
        """End the connection; calls in flight fail with ConnectionLost."""
        self._fail(ConnectionLost("the connection was closed here"))

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- writing ----

    def _begin(self, requests: list[tuple[str, bytes]], deadline: float | None) -> list[Call]:
        method = requests[0][0]
        if not self._writing.acquire(timeout=_left(deadline)):
            raise _too_late(method)
        calls: list[Call] = []
        try:
            out = b""
            with self._state:
                if self._error is not None:
                    raise self._failure()
                for name, data in requests:
                    call = Call(self._next, name)
                    self._next += 2
                    self._calls[call.stream] = call
                    calls.append(call)
                    out += frame.encode(call.stream, frame.REQUEST, data)
            try:
                self._write(out, deadline, method)
            except BaseException:
                with self._state:
                    for call in calls:
                        self._calls.pop(call.stream, None)
                # Part of a frame may have been sent (also after an interrupt), and nothing can follow that.
                self._fail(ConnectionLost("a call was cut short while it was sent"))
                raise
        finally:
            self._writing.release()
        return calls

    def _write(self, data: bytes, deadline: float | None, method: str) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                if not self._is_writable(deadline):
                    self._fail(ConnectionLost("the server does not read what it is sent"))
                    raise _too_late(method) from None
            except OSError as error:
                raise self._fail(ConnectionLost(f"the connection ended: {error.strerror}")) from None

    # ---- reading ----

    def _wait(self, call: Call, deadline: float | None) -> None:
        """Return when `call` has its response or the connection is lost."""
        call.waited_for = True
        while True:
            with self._state:
                if call.response is not None or self._error is not None:
                    return
                lead = not self._reading
                self._reading = True
            if not lead:
                if not call.wake.acquire(timeout=_left(deadline)):
                    raise _too_late(call.method)
                continue
            try:
                while call.response is None and self._error is None:
                    if not _ready(self._readable, deadline):
                        raise _too_late(call.method)
                    self._read()
            finally:
                with self._state:
                    self._reading = False
            return

    def _read(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(ConnectionLost(f"the connection ended: {error.strerror}"))
            return
        if not data:
            cut = " in the middle of an answer" if self._parser.pending else ""
            self._fail(ConnectionLost(f"the server closed the connection{cut}"))
            return
        try:
            for item in self._parser.feed(data):
                self._take(item)
        except ProtocolError as error:
            self._fail(error)

    def _take(self, item: frame.Frame) -> None:
        response = response_in(item)
        with self._state:
            call = self._calls.pop(item.stream, None)
            if call is not None:
                call.response = response
                _wake(call)
            elif item.stream in self._abandoned:
                self._abandoned.discard(item.stream)
            else:
                raise ProtocolError(f"the server answered call {item.stream}, which nobody made")

    def _is_writable(self, deadline: float | None) -> bool:
        poll = select.poll()
        try:
            poll.register(self._sock.fileno(), select.POLLOUT)
        except (ValueError, OSError):
            # Closed by another thread.
            return True
        return _ready(poll, deadline)

    # ---- the end ----

    def _fail(self, error: ConnectionLost) -> ConnectionLost:
        """Close the connection for `error`, unless it is closed already. Returns the error to raise."""
        with self._state:
            if self._error is None:
                self._error = error
                try:
                    # Unlike close, this wakes the thread that polls.
                    self._sock.shutdown(2)
                except OSError:
                    pass
                self._sock.close()
                for call in self._calls.values():
                    _wake(call)
        return self._failure()

    def _failure(self) -> ConnectionLost:
        # A new exception for every raise: threads must not share a traceback.
        error = self._error or ConnectionLost("the connection ended")
        return type(error)(*error.args)


def _wake(call: Call) -> None:
    # Called with `_state` locked; only the call's own thread acquires this lock.
    if call.wake.locked():
        call.wake.release()


def _ready(poll: select.poll, deadline: float | None) -> bool:
    """Whether the socket became ready. Also true at end of file, which the next read or write reports."""
    while not poll.poll(None if deadline is None else min(int(_left(deadline) * 1000) + 1, 1 << 30)):
        if _left(deadline) == 0:
            return False
    return True


def _left(deadline: float | None) -> float:
    """Seconds until `deadline`; -1 (no timeout for a lock) when there is none."""
    return -1 if deadline is None else max(0.0, deadline - monotonic())


def _too_late(method: str) -> TtrpcError:
    return TtrpcError(DEADLINE_EXCEEDED, f"{method} was not answered in time")
