"""What a client names as the other ends of a process's standard streams."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata.engine.standard_streams import stdio
from kata.engine.standard_streams.stdio import (
    Descriptor,
    Null,
    PathEndpoint,
    Program,
    parse,
    parse_stdio,
)
from kata.engine.standard_streams.streams import InputPump, OutputPump, Sink
from kata.errors import UnsupportedError, UsageError


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def blocks(fd: int) -> bool:
    return not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


def inherited(fd: int) -> bool:
    return not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", Null),
        ("/run/fifo", PathEndpoint),
        ("fifo:///run/fifo", PathEndpoint),
        ("file:///var/log/x", PathEndpoint),
        ("binary:///usr/bin/logger?a=b", Program),
    ],
)
def test_what_clients_write(text: str, kind: type) -> None:
    endpoint = parse(text)
    assert type(endpoint) is kind
    assert (endpoint.text, endpoint.is_null) == (text, not text)


def test_uris_that_there_are_not() -> None:
    with pytest.raises(UnsupportedError, match="of the kind npipe:// are not supported") as caught:
        parse("npipe://x")
    assert "binary://" in caught.value.hint
    with pytest.raises(UnsupportedError, match="of the kind binary://"):
        parse("binary:///x").open_source()


def test_a_terminal_has_one_output() -> None:
    assert parse_stdio(True, "", "/out", "/err").stderr.is_null
    assert parse_stdio(False, "", "/out", "/err").stderr.text == "/err"
    reader, writer = os.pipe()
    stdio.Stdio(True, Null(), Null(), Descriptor(writer))  # is let go of
    os.close(reader)


def test_a_fifo_is_held_if_need_be(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    with pytest.raises(UsageError, match="No such device"):
        parse(path).open_sink()
    for fd, held in (parse(path).open_sink(held=True), parse(path).open_source(held=True)):
        assert held is not None
        os.close(fd)
        os.close(held)
    fd, held = parse(path).open_source()
    assert (held, blocks(fd)) == (None, False)
    os.close(fd)


def test_a_fifo_that_cannot_be_held_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    opened = os.open

    def once(name: str, flags: int, *more: int) -> int:
        if flags & os.O_WRONLY:
            raise OSError(24, "Too many open files")
        return opened(name, flags, *more)

    monkeypatch.setattr(os, "open", once)
    for open_it in (parse(path).open_source, parse(path).open_sink):
        with pytest.raises(UsageError, match="Too many open files"):
            open_it(held=True)


def test_a_pipe_that_was_handed_over_blocks_for_its_giver_only() -> None:
    reader, writer = os.pipe()
    kept = os.dup(writer)  # the giver's own
    endpoint = Descriptor(writer)
    fd, held = endpoint.open_sink(held=True)
    assert held is None
    assert (blocks(fd), blocks(kept)) == (False, True)
    assert not inherited(fd)
    os.write(fd, b"x")
    assert os.read(reader, 9) == b"x"
    with pytest.raises(UsageError, match="only once"):
        endpoint.open_sink()
    endpoint.close()
    # Nothing but these is open: the reader sees the end when both have gone.
    os.close(fd)
    os.close(kept)
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_a_file_that_was_handed_over_keeps_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old ")
    given = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.set_inheritable(given, True)
    fd, _ = Descriptor(given).open_sink()
    assert not inherited(fd)
    os.write(fd, b"new")
    os.close(fd)
    assert path.read_bytes() == b"old new"
    source = os.open(path, os.O_RDONLY)
    os.lseek(source, 4, os.SEEK_SET)
    fd, _ = Descriptor(source).open_source()
    assert os.read(fd, 9) == b"new"
    os.close(fd)


def test_a_socket_and_a_directory_that_were_handed_over(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    fd, _ = Descriptor(ours.detach()).open_source()
    assert not blocks(fd)
    theirs.send(b"x")
    assert os.read(fd, 9) == b"x"
    os.close(fd)
    theirs.close()
    directory = Descriptor(os.open(tmp_path, os.O_RDONLY))
    with pytest.raises(UsageError, match="neither a pipe, a file, a terminal nor a socket"):
        directory.open_source()
    directory.close()
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(UsageError, match="Bad file descriptor"):
        Descriptor(closed).open_source()


def test_output_and_input_over_descriptors() -> None:
    """The pumps carry over pipes that were handed over as over fifos."""
    out_reader, out_writer = os.pipe()
    in_reader, in_writer = os.pipe()
    pieces = [b"one ", b"two", b""]
    written = bytearray()
    closed = asyncio.Event()

    async def read() -> bytes:
        return pieces.pop(0)

    async def write(data: bytes) -> None:
        written.extend(data)

    async def close() -> None:
        closed.set()

    async def work() -> None:
        output, source = OutputPump("stdout", read, None), InputPump(write, close)
        fd, held_fd = Descriptor(out_writer).open_sink()
        output.sinks.append(Sink(fd, held_fd=held_fd))
        fd, held_fd = Descriptor(in_reader).open_source()
        source.add(fd, held_fd=held_fd, closes=True)
        output.start()
        source.start()
        assert output.delivered is not None
        await asyncio.wait_for(output.delivered, 10)
        os.write(in_writer, b"typed")
        os.close(in_writer)
        await asyncio.wait_for(closed.wait(), 10)

    asyncio.run(work())
    assert os.read(out_reader, 99) == b"one two"
    assert os.read(out_reader, 99) == b""
    assert bytes(written) == b"typed"
    os.close(out_reader)


class Console:
    """Who waits for a terminal, as conmon does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        self.got: list[tuple[bytes, list[int]]] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            content, fds, _, _ = socket.recv_fds(connection, 100, 4)
            self.got.append((content, fds))

    def master(self) -> int:
        self._thread.join(10)
        self._socket.close()
        [(name, [fd])] = self.got
        assert name.startswith(b"/dev/pts/")
        return fd


