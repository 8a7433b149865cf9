"""What a process of a sandbox could do if its guest took it over: the table in docs/reference.md, from /proc."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from share_cases import SHARES, sharing

from kata import confinement, mount_table, sysio
from kata.hypervisor.qemu.process import SHARE_CAPABILITIES
from kata.resources import host_cgroup

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

NO_CAPABILITIES = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
FILE_SERVER_CAPABILITIES = (*SHARE_CAPABILITIES, sysio.CAP_SETUID, sysio.CAP_SETGID)
SHARE_MASK = sum(1 << number for number in SHARE_CAPABILITIES)
OWN_NAMESPACES = {
    "qemu-system-x86": {"cgroup", "ipc", "mnt", "pid", "uts"},
    "passt": {"ipc", "mnt", "pid", "user", "uts"},
    "virtiofsd": {"cgroup", "ipc", "mnt", "net", "pid", "uts"},
}
"""By a process's name; it has the engine's otherwise (and the engine a mount namespace that is not the host's)."""


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(pid: int) -> dict[str, int]:
    found = status(pid)
    return {name: int(found[name], 16) for name in NO_CAPABILITIES}


def namespaces(pid: int) -> dict[str, int]:
    return {
        kind: sysio.namespace_inode(kind, pid)
        for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
    }


def descriptors(pid: int) -> dict[int, str]:
    return {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


def family(pid: int) -> dict[str, int]:
    """A process's descendants by name; of those that share one the youngest, which is the one that serves."""
    found: dict[str, int] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for task in os.listdir(f"/proc/{parent}/task"):
            children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
            for child in map(int, children):
                name = Path(f"/proc/{child}/comm").read_text().strip()
                found[name.removesuffix(".avx2")] = child
                waiting.append(child)
    return found


def in_their_cgroups(sandbox: dict[str, Any], pids: Iterable[int]) -> None:
    """All of them are where the sandbox is limited, or (version 2: the network's helper) below."""
    leaves = sandbox["host_cgroups"]
    assert leaves.keys() == set(host_cgroup.CONTROLLERS)
    for leaf in leaves.values():
        inside = {
            int(pid)
            for directory, _, _ in os.walk(leaf)
            for pid in Path(directory, "cgroup.procs").read_text().split()
        }
        assert set(pids) <= inside, leaf
    assert Path(leaves["pids"], "pids.max").read_text() == f"{host_cgroup.MOST_TASKS}\n"
    memory = Path(leaves["memory"])
    limit = next(
        memory / name for name in ("memory.max", "memory.limit_in_bytes") if (memory / name).exists()
    )
    assert 0 < int(limit.read_text()) < 1 << 40


def no_core_dump(pid: int) -> None:
    """Its memory is the guest's, and is never written to a disk of the host."""
    assert re.search(r"Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text())


def its_user_and_limits(monitor: int, engine: int, serves: bool) -> None:
    """QEMU's."""
    told = status(monitor)
    # Who serves files of all owners is root; otherwise it is a user that nobody else is.
    user = 0 if serves else confinement.FIRST_USER + confinement.USERS_PER_SANDBOX * engine
    assert told["Uid"].split() == told["Gid"].split() == [str(user)] * 4
    assert serves or told["Groups"] == ""
    limits = Path(f"/proc/{monitor}/limits").read_text()
    assert serves or re.search(r"Max open files +1024 +1024 ", limits)
    assert serves or re.search(r"Max processes +1024 +1024 ", limits)


@pytest.mark.parametrize("shares", ["", *SHARES])
def test_what_each_process_is_left_with(
    shared_kata: Kata, busybox_image: str, tmp_path: Path, shares: str
) -> None:
    kata = sharing(shared_kata, shares, tmp_path) if shares else shared_kata
    (tmp_path / "file").touch()
    options = ["-v", f"{tmp_path}:/v", "-p", "8291:80"] if shares else []
    kata.ok("run", "-d", "--name", "bare", *options, busybox_image, "sleep", "600")
    try:
        engine = kata.engine_pid("bare")
        [found] = json.loads(kata.ok("inspect", "bare"))
        processes = family(engine)
        server = {"virtiofsd"} if shares.startswith("virtio-fs") else set()
        assert processes.keys() == {"qemu-system-x86", "passt", *server}
        monitor = processes["qemu-system-x86"]
        assert found["state"]["pid"] == monitor

        kept = SHARE_MASK if shares == "virtio-9p" else 0
        assert capabilities(monitor) == {**NO_CAPABILITIES, "CapPrm": kept, "CapEff": kept, "CapBnd": kept}
        # (Passt's bounding set is that of its user namespace.)
        assert capabilities(processes["passt"]) | {"CapBnd": 0} == NO_CAPABILITIES
        if server:
            wanted = sum(1 << number for number in FILE_SERVER_CAPABILITIES)
            assert capabilities(processes["virtiofsd"])["CapPrm"] == wanted
        assert status(processes["passt"])["Uid"].split() == ["65534"] * 4
        for name, pid in processes.items():
            told = status(pid)
            assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2"), name
            assert int(told["Seccomp_filters"]) >= 2, name  # its own and ours
            ours, host, its = namespaces(engine), namespaces(os.getpid()), namespaces(pid)
            assert ours["mnt"] != host["mnt"]
            assert {kind for kind in its if its[kind] != ours[kind]} == OWN_NAMESPACES[name], name
            assert its["mnt"] != host["mnt"]
            no_core_dump(pid)
        in_their_cgroups(found["sandbox"], (engine, *processes.values()))
        its_user_and_limits(monitor, engine, shares == "virtio-9p")
        # Its numbers in its own PID namespace.
        assert status(monitor)["NSpid"].split()[-1] == "1"

        # Neither the socket on which the engine is called, nor the pipe by which its client holds it.
        held = descriptors(engine)
        for name, pid in processes.items():
            common = set(descriptors(pid).values()) & {held[3], held[4]}
            assert common == set(), name
        assert held[3].startswith("socket:")

        # Its root: the share, where it serves one, and nothing of the host.
        root = Path(f"/proc/{monitor}/root")
        assert not root.samefile("/")
        assert sorted(os.listdir(root)) == (["proc", "share"] if shares == "virtio-9p" else [])
        mounts = [one.target for one in mount_table.mounts(monitor)]
        assert all(target in ("/", "/proc/self/fd") or target.startswith("/share") for target in mounts)
        above = subprocess.run(
            ["nsenter", f"--mount=/proc/{monitor}/ns/mnt", "--root=" + str(root), "true"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "No such file" in above.stderr  # not even this program

        # What ps and `docker top` show of it.
        shown = subprocess.run(
            ["ps", "-o", "args=", str(monitor)], capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == f"qemu-system-x86_64 (kata: machine of {found['id']})"
        arguments = (kata.run_dir / "sandboxes" / found["id"] / "qemu.args").read_bytes().split(b"\0")
        assert (arguments[0], b"-sandbox" in arguments) == (b"/usr/bin/qemu-system-x86_64", True)

        if shares:
            script = (
                "chown 7:8 /v/file && chmod 0200 /v/file && echo x >/v/file && mkdir /v/d && chown 9 /v/d"
            )
            kata.ok("exec", "bare", "sh", "-c", f"{script} && touch /v/d/f && stat -c %u:%g /v/file")
            done = (tmp_path / "file").stat()
            assert (done.st_uid, done.st_gid, done.st_mode & 0o777) == (7, 8, 0o200)
    finally:
        kata.ok("rm", "-f", "bare")
    assert not Path(f"/proc/{engine}").exists() or kata.sandboxes() == []
