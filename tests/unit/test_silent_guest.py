"""A guest that answers nothing, too little, or late: what it can hold up, and what not.

The table is in docs/reference.md.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_double import Engine, make, process

from kata.agent import client as agent_client
from kata.agent.client import AgentClient
from kata.cli import session
from kata.engine.client import EngineClient
from kata.engine.containers import container_kill, container_parts
from kata.engine.lifecycle import watch
from kata.engine.services import sandbox_service, task_service
from kata.errors import AgentError, AgentTimeoutError, KataError, VMLostError
from kata.proto import agent_pb
from kata.shim import start

__all__ = ["make"]
KILL, TERM = signal.SIGKILL, signal.SIGTERM
SHORT_S = 0.3
_silenced: list[tuple[Engine, asyncio.Event]] = []


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less patience than in earnest."""
    assert container_kill.KILL_S <= 4
    for module, name in (
        (container_kill, "KILL_S"),
        (container_kill, "REAP_S"),
        (task_service, "KILL_S"),
        (agent_client, "ASK_S"),
        (sandbox_service, "ASK_S"),
        (sandbox_service, "_DETAILS_S"),
    ):
        monkeypatch.setattr(module, name, SHORT_S)


def silence(engine: Engine, *methods: str) -> asyncio.Event:
    """Have the agent take these calls (none named: all but Health) and not answer them until the event is set."""
    awake: asyncio.Event = engine.do(asyncio.Event)

    async def nothing(method: str) -> None:
        if method in methods or (not methods and method != "Check"):
            await awake.wait()

    engine.double.fault = nothing
    _silenced.append((engine, awake))
    return awake


@pytest.fixture
def build(make: Callable[..., Engine]) -> Iterator[Callable[..., Engine]]:
    """`make`; whoever was silenced answers at the end, which would else take its time."""
    yield make
    while _silenced:
        engine, awake = _silenced.pop()
        engine.do(awake.set)


def started(engine: Engine, client: EngineClient, name: str = "c1") -> None:
    client.create(name, engine.bundle("sleep"))
    client.start(name)


@pytest.mark.parametrize("human", [True, False])
def test_sigkill_ends_a_container_whatever_its_guest_does(build: Callable[..., Engine], human: bool) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S, "late_signals_fail": human})
    with engine.client() as client, engine.client() as other:
        started(engine, client)
        client.exec("c1", "e", process("sleep"))
        client.start("c1", "e")
        silence(engine)
        began = time.monotonic()
        client.kill("c1", KILL)
        assert client.wait("c1") == 137
        assert other.wait("c1", "e") == 137
        assert SHORT_S <= time.monotonic() - began < 3
        assert "its guest did not answer" in client.describe()["error"]
        client.delete("c1")
        assert time.monotonic() - began < 3
    assert engine.state["exit_code"] == 137
    assert "its virtual machine was ended" in engine.state["error"]


@pytest.mark.parametrize("answer", ["yes", "no such process", "refused"])
def test_sigkill_ends_what_the_guest_only_says_to_have_ended(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})

    async def lie(self: Any, request: Any, context: Any) -> Any:
        from kata.proto import google_pb
        from kata.ttrpc.status import NOT_FOUND, TtrpcError

        if answer == "yes":
            return google_pb.Empty()
        raise TtrpcError(NOT_FOUND if answer == "no such process" else 7, "it says")

    with engine.client() as client:
        started(engine, client)
        monkeypatch.setattr(type(engine.double), "SignalProcess", lie)
        try:
            client.kill("c1", KILL)
        except KataError:
            assert answer != "yes"
        assert client.wait("c1", timeout=3) == 137
        assert "its guest did not end it" in client.describe()["error"]


def reaps_late(engine: Engine, seconds: float) -> None:
    """Have the guest take SIGKILL at once, and tell of the end later."""
    doomed = engine.double.processes["c1", ""]
    kill = doomed.signal

    def later(number: int) -> None:
        engine.loop.call_later(seconds, kill, number)

    doomed.signal = later  # type: ignore[method-assign]


