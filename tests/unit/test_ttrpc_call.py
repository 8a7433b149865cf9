"""ttRPC clients and server against each other over socket pairs, and against peers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from kata.proto import google_pb, health_pb
from kata.proto.codec import Methods
from kata.ttrpc import envelope, frame, status, sync_client
from kata.ttrpc.calls import encoded
from kata.ttrpc.client import Client, ConnectionLost, ProtocolError, TtrpcError
from kata.ttrpc.server import Context, Server, finish

SERVICE = "test.Echo"
NAMES = ("Echo", "Block", "Slow", "Fail", "Bug", "Big", "Wrong", "Context", "Unwritten", "Stubborn", "Empty")
TABLE = Methods(dict.fromkeys(NAMES, "@health.CheckRequest @health.CheckRequest"))
Request = health_pb.CheckRequest


class NotThere(Exception):
    grpc_code = 5
    hint = "make it first"


class Echo:
    """The service of these tests."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.finished = asyncio.Event()

    async def Echo(self, request: Request, context: Context) -> Request:
        return request

    async def Slow(self, request: Request, context: Context) -> Request:
        await asyncio.sleep(0)
        return request

    async def Block(self, request: Request, context: Context) -> Request:
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    @finish
    async def Stubborn(self, request: Request, context: Context) -> Request:
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.finished.set()
        return request

    async def Fail(self, request: Request, context: Context) -> Request:
        if request.service == "ttrpc":
            raise TtrpcError(status.FAILED_PRECONDITION, "not now", [b"\x0a\x01t"])
        raise NotThere(f"{request.service} does not exist")

    async def Bug(self, request: Request, context: Context) -> Request:
        raise ZeroDivisionError("a\nbug")

    async def Big(self, request: Request, context: Context) -> Request:
        return Request(service="x" * frame.MAX_DATA)

    async def Wrong(self, request: Request, context: Context) -> google_pb.Empty:
        return google_pb.Empty()

    async def Context(self, request: Request, context: Context) -> Request:
        left = context.remaining()
        timed = "timed" if left is not None and 0 < left <= 60 else str(left)
        return Request(service=f"{context.service} {context.method} {context.metadata} {timed}")


def run(scenario: Callable[[Client, Echo, Server], Awaitable[None]], **limits: int) -> list[Exception]:
    """Run a scenario with a client connected to a server; the errors that the server reported."""
    errors: list[Exception] = []

    async def main() -> None:
        echo = Echo()
        server = Server({SERVICE: (TABLE, echo)}, lambda context, error: errors.append(error))
        ours, theirs = socket.socketpair()
        await server.attach(theirs)
        client = await Client.connect(ours, **limits)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(scenario(client, echo, server), 60)
        finally:
            client.close()
            echo.release.set()
            await server.shutdown()

    asyncio.run(main())
    return errors


async def call(client: Client, method: str, text: str = "", timeout: float | None = None) -> str:
    return (await client.call(SERVICE, method, Request(service=text), Request, timeout)).service


async def fails(awaitable: Awaitable[object], code: int) -> TtrpcError:
    with pytest.raises(TtrpcError) as caught:
        await awaitable
    assert caught.value.code == code, caught.value
    return caught.value


def test_a_thousand_calls_at_once_and_a_blocked_one_holds_nobody_up() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        blocked = asyncio.create_task(call(client, "Block", "first"))
        await echo.started.wait()
        texts = [f"{i}" for i in range(1000)]
        assert await asyncio.gather(*(call(client, "Slow", text, 60) for text in texts)) == texts
        assert not blocked.done()
        assert server.calls == 1
        echo.release.set()
        assert await blocked == "first"

    assert run(scenario) == []


