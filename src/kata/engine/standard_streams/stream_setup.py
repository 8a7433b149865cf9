"""Connecting the streams of a process in the guest with what its client has named for them."""

from __future__ import annotations

from kata.agent.streams import Input, Output
from kata.engine.standard_streams.stdio import Program
from kata.engine.standard_streams.streams import InputPump, OutputPump, ProcessStreams, Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.engine.access import StreamAccess
    from kata.engine.containers.process import Process
    from kata.engine.standard_streams.stdio import Stdio
    from kata.engine.standard_streams.streams import Log


def open_streams(sandbox: StreamAccess, process: Process, log: Log | None) -> ProcessStreams:
    """Open what the client named for the streams of a process.

    Args:
        sandbox: Knows how its client's fifos are to be held.
        process: Whose streams they are.
        log: Where its output goes besides.

    Raises:
        KataError: One cannot be opened; the others are closed again.
    """
    stdio = process.stdio
    container_id, guest_id = process.container_id, process.exec_id or process.container_id
    streams = ProcessStreams(None, [])

    def output(name: str) -> OutputPump:
        stream: Output | None = None

        async def read() -> bytes:
            nonlocal stream
            if stream is None:
                stream = Output(await sandbox.ready(), container_id, guest_id, name)
            return await stream.read()

        pump = OutputPump(name, read, log)
        streams.outputs.append(pump)
        return pump

    try:
        if isinstance(stdio.stdout, Program):
            streams.logger = sandbox.start_logger(stdio.stdout.text, container_id)
        # Without a reader the output is still read, and thrown away: /dev/null never fills up.
        for name, endpoint in (("stdout", stdio.stdout), ("stderr", stdio.stderr)):
            if name == "stderr" and stdio.terminal:
                continue
            pump = output(name)
            if streams.logger is not None:
                # As with runc's shim, the program that stdout names takes both.
                pump.sinks.append(Sink(streams.logger.take(name)))
            elif not endpoint.is_null:
                # Where the reader may restart (containerd), the reading end is held as well: nothing is lost, and no
                # process gets a SIGPIPE.
                fd, held_fd = endpoint.open_sink(held=sandbox.settings.client.holds_fifos)
                pump.sinks.append(Sink(fd, held_fd=held_fd))
        if streams.logger is not None:
            streams.logger.close()  # a terminal has one stream only
        if not stdio.stdin.is_null or (_keeps_stdin_open(sandbox) and not process.exec_id):
            streams.input = _open_stdin(sandbox, stdio, container_id, guest_id)
    except BaseException:
        streams.abandon()
        raise
    finally:
        stdio.close()
    return streams


def _keeps_stdin_open(sandbox: StreamAccess) -> bool:
    return sandbox.settings.container is not None and sandbox.settings.container.open_stdin


def _open_stdin(sandbox: StreamAccess, stdio: Stdio, container_id: str, guest_id: str) -> InputPump:
    stream: Input | None = None

    async def opened() -> Input:
        nonlocal stream
        if stream is None:
            stream = Input(await sandbox.ready(), container_id, guest_id)
        return stream

    async def write(data: bytes) -> None:
        await (await opened()).write(data)

    async def close() -> None:
        await (await opened()).close()

    pump = InputPump(write, close)
    if stdio.stdin.is_null:
        return pump  # open, and silent until somebody attaches
    # The end of the last writer ends the stream, as with runc: ctr says CloseIO only if it is quick enough
    # to know its process before its own input ends. Behind a terminal, writers come and go.
    fd, held_fd = stdio.stdin.open_source(held=stdio.terminal and sandbox.settings.client.holds_fifos)
    pump.add(fd, held_fd=held_fd, closes=True)
    return pump