@pytest.mark.parametrize("load", ["none", "starved"])
def test_a_guest_that_is_at_it_may_take_longer_to_end_a_killed_container(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    """It answers and frees a large process; or the host leaves its hypervisor no processor time meanwhile."""
    if load == "none":
        monkeypatch.setattr(container_kill, "REAP_S", 20 * SHORT_S)
    else:
        ticks = iter(range(1_000_000))
        monkeypatch.setattr(watch, "cpu_time", lambda pid: watch.CpuTime(0, next(ticks), False))
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        reaps_late(engine, 4 * SHORT_S)
        client.kill("c1", KILL)
        assert client.wait("c1", timeout=10) == 137
        assert client.describe()["error"] == ""


def test_an_overloaded_host_does_not_put_an_end_off_for_ever(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(watch, "cpu_time", lambda pid: watch.CpuTime(0, next(ticks), False))
    monkeypatch.setattr(container_kill, "STARVED_S", 4 * SHORT_S)
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        reaps_late(engine, 60)
        began = time.monotonic()
        client.kill("c1", KILL)
        assert client.wait("c1", timeout=10) == 137
        assert time.monotonic() - began >= 4 * SHORT_S
        assert "its guest did not end it" in client.describe()["error"]


def test_a_pod_is_not_ended_for_one_container_that_is_stuck(build: Callable[..., Engine]) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        started(engine, client, "c2")
        doomed = engine.double.processes["c2", ""]
        doomed.signal = lambda number: doomed.signals.append(number)  # type: ignore[method-assign]
        client.kill("c2", KILL)
        time.sleep(3 * SHORT_S)
        assert client.state("c1").status == client.state("c2").status == 2
        # But a guest that does not even take the signal is of no use to anybody.
        silence(engine)
        client.kill("c2", KILL)
        assert client.wait("c1") == client.wait("c2") == 137


def test_a_late_guest_is_not_ended_for_a_plain_signal(build: Callable[..., Engine]) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        awake = silence(engine)
        with pytest.raises(AgentError, match="has not taken signal 15") as caught:
            client.kill("c1", TERM)
        assert caught.value.grpc_code == AgentTimeoutError.grpc_code
        assert "rm -f" in caught.value.hint
        with pytest.raises(AgentError, match="has not taken signal 10"):
            client.kill("c1", 10, everything=True)
        # containerd's clients would not go on to wait for the end that they have asked for.
        engine.do(lambda: setattr(engine.sandbox.client, "late_signals_fail", False))
        client.kill("c1", 12)
        assert client.state("c1").status == 2
        engine.do(awake.set)
        assert client.wait("c1", timeout=3) == 143
        assert set(engine.double.processes["c1", ""].signals) >= {TERM, 12}


def test_an_unstarted_container_can_be_deleted(build: Callable[..., Engine]) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        silence(engine)
        assert client.delete("c1") == 137


def test_shutdown_does_not_wait_for_the_guest(build: Callable[..., Engine]) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        silence(engine)
        began = time.monotonic()
        client.shutdown("c1", now=True)
        assert time.monotonic() - began < 3


def test_what_needs_no_guest_is_answered_without_it(build: Callable[..., Engine], tmp_path: Path) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client:
        started(engine, client)
        silence(engine)
        began = time.monotonic()
        assert client.state("c1").status == 2
        assert client.pids("c1")
        assert client.connect("c1").task_pid
        client.close_stdin("c1")
        client.exec("c1", "e", process("sleep"))  # its start is what asks
        client.attach("c1")
        assert time.monotonic() - began < SHORT_S
        found = client.describe()
        assert found["containers"]["c1"]["state"] == "running"
        assert "did not answer" in found["agent"]["error"]
        with pytest.raises(AgentError, match="did not answer"):
            client.stats("c1")
        with pytest.raises(AgentError, match="did not answer"):
            client.processes("c1")


def test_calls_that_wait_for_the_guest_end_with_its_machine(build: Callable[..., Engine]) -> None:
    engine = build(client={"ends_with_init": False, "signal_s": SHORT_S})
    with engine.client() as client, ThreadPoolExecutor(8) as threads:
        started(engine, client)
        client.exec("c1", "e", process("sleep"))
        silence(engine)
        calls: list[Future[Any]] = [
            threads.submit(client.start, "c1", "e"),
            threads.submit(client.pause, "c1"),
            threads.submit(client.update, "c1", {"pids": {"limit": 5}}),
        ]
        time.sleep(0.1)
        client.kill("c1", KILL)
        for call in calls:
            with pytest.raises(VMLostError, match="its virtual machine was ended"):
                call.result(5)


def test_how_long_each_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waited: dict[str, float | None] = {}

    async def call(
        self: Any, service: str, method: str, request: Any, answer: Any, timeout_s: Any = 60.0
    ) -> Any:
        waited[method] = timeout_s
        raise AgentTimeoutError("never")

    monkeypatch.setattr(AgentClient, "call", call)
    agent = object.__new__(AgentClient)
    resources = agent_pb.UpdateContainerRequest().resources
    asked = {
        "StartContainer": (agent.start_container("c"), 60),
        "ExecProcess": (agent.exec_process("c", "e", agent_pb.ExecProcessRequest().process), 60),  # type: ignore[arg-type]
        "CreateContainer": (agent.create_container(agent_pb.CreateContainerRequest()), 120),
        "RemoveContainer": (agent.remove_container("c", container_parts.REMOVE_S), 25),
        "PauseContainer": (agent.pause("c"), 60),
        "ResumeContainer": (agent.resume("c"), 60),
        "UpdateContainer": (agent.update("c", resources), 60),  # type: ignore[arg-type]
        "StatsContainer": (agent.stats("c"), 15),
        "TtyWinResize": (agent.resize("c", "c", 1, 1), 15),
        "CloseStdin": (agent.close_stdin("c", "c"), 60),
        "WaitProcess": (agent.wait("c", "c"), None),
        "ReadStdout": (agent.read("c", "c", "stdout", 1), None),
    }

    async def ask() -> None:
        for work, _ in asked.values():
            with pytest.raises(AgentTimeoutError):
                await work

    asyncio.run(ask())
    assert waited == {method: seconds for method, (_, seconds) in asked.items()}
    assert (container_kill.KILL_S, container_kill.REAP_S, container_kill.STARVED_S) == (4, 8, 30)
    policies = session.client_policy(), start.client_policy("default", "/bundle")
    assert [(policy.signal_s, policy.late_signals_fail) for policy in policies] == [(10, True), (2, False)]
