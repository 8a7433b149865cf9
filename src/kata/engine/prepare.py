"""What a container needs before it can be made: its streams, what it sees of the host, its spec for the
guest."""

from __future__ import annotations

import asyncio
import os

from ..agent.streams import Input, Output
from ..errors import ConfigError
from . import rootfs, spec
from .stdio import open_stream
from .streams import InputPump, OutputPump, ProcessStreams, Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..agent.client import AgentClient
    from .process import Process, Stdio
    from .sandbox import Sandbox
    from .streams import Log


_NO_SHARE = "Is shared_fs 'none' in the configuration (kata config show --origin)?"


def open_streams(sandbox: Sandbox, process: Process, log: Log | None) -> ProcessStreams:
    """Open the paths that the caller named for a process.

    Args:
        sandbox: Knows how this door's fifos are to be held.
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
        if stdio.stdout.startswith("binary://"):
            streams.logger = sandbox.start_logger(stdio.stdout, container_id)
        # Without a reader the output is still read, and thrown away: /dev/null never fills up.
        for name, path in (("stdout", stdio.stdout), ("stderr", stdio.stderr)):
            if name == "stderr" and stdio.terminal:
                continue
            pump = output(name)
            if streams.logger is not None:
                # As with runc's shim, the program that stdout names takes both.
                pump.sinks.append(Sink(streams.logger.take(name)))
            elif path:
                # containerd may restart: the engine holds the reading end as well, so that nothing is lost
                # and nobody gets a SIGPIPE. The human door's reader is the person: gone means gone.
                flags = os.O_RDWR if sandbox.holds_fifos else os.O_WRONLY
                pump.sinks.append(Sink(open_stream(path, flags)))
        if streams.logger is not None:
            streams.logger.close()  # a terminal has one stream only
        if stdio.stdin or (sandbox.settings.get("open_stdin") and not process.exec_id):
            streams.input = _open_stdin(sandbox, stdio, container_id, guest_id)
    except BaseException:
        streams.close()
        raise
    return streams


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
    path = stdio.stdin
    if not path:
        return pump  # open, and silent until somebody attaches
    fd = open_stream(path, os.O_RDONLY)
    held = -1
    try:
        # The end of the last writer ends the stream, as with runc: ctr says CloseIO only if it is quick enough
        # to know its process before its own input ends. Behind a terminal, writers come and go.
        if stdio.terminal and not sandbox.is_human:
            held = open_stream(path, os.O_WRONLY)
    except BaseException:
        os.close(fd)
        raise
    pump.add(fd, held_fd=held, closes=True)
    return pump


class Shared:
    """What one container sees of the host through the sandbox's share. Blocks: for the helper thread.

    Args:
        sandbox: Whose share it is.
        container_id: The container.
    """

    __slots__ = ("_container_id", "_names", "_sandbox")

    def __init__(self, sandbox: Sandbox, container_id: str) -> None:
        self._sandbox = sandbox
        self._container_id = container_id
        self._names: list[str] = []

    def add_all(self, config: dict[str, Any], root: dict[str, Any]) -> dict[str, str]:
        """Bind the sources of the spec's bind mounts, and a root directory of the host, below the share.

        Args:
            config: The spec.
            root: The container's ``rootfs`` object, see `rootfs.storages`.

        Returns:
            Source on the host -> path in the guest.

        Raises:
            KataError: A source cannot be shared.
        """
        found: dict[str, str] = {}
        for mount in spec.host_binds(config):
            source = mount.get("source") or ""
            if source not in found:
                base = os.path.basename(source.rstrip("/")) or "root"
                readonly = "ro" in (mount.get("options") or ())
                found[source] = self._add(source, f"{os.urandom(8).hex()}-{base}", readonly=readonly)
        if root.get("kind") == "share":
            share = self._sandbox.share
            if share is None:
                raise ConfigError(
                    f"cannot share {root.get('source')}: the sandbox was started without a share", _NO_SHARE
                )
            layered = "upper_slot" in root or "upper" in root
            name = rootfs.share_name(self._container_id)
            self._names.append(share.add(root["source"], name, readonly=layered))
        return found

    def _add(self, source: str, name: str, *, readonly: bool) -> str:
        share = self._sandbox.share
        if share is None:
            raise ConfigError(f"cannot mount {source}: the sandbox was started without a share", _NO_SHARE)
        self._names.append(share.add(source, f"{self._container_id}-{name}", readonly=readonly))
        return f"{spec.GUEST_SHARE}/{self._names[-1]}"

    def add_file(self, name: str, content: bytes) -> None:
        """Show the guest a small file, writable, below its share directory."""
        assert self._sandbox.share is not None
        self._names.append(self._sandbox.share.add_file(name, content))

    def remove_all(self) -> None:
        """Take everything back."""
        if self._sandbox.share is not None:
            for name in reversed(self._names):
                self._sandbox.share.remove(name)
        self._names.clear()


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
        if not sandbox.makes_etc_files:
            return
        hostname = config.get("hostname") or sandbox.hostname or container_id[:12]
        hosts = (
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
            f"{sandbox.address or '127.0.1.1'}\t{hostname}\n"
        )
        for name, content in (("hostname", f"{hostname}\n"), ("hosts", hosts)):
            self._contents[f"{container_id}-{name}"] = content.encode()
            self.mounts[f"/etc/{name}"] = f"{spec.GUEST_SHARE}/{container_id}-{name}"
        if sandbox.dns:
            self.mounts["/etc/resolv.conf"] = spec.GUEST_RESOLV

    async def write(self, agent: AgentClient) -> None:
        """Bring them into the guest; before the container is made, which mounts them.

        Raises:
            KataError: One could not be written.
        """
        if self._sandbox.share is not None:
            for name, content in self._contents.items():
                await self._sandbox.helper(self._shared.add_file, name, content)
            return
        await asyncio.gather(
            *(
                agent.copy_file(f"{spec.GUEST_SHARE}/{name}", content)
                for name, content in self._contents.items()
            )
        )
