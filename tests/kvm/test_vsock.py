"""vhost-vsock: context ids that no two guests share, and the agent behind one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import minivm
import pytest
from conftest import ROOT, Kata
from waiting import PATIENCE

from kata import journal_undo
from kata.agent.client import AgentClient
from kata.engine.lifecycle.boot import KERNEL_PARAMETERS
from kata.errors import HostError, KataError, VMLostError
from kata.guest import manifest
from kata.guest.cpio import Archive
from kata.hypervisor import vsock
from kata.hypervisor.channel import AGENT_PORT
from kata.hypervisor.qemu.process import QemuProcess
from kata.hypervisor.vsock import Vsock
from kata.ttrpc.client import Client

SET_GUEST_CID = 0x4008AF60


def take(cid: int) -> int:
    """Occupy a CID as another program would; the descriptor that holds it."""
    fd = os.open(vsock.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(fd, SET_GUEST_CID, cid.to_bytes(8, "little"))
    except OSError:
        os.close(fd)
        raise
    return fd


def drawn(cid: int) -> bytes:
    """The random bytes from which this CID is made."""
    return (cid - 3).to_bytes(4, "little")


@contextlib.contextmanager
def allocated() -> Iterator[Vsock]:
    given = vsock.allocate()
    assert given is not None
    try:
        yield given
    finally:
        given.fd.close()


def test_every_guest_gets_a_cid_of_its_own() -> None:
    assert vsock.usable() == ""
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(allocated()) for _ in range(20)]
        assert len({one.cid for one in given}) == 20
        for one in given:
            assert one.cid > 2
            with pytest.raises(OSError, match="in use"):
                take(one.cid)


def test_a_taken_cid_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = [take(cid) for cid in (4242, 4243)]
    draws = [drawn(cid) for cid in (4242, 4243, 4242, 4244)]
    monkeypatch.setattr(os, "urandom", lambda size: draws.pop(0))
    with allocated() as given:
        assert given.cid == 4244
        assert draws == []
        # Ours is refused to a third.
        with pytest.raises(OSError, match="in use"):
            take(4244)
    for fd in strangers:
        os.close(fd)
    os.close(take(4244))  # given back with its descriptor


def test_no_free_cid_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = take(4242)
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "urandom", lambda size: drawn(4242))
    with pytest.raises(HostError, match="gives no context id"):
        vsock.allocate()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    os.close(stranger)


class Guests:
    """Guests with the project's own initrd, whose agents listen on vsock."""

    def __init__(self, base: Path, guest: manifest.Guest) -> None:
        self.base = base
        self.guest = guest

    @contextlib.contextmanager
    def start(self, name: str, *words: str, initrd: Path | None = None) -> Iterator[tuple[QemuProcess, int]]:
        """A booting guest and its CID; *words* go to its kernel's command line."""
        journal = minivm.sandbox_dir(self.base, name)
        given = vsock.allocate()
        assert given is not None
        process, shell = minivm.start(
            minivm.settings(
                journal,
                kernel=self.guest.kernel,
                initrd=str(initrd or self.guest.initrd),
                cmdline=" ".join((*KERNEL_PARAMETERS, *words)),
                accel="kvm",
                vsock=given,
            ),
            journal,
        )
        try:
            yield process, given.cid
        finally:
            shell.close()
            assert journal_undo.undo(journal, 30) == []
            assert process.child.wait(30) is not None
            console = os.read(process.detach_fd("console"), 65536).decode(errors="replace")
            print(f"console of {name}:\n{console}")  # pytest shows it when the test fails
            process.close()


@pytest.fixture
def guests(tmp_path: Path, guest_assets: Path) -> Guests:
    return Guests(tmp_path, manifest.load(str(guest_assets)))


async def agent(cid: int) -> AgentClient:
    """A connection to the agent in a guest that may still be booting."""
    sock = await asyncio.wait_for(vsock.connect(cid, AGENT_PORT), PATIENCE)
    return AgentClient(await Client.connect(sock))


async def ask_for_ever(client: AgentClient) -> None:
    while True:
        await client.check(PATIENCE)


