"""A process's standard streams: from the agent to fifos and log, from fifos to the agent.

Output is read from the guest one piece at a time and handed, in order, to the log and to every sink (the
foreground fifo, attached clients). A slow foreground sink holds the reading up, and so in the end the
process in the guest: that is back-pressure. A sink that vanished is dropped and never hurts the container.

Once the process has ended, what was in its pipes is finite: it is read to the end whatever the sinks do, so
that an exit can be told after everything has been delivered, and a reader that is stuck cannot hold the exit
up for ever (`ProcessStreams.finish`).
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque

from kata.errors import KataError
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kata.engine.standard_streams.logfile import LogFile
    from kata.engine.standard_streams.logger import Logger
    from kata.engine.standard_streams.stdio import Stdio

STDIN_BYTES = 1 << 18
STALL_S = 2.0
"""How long an ended process's exit waits for a sink that takes nothing. runc's shim waits as long."""
ATTACHED_STALL_S = 30.0
"""After how long without progress an attached client is dropped; only the foreground one may stop a
container."""
READER_S = 30.0
READER_POLL_S = 0.05
"""How long an ended process's fifo waits for a reader. containerd's opens it at its leisure, on a busy host seconds
after a short process has ended."""
GUEST_EOF_S = 10.0
"""How long the agent may take between a process's exit and the end of its streams."""
MAX_TAIL_BYTES = 16 << 20
"""More than this after the exit cannot have been in a pipe: the guest does not keep to the protocol."""


class SinkGone(Exception):
    """Nobody reads any more."""


class Sink:
    """The writing end of a fifo (or a file).

    Args:
        fd: Non-blocking descriptor; the sink owns it.
        patience_s: Give up on a reader that takes nothing for so long; None waits for ever.
        held_fd: The fifo's reading end, held so that readers may come and go; None when it is not. The sink owns it.
    """

    __slots__ = ("_file", "_held", "_patience", "progress")

    def __init__(self, fd: int, patience_s: float | None = None, held_fd: int | None = None) -> None:
        self._file = Fd(fd)
        self._patience = patience_s
        self._held = None if held_fd is None else Fd(held_fd)
        self.progress = 0

    async def write(self, data: bytes) -> None:
        """Write all of *data*.

        Raises:
            SinkGone: The reader went away, or its patience ran out.
        """
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._file.raw, view)
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:  # EPIPE; a file's disk may be full
                raise SinkGone(str(error.strerror)) from None
            self.progress += count
            view = view[count:]

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        fd = self._file.raw
        loop.add_writer(fd, _wake, ready)
        try:
            await asyncio.wait_for(ready, self._patience)
        except TimeoutError:
            raise SinkGone(f"took nothing for {self._patience:.0f} seconds") from None
        finally:
            loop.remove_writer(fd)

    def close(self) -> None:
        """Close it. A fifo that is held stays open until it has a reader: otherwise what is in it would be lost, and
        a reader that opens it later would wait for ever."""
        if self._held is not None and self._held.is_open:
            self._held.close()
            if _lacks_reader(self._file.raw):
                task = asyncio.ensure_future(_close_for_reader(self._file.detach()))
                _closing.add(task)
                task.add_done_callback(_closing.discard)
        self._file.close()


_closing: set[asyncio.Future[None]] = set()


