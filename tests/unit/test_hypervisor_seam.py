"""The seam between engine and hypervisor: who knows what, shapes, channels, and what a failed start leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import sandbox_support

from kata import journal_undo, sysio
from kata.engine.lifecycle import boot
from kata.errors import ConfigError, HostError, HypervisorError, KataError, UnsupportedError
from kata.hypervisor import registry
from kata.hypervisor.base import Attachments, Capabilities, MachineShape, Nic
from kata.hypervisor.channel import AGENT_PORT, HybridVsockChannel, SerialChannel, UnixChannel, VsockChannel
from kata.journal import Journal
from kata.settings import NetworkSettings

SOURCE = Path(__file__).resolve().parents[2] / "src/kata"
KNOWN = {
    "config/keys.py",  # the keys' documentation
    "hypervisor/registry.py",  # its name, and where it is
    "hypervisor/virtiofsd.py",  # the directory in which distributions have that program
}


def test_one_package_alone_knows_qemu() -> None:
    words = re.compile(r"qemu|\bqmp|q35|i440|qboot", re.IGNORECASE)
    found = {
        str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if words.search(path.read_text())
    }
    assert {name for name in found if not name.startswith("hypervisor/qemu/")} == KNOWN


def test_hypervisors_are_found_by_name() -> None:
    assert registry.find().name == registry.DEFAULT in registry.names()
    with pytest.raises(ConfigError, match="no hypervisor 'x' here"):
        registry.find("x")


def shape(**changes: Any) -> MachineShape:
    return MachineShape(**{"kernel": "/k", "initrd": "/i", "options": {"a": 1, "b": "x"}, **changes})


def test_machines_of_one_shape_are_the_same_key() -> None:
    assert shape() == shape(options={"b": "x", "a": 1})
    assert len({shape(), shape(), shape(vcpus=2), shape(disks=["spare"]), shape(share="9p")}) == 4
    assert shape() != "shape"


def test_a_descriptor_has_one_owner() -> None:
    read, write = os.pipe()
    with sysio.Fd(read) as fd, sysio.Fd(write) as other:
        assert fd.raw == fd.fileno() == read
        given = other.detach()
        assert not other.is_open
        with pytest.raises(ValueError, match="given away"):
            other.detach()
        Attachments(sandbox_id="x", run_dir="/", nics=[Nic("m", tap_fd=fd)], share_server=other).close()
        with pytest.raises(ValueError, match="closed"):
            _ = fd.raw
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)
    os.close(given)  # which was nobody's any more


# ---- channels ----


def serve(path: Path, *steps: Callable[[socket.socket], None]) -> threading.Thread:
    """Listen at *path*; each connection is one step's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def work() -> None:
        with listener:
            for step in steps:
                with listener.accept()[0] as peer:
                    step(peer)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_hybrid_vsock_is_asked_for_a_port_until_somebody_listens(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    asked: list[bytes] = []

    def hang_up(peer: socket.socket) -> None:
        asked.append(peer.recv(64))

    def answer(peer: socket.socket) -> None:
        asked.append(peer.recv(64))
        peer.sendall(b"OK 1073741824\nfirst bytes of the agent")

    async def reach() -> bytes:
        channel = HybridVsockChannel(str(path))
        assert (channel.url, channel.is_single) == (f"hvsock://{path}:{AGENT_PORT}", False)
        connecting = asyncio.create_task(channel.connect())
        await asyncio.sleep(0.05)  # the monitor has not made its socket yet
        thread = serve(path, hang_up, answer)
        with await asyncio.wait_for(connecting, 10) as sock:
            data = await asyncio.get_running_loop().sock_recv(sock, 100)
        await asyncio.to_thread(thread.join)
        return data

    assert asyncio.run(reach()) == b"first bytes of the agent"
    assert asked == [b"CONNECT 1024\n"] * 2


def test_a_hybrid_vsock_that_talks_nonsense_is_told(tmp_path: Path) -> None:
    for number, nonsense in enumerate((b"NO\n", b"OK " + b"9" * 100)):
        path = tmp_path / str(number)

        def answer(peer: socket.socket, said: bytes = nonsense) -> None:
            peer.recv(64)
            peer.sendall(said)
            with contextlib.suppress(ConnectionError):
                peer.recv(1)  # until it is hung up

        thread = serve(path, answer)
        with pytest.raises(HostError, match="where a hybrid vsock says OK"):
            asyncio.run(asyncio.wait_for(HybridVsockChannel(str(path)).connect(), 10))
        thread.join()


def test_other_channels(tmp_path: Path) -> None:
    thread = serve(tmp_path / "a", lambda peer: peer.sendall(b"hello"))

    async def reach() -> bytes:
        channel = UnixChannel(str(tmp_path / "a"))
        assert channel.url == f"unix://{tmp_path}/a"
        with await channel.connect() as sock:
            return await asyncio.get_running_loop().sock_recv(sock, 5)

    assert asyncio.run(reach()) == b"hello"
    thread.join()
    assert VsockChannel(77).url == "vsock://77:1024"
    ours, theirs = socket.socketpair()
    ends = [ours.detach(), -1]
    serial = SerialChannel(lambda: ends.pop(0))
    assert (serial.url, serial.is_single) == ("", True)
    with asyncio.run(serial.connect()) as sock, theirs:
        theirs.send(b"x")
        assert sock.recv(1) == b"x"
    with pytest.raises(HypervisorError, match="in use"):
        serial.take()


# ---- what the engine asks before it makes anything ----


class Poor:
    """A hypervisor that can do next to nothing."""

    name, title = "poor", "Poor"
    accelerators = ("kvm",)

    def __init__(self, **capabilities: Any) -> None:
        self._capabilities = Capabilities(**{"disk_slots": 1, **capabilities})

    def capabilities(self, accel: str, options: object, *, bounces: bool = True) -> Capabilities:
        return self._capabilities


def booting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Poor) -> boot.Boot:
    monkeypatch.setitem(registry._LOADERS, "poor", lambda: cast(Any, monitor))
    sandbox = sandbox_support.sandbox("x", str(tmp_path), kernel="/k", initrd="/i", accel="kvm")
    sandbox.described().hypervisor.name = "poor"
    return boot.Boot(sandbox, str(tmp_path), Journal.create_dir(str(tmp_path / "r"), "s", {}))


