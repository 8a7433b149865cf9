"""The KVM lab as a tool: streams, files, signals, deadlines, and what is left of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import PATIENCE, Reader

from kata.hypervisor import kvmprobe

TOOL = str(ROOT / "tools" / "kvm-lab")
_CHECK = subprocess.run([TOOL, "--check"], capture_output=True, text=True, check=False)

pytestmark = [
    pytest.mark.skipif(_CHECK.returncode != 0, reason=f"no KVM lab: {_CHECK.stdout.strip()}"),
    pytest.mark.skipif("KVM_LAB" in os.environ, reason="a lab in a lab would be up in minutes"),
]

FACTS = """
echo out; echo err >&2
echo secret >/root/kvm-lab-was-here; echo secret >{root}/kvm-lab-was-here; echo $MINE >{tmp}/inside
{{
    test -c /dev/kvm && echo kvm; test -c /dev/vhost-vsock && echo vsock; test -c /dev/vhost-net && echo net
    cut -d: -f1 /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.controllers; pwd; nproc; uname -r
    awk '/^MemTotal/ {{ print int($2 / 1024) }}' /proc/meminfo
    ls -d /sys/module/veth; ls /var/lib/kata 2>/dev/null | wc -l; cat {tmp}/frozen
    ip link add kt0 type dummy && ip tuntap add kt1 mode tap && ip link | grep -c kt[01]
    tc qdisc add dev kt0 clsact && tc filter add dev kt0 ingress u32 match u32 0 0 action mirred egress redirect \
dev kt1 && echo tc
    ls -d /sys/module/nf_tables
}} >{tmp}/facts 2>&1
mkdir {tmp}/tree; echo deep >{tmp}/tree/leaf
exit 7
"""


def lab(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    pipes: dict[str, object] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([TOOL, *arguments], **{**pipes, **options})  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The tool does not outlive its test."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def machines_of(pid: int) -> list[int]:
    """The lab's QEMU, once it has been executed."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            # Its name tells it from a QEMU that is only asked what it can.
            if b"kvm-lab" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                found.append(int(child))
    return found


