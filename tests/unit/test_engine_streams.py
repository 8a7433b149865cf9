"""The engine's stream pumps, with real fifos."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kata.engine.standard_streams import streams
from kata.engine.standard_streams.stdio import parse, parse_stdio
from kata.engine.standard_streams.streams import InputPump, OutputPump, ProcessStreams, Sink
from kata.errors import AgentError, KataError, UnsupportedError, UsageError, VMLostError


class Guest:
    """A process in the guest, as the agent shows it: pieces to read, a place to write."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.reads = 0
        self.written = bytearray()
        self.closed = asyncio.Event()
        self.error: KataError | None = None

    async def read(self) -> bytes:
        self.reads += 1
        if self.error:
            raise self.error
        return await self.pieces.get()

    async def write(self, data: bytes) -> None:
        if self.error:
            raise self.error
        self.written += data

    async def close(self) -> None:
        self.closed.set()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


async def read_all(fd: int) -> bytes:
    """Everything until the writers have gone, without blocking the loop."""
    data = bytearray()
    while True:
        try:
            piece = os.read(fd, 1 << 16)
        except BlockingIOError:
            await asyncio.sleep(0.001)
            continue
        if not piece:
            return bytes(data)
        data += piece


def reader_of(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def test_output_arrives_whole_and_in_order(fifo: str) -> None:
    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        pump.start()
        sent = [os.urandom(300_000) for _ in range(20)]
        for piece in [*sent, b""]:
            guest.pieces.put_nowait(piece)
        assert await read_all(fd) == b"".join(sent)
        os.close(fd)

    run(work)


def test_slow_reader_holds_the_guest_up(fifo: str) -> None:
    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        pump.start()
        for _ in range(50):
            guest.pieces.put_nowait(bytes(1 << 20))
        guest.pieces.put_nowait(b"")
        await asyncio.sleep(0.2)
        # One piece fills the pipe, one is being written, two wait: nothing else was asked for.
        assert guest.reads <= 5
        assert len(await read_all(fd)) == 50 << 20
        os.close(fd)

    run(work)


def test_vanished_reader_is_dropped_and_the_log_goes_on(fifo: str, tmp_path: Path) -> None:
    from kata.engine.standard_streams.logfile import LogFile
    from kata.engine.standard_streams.streams import Log

    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        log = Log(LogFile(str(tmp_path / "log")))
        pump = OutputPump("stdout", guest.read, log)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        pump.start()
        os.close(fd)
        for piece in (b"one\n", b"two\n", b""):
            guest.pieces.put_nowait(piece)
        assert pump.delivered is not None
        await pump.delivered
        assert not pump.sinks
        log.close()

    run(work)
    text = (tmp_path / "log").read_text()
    assert '"log":"one\\n"' in text
    assert '"log":"two\\n"' in text


def test_exit_waits_for_a_reader_that_reads(fifo: str) -> None:
    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        together = ProcessStreams(None, [pump])
        together.start()
        for _ in range(8):
            guest.pieces.put_nowait(bytes(1 << 20))
        guest.pieces.put_nowait(b"")
        finish = asyncio.create_task(together.finish())
        await asyncio.sleep(0.1)
        assert not finish.done()
        data = await read_all(fd)
        await finish
        assert len(data) == 8 << 20
        os.close(fd)

    run(work)


def test_exit_does_not_wait_for_a_reader_that_does_not(fifo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.2)

    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        together = ProcessStreams(None, [pump])
        together.start()
        for _ in range(3):
            guest.pieces.put_nowait(bytes(1 << 20))
        guest.pieces.put_nowait(b"")
        await together.finish()
        assert len(together.undelivered) == 1
        # The reader comes back, and nothing was lost meanwhile.
        assert len(await read_all(fd)) == 3 << 20
        assert not together.undelivered
        os.close(fd)

    run(work)


def test_guest_that_never_ends_its_stream_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "GUEST_EOF_S", 0.1)

    async def work() -> None:
        guest = Guest()
        pump = OutputPump("stdout", guest.read, None)
        together = ProcessStreams(None, [pump])
        together.start()
        guest.pieces.put_nowait(b"last words")
        await together.finish()
        assert pump.size == len(b"last words")

    run(work)