def test_calls_above_the_limits_wait_their_turn() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        blocked = [asyncio.create_task(call(client, "Block", str(i))) for i in range(3)]
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(call(client, "Echo", str(i), 60)) for i in range(10)]
        await fails(call(client, "Echo"), status.RESOURCE_EXHAUSTED)
        await fails(call(client, "Echo", "", 0.01), status.DEADLINE_EXCEEDED)
        assert not any(task.done() for task in waiting)
        waiting[4].cancel()
        echo.release.set()
        assert await asyncio.gather(*blocked) == ["0", "1", "2"]
        del waiting[4]
        assert len(await asyncio.gather(*waiting)) == 9

    run(scenario, max_calls=3)


def test_bytes_in_flight_are_bounded() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        big = "x" * 600
        # One that is bigger than the limit passes when it is alone.
        assert await call(client, "Echo", "y" * 5000) == "y" * 5000
        results = await asyncio.gather(*(call(client, "Slow", big) for _ in range(20)))
        assert results == [big] * 20
        assert client._bytes == 0

    run(scenario, max_bytes=1000)


def test_statuses() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        error = await fails(call(client, "Fail", "thing"), status.NOT_FOUND)
        assert error.split_hint() == ("thing does not exist", "make it first")
        error = await fails(call(client, "Fail", "ttrpc"), status.FAILED_PRECONDITION)
        assert (error.message, error.details) == ("not now", (b"\x0a\x01t",))
        error = await fails(call(client, "Bug"), status.INTERNAL)
        assert error.message == "ZeroDivisionError: a bug"
        await fails(call(client, "Wrong"), status.INTERNAL)
        await fails(call(client, "Big"), status.RESOURCE_EXHAUSTED)
        await fails(call(client, "Unwritten"), status.UNIMPLEMENTED)
        await fails(call(client, "__init__"), status.UNIMPLEMENTED)
        await fails(client.call("x.Y", "Z", Request(), Request), status.UNIMPLEMENTED)
        await fails(call(client, "Echo", "x" * frame.MAX_DATA), status.RESOURCE_EXHAUSTED)

    # Only the two bugs are for the log.
    assert [type(error) for error in run(scenario)] == [ZeroDivisionError, TypeError]


def test_a_malformed_request_is_an_invalid_argument() -> None:
    class Garbage:
        def encode(self) -> bytes:
            return b"\x0a\xff"

    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        await fails(client.call(SERVICE, "Echo", Garbage(), Request), status.INVALID_ARGUMENT)

    run(scenario)


def test_the_handler_knows_its_call() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        got = await client.call(SERVICE, "Context", Request(), Request, 60, {"a": "1", "b": "2"})
        assert got.service == "test.Echo Context {'a': ['1'], 'b': ['2']} timed"
        assert (await call(client, "Context")).endswith("{} None")

    run(scenario)


def test_a_deadline_ends_call_and_handler() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        await fails(call(client, "Block", "", 0.05), status.DEADLINE_EXCEEDED)
        await echo.cancelled.wait()
        # The server's late answer to it is no protocol error.
        assert await call(client, "Echo", "on") == "on"
        assert not client.closed

    assert run(scenario) == []


def test_a_marked_handler_outlives_deadline_and_connection() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        await fails(call(client, "Stubborn", "", 0.05), status.DEADLINE_EXCEEDED)
        client.close()
        while server.connections:
            await asyncio.sleep(0.01)
        echo.release.set()
        await echo.finished.wait()
        assert not echo.cancelled.is_set()

    assert run(scenario) == []


def test_a_cancelled_call_leaves_the_connection_alone() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        task = asyncio.create_task(call(client, "Block"))
        await echo.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        echo.release.set()
        assert await call(client, "Echo", "on") == "on"
        while client._abandoned:
            await asyncio.sleep(0.01)
        assert client._bytes == 0

    run(scenario)


def test_the_end_of_the_connection_fails_all_calls_and_cancels_their_handlers() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        tasks = [asyncio.create_task(call(client, "Block")) for _ in range(5)]
        await echo.started.wait()
        client.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ConnectionLost)
        await echo.cancelled.wait()
        with pytest.raises(ConnectionLost, match="closed here"):
            await call(client, "Echo")
        assert isinstance(await client.wait_closed(), ConnectionLost)
        assert client.closed

    run(scenario)


