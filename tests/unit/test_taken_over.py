"""What a monitor that was taken over could do: a program in the same confinement tries it, harmlessly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kata import children, confinement, sysio
from kata.hypervisor.base import Attachments
from kata.hypervisor.rust_vmm import MonitorUser
from kata.journal import Journal

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PYTHON = os.path.realpath("/usr/bin/python3")
PROBE = r"""
import ctypes, errno, json, os, signal, socket, sys, threading
given = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
found = {"fds": sorted(os.listdir("/proc/self/fd"))[:-1]}  # but that of the listing

def attempt(name, action):
    try:
        action()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
    else:
        found[name] = "done"

def call(name, number, *arguments):
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    found[name] = "done" if done >= 0 else errno.errorcode[ctypes.get_errno()]

for name, number in given["calls"].items():
    call(name, number, 0, 0, 0, 0, 0, 0)
call("clone a process", 56, signal.SIGCHLD, 0, 0, 0, 0)
call("clone with namespaces", 56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
call("clone3", 435, 0, 0)
attempt("a program", lambda: os.execve("/usr/bin/true", ["true"], {}))
attempt("a program by its descriptor", lambda: os.execve(os.open("/usr/bin/true", os.O_RDONLY), ["true"], {}))
for name, family in (("inet", socket.AF_INET), ("unix", socket.AF_UNIX), ("netlink", socket.AF_NETLINK),
                     ("vsock", socket.AF_VSOCK), ("packet", socket.AF_PACKET)):
    kind = socket.SOCK_RAW if name == "netlink" else socket.SOCK_STREAM
    attempt(f"socket {name}", lambda: socket.socket(family, kind))
def connect():
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(given["abstract"])
attempt("an abstract socket of another", connect)
def connect_named():
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(given["named"])
attempt("a socket of another", connect_named)
if given["own"]:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(given["own"] + "/socket")
    found["own"] = sorted(os.listdir(given["own"]))
    fd = os.open(given["own"], os.O_PATH)
    for name in ("../../disk", "..", "../journal"):
        attempt(f"own {name}", lambda: os.listdir(os.open(name, os.O_RDONLY, dir_fd=fd)))
    os.close(fd)
for path in given["read"]:
    attempt(f"read {path}", lambda: os.open(path, os.O_RDONLY))
for path in given["write"]:
    attempt(f"write {path}", lambda: os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
attempt("signal another", lambda: os.kill(given["pid"], 0))
attempt("be root", lambda: os.setresuid(0, 0, 0))
attempt("give away", lambda: os.chown(given["mine"], 1, 1))
for name in ("CORE", "NOFILE", "NPROC"):
    import resource
    limit = getattr(resource, "RLIMIT_" + name)
    found["limit " + name] = resource.getrlimit(limit)[1]
ran = []
thread = threading.Thread(target=lambda: ran.append(1))
thread.start(); thread.join()
found["threads"] = len(ran)
with open(given["mine"]) as file:
    found["mine"] = file.read()
with open("/proc/self/status") as lines:
    found["status"] = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
print(json.dumps(found), flush=True)
"""
CALLS = {
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "pidfd_getfd": 438,
    "init_module": 175,
    "finit_module": 313,
    "delete_module": 176,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "open_by_handle_at": 304,
    "name_to_handle_at": 303,
    "bpf": 321,
    "perf_event_open": 298,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "keyctl": 250,
    "add_key": 248,
    "request_key": 249,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "setns": 308,
    "unshare": 272,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "mount_setattr": 442,
    "mknod": 133,
    "mknodat": 259,
    "reboot": 169,
    "swapon": 167,
    "sethostname": 170,
    "iopl": 172,
    "clock_settime": 227,
    "settimeofday": 164,
    "syslog": 103,
    "personality": 135,
    "fork": 57,
    "vfork": 58,
    "setuid": 105,
    "setgid": 106,
    "setgroups": 116,
    "capset": 126,
    "modify_ldt": 154,
}
"""Each fails with EPERM whatever its arguments; none would do anything with these."""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path), "s", {})


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that can be reached by everybody."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture
def another() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def ask(journal: Journal, script: str, given: dict[str, Any], how: confinement.Confinement) -> str:
    child = children.SupervisedChild("the probe")
    child.start(
        [PYTHON, "-I", "-S", "-c", script, json.dumps(given)],
        journal,
        "probe",
        capabilities=(),
        namespaces=confinement.NAMESPACES,
        confinement=how,
    )
    said = ""

    def ended() -> bool:
        nonlocal said
        said = child.said()
        return child.poll() is not None

    until(ended, "the probe's end", patience_s=30, poll_s=0.02)
    child.stop()
    return child.failure() if child.poll() else said


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter is for x86-64")
@pytest.mark.parametrize("whose", ["QEMU's", "QEMU's as root", "Cloud Hypervisor's", "Firecracker's"])
def test_nothing_that_a_taken_over_monitor_tries_works(
    journal: Journal, directory: Path, another: subprocess.Popen[bytes], whose: str
) -> None:
    mine, disk, public = directory / "mine", directory / "other-disk", directory / "public"
    mine.write_text("given")
    mine.chmod(0o644)
    disk.write_text("another's")
    disk.chmod(0o600)
    public.write_text("everybody's")
    public.chmod(0o666)
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        abstract.bind(f"\0kata-{os.getpid()}")
        abstract.listen()
        named.bind(str(directory / "engine.sock"))
        named.listen()
        how = confinement_of(whose, str(mine), directory, journal)
        given = {
            "calls": CALLS,
            "abstract": f"\0kata-{os.getpid()}",
            "named": str(directory / "engine.sock"),
            "own": confinement.OWN_DIRECTORY if how.directory else "",
            "read": [str(disk), "/root", "/etc/shadow", "/dev/mem", f"/proc/{another.pid}/mem"],
            "write": [str(disk), str(directory / "new"), "/etc/new", "/tmp/new", "/proc/sysrq-trigger"],
            "pid": another.pid,
            "mine": str(mine),
        }
        if confinement.landlock_version():
            given["read"] = [*given["read"], str(public), "/var", str(directory)]  # type: ignore[misc]
        wanted_user = how.user
        found = json.loads(ask(journal, PROBE, given, how))
    if how.directory:
        # It makes its own sockets, and what is above on the host it cannot even look at.
        assert found.pop("own") == ["socket"]
        assert (directory / "monitor/socket").is_socket()
        assert found.pop("socket unix") == "done"
        assert found.pop("own ..") in ("done", "EACCES")  # its own /dev
        if confinement.landlock_version() < confinement.SCOPES:
            found.pop("an abstract socket of another")
    told = found.pop("status")
    assert found.pop("mine") == "given"
    assert found.pop("threads") == 1
    assert found.pop("fds") == ["0", "1", "2"]
    assert (found.pop("limit CORE"), found.pop("limit NOFILE")) == (0, confinement.MOST_FILES)
    limit = found.pop("limit NPROC")
    assert not wanted_user or limit == confinement.MOST_THREADS
    assert {name: found.pop(name) for name in CALLS} == dict.fromkeys(CALLS, "EPERM")
    assert found.pop("clone3") == "ENOSYS"
    # By numbers that are the host's it is told of nobody.
    assert found.pop("signal another") == "ESRCH"
    allowed = {name: value for name, value in found.items() if value not in ("EPERM", "EACCES", "ENOENT")}
    assert allowed == {}
    assert [told[name].strip("0") for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")] == [""] * 5
    assert (told["NoNewPrivs"], told["Seccomp"], told["Groups"] if wanted_user else "") == ("1", "2", "")
    assert told["Uid"].split() == told["Gid"].split() == [str(wanted_user)] * 4
    assert (wanted_user == 0) == whose.endswith("as root")


def confinement_of(whose: str, mine: str, directory: Path, journal: Journal) -> confinement.Confinement:
    """What such a hypervisor gets, for a Python; its sandbox's directory is the one that is given."""
    if whose.startswith("QEMU"):
        return confinement.monitor(PYTHON, user=0 if whose.endswith("root") else None, readable=[mine])
    attachments = Attachments(sandbox_id="box", run_dir=str(directory))
    devices = ["/dev/kvm", *(["/dev/net/tun"] if whose.startswith("Firecracker") else [])]
    with MonitorUser(PYTHON, attachments, [], {}, journal, str(directory / "root")) as own:
        return own.confinement([mine], [], devices)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter is for x86-64")
def test_system_calls_of_other_kinds_end_the_process(journal: Journal) -> None:
    script = "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000027)); print('done')"
    assert "signal 31" in ask(journal, script, {}, confinement.monitor(PYTHON))


def test_what_is_to_be_served_and_made_can_be(journal: Journal, tmp_path: Path) -> None:
    share, sockets = tmp_path / "share", tmp_path / "sockets"
    share.mkdir()
    sockets.mkdir()
    script = (
        "import json, os, socket, sys; given = json.loads(sys.argv[1]); os.mkdir(given['share'] + '/d');"
        "one = socket.socket(socket.AF_UNIX); one.bind(given['sockets'] + '/s');\n"
        "try: socket.socket(socket.AF_INET)\n"
        "except OSError: print('done')"
    )
    how = confinement.monitor(PYTHON, user=0, shares=str(share), sockets_in=str(sockets))
    assert ask(journal, script, {"share": str(share), "sockets": str(sockets)}, how) == "done"
    assert (share / "d").is_dir()
    assert (sockets / "s").is_socket()


def test_a_file_of_root_can_be_read_by_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"x" * 100_000)
    path.chmod(0o600)
    fd = os.open(path, os.O_RDONLY)
    copy = confinement.for_user(fd, 1234)
    with open(copy, "rb") as file:
        assert os.pread(copy, 200_000, 0) == path.read_bytes()
        assert os.fstat(copy).st_mode & 0o004
        assert confinement.for_user(copy, 1234) == file.fileno()


def test_users(monkeypatch: pytest.MonkeyPatch) -> None:
    first = confinement.FIRST_USER + confinement.USERS_PER_SANDBOX * os.getpid()
    assert [confinement.user_of(which) for which in (0, 1)] == [first, first + 1]
    monkeypatch.setenv(confinement.VARIABLE, "0")
    assert confinement.user_of(0) == 0
    monkeypatch.setenv(confinement.VARIABLE, "500000")
    assert confinement.user_of(0) == 500000 + confinement.USERS_PER_SANDBOX * os.getpid()


def test_wrappers_may_execute_what_they_wrap(journal: Journal, tmp_path: Path) -> None:
    script = tmp_path / "wrapper"
    script.write_text("#!/bin/sh\necho $(echo wrapped)\n")
    script.chmod(0o755)
    child = children.SupervisedChild("the wrapper")
    child.start([str(script)], journal, "w", capabilities=(), confinement=confinement.monitor(str(script)))
    until(lambda: child.poll() is not None, "its end", patience_s=30, poll_s=0.02)
    assert (child.said(), child.poll()) == ("wrapped", 0)
    child.stop()
    assert sysio.proc_starttime(child.pid) is None
