"""Processes that are executed in a container, and the streams of all, against a double of the agent."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_double import Engine, drain, engine, fifos, make, process

from kata.engine.standard_streams import streams
from kata.errors import (
    AlreadyExistsError,
    CommandNotFoundError,
    NotFoundError,
    UsageError,
)
from kata.ttrpc.status import UNIMPLEMENTED, TtrpcError

__all__ = ["engine", "make"]


# ---- execs ----


def test_an_exec_by_one_message(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        pipes = fifos(tmp_path, "stdout")
        running = client.run("c1", "e1", process("flood", "300000"), stdout=pipes["stdout"])
        running.started()
        assert client.state("c1", "e1").status in (2, 3)
        assert len(drain(pipes["stdout_fd"])) == 300_000
        assert running.status() == 0
        assert running.over()
        client.begin_delete("c1", "e1")
        with pytest.raises(NotFoundError):  # the server begins with calls in their order
            client.state("c1", "e1")
        failed = client.run("c1", "bad", process("missing"))
        with pytest.raises(CommandNotFoundError):
            failed.started()
        refused = client.run("c1", "c1", process("exit", "0"))
        with pytest.raises(AlreadyExistsError):
            refused.started()
        asleep = client.run("c1", "e2", process("sleep"))
        asleep.started()
        assert not asleep.over()
        client.kill("c1", 9, "e2")
        assert asleep.status() == 137
    with engine.client() as client:  # what was not waited for is not undone with the connection
        client.run("c1", "e3", process("exit", "7"))
    with engine.client() as client:
        assert client.wait("c1", "e3") == 7
        client.begin_delete("c1", "e3")


def test_execs_run_beside_the_init(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        for number in range(20):
            name = f"e{number}"
            pipes = fifos(tmp_path, f"stdout{number}")
            client.exec("c1", name, process("flood", "300000"), stdout=pipes[f"stdout{number}"])
            assert client.state("c1", name).status == 1
            client.start("c1", name)
            data = drain(pipes[f"stdout{number}_fd"])
            assert client.wait("c1", name) == 0
            assert len(data) == 300_000
            assert client.delete("c1", name) == 0
        client.exec("c1", "bad", process("missing"))
        with pytest.raises(CommandNotFoundError):
            client.start("c1", "bad")
        assert client.wait("c1", "bad") == 127
        client.delete("c1", "bad")
        with pytest.raises(AlreadyExistsError):
            client.exec("c1", "c1", process("exit", "0"))
        with pytest.raises(UsageError):
            client.exec("c1", "odd", {"args": 7})
    topics = engine.topics()
    assert topics[:6] == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exec-added",
    ]
    assert "/tasks/delete" not in topics  # as with runc: it is told of tasks, not of execs


def test_the_end_of_the_init_is_told_after_the_ends_of_its_execs(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        for name in ("e1", "e2"):
            client.exec("c1", name, process("sleep"))
            client.start("c1", name)
        client.kill("c1", 9)
        assert client.wait("c1") == 137
        assert client.wait("c1", "e1") == 137
    exits = [event.id for topic, event in engine.events if topic == "/tasks/exit"]
    assert sorted(exits[:2]) == ["e1", "e2"]
    assert exits[2] == "c1"


@pytest.mark.parametrize("ours", [True, False], ids=["our agent", "another agent"])
def test_kill_all_reaches_execs_and_kill_of_one_does_not(make: Callable[..., Engine], ours: bool) -> None:
    engine = make(client={"ends_with_init": False})

    async def unknown(method: str) -> None:
        if method == "Signal":
            raise TtrpcError(UNIMPLEMENTED, "unknown method")

    if not ours:
        engine.double.fault = unknown
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("sleep"))
        client.start("c1", "e")
        client.kill("c1", 10)
        client.kill("c1", 12, everything=True)
        assert engine.double.processes["c1", ""].signals == [10, 12]
        assert engine.double.processes["c1", "e"].signals == [12]
        client.kill("c1", 15, "e")
        assert client.wait("c1", "e") == 143


# ---- streams ----


def test_stdin_reaches_the_process_and_its_end_too(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdin", "stdout")
    data = os.urandom(5_000_000)
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=pipes["stdin"], stdout=pipes["stdout"])
        client.start("c1")
        writer = threading.Thread(target=Path(pipes["stdin"]).write_bytes, args=(data,))
        writer.start()
        assert drain(pipes["stdout_fd"]) == data
        assert client.wait("c1") == 0
        writer.join()


def test_no_stdin_is_an_empty_one(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"))
        client.start("c1")
        assert client.wait("c1") == 0


def test_a_vanished_reader_does_not_hurt(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("flood", "3000000"), stdout=pipes["stdout"])
        os.close(pipes["stdout_fd"])
        client.start("c1")
        assert client.wait("c1") == 0


def test_terminal_has_one_stream_and_a_size(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdin", "stdout")
    with engine.client() as client:
        client.create(
            "c1", engine.bundle("cat"), terminal=True, stdin=pipes["stdin"], stdout=pipes["stdout"]
        )
        assert engine.double.requests["CreateContainer"].OCI.Process.Terminal
        client.start("c1")
        client.resize("c1", 24, 80)
        assert engine.double.processes["c1", ""].size == (24, 80)
        Path(pipes["stdin"]).write_bytes(b"hello")
        assert drain(pipes["stdout_fd"]) == b"hello"
        assert client.wait("c1") == 0
        assert "ReadStderr" not in engine.double.calls


def test_attach_takes_part(engine: Engine, tmp_path: Path) -> None:
    first = fifos(tmp_path, "stdin", "stdout")
    (tmp_path / "second").mkdir()
    second = fifos(tmp_path / "second", "stdin", "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=first["stdin"], stdout=first["stdout"])
        client.start("c1")
        keep = os.open(first["stdin"], os.O_WRONLY)
        client.attach("c1", stdin=second["stdin"], stdout=second["stdout"])
        Path(second["stdin"]).write_bytes(b"from the second")
        os.set_blocking(second["stdout_fd"], True)
        assert os.read(second["stdout_fd"], 100) == b"from the second"
        os.close(keep)
        assert drain(first["stdout_fd"]) == b"from the second"
        assert client.wait("c1") == 0
        os.close(second["stdout_fd"])


def test_a_stuck_reader_does_not_hold_the_exit(
    make: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.3)
    engine = make(client={"ends_with_init": False})
    pipes = fifos(tmp_path, "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("flood", "3000000"), stdout=pipes["stdout"])
        client.start("c1")
        waiter: list[int] = []
        thread = threading.Thread(target=lambda: waiter.append(client.wait("c1")))
        thread.start()
        # The process itself is held up by the full pipe; kill it, and its exit comes although nobody reads.
        with engine.client() as second:
            while engine.sandbox.containers["c1"].init.streams.outputs[0].progress < 1 << 20:  # type: ignore[union-attr]
                pass
            second.kill("c1", 9)
        thread.join(10)
        assert waiter == [137]
        os.close(pipes["stdout_fd"])