def test_shutdown_lets_calls_end_and_refuses_new_ones() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        running = asyncio.create_task(call(client, "Block", "done"))
        await echo.started.wait()
        ending = asyncio.create_task(server.shutdown(60))
        await asyncio.sleep(0)
        await fails(call(client, "Echo"), status.UNAVAILABLE)
        echo.release.set()
        assert await running == "done"
        await ending
        await client.wait_closed()

    run(scenario)


def test_shutdown_cancels_what_does_not_end() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        running = asyncio.create_task(call(client, "Block"))
        await echo.started.wait()
        await asyncio.gather(server.shutdown(0.05), fails(running, status.CANCELLED))

    run(scenario)


def test_a_listening_socket(tmp_path: Any) -> None:
    async def main() -> None:
        server = Server({SERVICE: (TABLE, Echo())})
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        serving = asyncio.create_task(server.serve(listener))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        client = Client.over_streams(reader, writer)
        assert await call(client, "Echo", "hello") == "hello"
        # Blocking clients connect to the same one.
        with await asyncio.to_thread(sync_client.connect, str(tmp_path / "s")) as other:
            got = await asyncio.to_thread(other.call, SERVICE, "Echo", Request(service="you"), Request, 60)
        assert got.service == "you"
        await server.shutdown()
        await serving
        assert isinstance(await client.wait_closed(), ConnectionLost)
        with pytest.raises(ConnectionLost):
            await call(client, "Echo")

    asyncio.run(main())


# ---- peers that break the protocol ----

GOOD = envelope.Response(Request(service="x").encode()).encode()
VIOLATIONS = [
    (frame.encode(7, frame.RESPONSE, GOOD), "nobody made"),
    (frame.encode(1, frame.REQUEST, GOOD), "type 1"),
    (frame.encode(1, frame.DATA, b""), "type 3"),
    (frame.encode(1, frame.RESPONSE, b"\xff"), "malformed response"),
    (
        frame.encode(1, frame.RESPONSE, envelope.Response(b"\x0a\xff").encode()),
        "answer to Echo is malformed",
    ),
    (b"\x00\x40\x00\x01\0\0\0\x01\x02\0", "4194305 bytes"),
    (b"GET / HTTP/1.1\r\n", "bytes"),
]


@pytest.mark.parametrize(("answer", "words"), VIOLATIONS)
def test_a_hostile_server_fails_all_calls(answer: bytes, words: str) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        client = await Client.connect(ours)
        calls = [asyncio.create_task(call(client, "Echo")) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, theirs.sendall, answer)
        first, *others = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(first, ProtocolError)
        assert words in str(first)
        assert all(isinstance(other, ProtocolError) for other in others)
        theirs.close()

    asyncio.run(main())


@pytest.mark.parametrize(("answer", "words"), VIOLATIONS)
def test_a_hostile_server_of_a_blocking_client(answer: bytes, words: str) -> None:
    ours, theirs = socket.socketpair()
    client = sync_client.Client(ours)
    theirs.sendall(answer)
    with pytest.raises(ProtocolError, match=words):
        client.call(SERVICE, "Echo", Request(), Request, timeout=60)
    with pytest.raises(ProtocolError, match=words):
        client.call(SERVICE, "Echo", Request(), Request, timeout=60)
    theirs.close()


def test_an_answer_that_is_cut_short() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        client = await Client.connect(ours)
        task = asyncio.create_task(call(client, "Echo"))
        await asyncio.sleep(0)
        # Unread data would turn the end of the stream into a reset.
        theirs.recv(4096)
        theirs.send(frame.encode(1, frame.RESPONSE, GOOD)[:-1])
        theirs.close()
        with pytest.raises(ConnectionLost, match="in the middle"):
            await task

    asyncio.run(main())