def test_what_a_hypervisor_cannot_do_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = booting(tmp_path, monkeypatch, Poor())
    assert start._described.hypervisor.accel == "kvm"
    start._described.hypervisor.accel = "tcg"
    with pytest.raises(HostError, match="Poor needs KVM"):
        start.choose_monitor()
    start._described.hypervisor.accel = "kvm"
    start._settings.disks = [None, None]
    with pytest.raises(UnsupportedError, match="Poor gives a machine 1 disks, and 2 are needed"):
        start.choose_monitor()
    start._settings.disks = []
    start._settings.client.shares_from_start = True
    with pytest.raises(UnsupportedError, match="Poor cannot share files"):
        start.choose_monitor()
    start._settings.client.shares_from_start = False
    start.choose_monitor()
    start._settings.network = NetworkSettings(mode="netns")
    with pytest.raises(
        UnsupportedError, match="Poor cannot connect a machine to a network of the mode 'netns'"
    ):
        start.plan_network()
    start._settings.network = NetworkSettings()
    start.plan_network()
    start.describe_machine()
    made = start.machine.shape
    assert made is not None
    assert (made.nics, made.share, made.disks, made.max_vcpus) == (0, "", ("spare",), 0)
    assert os.listdir(tmp_path / "r/s") == ["journal"]


def test_one_thing_that_cannot_be_taken_back_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = booting(tmp_path, monkeypatch, Poor())
    taken: list[str] = []

    def refuse() -> None:
        raise RuntimeError("no")

    start._undo += [lambda: taken.append("first"), refuse, lambda: taken.append("last")]
    start.undo()
    start.undo()
    assert taken == ["last", "first"]
    assert start._settings.notes == ["a start that failed was not taken back whole: no"]


# ---- a start that fails ----

STEPS = [
    "choose_monitor",
    "keep_host_namespaces",
    "enter_namespace",
    "prepare_share",
    "plan_network",
    "prepare_file_server",
    "describe_machine",
    "take_boot_slot",
    "start_monitor",
    "join_cgroup",
    "start_file_server",
    "start_network",
    "set_oom_scores",
]


def descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            pass  # that of the listing
    return found


def in_child(work: Callable[[], str]) -> str:
    """What *work* says, in a process of its own: namespaces and cgroups are its alone."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


class Refused(KataError):
    """What a step fails with here."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("network", ["netns", "user"])
@pytest.mark.parametrize("step", STEPS)
def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path, step: str, network: str) -> None:
    """Each step in turn fails when it is done, with real namespaces, taps, helpers and a hypervisor's program."""
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_bytes(b"nothing that boots")
    sandbox = sandbox_support.sandbox(
        "x", str(tmp_path / "c"), kernel=f"{tmp_path}/kernel", initrd=f"{tmp_path}/initrd", accel="tcg"
    )
    sandbox.network = NetworkSettings(mode=network)
    sandbox.described().guest.bounces = True  # a file server of its own, where the host has one
    sandbox.client.keeps_host_mounts = sandbox.client.shares_from_start = True
    sandbox.cgroups_path = f"/kata-test-{os.getpid()}-{step}"
    os.environ["KATA_RUN_DIR"] = str(tmp_path / "run")
    done = getattr(boot.Boot, step)

    def failing(self: boot.Boot) -> None:
        done(self)
        raise Refused(step)

    def work() -> str:
        from kata.engine import hostns  # noqa: F401
        from kata.hypervisor import virtiofsd  # noqa: F401
        from kata.network import netns, plan  # noqa: F401

        journal = Journal.create_dir(str(tmp_path / "r"), "s", {})
        sysio.preload()
        before = descriptors()
        setattr(boot.Boot, step, failing)
        try:
            boot.power_on(sandbox, os.path.dirname(journal.path), journal)
        except Refused:
            pass
        left = descriptors() - before
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        notes = [note for note in sandbox.notes if boot.BY_9P not in note]
        return repr((sorted(left), children, notes, journal_undo.undo(journal, 10)))

    try:
        assert in_child(work) == "([], [], [], [])"
    finally:
        del os.environ["KATA_RUN_DIR"]