def machine_of(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + PATIENCE
    while not (found := machines_of(process.pid)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def gone(pid: int) -> bool:
    """Whether a process has ended, within a moment."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module", autouse=True)
def _files() -> None:
    """The lab's kernel, fetched when it is not there yet."""
    subprocess.run([TOOL, "--prepare"], check=True)


def test_a_command_sees_this_machine_and_changes_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "frozen").write_text("as it was\n")
    words = ["--memory", "900", "--modules", "veth", "-e", "MINE=my own", "-C", "/usr"]
    for name in ("facts", "tree", "inside"):
        words += ["--get", f"{tmp_path}/{name}:{tmp_path}/got-{name}"]
    script = FACTS.format(tmp=tmp_path, root=ROOT)
    process = lab(*words, "--freeze", f"{tmp_path}/frozen", "--", "sh", "-c", script)
    with ended(process):
        machine = machine_of(process)
        out, err = process.communicate(timeout=PATIENCE * 3)
    assert (process.returncode, out, err) == (7, b"out\n", b"err\n")
    assert gone(machine)
    for path in (
        "/root/kvm-lab-was-here",
        f"{ROOT}/kvm-lab-was-here",
        f"{tmp_path}/inside",
        f"{tmp_path}/tree",
    ):
        assert not os.path.exists(path), path
    assert (tmp_path / "got-inside").read_text() == "my own\n"
    assert (tmp_path / "got-tree" / "leaf").read_text() == "deep\n"
    facts = (tmp_path / "got-facts").read_text().splitlines()
    devices, (hierarchy, controllers, directory, cpus, kernel, memory), rest = (
        facts[:3],
        facts[3:9],
        facts[9:],
    )
    assert devices == ["kvm", "vsock", "net"]
    assert hierarchy == "0"  # version 2 alone
    assert {"cpu", "memory", "pids", "io"} <= set(controllers.split())
    assert (directory, cpus) == ("/usr", "1")
    assert kernel != os.uname().release
    assert 700 < int(memory) <= 900
    assert rest == ["/sys/module/veth", "0", "as it was", "2", "tc", "/sys/module/nf_tables"]


def test_streams_are_live_and_a_signal_goes_to_the_command() -> None:
    script = (
        "trap 'echo asked; exit 9' INT; echo first; read word; echo got $word; while :; do sleep 0.1; done"
    )
    process = lab("--stdin", "--cpus", "2", "--", "sh", "-c", script)
    with ended(process):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        process.stdin.write(b"this\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got this\n"
        machine = machine_of(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (9, b"asked\n", b"")
        assert gone(machine)


def test_the_deadline_ends_the_command_and_results_still_come_back(tmp_path: Path) -> None:
    script = f"trap 'echo told; exit 0' TERM; echo here >/dev/console; echo so far >{tmp_path}/result"
    script += "; while :; do sleep 0.1; done"
    words = ["--timeout", "3", "--get", f"{tmp_path}/result:{tmp_path}/got", "--get", "/no/such:none"]
    process = lab(*words, "--log", str(tmp_path / "console"), "--", "sh", "-c", script)
    with ended(process):
        machine = machine_of(process)
        out, err = process.communicate(timeout=PATIENCE * 3)
    assert (process.returncode, out) == (124, b"told\n")
    assert b"the command has not ended after 3 s" in err
    assert b"cannot bring back /no/such: No such file or directory" in err
    assert (tmp_path / "got").read_text() == "so far\n"
    assert "here" in (tmp_path / "console").read_text()
    assert gone(machine)


def test_a_shell_has_our_terminal() -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(TOOL, [TOOL, "--shell", "--", "sh"])
    try:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        reader = Reader(fd)
        reader.until(b"# ", PATIENCE * 3)
        os.write(fd, b"tty; stty size; echo $((6 * 7))\n")
        assert b"/dev/pts/" in reader.until(b"33 77\r\n42\r\n", PATIENCE * 3)
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
        # A Ctrl-C of the keyboard ends what the shell runs, and not the lab.
        os.write(fd, b"sleep 1000\n")
        reader.until(b"sleep 1000\r\n", PATIENCE * 3)
        time.sleep(1)
        os.write(fd, b"\x03")
        os.write(fd, b"stty size; exit 5\n")
        reader.until(b"40 90\r\n", PATIENCE * 3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


def test_a_lab_that_dies_is_told_from_a_command_that_fails() -> None:
    process = lab("--", "true")
    with ended(process):
        os.kill(machine_of(process), signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (125, b"")
    assert b"the lab ended before the command was started (QEMU's status -9)" in err
    assert b"the lab's console" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_tool_that_is_killed(number: signal.Signals) -> None:
    process = lab("--", "sleep", "1000")
    with ended(process):
        machine = machine_of(process)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    # Whether the tool already listens to TERM when it comes makes no difference to what is left.
    assert process.returncode in (-number, 128 + number)
    assert gone(machine)


@pytest.mark.skipif(kvmprobe.probe().works, reason="the lane runs on this machine's own KVM")
def test_without_kvm_and_without_a_lab_the_lane_is_skipped_and_says_why(tmp_path: Path) -> None:
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho Recognized CPUID flags: fpu vme\n")
    old.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # Without CI: this is no machine of that run's own, on which nobody else starts anything meanwhile.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "KATA_TEST_REPORT", "CI"):
        environment.pop(name, None)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-m",
        "not here",
        str(ROOT / "tests/kvm"),
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"=+ \d+ skipped, because =+", done.stdout), done.stdout
    assert f"and no KVM lab ({old} does not emulate AMD-V)" in done.stdout
    assert "passed" not in done.stdout
