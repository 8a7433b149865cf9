"""`kata` from end to end with KVM, vsock and cgroup v2: what most users have."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import PATIENCE, until

from kata import mount_table, sysio

ALONE = ("--network", "none")
FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.5; done"


def inspect(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", name))[0]
    return found


def gone(pid: int) -> bool:
    return sysio.proc_starttime(pid) is None


def arguments(kata: Kata, found: dict[str, Any]) -> str:
    """QEMU's, each with a final zero."""
    return (kata.run_dir / "sandboxes" / str(found["id"]) / "qemu.args").read_text()


@pytest.fixture(scope="module")
def box(kvm_kata: Kata, busybox_image: str) -> Iterator[str]:
    """A running container that several tests use."""
    kvm_kata.ok("run", "-d", "--name", "kvmbox", *ALONE, busybox_image, "sh", "-c", f"echo up; {FOREVER}")
    yield "kvmbox"
    kvm_kata.ok("rm", "-f", "kvmbox")


def test_it_runs_under_kvm_and_is_reached_over_vsock(kvm_kata: Kata, box: str) -> None:
    found = inspect(kvm_kata, box)
    assert found["state"]["status"] == "running"
    assert found["sandbox"]["accelerator"] == "kvm"
    assert found["sandbox"]["agent_channel"] == "vsock"
    argv = arguments(kvm_kata, found).split("\0")
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert any(word.startswith("vhost-vsock-pci,") for word in argv)
    assert "agent.channel=vsock" in argv[argv.index("-append") + 1]


def test_each_stream_has_a_vsock_connection_to_itself(kvm_kata: Kata, box: str) -> None:
    argv = arguments(kvm_kata, inspect(kvm_kata, box))
    cid = re.search(r"guest-cid=(\d+)", argv)
    assert cid is not None

    def connections() -> int:
        listed = subprocess.run(["ss", "-H", "--vsock"], capture_output=True, text=True, check=True).stdout
        return sum(f" {cid[1]}:1024" in line and "ESTAB" in line for line in listed.splitlines())

    # The common one, and those of the first process's stdout and stderr.
    assert connections() == 3
    done = kvm_kata.call("exec", "-i", box, "cat", stdin=b"x" * 100_000)
    assert done.stdout == b"x" * 100_000
    until(lambda: connections() == 3, "the connections of an exec end with it")


def test_exec(kvm_kata: Kata, box: str) -> None:
    done = kvm_kata.call("exec", "-i", box, "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in and out")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in and out", b"err\n")
    assert kvm_kata.ok("exec", box, "cat", "/proc/1/comm").strip() == "sh"


@pytest.mark.long
def test_run_gives_output_and_status(kvm_kata: Kata, busybox_image: str) -> None:
    script = "cat /proc/sys/kernel/random/boot_id; echo err >&2; exit 3"
    done = kvm_kata.call("run", "--rm", *ALONE, busybox_image, "sh", "-c", script)
    assert done.returncode == 3, done.stderr
    # A kernel of its own: this one may well have the same name.
    assert len(done.stdout.strip()) == 36
    assert done.stdout.strip().decode() != sysio.boot_id()
    assert b"err\n" in done.stderr
    assert b"emulation" not in done.stderr


