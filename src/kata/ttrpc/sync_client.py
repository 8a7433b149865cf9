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
    from kata.ttrpc.messages import Encodable, R, Socket

__all__ = ["Client", "ConnectionLost", "ProtocolError", "TtrpcError", "connect"]

_CHUNK = 1 << 16


class _Call:
    """One call in flight. `wake` is a lock that stays locked until the call's thread has something to do."""

    __slots__ = ("response", "wake")

    def __init__(self) -> None:
        self.response: envelope.Response | None = None
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
        self._calls: dict[int, _Call] = {}
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
        stream, call = self._begin(data, deadline, method)
        try:
            self._wait(call, deadline, method)
        finally:
            with self._state:
                if self._calls.pop(stream, None) is not None:
                    # Its answer may still arrive, and must not be taken for a protocol error.
                    self._abandoned.add(stream)
                if not self._reading:
                    # Another waiting thread, any of them, has to read now. This applies after a timeout too: this
                    # thread may just have been chosen as the reader.
                    for other in self._calls.values():
                        _wake(other)
                        break
        answer = call.response
        if answer is None:
            raise self._failure()
        try:
            return decoded(answer, response, method)
        except ProtocolError as error:
            raise self._fail(error) from None

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

    def _begin(self, data: bytes, deadline: float | None, method: str) -> tuple[int, _Call]:
        call = _Call()
        if not self._writing.acquire(timeout=_left(deadline)):
            raise _too_late(method)
        try:
            with self._state:
                if self._error is not None:
                    raise self._failure()
                stream = self._next
                self._next += 2
                self._calls[stream] = call
            try:
                self._write(frame.encode(stream, frame.REQUEST, data), deadline, method)
            except BaseException:
                with self._state:
                    self._calls.pop(stream, None)
                # Part of a frame may have been sent (also after an interrupt), and nothing can follow that.
                self._fail(ConnectionLost("a call was cut short while it was sent"))
                raise
        finally:
            self._writing.release()
        return stream, call

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

    def _wait(self, call: _Call, deadline: float | None, method: str) -> None:
        """Return when `call` has its response or the connection is lost."""
        while True:
            with self._state:
                if call.response is not None or self._error is not None:
                    return
                lead = not self._reading
                self._reading = True
            if not lead:
                if not call.wake.acquire(timeout=_left(deadline)):
                    raise _too_late(method)
                continue
            try:
                while call.response is None and self._error is None:
                    if not _ready(self._readable, deadline):
                        raise _too_late(method)
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


def _wake(call: _Call) -> None:
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
