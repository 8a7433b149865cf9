"""The parent of engines: what those that it forks take from who asks, and whom it refuses. The parent is a real one;
its engines get no settings that make sense, so they end with a word in their log.
"""

from __future__ import annotations

import marshal
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kata import journal_undo, launcher
from kata.engine import parent_client
from kata.engine.parent_client import Unavailable

SOURCE = Path(__file__).resolve().parents[2] / "src"
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "KATA_OF_THIS": "1"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Request:
    """The descriptors of an engine, and its log."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = str(run_dir)
        self.log = run_dir / "log"
        settings = os.memfd_create("settings")
        os.write(settings, marshal.dumps({"id": "one", "nonsense": 1}))
        os.lseek(settings, 0, os.SEEK_SET)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        read, self.lifetime = os.pipe()
        listener = os.dup(null)
        self.fds = (null, log, log, listener, read, settings)

    def ask(self) -> tuple[int, Any]:
        return parent_client.ask(self.run_dir, "/sandbox", ENVIRONMENT, self.fds)

    def close(self) -> None:
        for fd in {*self.fds, self.lifetime}:
            os.close(fd)


@pytest.fixture
def request_of() -> Iterator[Request]:
    """For a parent that runs."""
    run_dir = Path(tempfile.mkdtemp(prefix="kp-", dir="/tmp"))
    request = Request(run_dir)
    try:
        with pytest.raises(Unavailable, match="is being started"):
            request.ask()
        until(lambda: bool(list(run_dir.glob("factory/*/parent.sock"))), "a parent listens")
        yield request
    finally:
        parent_client.end_all(str(run_dir))
        request.close()
        shutil.rmtree(run_dir)


def parent_pid(request: Request) -> int:
    (one,) = parent_client.listed(request.run_dir)
    return int(one["pid"])


def has_ended(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_an_engine_has_what_exec_would_have_passed_on(request_of: Request) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    processors = os.sched_getaffinity(0)
    score = Path("/proc/self/oom_score_adj").read_text()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        os.sched_setaffinity(0, {min(processors)})
        Path("/proc/self/oom_score_adj").write_text("123")
        pid, connection = request_of.ask()
        try:
            here = Path(f"/proc/{pid}")
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (soft - 1, hard)
            assert os.sched_getaffinity(pid) == {min(processors)}
            assert os.sched_getscheduler(pid) == os.sched_getscheduler(0)
            assert os.getpriority(os.PRIO_PROCESS, pid) == nice
            assert (here / "oom_score_adj").read_text() == "123\n"
            assert (here / "cgroup").read_text() == Path("/proc/self/cgroup").read_text()
            assert os.getsid(pid) not in (os.getsid(0), os.getsid(parent_pid(request_of)))
            # Nothing of its parent's: it has no child to wait for, and its end is none of the engine's business.
            assert f"PPid:\t{parent_pid(request_of)}\n" not in (here / "status").read_text()
        finally:
            os.sched_setaffinity(0, processors)
            connection.close()
        # Whoever gives up has no engine that goes on by itself.
        until(lambda: has_ended(pid), "the engine ends")
        assert request_of.log.read_bytes() == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        Path("/proc/self/oom_score_adj").write_text(score)


def test_an_engine_goes_on_when_it_is_told_to(request_of: Request) -> None:
    pid, connection = request_of.ask()
    parent_client.go(connection)
    until(lambda: has_ended(pid), "the engine ends")
    assert "there is no key 'nonsense'" in request_of.log.read_text()


def test_an_engine_looks_like_one_that_was_executed(request_of: Request) -> None:
    # It reads its settings from a pipe that says nothing for now.
    read, write = os.pipe()
    request_of.fds = (*request_of.fds[:5], read)
    try:
        pid, connection = request_of.ask()
        parent_client.go(connection)
        until(lambda: b"\0engine\0" in Path(f"/proc/{pid}/cmdline").read_bytes(), "it has its arguments")
        shown = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert shown == [os.fsencode(word) for word in (*launcher.command(), "engine", "/sandbox")]
        parent = parent_pid(request_of)
        assert Path(f"/proc/{pid}/comm").read_text() == Path(f"/proc/{parent}/comm").read_text()
        assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == list(range(6))
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        blocked = next(
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("SigBlk")
        )
        assert int(blocked.split()[1], 16) == 0
    finally:
        os.close(write)
    until(lambda: has_ended(pid), "the engine ends")


def test_another_user_gets_no_answer_even_with_an_open_socket(request_of: Request) -> None:
    (socket,) = Path(request_of.run_dir).glob("factory/*/parent.sock")
    assert socket.stat().st_mode & 0o777 == 0o600
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    for path, mode in ((socket, 0o666), (socket.parent, 0o755), (Path(request_of.run_dir), 0o755)):
        path.chmod(mode)
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.settimeout(5); s.connect(sys.argv[1])\n"
        "try:\n    s.send(b'x'); print(s.recv(100))\nexcept (BrokenPipeError, ConnectionResetError):\n    print(b'')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(socket)], capture_output=True, check=False)
    assert done.stdout == b"b''\n", done.stderr.decode()
    pid, connection = request_of.ask()
    connection.close()
    until(lambda: has_ended(pid), "the engine ends")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("sysio.unshare(0x04000000)", "another uts namespace"),
        ("sysio.prctl(38, 1)", "another NoNewPrivs"),
        ("os.setgroups([5])", "another Groups"),
    ],
)
def test_who_differs_in_what_cannot_be_taken_over_is_refused(
    request_of: Request, change: str, differs: str
) -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from kata import sysio\nfrom kata.engine import parent_client\n"
        f"parent_client.name = lambda: {parent_client.name()!r}\n"
        f"parent_client.program = lambda: {parent_client.program()!r}\n"
        f"{change}\n"
        "try:\n"
        f"    print(parent_client.ask({request_of.run_dir!r}, '/sandbox', {{}}, (0, 1, 2, 0, 0, 0)))\n"
        "except parent_client.Unavailable as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert differs in done.stdout


def test_nonsense_does_no_harm(request_of: Request) -> None:
    import socket

    (path,) = Path(request_of.run_dir).glob("factory/*/parent.sock")
    for said in (b"x" * 1000, marshal.dumps((1, 2)), marshal.dumps([]), b"", b"\xe9" * 70000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
            one.settimeout(5)
            one.connect(str(path))
            if said:
                one.send(said)
            else:
                time.sleep(0.3)  # it does not wait for long
            assert one.recv(300).startswith(parent_client.REFUSED)
    pid, connection = request_of.ask()
    connection.close()
    until(lambda: has_ended(pid), "the engine ends")


def test_one_that_hangs_costs_half_a_second(request_of: Request) -> None:
    parent = parent_pid(request_of)
    os.kill(parent, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            request_of.ask()
        assert time.monotonic() - began < 2
    finally:
        os.kill(parent, signal.SIGCONT)


def test_one_that_was_killed_is_cleared_away_and_replaced(request_of: Request) -> None:
    killed = parent_pid(request_of)
    os.kill(killed, signal.SIGKILL)
    until(lambda: has_ended(killed), "it has ended")
    with pytest.raises(Unavailable, match="is being started"):
        request_of.ask()

    def replaced() -> bool:
        found = parent_client.listed(request_of.run_dir)
        return bool(found) and found[0]["pid"] != killed

    until(replaced, "there is another one")
    os.kill(parent_pid(request_of), signal.SIGKILL)
    until(lambda: not parent_client.listed(request_of.run_dir), "it has ended")
    report = journal_undo.reconcile(request_of.run_dir, request_of.run_dir)
    assert [os.path.basename(path) for path in report.undone] == [parent_client.name()]
    assert os.listdir(os.path.join(request_of.run_dir, "factory")) == []


def test_it_leaves_nothing_when_it_is_told_to_end(request_of: Request) -> None:
    pid = parent_pid(request_of)
    os.kill(pid, signal.SIGTERM)
    until(lambda: has_ended(pid), "it has ended")
    assert os.listdir(os.path.join(request_of.run_dir, "factory")) == []


def test_it_ends_when_its_directory_has_gone(request_of: Request) -> None:
    pid = parent_pid(request_of)
    shutil.rmtree(os.path.join(request_of.run_dir, "factory"))
    until(lambda: has_ended(pid), "it has ended")


def test_the_variable_outdoes_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(parent_client.VARIABLE, raising=False)
    assert not parent_client.is_wanted(None)
    monkeypatch.setenv(parent_client.VARIABLE, "on")
    assert parent_client.is_wanted(None)
