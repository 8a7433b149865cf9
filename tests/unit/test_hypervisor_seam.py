"""The seam between engine and hypervisor: who knows what, shapes, descriptors, channels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kata import sysio
from kata.config import files, keys
from kata.errors import ConfigError, HostError, HypervisorError
from kata.hypervisor import registry
from kata.hypervisor.base import Attachments, MachineShape, Nic, random_mac
from kata.hypervisor.channel import AGENT_PORT, HybridVsockChannel, SerialChannel, UnixChannel, VsockChannel

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src/kata"
KNOWN = {
    "confinement.py",  # what its process may read
    "config/files.py",  # the default one's name
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


def test_the_page_about_them_is_as_they_are() -> None:
    command = [sys.executable, str(ROOT / "tools" / "hypervisors_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), f"run tools/hypervisors_table.py: {done.stderr}"


def results(directory: Path, rows: list[dict[str, str]]) -> Path:
    """A file of what tests came to, as the lanes write it."""
    path = directory / "results"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def table(name: str, path: Path) -> str:
    """What tools/hypervisors_table.py makes of such a file."""
    code = f"import sys, hypervisors_table as t; print(t.{name}(sys.argv[1:]))"
    return subprocess.check_output([sys.executable, "-c", code, str(path)], text=True, cwd=ROOT / "tools")


def test_the_table_of_the_suite(tmp_path: Path) -> None:
    """Rows by test, columns by hypervisor and accelerator; what was skipped has its reason below."""
    row = {"title": "QEMU", "accelerator": "tcg", "version": "7.2", "test": "test_one_thing", "reason": ""}
    other = {**row, "title": "Firecracker", "accelerator": "kvm", "version": ""}
    rows = [{**row, "outcome": "passed"}, {**other, "outcome": "skipped", "reason": "it needs KVM"}]
    rows.append({**row, "test": "test_another", "outcome": "failed"})
    path = results(tmp_path, rows)
    assert table("suite", path).splitlines() == [
        "| | Firecracker (kvm) | QEMU (tcg) |",
        "|---|---|---|",
        "| version | not installed | 7.2 |",
        "| one thing | - (1) | passed |",
        "| another | not run | failed |",
        "",
        "1. it needs KVM",
    ]


def test_the_table_of_versions(tmp_path: Path) -> None:
    """Of each test what all machine types have in common, and modules of the rest of the lane as they went."""
    row = {
        "title": "QEMU",
        "accelerator": "tcg",
        "version": "QEMU emulator version 7.2.22 (Debian 1:7.2)",
        "reason": "",
    }
    newer = {**row, "version": "QEMU emulator version 11.1.3 (Debian 1:11.1)"}
    rows: list[dict[str, str]] = [
        {**newer, "test": "test_one_thing", "outcome": "passed", "reason": ""},
        {**newer, "title": "QEMU pc", "test": "test_one_thing", "outcome": "failed", "reason": ""},
        *(
            {**row, "title": title, "test": "test_one_thing", "outcome": "passed"}
            for title in ("QEMU", "QEMU pc")
        ),
        {**row, "title": "Firecracker", "version": "", "test": "test_one_thing", "outcome": "skipped"},
        *(
            {
                "module": "test_x.py",
                "version": row["version"],
                "test": f"test_y {number}",
                "outcome": outcome,
            }
            for number, outcome in enumerate(("passed", "skipped", "failed", "passed"))
        ),
        {"module": "test_x.py", "version": row["version"], "test": "test_y 2", "outcome": "passed"},
    ]
    path = results(tmp_path, rows)
    assert table("versions", path).splitlines() == [
        "| | 7.2.22 | 11.1.3 |",
        "|---|---|---|",
        "| one thing | passed | pc: failed, q35: passed |",
        "| `test_x.py` | 3 passed, 1 skipped | not run |",
    ]
    # The other table has no place for modules.
    made = table("suite", path)
    assert "test_x" not in made


def test_hypervisors_are_found_by_name() -> None:
    assert registry.find().name == registry.DEFAULT == files.DEFAULT in registry.names()
    assert set(registry.names()) <= set(keys.HYPERVISORS) == {keys.HYPERVISOR, *keys.VARIANTS}
    with pytest.raises(ConfigError, match="no hypervisor 'x' here"):
        registry.find("x")


def shape(**changes: Any) -> MachineShape:
    return MachineShape(**{"kernel": "/k", "initrd": "/i", "options": {"a": 1, "b": "x"}, **changes})


def test_machines_of_one_shape_are_the_same_key() -> None:
    assert shape() == shape(options={"b": "x", "a": 1})
    assert len({shape(), shape(), shape(vcpus=2), shape(disks=["spare"]), shape(share="9p")}) == 4
    assert shape() != "shape"


def test_hardware_addresses_are_local_and_unicast() -> None:
    for _ in range(100):
        assert int(random_mac()[:2], 16) & 3 == 2


def test_a_descriptor_has_one_owner() -> None:
    read, write = os.pipe()
    with sysio.Fd(read) as fd, sysio.Fd(write) as other:
        assert fd.raw == fd.fileno() == read
        given = other.detach()
        assert not other.is_open
        with pytest.raises(ValueError, match="given away"):
            other.detach()
        Attachments(sandbox_id="x", run_dir="/", nics=[Nic("m", fd=other, tap_fd=fd)]).close()
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
    ends = [ours.detach()]

    def take() -> int:
        if not ends:
            raise HypervisorError("the agent's channel is in use already")
        return ends.pop()

    serial = SerialChannel(take)
    assert (serial.url, serial.is_single) == ("", True)
    with asyncio.run(serial.connect()) as sock, theirs:
        theirs.send(b"x")
        assert sock.recv(1) == b"x"
    with pytest.raises(HypervisorError, match="in use"):
        serial.take()
