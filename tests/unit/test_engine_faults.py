"""Guests that lie, hang up or are silent, machines that die, and hosts that cannot write, by a double of the agent."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_double import Engine, engine, fifos, make, process

from kata.engine.containers import records
from kata.engine.lifecycle import guest_setup
from kata.errors import (
    AgentError,
    KataError,
    NotFoundError,
    StateError,
    VMLostError,
)
from kata.hypervisor.base import DiskError

__all__ = ["engine", "make"]


def test_machine_that_dies_ends_everything_as_137_with_its_reason(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("sleep"))
        client.start("c1", "e")
        engine.do(engine.sandbox.machine_double.die)
        assert client.wait("c1") == 137
        assert client.wait("c1", "e") == 137
        assert "killed by signal 9" in client.describe()["error"]
        with pytest.raises(StateError):
            client.exec("c1", "f", process("sleep"))
        with pytest.raises(NotFoundError):
            client.stats("c1")
    assert "killed by signal 9" in engine.state["error"]
    assert engine.state["exit_code"] == 137


@pytest.mark.parametrize("method", ["Check", "CreateSandbox", "CreateContainer", "StartContainer"])
def test_machine_that_dies_during_a_call_fails_the_call(make: Callable[..., Engine], method: str) -> None:
    def prepare(engine: Engine) -> None:
        async def die(called: str) -> None:
            if called == method:
                engine.sandbox.machine_double.die()
                await asyncio.Event().wait()

        engine.double.fault = die

    engine = make(prepare=prepare)
    with engine.client() as client:
        bundle = engine.bundle("sleep")
        if method == "StartContainer":
            client.create("c1", bundle)
        call = client.start if method == "StartContainer" else lambda name: client.create(name, bundle)
        with pytest.raises(VMLostError, match="killed by signal 9"):
            call("c1")
        if method == "StartContainer":
            assert client.wait("c1") == 137


def test_silent_agent_at_boot_is_explained(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_setup, "READY_S", 0.3)
    engine = make(prepare=lambda one: one.double.serving.clear())
    with engine.client() as client, pytest.raises(AgentError) as caught:
        client.create("c1", engine.bundle("sleep"))
    text = caught.value.message
    for part in ("waiting for the agent", "still running", "/k", "/i", "console says hello"):
        assert part in text
    assert caught.value.hint


def test_agent_that_hangs_up_while_its_machine_lives(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.do(engine.sandbox.machine_double.drop)
        assert client.wait("c1") == 137
    assert engine.state["error"]


@pytest.mark.parametrize("lie", ["status", "length"])
def test_lying_agent_ends_the_sandbox(make: Callable[..., Engine], lie: str, tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    pipes = fifos(tmp_path, "stdin")
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=pipes["stdin"])
        client.start("c1")
        if lie == "status":
            engine.do(lambda: engine.double.processes["c1", ""].end(4711))
        else:
            engine.do(lambda: setattr(engine.double, "WriteStdin", engine.double.CloseStdin))
            engine.do(lambda: engine.sandbox.machine_double.drop())
        assert client.wait("c1") == 137
        assert client.describe()["error"]


def test_exit_is_told_though_the_log_cannot_be_written(make: Callable[..., Engine]) -> None:
    engine = make(container={"log": {"path": "/dev/full", "max_bytes": 100, "files": 1}})
    with engine.client() as client:
        client.create("c1", engine.bundle("say", "out", "err"))
        client.start("c1")
        assert client.wait("c1") == 0


def test_exit_is_told_though_the_state_cannot_be_written(
    make: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.do(
            lambda: setattr(engine.sandbox.containers["c1"].record._file, "_path", "/nonexistent/state.json")
        )
        client.kill("c1", 9)
        assert client.wait("c1") == 137


@pytest.mark.parametrize("when", ["create", "start"])
def test_no_container_runs_whose_state_cannot_be_recorded(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with engine.client() as client:
        bundle = engine.bundle("sleep")
        if when == "create":
            monkeypatch.setattr(records, "write_json", full)
            with pytest.raises(KataError, match="cannot be recorded: No space left on device"):
                client.create("c1", bundle)
        else:
            client.create("c1", bundle)
            process = engine.double.processes["c1", ""]  # which the agent forgets with its container
            monkeypatch.setattr(records, "write_json", full)
            with pytest.raises(KataError, match="cannot be recorded: No space left on device") as caught:
                client.start("c1")
            assert "kata rmi" in caught.value.hint
            assert process.signals[0] == 9
    assert ("StartContainer" in engine.double.calls) == (when == "start")


def test_debug_at_run_time_shows_calls_the_monitor_and_the_guest(
    make: Callable[..., Engine], capfd: Any
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        assert " debug: " not in capfd.readouterr().err
        engine.do(lambda: engine.sandbox.tasks.set_level("debug"))
        machine = engine.sandbox.machine_double
        engine.do(lambda: machine.traffic("console", b"Linux \x1b[2J\nhalf"))
        engine.do(lambda: machine.traffic("event", b'{"event": "STOP"}'))
        client.start("c1")
        engine.do(lambda: engine.sandbox.tasks.set_level("info"))
        assert machine.traffic is None
        client.kill("c1", 9)
    said = capfd.readouterr().err
    # Behind the time, which may come behind the end of what another wrote without a line's end.
    debug = [line.partition("Z ")[2] for line in said.splitlines() if " debug: " in line]
    assert r"debug: console: Linux \x1b[2J" in debug
    assert any('says {"event": "STOP"}' in line for line in debug)
    assert sum("the agent answered StartContainer" in line for line in debug) == 1
    assert not any("Kill" in line for line in debug)


def test_an_exit_is_told_once_although_it_cannot_be_recorded(
    make: Callable[..., Engine], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")

        async def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(type(engine.sandbox.containers["c1"].record), "write", broken)
        client.kill("c1", 9)
        assert client.wait("c1") == 137
    assert engine.topics().count("/tasks/exit") == 1
    assert capfd.readouterr().err.count("container.exited") == 1


def test_a_disk_of_the_hosts_that_fails_is_told(make: Callable[..., Engine], capfd: Any) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        fails = engine.sandbox.machine_double.disk_fails
        for _ in range(100):
            engine.do(lambda: fails(DiskError("/rw.img", writes=False, full=False, reason="I/O error")))
        assert client.describe()["disk_error"] == "/rw.img could not be read on the host: I/O error"
        for _ in range(100):
            engine.do(lambda: fails(DiskError("/rw.img", writes=True, full=True, reason="No space left")))
        engine.do(lambda: fails(DiskError("/rw.img", writes=True, full=False, reason="I/O error")))
        told = client.describe()
        assert told["disk_errors"] == 201
        assert told["disk_error"].startswith("the host's disk is full: /rw.img could not be written")
        client.kill("c1", 9)
        assert client.wait("c1") == 137
        assert engine.state["disk_error"] == told["disk_error"]
    assert capfd.readouterr().err.count("/rw.img") == 2


def test_many_waits_and_reads_do_not_delay_a_call(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        threads = [threading.Thread(target=client.wait, args=("c1",)) for _ in range(50)]
        for thread in threads:
            thread.start()
        assert client.state("c1").status == 2
        client.kill("c1", 9)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_engine_errors_have_a_code_and_words(engine: Engine) -> None:
    async def refuse(method: str) -> None:
        if method == "PauseContainer":
            raise KataError("the freezer is broken \x1b[31m")

    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.double.fault = refuse
        with pytest.raises(AgentError, match=r"the freezer is broken \\x1b\[31m"):
            client.pause("c1")
        assert client.state("c1").status == 2