@pytest.mark.parametrize(
    "request_frame",
    [
        frame.encode(1, frame.RESPONSE, b""),
        frame.encode(1, frame.DATA, b""),
        frame.encode(1, frame.REQUEST, envelope.Request(SERVICE, "Block", b"").encode()) * 2,
        b"\xff" * 10,
    ],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(request_frame: bytes) -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        ours, theirs = socket.socketpair()
        await server.attach(theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(request_frame)
        assert await reader.read() == b""
        writer.close()
        # Others are not disturbed.
        assert await call(client, "Echo", "on") == "on"

    (error,) = run(scenario)
    assert isinstance(error, ProtocolError)


def test_requests_the_server_can_answer_with_a_refusal() -> None:
    async def scenario(client: Client, echo: Echo, server: Server) -> None:
        ours, theirs = socket.socketpair()
        await server.attach(theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        for stream, data in ((2, envelope.Request(SERVICE, "Echo", b"").encode()), (3, b"\xff")):
            writer.write(frame.encode(stream, frame.REQUEST, data))
            head = await reader.readexactly(frame.HEADER_SIZE)
            body = await reader.readexactly(int.from_bytes(head[:4], "big"))
            assert int.from_bytes(head[4:8], "big") == stream
            assert envelope.Response.decode(body).code == status.INVALID_ARGUMENT
        writer.close()

    run(scenario)


def test_a_client_may_have_only_so_many_calls() -> None:
    async def main() -> None:
        echo = Echo()
        server = Server({SERVICE: (TABLE, echo)}, max_calls=2)
        ours, theirs = socket.socketpair()
        await server.attach(theirs)
        client = await Client.connect(ours)
        blocked = [asyncio.create_task(call(client, "Block")) for _ in range(2)]
        await echo.started.wait()
        await fails(call(client, "Echo"), status.RESOURCE_EXHAUSTED)
        echo.release.set()
        await asyncio.gather(*blocked)
        client.close()
        await server.shutdown()

    asyncio.run(main())


def test_calls_that_were_made_before_there_was_a_client() -> None:
    """Their answers may come before somebody waits for them; further calls have streams of their own."""

    async def main() -> None:
        echo = Echo()
        server = Server({SERVICE: (TABLE, echo)})
        ours, theirs = socket.socketpair()
        for stream, method in ((1, "Echo"), (3, "Fail"), (5, "Block")):
            data = encoded(SERVICE, method, Request(service=f"early {stream}"))
            ours.sendall(frame.encode(stream, frame.REQUEST, data))
        await server.attach(theirs)
        client = await Client.connect(ours, made=(1, 3, 5))
        assert await call(client, "Echo", "late") == "late"  # the others have been answered by now, but one
        first = await client.call(SERVICE, "Echo", Request(), Request, stream=1)
        assert first.service == "early 1"
        await fails(client.call(SERVICE, "Fail", Request(), Request, stream=3), status.NOT_FOUND)
        await fails(
            client.call(SERVICE, "Block", Request(), Request, 0.05, stream=5), status.DEADLINE_EXCEEDED
        )
        echo.release.set()
        assert await call(client, "Echo", "after the late answer") == "after the late answer"
        client.close()
        lost = await Client.connect(socket.socketpair()[0], made=(1,))
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(lost.call(SERVICE, "Echo", Request(), Request, stream=1), 10)
        await server.shutdown()

    asyncio.run(main())


# ---- the blocking client ----


@pytest.fixture
def blocking() -> Iterator[tuple[sync_client.Client, Callable[[], None]]]:
    """A blocking client of a server in another thread, and a function that releases the blocked calls."""
    ours, theirs = socket.socketpair()
    ready = threading.Event()
    state: dict[str, Any] = {}

    def serve() -> None:
        async def main() -> None:
            echo = Echo()
            server = Server({SERVICE: (TABLE, echo)})
            await server.attach(theirs)
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            state["stop"] = lambda: loop.call_soon_threadsafe(stop.set)
            state["release"] = lambda: loop.call_soon_threadsafe(echo.release.set)
            ready.set()
            await stop.wait()
            echo.release.set()
            await server.shutdown()

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    client = sync_client.Client(ours)
    yield client, state["release"]
    client.close()
    state["stop"]()
    thread.join()


def test_blocking_calls(blocking: tuple[sync_client.Client, Callable[[], None]]) -> None:
    client, _ = blocking
    assert client.call(SERVICE, "Echo", Request(service="a"), Request).service == "a"
    assert len(client.call(SERVICE, "Echo", Request(service="x" * 3_000_000), Request).service) == 3_000_000
    with pytest.raises(TtrpcError, match="does not exist") as caught:
        client.call(SERVICE, "Fail", Request(service="b"), Request)
    assert caught.value.code == status.NOT_FOUND
    with pytest.raises(TtrpcError) as caught:
        client.call(SERVICE, "Block", Request(), Request, timeout=0.05)
    assert caught.value.code == status.DEADLINE_EXCEEDED
    with pytest.raises(TtrpcError) as caught:
        client.call(SERVICE, "Echo", Request(service="x" * frame.MAX_DATA), Request)
    assert caught.value.code == status.RESOURCE_EXHAUSTED
    got = client.call(SERVICE, "Context", Request(), Request, 60, {"k": "v"})
    assert got.service.endswith("{'k': ['v']} timed")
    assert client.fileno() >= 0


def test_threads_share_a_blocking_client(
    blocking: tuple[sync_client.Client, Callable[[], None]],
) -> None:
    client, release = blocking
    answers: list[str] = []
    failures: list[BaseException] = []

    def many(name: int) -> None:
        try:
            for i in range(50):
                text = f"{name} {i}"
                assert client.call(SERVICE, "Slow", Request(service=text), Request).service == text
                if i % 10 == name % 10:
                    with pytest.raises(TtrpcError):
                        client.call(SERVICE, "Stubborn", Request(), Request, timeout=0.001)
        except BaseException as error:
            failures.append(error)

    def block() -> None:
        answers.append(client.call(SERVICE, "Block", Request(service="held"), Request).service)

    blocked = threading.Thread(target=block)
    blocked.start()
    threads = [threading.Thread(target=many, args=(name,)) for name in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert answers == []
    release()
    blocked.join()
    assert answers == ["held"]


def test_closing_wakes_the_threads_that_wait(
    blocking: tuple[sync_client.Client, Callable[[], None]],
) -> None:
    client, _ = blocking
    failures: list[BaseException] = []

    def block() -> None:
        try:
            client.call(SERVICE, "Block", Request(), Request)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=block) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(client._calls) < 3:
        assert client.call(SERVICE, "Echo", Request(), Request) == Request()
    client.close()
    for thread in threads:
        thread.join()
    assert [type(failure) for failure in failures] == [ConnectionLost] * 3


def test_a_server_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    client = sync_client.Client(ours)
    with pytest.raises(TtrpcError) as caught:
        client.call(SERVICE, "Echo", Request(service="x" * 4_000_000), Request, timeout=0.05)
    assert caught.value.code == status.DEADLINE_EXCEEDED
    # Half a request is out there, so nothing can follow.
    with pytest.raises(ConnectionLost):
        client.call(SERVICE, "Echo", Request(), Request, timeout=60)
    theirs.close()


def test_a_server_that_goes_away() -> None:
    ours, theirs = socket.socketpair()
    client = sync_client.Client(ours)
    theirs.close()
    with pytest.raises(ConnectionLost):
        client.call(SERVICE, "Echo", Request(), Request)
    with pytest.raises(FileNotFoundError):
        sync_client.connect("/nonexistent/socket")