def test_all_output_arrives(kvm_kata: Kata, box: str) -> None:
    size = 16 << 20
    script = f"head -c {size} /dev/urandom | tee /tmp/all; sha256sum /tmp/all >&2; rm /tmp/all"
    done = kvm_kata.call("exec", box, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == size
    assert hashlib.sha256(done.stdout).hexdigest() == done.stderr.split()[0].decode()


@pytest.mark.long
def test_all_input_arrives(kvm_kata: Kata, box: str) -> None:
    data = os.urandom(4 << 20)
    done = kvm_kata.call("exec", "-i", box, "sha256sum", stdin=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_the_network_helper_is_in_a_cgroup_of_version_2(kvm_kata: Kata, busybox_image: str) -> None:
    """The guard that keeps the helper away from the host's loopback hangs on that cgroup."""
    kvm_kata.ok("run", "-d", "--name", "net", "--network", "user", busybox_image, "sh", "-c", FOREVER)
    try:
        engine = kvm_kata.engine_pid("net")
        children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
        [helper] = [pid for pid in children if "passt" in Path(f"/proc/{pid}/comm").read_text()]
        [line] = Path(f"/proc/{helper}/cgroup").read_text().splitlines()
        own = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
        mounted = next(m.target for m in mount_table.mounts() if m.fstype == "cgroup2")
        directory = Path(mounted + line.split("::")[1])
        assert directory.is_dir()
        assert line.split("::")[1] != own
        assert helper in (directory / "cgroup.procs").read_text().split()
        assert kvm_kata.ok("exec", "net", "ip", "-4", "addr", "show", "dev", "eth0").count("inet ") == 1
    finally:
        kvm_kata.ok("rm", "-f", "net")
    until(lambda: not directory.exists(), "the helper's cgroup is gone")


def test_engine_and_hypervisor_are_limited_by_cgroup_version_2(kvm_kata: Kata, box: str) -> None:
    sandbox = inspect(kvm_kata, box)["sandbox"]
    # Spelled out, not taken from the code: a place that nothing else looks at would pass every other test.
    leaf = Path("/sys/fs/cgroup/kata", sandbox["id"])
    assert sandbox["host_cgroups"] == dict.fromkeys(("memory", "cpu", "pids"), str(leaf))
    for pid in (sandbox["engine_pid"], sandbox["hypervisor_pid"]):
        assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/kata/{sandbox['id']}\n"
    memory = sandbox["memory_mib"] + 256 + sandbox["memory_mib"] // 32 << 20
    assert (leaf / "memory.max").read_text() == f"{memory}\n"
    assert (leaf / "cpu.max").read_text() == f"{(sandbox['vcpus'] + 1) * 100000} 100000\n"
    assert (leaf / "pids.max").read_text() == "2048\n"
    assert int((leaf / "memory.current").read_text()) > 16 << 20
    assert "usage_usec 0\n" not in (leaf / "cpu.stat").read_text()


def test_a_sandboxs_processes_may_open_the_devices_that_they_need_alone(kvm_kata: Kata, box: str) -> None:
    leaf = inspect(kvm_kata, box)["sandbox"]["host_cgroups"]["memory"]
    # From within the cgroup. A shell, since every start of a Python takes seconds in the lab.
    script = (
        'echo $$ >"$1/cgroup.procs" && for i in kvm zero null kmsg; do true <"/dev/$i" && echo "$i"; done'
    )
    kernels_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)  # the test itself may
    os.close(kernels_log)
    done = subprocess.run(["sh", "-c", script, "sh", leaf], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["kvm", "zero", "null"], done.stderr
    assert "/dev/kmsg" in done.stderr


@pytest.mark.long
def test_a_machine_that_reached_the_limit_on_memory_says_so(kvm_kata: Kata, busybox_image: str) -> None:
    kvm_kata.ok("run", "-d", "--name", "greedy", *ALONE, busybox_image, "sh", "-c", FOREVER)
    leaf = Path(inspect(kvm_kata, "greedy")["sandbox"]["host_cgroups"]["memory"])
    now = int((leaf / "memory.current").read_text())
    (leaf / "memory.max").write_text(str(now + (16 << 20)))
    kvm_kata.call("exec", "greedy", "dd", "if=/dev/zero", "of=/dev/shm/more", "bs=1M", "count=200")
    assert kvm_kata.ok("wait", "greedy").strip() == "137"
    state = json.loads((kvm_kata.container_dir("greedy") / "state.json").read_text())
    assert f"reached the limit on memory of its cgroup {leaf}" in state["error"], state
    until(lambda: not leaf.exists(), "the cgroup is gone")
    kvm_kata.ok("rm", "greedy")


def test_the_end_of_the_machine_ends_the_container(kvm_kata: Kata, busybox_image: str) -> None:
    kvm_kata.ok("run", "-d", "--name", "victim", *ALONE, busybox_image, "sh", "-c", FOREVER)
    found = inspect(kvm_kata, "victim")
    engine = kvm_kata.engine_pid("victim")
    os.kill(found["state"]["pid"], signal.SIGKILL)
    assert kvm_kata.ok("wait", "victim").strip() == "137"
    state = json.loads((kvm_kata.container_dir("victim") / "state.json").read_text())
    assert "signal 9" in state["error"], state
    until(lambda: gone(engine) and found["id"] not in kvm_kata.sandboxes(), "engine and sandbox are gone")
    assert not os.path.exists(found["sandbox"]["host_cgroups"]["memory"])
    kvm_kata.ok("rm", "victim")


@pytest.mark.long
def test_the_end_of_the_engine_ends_the_machine(kvm_kata: Kata, busybox_image: str) -> None:
    kvm_kata.ok("run", "-d", "--name", "orphan", *ALONE, busybox_image, "sh", "-c", FOREVER)
    found = inspect(kvm_kata, "orphan")
    os.kill(kvm_kata.engine_pid("orphan"), signal.SIGKILL)
    until(lambda: gone(found["state"]["pid"]), "QEMU is gone")
    kvm_kata.ok("gc")
    assert found["id"] not in kvm_kata.sandboxes()
    assert not os.path.exists(found["sandbox"]["host_cgroups"]["memory"])
    kvm_kata.ok("rm", "-f", "orphan")


@pytest.mark.long
def test_several_at_once(kvm_kata: Kata, busybox_image: str) -> None:
    running = [
        kvm_kata.start("run", "--rm", *ALONE, busybox_image, "sh", "-c", f"echo {number}; exit {number}")
        for number in range(3)
    ]
    for number, process in enumerate(running):
        out, err = process.communicate(timeout=PATIENCE * 3)
        assert (process.returncode, out) == (number, f"{number}\n".encode()), err