def test_guest_that_floods_after_its_exit_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_TAIL_BYTES", 1 << 20)

    async def work() -> None:
        async def flood() -> bytes:
            await asyncio.sleep(0)
            return bytes(1 << 18)

        pump = OutputPump("stdout", flood, None)
        together = ProcessStreams(None, [pump])
        together.start()
        await together.finish()
        assert pump.guest_eof is not None
        assert pump.guest_eof.done()

    run(work)


def test_lost_guest_ends_the_output(fifo: str) -> None:
    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        guest.pieces.put_nowait(b"before")
        pump.start()
        await asyncio.sleep(0.05)
        guest.error = VMLostError("gone")
        guest.pieces.put_nowait(b"!")  # the read that was waiting; the next one fails
        assert await read_all(fd) == b"before!"
        os.close(fd)

    run(work)


def test_stdin_arrives_and_its_end_closes(fifo: str) -> None:
    async def work() -> None:
        guest = Guest()
        pump = InputPump(guest.write, guest.close)
        pump.add(parse(fifo).open_source()[0], closes=True)
        pump.start()
        await asyncio.sleep(0.05)
        assert not guest.closed.is_set()  # no writer yet is not the end
        data = os.urandom(3_000_000)
        writer = asyncio.create_task(asyncio.to_thread(Path(fifo).write_bytes, data))
        await guest.closed.wait()
        await writer
        assert hashlib.sha256(guest.written).digest() == hashlib.sha256(data).digest()

    run(work)


def test_held_stdin_stays_open_until_told(fifo: str) -> None:
    async def work() -> None:
        guest = Guest()
        pump = InputPump(guest.write, guest.close)
        fd, held_fd = parse(fifo).open_source(held=True)
        pump.add(fd, held_fd=held_fd, closes=True)
        pump.start()
        for word in (b"one", b"two"):
            await asyncio.to_thread(Path(fifo).write_bytes, word)  # opens and closes
        await asyncio.sleep(0.1)
        assert bytes(guest.written) == b"onetwo"
        assert not guest.closed.is_set()
        await asyncio.to_thread(Path(fifo).write_bytes, b"three")
        pump.end_of_input()
        await guest.closed.wait()
        assert bytes(guest.written) == b"onetwothree"

    run(work)


def test_process_that_closed_its_stdin_breaks_the_pipe(fifo: str) -> None:
    async def work() -> None:
        guest = Guest()
        guest.error = AgentError("broken pipe")
        pump = InputPump(guest.write, guest.close)
        pump.add(parse(fifo).open_source()[0], closes=True)
        pump.start()
        writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"x")
        await asyncio.sleep(0.1)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"y")
        os.close(writer)

    run(work)


def test_attached_client_sees_what_comes_and_may_vanish(fifo: str, tmp_path: Path) -> None:
    async def work() -> None:
        guest, first = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(fifo).open_sink()[0]))
        together = ProcessStreams(None, [pump])
        together.start()
        second_path = str(tmp_path / "second")
        os.mkfifo(second_path)
        second = reader_of(second_path)
        together.attach(parse_stdio(False, "", second_path, ""))
        guest.pieces.put_nowait(b"both")
        await asyncio.sleep(0.05)
        assert os.read(second, 100) == b"both"
        os.close(second)
        guest.pieces.put_nowait(b" one")
        guest.pieces.put_nowait(b"")
        assert await read_all(first) == b"both one"
        os.close(first)

    run(work)