def _lacks_reader(fd: int) -> bool:
    """Whether nobody has the reading end of a fifo open; false for a file."""
    poller = select.poll()
    # POLLERR is always reported: "no readers", see pipe_poll in the kernel's fs/pipe.c.
    poller.register(fd, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


async def _close_for_reader(fd: int) -> None:
    """Close a fifo once it has a reader, or none comes: it may have been there, or be restarting, or be busy."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + READER_S
    try:
        while _lacks_reader(fd) and loop.time() < give_up:
            await asyncio.sleep(READER_POLL_S)
    finally:
        os.close(fd)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class OutputPump:
    """Carries one output stream of a process.

    Args:
        name: ``stdout`` or ``stderr``.
        read: Gives the next piece, empty at the end; raises `KataError` or `ConnectionError` when the guest
            is lost.
        log: The container's log; None for an exec.
    """

    __slots__ = (
        "_data",
        "_limit",
        "_log",
        "_pieces",
        "_read",
        "_space",
        "delivered",
        "guest_eof",
        "name",
        "sinks",
        "size",
        "tail",
    )

    def __init__(self, name: str, read: Callable[[], Awaitable[bytes]], log: Log | None) -> None:
        self.name = name
        self.sinks: list[Sink] = []
        self.delivered: asyncio.Task[None] | None = None
        self.guest_eof: asyncio.Task[None] | None = None
        self.size = 0
        self.tail = 0
        self._read = read
        self._log = log
        self._pieces: deque[bytes] = deque()
        self._limit = 1
        self._data = asyncio.Event()
        self._space = asyncio.Event()

    def start(self) -> None:
        """Begin to read. Once: a start that failed may be tried again."""
        if self.delivered is not None:
            return
        self.guest_eof = asyncio.create_task(self._read_ahead())
        self.delivered = asyncio.create_task(self._deliver())

    def read_to_end(self) -> None:
        """The process has ended: read what is left without waiting for the sinks."""
        self._limit = 0
        self._space.set()

    @property
    def progress(self) -> int:
        """A number that changes whenever a sink takes something."""
        return self.size + sum(sink.progress for sink in self.sinks)

    async def _read_ahead(self) -> None:
        """Read ahead by one piece, so that the guest's next one travels while this one is being written."""
        while True:
            try:
                piece = await self._read()
            except (KataError, ConnectionError):
                piece = b""
            self._pieces.append(piece)
            self._data.set()
            if not piece:
                return
            if not self._limit:
                self.tail += len(piece)
                if self.tail > MAX_TAIL_BYTES:
                    self._pieces.append(b"")
                    return
            while self._limit and len(self._pieces) > self._limit:
                self._space.clear()
                await self._space.wait()

    async def _deliver(self) -> None:
        try:
            while True:
                while not self._pieces:
                    self._data.clear()
                    await self._data.wait()
                piece = self._pieces.popleft()
                self._space.set()
                if not piece:
                    break
                if self._log is not None:
                    await self._log.write(self.name, piece)
                for sink in list(self.sinks):
                    try:
                        await sink.write(piece)
                    except SinkGone:
                        self.drop(sink)
                self.size += len(piece)
        finally:
            for sink in list(self.sinks):
                self.drop(sink)

    def drop(self, sink: Sink) -> None:
        """Close a sink and remove it."""
        if sink in self.sinks:
            self.sinks.remove(sink)
        sink.close()

    def truncate(self) -> None:
        """End the stream here, although the guest has not ended it: what has been read is still delivered."""
        if self.guest_eof is not None and not self.guest_eof.done():
            self.guest_eof.cancel()
            self._pieces.append(b"")
            self._data.set()


class Log:
    """A `LogFile` that does not hold the event loop up: what is big is written by a helper thread.

    Small pieces go to the page cache at once: handing them over would cost more than writing them.
    """

    __slots__ = ("_file", "_lock")

    _SMALL = 16 * 1024

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._lock = asyncio.Lock()  # stdout and stderr share the file

    async def write(self, stream: str, data: bytes) -> None:
        async with self._lock:
            if len(data) <= self._SMALL:
                self._file.write(stream, data)
            else:
                await asyncio.to_thread(self._file.write, stream, data)

    def close(self) -> None:
        self._file.close()


class InputPump:
    """Carries a process's stdin: from any number of sources, one piece at a time.

    Args:
        write: Takes a piece and returns when all of it is in the process's pipe.
        close: Closes the process's stdin.
    """

    __slots__ = ("_close", "_closed", "_copies", "_fds", "_held", "_lock", "_waiting", "_write")

    def __init__(
        self, write: Callable[[bytes], Awaitable[None]], close: Callable[[], Awaitable[None]]
    ) -> None:
        self._write = write
        self._close = close
        self._closed = False
        self._lock = asyncio.Lock()
        self._copies: set[asyncio.Task[None]] = set()
        self._fds: set[int] = set()
        self._held: list[int] = []
        self._waiting: list[tuple[int, bool]] | None = []

    def add(self, fd: int, *, held_fd: int | None = None, closes: bool) -> None:
        """Copy from a fifo.

        Args:
            fd: Its reading end, non-blocking; owned from here on.
            held_fd: A writing end of our own that keeps end-of-file away until `end_of_input`; None for none.
            closes: Whether this source's end of file closes the process's stdin.
        """
        if held_fd is not None:
            self._held.append(held_fd)
        self._fds.add(fd)
        if self._waiting is not None:
            self._waiting.append((fd, closes))
        elif self._closed:
            self._close_fd(fd)
        else:
            self._begin(fd, closes)

    def start(self) -> None:
        """The process has its stdin now: begin to copy."""
        waiting, self._waiting = self._waiting or [], None
        for fd, closes in waiting:
            self._begin(fd, closes)

    def _begin(self, fd: int, closes: bool) -> None:
        copy = asyncio.create_task(self._copy(fd, closes))
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)

    def end_of_input(self) -> None:
        """CloseIO: end-of-file comes as soon as the other writers have gone, after their last byte."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    async def _copy(self, fd: int, closes: bool) -> None:
        try:
            # A read before the first writer came would look like end of file. The poller knows better: it
            # reports a hang-up only after there has been a writer since we opened (fs/pipe.c, pipe_poll).
            await _readable(fd)
            while True:
                try:
                    data = os.read(fd, STDIN_BYTES)
                except BlockingIOError:
                    await _readable(fd)
                    continue
                except OSError:
                    data = b""
                if not data:
                    break
                async with self._lock:
                    await self._write(data)
        except (KataError, ConnectionError):
            # The process closed its stdin or is gone: whoever writes to the fifo gets EPIPE, as from a pipe.
            closes = False
        finally:
            self._close_fd(fd)
        if closes:
            await self.close_process_stdin()

    async def close_process_stdin(self) -> None:
        """Close the process's stdin, behind what was written before. Once; a process that is gone is no
        error."""
        if self._closed:
            return
        self._closed = True
        try:
            async with self._lock:
                await self._close()
        except (KataError, ConnectionError):
            pass

    def _close_fd(self, fd: int) -> None:
        if fd in self._fds:
            self._fds.discard(fd)
            os.close(fd)

    def stop(self) -> None:
        """The process has ended: nothing is read any more."""
        self._closed = True
        for copy in list(self._copies):
            copy.cancel()
        for fd, _ in self._waiting or []:
            self._close_fd(fd)
        self._waiting = None
        self.end_of_input()


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    try:
        loop.add_reader(fd, _wake, ready)
    except PermissionError:
        return  # epoll knows no plain files: they are always readable
    try:
        await ready
    finally:
        loop.remove_reader(fd)


class ProcessStreams:
    """The streams of one process, from creation to the last byte.

    Args:
        inputs: Its stdin; None when it has none.
        outputs: Its stdout and, without a terminal, stderr.

    Attributes:
        logger: The client's program that takes the output, if it named one.
    """

    __slots__ = ("input", "logger", "outputs")

    def __init__(self, inputs: InputPump | None, outputs: list[OutputPump]) -> None:
        self.input = inputs
        self.outputs = outputs
        self.logger: Logger | None = None

    async def ready(self) -> None:
        """Return when what takes the output does so.

        Raises:
            HostError: It has failed.
        """
        if self.logger is not None:
            await self.logger.ready()

    def start_outputs(self) -> None:
        """The process is being made: begin to carry what it writes."""
        for pump in self.outputs:
            pump.start()

    def start(self) -> None:
        """The process runs: begin to carry."""
        self.start_outputs()
        if self.input is not None:
            self.input.start()

    def attach(self, stdio: Stdio, *, closes: bool = False) -> None:
        """Let a client take part in the streams; it may vanish at any time.

        Args:
            stdio: The client's ends; what is null is not attached.
            closes: Whether the end of this client's input ends the process's.

        Raises:
            KataError: A stream cannot be opened; nothing is attached then.
        """
        opened: list[tuple[OutputPump, Sink]] = []
        source: int | None = None
        by_name = {pump.name: pump for pump in self.outputs}
        try:
            for name, endpoint in (("stdout", stdio.stdout), ("stderr", stdio.stderr)):
                if not endpoint.is_null and name in by_name:
                    sink = Sink(endpoint.open_sink()[0], ATTACHED_STALL_S)
                    opened.append((by_name[name], sink))
            if not stdio.stdin.is_null and self.input is not None:
                source, _ = stdio.stdin.open_source()
        except KataError:
            for _, sink in opened:
                sink.close()
            raise
        for pump, sink in opened:
            if pump.delivered is not None and pump.delivered.done():
                sink.close()  # the stream is over: the client sees its end at once
            else:
                pump.sinks.append(sink)
        if source is not None and self.input is not None:
            self.input.add(source, closes=closes)

    async def finish(self) -> None:
        """The process was reaped: return when its output has been delivered, or cannot be."""
        if self.input is not None:
            self.input.stop()
        running = [pump for pump in self.outputs if pump.delivered is not None]
        for pump in running:
            pump.read_to_end()
        ends = [pump.guest_eof for pump in running if pump.guest_eof is not None]
        if ends:
            await asyncio.wait(ends, timeout=GUEST_EOF_S)
        for pump in running:
            pump.truncate()
        waiting = [
            pump.delivered for pump in running if pump.delivered is not None and not pump.delivered.done()
        ]
        while waiting:
            before = sum(pump.progress for pump in running)
            _, pending = await asyncio.wait(waiting, timeout=STALL_S)
            waiting = list(pending)
            if waiting and sum(pump.progress for pump in running) == before:
                return  # the pumps go on without us; see `undelivered`

    @property
    def undelivered(self) -> list[asyncio.Task[None]]:
        """Deliveries that are not complete: a reader is there but takes its time."""
        return [
            pump.delivered
            for pump in self.outputs
            if pump.delivered is not None and not pump.delivered.done()
        ]

    def abandon(self) -> None:
        """Let go of everything: there will be no process."""
        self.close()
        if self.logger is not None:
            self.logger.dismiss()

    def close(self) -> None:
        """Let go of everything at once, delivered or not."""
        if self.input is not None:
            self.input.stop()
        for pump in self.outputs:
            for task in (pump.guest_eof, pump.delivered):
                if task is not None:
                    task.cancel()
            for sink in list(pump.sinks):
                pump.drop(sink)
