"""What a container needs before it can be made: its streams, and the files in /etc that nobody else gives it."""

from __future__ import annotations

import asyncio
import os

from kata.agent.streams import Input, Output
from kata.engine import spec
from kata.engine.stdio import Program
from kata.engine.streams import InputPump, OutputPump, ProcessStreams, Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.binds import Shared
    from kata.engine.process import Process
    from kata.engine.sandbox import Sandbox
    from kata.engine.stdio import Stdio
    from kata.engine.streams import Log


def open_streams(sandbox: Sandbox, process: Process, log: Log | None) -> ProcessStreams:
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
                fd, held_fd = endpoint.open_sink(held=sandbox.client.holds_fifos)
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


def _keeps_stdin_open(sandbox: Sandbox) -> bool:
    return sandbox.settings.container is not None and sandbox.settings.container.open_stdin


def _open_stdin(sandbox: Sandbox, stdio: Stdio, container_id: str, guest_id: str) -> InputPump:
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
    fd, held_fd = stdio.stdin.open_source(held=stdio.terminal and sandbox.client.holds_fifos)
    pump.add(fd, held_fd=held_fd, closes=True)
    return pump


def name_servers(config: dict[str, Any], lines: list[str]) -> list[str]:
    """Whom a container asks for names. Blocks.

    Args:
        config: Its specification.
        lines: Of the resolv.conf that it has where it brings none of its own.
    """
    from kata.network import resolver

    for mount in config.get("mounts") or ():
        if os.path.normpath(str(mount.get("destination"))) == resolver.RESOLV_CONF:
            # What the guest writes there counts as what its client has written.
            return resolver.read((str(mount.get("source") or ""),)).servers
    return resolver.parse("\n".join(lines)).servers


class EtcFiles:
    """The files in /etc that a container without an outer runtime gets, as with Docker.

    Args:
        sandbox: Its network is in them.
        config: The container's spec; its host name.
        container_id: The container.
        shared: Carries them where there is a share; else the agent writes them.

    Attributes:
        mounts: Destination in the container -> path in the guest.
    """

    __slots__ = ("_contents", "_sandbox", "_shared", "mounts")

    def __init__(self, sandbox: Sandbox, config: dict[str, Any], container_id: str, shared: Shared) -> None:
        self._sandbox = sandbox
        self._shared = shared
        self._contents: dict[str, bytes] = {}
        self.mounts: dict[str, str] = {}
        if not sandbox.client.makes_etc_files:
            return
        hostname = config.get("hostname") or sandbox.settings.hostname or container_id[:12]
        hosts = (
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
            f"{sandbox.address or '127.0.1.1'}\t{hostname}\n"
        )
        for name, content in (("hostname", f"{hostname}\n"), ("hosts", hosts)):
            self._contents[f"{container_id}-{name}"] = content.encode()
            self.mounts[f"/etc/{name}"] = f"{spec.GUEST_SHARE}/{container_id}-{name}"
        if sandbox.dns:
            self.mounts["/etc/resolv.conf"] = spec.GUEST_RESOLV
        if sandbox.is_pod:
            self.mounts["/dev/shm"] = "/dev/shm"  # the guest's own is the pod's

    async def write(self, agent: AgentClient) -> None:
        """Bring them into the guest; before the container is made, which mounts them.

        Raises:
            KataError: One could not be written.
        """
        if self._sandbox.share is not None:
            for name, content in self._contents.items():
                await self._sandbox.run_blocking(self._shared.add_file, name, content)
            return
        await asyncio.gather(
            *(
                agent.copy_file(f"{spec.GUEST_SHARE}/{name}", content)
                for name, content in self._contents.items()
            )
        )
