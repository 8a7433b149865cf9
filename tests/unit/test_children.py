"""Helper programs of a sandbox: how they are watched, explained and ended."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from waiting import until

from kata import children, sysio
from kata.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path), "s", {})


def helper(journal: Journal, script: str, **how: object) -> children.SupervisedChild:
    child = children.SupervisedChild("the helper")
    child.start(["/bin/sh", "-c", script], journal, "helper", **how)  # type: ignore[arg-type]
    return child


def gone(child: children.SupervisedChild) -> None:
    until(lambda: child.poll() is not None, "its end", patience_s=10, poll_s=0.01)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo the reason >&2; exit 3", "the helper ended with status 3: the reason"),
        ("echo out; exit 0", "the helper ended with status 0: out"),
        ("kill -9 $$", "the helper was killed by signal 9"),
    ],
)
def test_a_helper_that_ends_by_itself_is_explained(journal: Journal, script: str, sentence: str) -> None:
    child = helper(journal, script)
    gone(child)
    assert child.failure() == sentence
    child.stop()
    child.stop()
    assert child.failure() == sentence  # also once everything has been given back
    assert not [entry for entry in journal.entries if entry.kind == "process" and not entry.gone]


def test_a_helper_that_was_asked_to_end_has_not_failed(journal: Journal) -> None:
    child = helper(journal, "exec sleep 60")
    assert child.failure() == ""
    child.dismiss()
    gone(child)
    assert child.failure() == ""
    child.stop()


def test_a_helper_gets_its_time_and_is_killed_then(journal: Journal) -> None:
    child = helper(journal, "sleep 0.3; exit 5")
    child.stop(patience_s=10)
    assert child.poll() == 5

    child = helper(journal, "exec sleep 60")
    began = time.monotonic()
    child.stop(patience_s=0.2)
    assert 0.2 <= time.monotonic() - began < 5
    assert child.poll() == -9
    assert not [entry for entry in journal.entries if entry.kind == "process" and not entry.gone]


def test_the_end_of_a_helper_is_told_once_unless_nobody_watches(journal: Journal) -> None:
    async def work() -> None:
        told: list[str] = []
        ended = asyncio.Event()
        one, other = helper(journal, "echo oh >&2; exit 1"), helper(journal, "exit 2")
        other.on_exit(lambda: told.append("other"))
        other.unwatch()

        def on_exit() -> None:
            told.append(one.failure())
            ended.set()

        one.on_exit(on_exit)
        await asyncio.wait_for(ended.wait(), 10)
        gone(other)
        await asyncio.sleep(0.05)
        assert told == ["the helper ended with status 1: oh"]
        one.stop()
        other.stop()

    asyncio.run(work())


def test_a_helper_that_cannot_be_executed_leaves_nothing(journal: Journal) -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = children.SupervisedChild("the helper")
    with pytest.raises(OSError, match="no/such"):
        child.start(["/no/such"], journal, "helper")
    assert child.failure() == ""
    child.on_exit(lambda: None)
    child.stop()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [entry for entry in journal.entries if entry.kind == "process" and not entry.gone]


def test_a_helper_that_is_stopped_before_its_program_is_not_waited_for_without_end(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: object, **_more: object) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(sysio, "EXEC_TIMEOUT_S", 0.2)
    monkeypatch.setattr(children, "_exec_child", stop)
    child = children.SupervisedChild("the helper")
    with pytest.raises(TimeoutError, match="not executed within"):
        child.start(["/bin/true"], journal, "helper")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert not [entry for entry in journal.entries if entry.kind == "process" and not entry.gone]


def test_what_a_program_says_is_bounded_and_never_in_its_way() -> None:
    words = children.StderrTail()
    for _ in range(20):
        try:
            os.write(words.write_fd, b"first\n" + b"x" * 4000 + b"\n")
        except BlockingIOError:
            break
    else:
        pytest.fail("the pipe took everything")
    words.read()
    os.write(words.write_fd, b"\x1b[31mlast words\n")
    words.started()
    said = words.text()
    assert said.startswith("first\n")
    assert said.endswith("\\x1b[31mlast words")
    assert len(said) < 3 * children.StderrTail.KEEP
    assert not words.reader.is_open
    words.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a PID namespace")
def test_a_child_by_another_is_ours_and_later_orphans_are_not() -> None:
    pid = children._fork_by_another()
    if pid == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    assert os.waitpid(pid, 0) == (pid, 0)
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        ours, own = os.getppid(), os.getpid()
        if os.fork() == 0:
            while os.getppid() == own:
                time.sleep(0.01)
            os.write(write, b"ours" if os.getppid() == ours else b"not ours")
        os._exit(0)
    os.waitpid(between, 0)
    assert os.read(read, 10) == b"not ours"
    os.close(read)
    os.close(write)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who has nothing open")
def test_a_users_pipes_may_be_used_up() -> None:
    """Each pasta has a pool of large pipes, and a few of them take all that a user may have (pipe(7))."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            os.setresuid(1_234_567, 1_234_567, 1_234_567)
            ends = [os.pipe() for _ in range(1100)]
            try:
                fcntl.fcntl(ends[-1][1], fcntl.F_SETPIPE_SZ, 16 << 10)
            except PermissionError:
                status = 2
            words = children.StderrTail()
            os.write(words.write_fd, b"the reason\n")
            status *= os.read(words.reader.raw, 100) == b"the reason\n"
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(ended) == 1:
        pytest.skip("1100 pipes are not too many for a user here")
    assert os.waitstatus_to_exitcode(ended) == 2