def test_a_terminal_is_sent_and_carries_bytes_as_they_are(tmp_path: Path) -> None:
    console = Console(tmp_path / "console")
    slave = stdio.send_terminal(console.path)
    source, held = Descriptor(os.dup(slave)).open_source()
    sink, _ = Descriptor(slave).open_sink()
    master = console.master()
    assert held is None
    os.write(sink, b"line\n")
    assert os.read(master, 99) == b"line\n"  # and no \r\n
    os.write(master, b"a\x03\x04\r")
    assert os.read(source, 99) == b"a\x03\x04\r"  # no signal, no end, no translation
    with pytest.raises(BlockingIOError):
        os.read(source, 1)
    os.set_blocking(master, False)
    with pytest.raises(BlockingIOError):
        os.read(master, 1)  # no echo
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))
    assert os.get_terminal_size(source) == (77, 33)
    # The client's end is an end for the process, as with a fifo.
    os.close(master)
    assert os.read(source, 1) == b""
    with pytest.raises(OSError, match="Input/output error"):
        os.write(sink, b"x")
    os.close(source)
    os.close(sink)


def test_a_console_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=f"cannot send a terminal to {tmp_path}/none: No such file"
    ) as caught:
        stdio.send_terminal(str(tmp_path / "none"))
    assert "listen" in caught.value.hint
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "deaf"))
    with pytest.raises(UsageError, match="Connection refused"):
        stdio.send_terminal(str(tmp_path / "deaf"))
    bound.close()


def test_the_null_device_gives_nothing_and_takes_everything() -> None:
    source, held = stdio.Null().open_source()
    sink, kept = stdio.Null().open_sink(held=True)
    try:
        assert (held, kept) == (None, None)
        assert os.read(source, 10) == b""
        assert os.write(sink, b"gone") == 4
    finally:
        os.close(source)
        os.close(sink)
