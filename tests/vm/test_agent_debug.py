"""The agent's debug console, its log as a stream, and the log's level at run time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from agent_host import BUSYBOX, HostAgent
from agent_support import error
from waiting import PATIENCE, until

from kata.agent.client import AgentClient
from kata.agent.streams import OUTPUT_WINDOW, Pieces
from kata.guest import manifest
from kata.guest.cpio import Archive
from kata.hypervisor.qemu import slots
from kata.proto.agentext_pb import SetLogLevelRequest, StreamPiece
from kata.proto.google_pb import Empty
from kata.ttrpc.client import Client
from kata.ttrpc.status import INVALID_ARGUMENT, PERMISSION_DENIED, TtrpcError

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

DEBUG = "kata.agent.v1.Debug"


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[AgentClient]:
    """A connection, waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
            break
        except OSError:
            sock.close()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    sock.setblocking(False)
    agent = AgentClient(await Client.connect(sock))
    try:
        yield agent
    finally:
        agent.close()


def play(path: Path, scenario: Callable[[AgentClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with connected(path) as agent:
            return await asyncio.wait_for(scenario(agent), PATIENCE)

    return asyncio.run(run())


async def opened(agent: AgentClient, method: str) -> Pieces:
    pieces = Pieces(OUTPUT_WINDOW)
    first = StreamPiece(credit=OUTPUT_WINDOW).encode()
    pieces.stream = await agent.open(DEBUG, method, first, pieces)
    return pieces


async def output_until(pieces: Pieces, wanted: bytes) -> bytes:
    """What comes until *wanted* is in it."""
    found = bytearray()
    while wanted not in found:
        piece = await pieces.take()
        assert piece, f"the stream ended ({pieces.error}) after {bytes(found)!r}"
        found += piece
    return bytes(found)


async def talk(agent: AgentClient) -> None:
    """A dialogue with the console's shell, to its end."""
    await agent.negotiate_features()
    assert "kata.debug" in agent.features
    console = await opened(agent, "Console")
    assert console.stream is not None
    console.stream.send(StreamPiece(data=b"echo $((6 * 7))\n").encode())
    await output_until(console, b"42")
    console.stream.send(StreamPiece(data=b"echo my pid 1 is $(readlink /proc/$$/fd/0)\n").encode())
    assert b"/dev/pts/" in await output_until(console, b"is /")
    console.stream.send(StreamPiece(data=b"exit\n").encode())
    while await console.take():
        pass
    assert console.error is None


def test_console_over_a_call(run_directory: Path) -> None:
    with HostAgent(run_directory, "--debug-console") as agent:
        agent.connect().health()
        play(agent.path, talk)


def test_no_console_without_the_setting(run_directory: Path) -> None:
    async def scenario(agent: AgentClient) -> None:
        console = await opened(agent, "Console")
        assert await console.take() == b""
        assert isinstance(console.error, TtrpcError)
        assert console.error.code == PERMISSION_DENIED

    with HostAgent(run_directory) as agent:
        agent.connect().health()
        play(agent.path, scenario)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_console_ends_with_its_reader(run_directory: Path) -> None:
    async def scenario(agent: AgentClient) -> None:
        console = await opened(agent, "Console")
        assert console.stream is not None
        console.stream.send(StreamPiece(data=b"echo $((1 + 1))x\n").encode())
        await output_until(console, b"2x")

    with HostAgent(run_directory, "--debug-console") as agent:
        agent.connect().health()
        play(agent.path, scenario)
        until(lambda: not children(agent.process.pid), "the shell ends with its reader")


def test_ports_of_their_own(run_directory: Path) -> None:
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="d"))
    console, log = directory / "console", directory / "log"
    with HostAgent(
        run_directory, f"--debug-console=unix://{console}", f"--log-server=unix://{log}"
    ) as agent:
        peer = agent.connect()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(console))
            sock.sendall(b"echo $((6 * 7))\n")
            found = b""
            while b"42" not in found:
                piece = sock.recv(4096)
                assert piece
                found += piece
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(log))
            set_level(peer.client, "debug")
            wrong = SetLogLevelRequest(level="loud")
            deadline = time.monotonic() + PATIENCE
            sock.settimeout(0.1)
            found = b""
            # The listener is served some time after the connect: ask until a line comes.
            while b"\n" not in found:
                assert time.monotonic() < deadline
                assert error(peer.client.call, DEBUG, "SetLogLevel", wrong, Empty)[0] == INVALID_ARGUMENT
                try:
                    found += sock.recv(4096)
                except TimeoutError:
                    continue
            assert json.loads(found.splitlines()[0])["level"] == "DEBG"
            set_level(peer.client, "error")
        agent.complaints = True  # the lines before the stream was there
    for path in (console, log):
        path.unlink(missing_ok=True)
    directory.rmdir()


def set_level(client: Any, level: str) -> None:
    client.call(DEBUG, "SetLogLevel", SetLogLevelRequest(level=level), Empty)


def test_log_as_a_call(run_directory: Path) -> None:
    async def scenario(agent: AgentClient) -> None:
        log = await opened(agent, "Log")
        request = SetLogLevelRequest(level="debug")
        await agent.call(DEBUG, "SetLogLevel", request, Empty)
        with pytest.raises(Exception, match="is not a level"):
            await agent.call(DEBUG, "SetLogLevel", SetLogLevelRequest(level="loud"), Empty)
        line = json.loads(await output_until(log, b"\n"))
        assert (line["level"], line["source"]) == ("DEBG", "agent")
        # A second reader takes over; the first one sees its end.
        other = await opened(agent, "Log")
        while await log.take():
            pass
        assert log.error is None
        await agent.call(DEBUG, "SetLogLevel", SetLogLevelRequest(level="error"), Empty)
        assert not other.over

    with HostAgent(run_directory) as agent:
        agent.connect().health()
        play(agent.path, scenario)
        agent.connect().health()


def test_console_of_a_guest_over_its_serial_port(run_directory: Path, guest_assets: Path) -> None:
    guest = manifest.load(str(guest_assets))
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="p"))
    archive = Archive()
    archive.directory("debug")
    archive.file("debug/sh", BUSYBOX.read_bytes(), 0o755)
    initrd = directory / "initrd"
    initrd.write_bytes(Path(guest.initrd).read_bytes() + archive.finish())
    path = directory / "port"
    machine = "-M q35 -nodefaults -no-user-config -display none -no-reboot -bios qboot.rom -m 256 -accel tcg"
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", *machine.split(), "-cpu", "max,-erms"),
            *("-kernel", guest.kernel, "-initrd", str(initrd)),
            *("-append", "quiet panic=-1 agent.log=error agent.channel=serial agent.debug_console"),
            *("-device", f"virtio-serial-pci,addr={slots.SERIAL}"),
            *("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=agent,name={slots.AGENT_CHANNEL}"),
        ]
    )
    try:
        play(path, talk)
    finally:
        process.kill()
        process.wait(PATIENCE)
        shutil.rmtree(directory)