def test_attach_to_a_path_without_reader_fails_and_changes_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        guest = Guest()
        pump = OutputPump("stdout", guest.read, None)
        together = ProcessStreams(None, [pump])
        together.start()
        path = str(tmp_path / "nobody")
        os.mkfifo(path)
        with pytest.raises(UsageError):
            together.attach(parse_stdio(False, "", path, ""))
        assert not pump.sinks
        together.close()

    run(work)


def test_attach_after_the_end_closes_at_once(fifo: str) -> None:
    async def work() -> None:
        guest, fd = Guest(), reader_of(fifo)
        pump = OutputPump("stdout", guest.read, None)
        together = ProcessStreams(None, [pump])
        together.start()
        guest.pieces.put_nowait(b"")
        await together.finish()
        together.attach(parse_stdio(False, "", fifo, ""))
        assert await read_all(fd) == b""
        os.close(fd)

    run(work)


@pytest.mark.parametrize(
    ("path", "error"),
    [("binary:///bin/cat", UnsupportedError), ("/nonexistent/fifo", UsageError), ("/tmp", UsageError)],
)
def test_paths_that_cannot_be_streams(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(path).open_sink()[0]


def test_file_uri_is_appended_to(tmp_path: Path) -> None:
    async def work() -> None:
        guest = Guest()
        pump = OutputPump("stdout", guest.read, None)
        pump.sinks.append(Sink(parse(f"file://{tmp_path}/out").open_sink()[0]))
        pump.start()
        for piece in (b"a", b"b", b""):
            guest.pieces.put_nowait(piece)
        assert pump.delivered is not None
        await pump.delivered

    (tmp_path / "out").write_bytes(b"old ")
    run(work)
    assert (tmp_path / "out").read_bytes() == b"old ab"


def test_nothing_is_left_open() -> None:
    async def work() -> None:
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(20):
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            guest = Guest()
            pump = OutputPump("stdout", guest.read, None)
            pump.sinks.append(Sink(os.dup(write_end)))
            stdin = InputPump(guest.write, guest.close)
            stdin.add(read_end, held_fd=write_end, closes=True)
            together = ProcessStreams(stdin, [pump])
            together.start()
            await asyncio.sleep(0)
            together.close()
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert set(os.listdir("/proc/self/fd")) == before

    run(work)


@pytest.mark.parametrize("output", [b"quick", b""])
def test_a_reader_may_come_after_the_end(fifo: str, output: bytes) -> None:
    async def work() -> None:
        guest = Guest()
        pump = OutputPump("stdout", guest.read, None)
        fd, held_fd = parse(fifo).open_sink(held=True)
        pump.sinks.append(Sink(fd, held_fd=held_fd))
        process = ProcessStreams(None, [pump])
        process.start()
        for piece in (output, b"") if output else (b"",):
            guest.pieces.put_nowait(piece)
        await process.finish()
        # As containerd does: it blocks until somebody has the other end.
        late = await asyncio.to_thread(os.open, fifo, os.O_RDONLY)
        try:
            assert await asyncio.to_thread(os.read, late, 100) == output
            assert not output or await asyncio.to_thread(os.read, late, 100) == b""
        finally:
            os.close(late)

    run(work)


def test_a_reader_that_is_there_sees_the_end_at_once(fifo: str) -> None:
    async def work() -> None:
        fd, held_fd = parse(fifo).open_sink(held=True)
        sink = Sink(fd, held_fd=held_fd)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            sink.close()
            assert os.read(reader, 1) == b""  # an end, and no BlockingIOError
        finally:
            os.close(reader)

    run(work)


def test_a_fifo_that_nobody_reads_is_given_up(fifo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "READER_S", 0.1)

    async def work() -> None:
        fd, held_fd = parse(fifo).open_sink(held=True)
        sink = Sink(fd, held_fd=held_fd)
        sink.close()
        assert streams._closing
        await asyncio.gather(*streams._closing)
        with pytest.raises(OSError, match="No such device or address"):
            os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # nobody has it open any more

    run(work)