def test_agents_answer_on_vsock_and_go_with_their_machine(guests: Guests) -> None:
    async def talk(first: QemuProcess, cids: tuple[int, int]) -> None:
        clients = [await agent(cid) for cid in cids]
        for client in clients:
            await client.check(PATIENCE)
            details = (await client.details()).agent_details
            assert details is not None
            assert details.version
        # A machine's end is the end of its connection, at once and without a deadline of ours; the other lives.
        first.child.kill()
        with pytest.raises(VMLostError):
            await ask_for_ever(clients[0])
        await clients[1].check(PATIENCE)
        for client in clients:
            client.close()

    with guests.start("one") as (first, one), guests.start("two") as (_second, two):
        assert one != two
        asyncio.run(talk(first, (one, two)))
    # Both CIDs are free again.
    for cid in (one, two):
        os.close(take(cid))


async def port(cid: int, number: int) -> socket.socket:
    """A plain connection to one of the guest's other ports, which listens by now."""
    sock = socket.socket(socket.AF_VSOCK)
    sock.setblocking(False)
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (cid, number)), PATIENCE)
    return sock


async def until(sock: socket.socket, words: bytes) -> bytes:
    """What comes until *words* have come."""
    found = b""
    while words not in found:
        piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), PATIENCE)
        assert piece, found
        found += piece
    return found


def test_log_and_debug_console_have_ports_of_their_own(guests: Guests) -> None:
    archive = Archive()
    archive.directory("debug")
    archive.file("debug/sh", Path(minivm.BUSYBOX).read_bytes(), 0o755)
    initrd = guests.base / "initrd"
    initrd.write_bytes(Path(guests.guest.initrd).read_bytes() + archive.finish())

    async def talk(cid: int) -> None:
        client = await agent(cid)
        await client.check(PATIENCE)
        loop = asyncio.get_running_loop()
        with await port(cid, 1026) as console:
            await loop.sock_sendall(console, b"echo $((6 * 7)) on $(readlink /proc/$$/fd/0)\n")
            await until(console, b"42 on /dev/pts/")
        with await port(cid, 1025) as log:
            reading = asyncio.ensure_future(until(log, b"\n"))
            # The connection is taken some time after it was made; what is logged before that goes elsewhere.
            while not reading.done():
                with pytest.raises(KataError):
                    await client.signal("nobody", "", 9)
                await asyncio.wait([reading], timeout=0.2)
            line = json.loads((await reading).splitlines()[0])
            assert (line["level"], line["source"]) == ("DEBG", "agent")
        client.close()

    words = (
        "agent.debug_console",
        "agent.debug_console_vport=1026",
        "agent.log_vport=1025",
        "agent.log=debug",
    )
    with guests.start("debug", *words, initrd=initrd) as (_process, cid):
        asyncio.run(talk(cid))


def test_a_connection_that_nobody_answers_ends_with_its_caller() -> None:
    with allocated() as given, pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(vsock.connect(given.cid, AGENT_PORT), 5))


def test_the_control_tool_over_vsock(guests: Guests, kata_env: Kata) -> None:
    def control(*words: str) -> subprocess.CompletedProcess[bytes]:
        program = ROOT / "src/kata/agent_ctl/__main__.py"
        command = ["/usr/bin/python3", "-I", "-S", str(program), *words]
        return subprocess.run(command, capture_output=True, check=False, env=kata_env.env)

    with guests.start("ctl") as (_process, cid):
        # Still booting: it asks until somebody listens.
        patience = f"--connect-timeout={PATIENCE}"
        done = control("--server", f"vsock://{cid}:1024", patience, "Check")
        assert (done.returncode, json.loads(done.stdout)) == (0, {"status": "SERVING"}), done.stderr
        report = json.loads(
            control("--server", f"vsock://{cid}", "fuzz", "--cases", "42", "--only", "frames").stdout
        )
        assert report["verdict"] == "healthy"
        assert report["frames"]["right calls all at once"]["OK"] >= 4
        nobody = control("--server", f"vsock://{cid}:77", "--connect-timeout", "1", "Check")
        assert nobody.stderr.startswith(b"error: cannot connect to vsock://"), nobody.stderr
    done = control("--vm", "bench", "--calls", "5", "--bytes", "65536", "--size", "4096")
    assert json.loads(done.stdout)["target"] == "a temporary virtual machine (kvm)"
