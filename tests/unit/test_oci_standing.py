"""The process that stands for a container on the host, with a test in the place of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_double import Engine, engine, make, process
from waiting import until

from kata.engine.containers import host_process
from kata.errors import KataError, NotFoundError
from kata.oci_runtime import standing

__all__ = ["engine", "make"]

RUNNING = 2
"""Of containerd.v1.types.Status."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., standing.Standing]:
    def made(output: int = -1) -> standing.Standing:
        null = os.open(os.devnull, os.O_RDWR)
        streams = (null, null, null) if output < 0 else (null, output, output)
        path = str(tmp_path / "pid.sock")
        try:
            return standing.start(path, "", streams, terminal=False, orphan=False, own_mounts=False)
        finally:
            os.close(null)

    return made


def ended(pid: int) -> int:
    """How a child has ended: its status, or the negative number of a signal."""
    found: list[int] = []

    def has_ended() -> bool:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        found.append(status)
        return ended_pid == pid

    until(has_ended, "its end")
    return os.waitstatus_to_exitcode(found[-1])


def test_it_ends_with_the_status_that_the_engine_tells(start: Callable[..., standing.Standing]) -> None:
    one = start()
    engine = host_process.take(one.path)
    one.let_go()
    assert not os.path.exists(one.path)
    engine.end(7)
    assert ended(one.pid) == 7


@pytest.mark.parametrize("is_connected", [False, True])
def test_it_dies_with_who_has_not_let_go_of_it(
    start: Callable[..., standing.Standing], is_connected: bool
) -> None:
    """Also when the engine has its streams: conmon waits for their end to say that the start has failed."""
    one = start()
    engine = host_process.take(one.path) if is_connected else None
    one.abandon()  # what the kernel does when that process is killed
    assert ended(one.pid) == -9
    if engine is not None:
        engine.close()


def test_it_dies_with_its_engine(start: Callable[..., standing.Standing]) -> None:
    one = start()
    engine = host_process.take(one.path)
    one.let_go()
    engine.close()
    assert ended(one.pid) == -9


def test_the_streams_of_an_exec_that_nobody_will_start_are_let_go_of(
    engine: Engine, start: Callable[..., standing.Standing]
) -> None:
    """Its `kata-runtime exec` was killed in between: conmon reads its standard error to the end."""
    reading, writing = os.pipe()
    one = start(writing)
    os.close(writing)
    with engine.client() as client, open(reading, "rb") as output:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("true"), stdin=f"handover://{one.path}")
        one.abandon()
        assert ended(one.pid) == -9
        assert output.read() == b""
        with pytest.raises(NotFoundError):
            client.start("c1", "e")
        assert client.state("c1").status == RUNNING


def test_the_streams_of_what_is_refused_are_let_go_of(
    engine: Engine, start: Callable[..., standing.Standing]
) -> None:
    """Of an exec in a container that is paused, and of a container whose id is taken."""

    def refused(call: Callable[[str], object]) -> None:
        reading, writing = os.pipe()
        one = start(writing)
        os.close(writing)
        with open(reading, "rb") as output:
            with pytest.raises(KataError):
                call(f"handover://{one.path}")
            one.abandon()
            assert ended(one.pid) == -9
            assert output.read() == b""

    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        refused(lambda stdin: client.create("c1", engine.bundle("sleep"), stdin=stdin))
        client.pause("c1")
        refused(lambda stdin: client.exec("c1", "e", process("true"), stdin=stdin))


def test_an_exec_that_has_ended_is_forgotten(
    engine: Engine, start: Callable[..., standing.Standing]
) -> None:
    """Nobody deletes it: a container with a health check would have a thousand of them after a day."""
    one = start()
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("true"), stdin=f"handover://{one.path}")
        client.start("c1", "e")
        one.let_go()
        assert ended(one.pid) >= 0
        until(lambda: not engine.sandbox.containers["c1"].execs, "the exec is forgotten")
