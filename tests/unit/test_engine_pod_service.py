"""containerd's Sandbox API, of a sandbox in each of its states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.containers.process import KILLED
from kata.engine.lifecycle import pod
from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.engine.services.pod_service import PodService
from kata.errors import NotFoundError, StateError, VMLostError
from kata.proto import podsandbox_pb as pb
from kata.proto.codec import Message

CONTEXT: Any = None


class Pod:
    """A sandbox without a machine, and the service in front of it."""

    def __init__(self) -> None:
        self.id = "p1"
        self.life = Lifecycle("p1")
        self.ended = self.life.ended
        self.settings: Any = SimpleNamespace(id="p1")
        self.steps: list[str] = []
        self.runtime = SimpleNamespace(
            host_pid=42,
            machine=SimpleNamespace(cgroup=SimpleNamespace(usage=lambda: (5_000_000_000, 1 << 20))),
            ready=self._ready,
            stop=self._stop,
            wait_terminated=self._wait_terminated,
            is_lost=False,
        )
        service: Any = self
        self.service = PodService(service)

    def go(self, *states: SandboxState, reason: VMLostError | None = None) -> None:
        for state in states:
            self.life.enter(state, reason)
        self.runtime.is_lost = self.life.is_lost

    def power_on(self) -> None:
        self.steps.append("power on")
        self.go(SandboxState.BOOTING)

    def end(self) -> None:
        self.steps.append("end")
        self.go(SandboxState.ENDING, SandboxState.ENDED)

    async def network_up(self) -> None:
        self.steps.append("network")

    async def _ready(self) -> None:
        self.steps.append("ready")

    async def _stop(self) -> None:
        self.steps.append("stop")
        self.go(SandboxState.STOPPED, reason=VMLostError("was stopped"))

    async def _wait_terminated(self) -> None:
        await asyncio.shield(self.life.exit_reason)


def on(work: Callable[[Pod], Awaitable[None]]) -> None:
    async def run() -> None:
        await work(Pod())

    asyncio.run(run())


READ = {
    "StartSandbox": pb.StartSandboxRequest,
    "WaitSandbox": pb.WaitSandboxRequest,
    "PingSandbox": pb.PingRequest,
    "SandboxMetrics": pb.SandboxMetricsRequest,
}
REQUESTS: dict[str, type[Message]] = {
    **READ,
    "CreateSandbox": pb.CreateSandboxRequest,
    "Platform": pb.PlatformRequest,
    "StopSandbox": pb.StopSandboxRequest,
    "SandboxStatus": pb.SandboxStatusRequest,
    "ShutdownSandbox": pb.ShutdownSandboxRequest,
}


@pytest.mark.parametrize("method", REQUESTS)
def test_another_sandboxs_calls_are_refused(method: str) -> None:
    async def work(made: Pod) -> None:
        made.go(SandboxState.BOOTING, SandboxState.READY)
        with pytest.raises(NotFoundError, match="'other' is not served here, but 'p1'"):
            await getattr(made.service, method)(REQUESTS[method](sandbox_id="other"), CONTEXT)
        assert made.steps == []

    on(work)


@pytest.mark.parametrize("method", READ)
def test_before_its_creation_there_is_nothing_to_ask(method: str) -> None:
    async def work(made: Pod) -> None:
        with pytest.raises(StateError, match="'p1' has not been created"):
            await getattr(made.service, method)(REQUESTS[method](sandbox_id="p1"), CONTEXT)

    on(work)


def test_a_pods_life(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[Any] = []
    monkeypatch.setattr(pod, "describe", lambda settings, request: described.append((settings, request)))

    async def work(made: Pod) -> None:
        service = made.service
        status = await service.SandboxStatus(pb.SandboxStatusRequest(sandbox_id="p1"), CONTEXT)
        assert (status.state, status.created_at) == ("SANDBOX_NOTREADY", None)
        asked = pb.CreateSandboxRequest(sandbox_id="p1")
        await service.CreateSandbox(asked, CONTEXT)
        assert described == [(made.settings, asked)]
        with pytest.raises(StateError, match="created already"):
            await service.CreateSandbox(asked, CONTEXT)
        assert len(described) == 1
        started = await service.StartSandbox(pb.StartSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert (started.pid, made.steps) == (42, ["power on", "ready", "network"])
        assert started.created_at is not None
        assert started.created_at.seconds == made.life.created_ns // 10**9
        made.go(SandboxState.READY)
        await service.PingSandbox(pb.PingRequest(sandbox_id="p1"), CONTEXT)
        status = await service.SandboxStatus(pb.SandboxStatusRequest(sandbox_id="p1"), CONTEXT)
        assert (status.state, status.pid, status.info) == ("SANDBOX_READY", 42, {})
        metrics = await service.SandboxMetrics(pb.SandboxMetricsRequest(sandbox_id="p1"), CONTEXT)
        assert metrics.metrics is not None
        assert metrics.metrics.data is not None
        assert metrics.metrics.id == "p1"
        waiting = asyncio.ensure_future(service.WaitSandbox(pb.WaitSandboxRequest(sandbox_id="p1"), CONTEXT))
        await asyncio.sleep(0)
        assert not waiting.done()
        for _ in range(2):  # as often as one likes
            await service.StopSandbox(pb.StopSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert made.steps[3:] == ["stop"]
        ended = await waiting
        assert ended.exit_status == 0
        assert ended.exited_at is not None
        status = await service.SandboxStatus(pb.SandboxStatusRequest(sandbox_id="p1"), CONTEXT)
        assert (status.state, bool(status.exited_at)) == ("SANDBOX_NOTREADY", True)
        await service.ShutdownSandbox(pb.ShutdownSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert made.steps[4:] == ["end"]

    on(work)


def test_a_machine_that_died_is_an_end_of_137_with_its_reason() -> None:
    async def work(made: Pod) -> None:
        made.go(SandboxState.BOOTING, SandboxState.READY)
        made.go(SandboxState.FAILED, reason=VMLostError("the virtual machine crashed"))
        ended = await made.service.WaitSandbox(pb.WaitSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert ended.exit_status == KILLED
        with pytest.raises(StateError, match="has ended: the virtual machine crashed"):
            await made.service.PingSandbox(pb.PingRequest(sandbox_id="p1"), CONTEXT)
        with pytest.raises(NotFoundError, match="no statistics"):
            await made.service.SandboxMetrics(pb.SandboxMetricsRequest(sandbox_id="p1"), CONTEXT)
        await made.service.StopSandbox(pb.StopSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert made.steps == [], "there is nothing to stop"

    on(work)


def test_the_platform_is_the_guests() -> None:
    async def work(made: Pod) -> None:
        answer = await made.service.Platform(pb.PlatformRequest(sandbox_id="p1"), CONTEXT)
        assert answer.platform is not None
        assert (answer.platform.os, answer.platform.architecture) in [("linux", "amd64"), ("linux", "arm64")]

    on(work)


def test_a_pod_that_was_never_created_can_be_stopped_and_ended() -> None:
    async def work(made: Pod) -> None:
        await made.service.StopSandbox(pb.StopSandboxRequest(sandbox_id="p1"), CONTEXT)
        made.end = lambda: made.go(SandboxState.ENDING, SandboxState.ENDED)  # type: ignore[method-assign]
        await made.service.ShutdownSandbox(pb.ShutdownSandboxRequest(sandbox_id="p1"), CONTEXT)
        assert made.steps == []

    on(work)


def test_what_the_verbose_status_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async def describe(_sandbox: Any) -> dict[str, Any]:
        return {"kernel": "6.12"}

    monkeypatch.setattr("kata.engine.services.pod_service.describe", describe)

    async def work(made: Pod) -> None:
        made.go(SandboxState.BOOTING)
        asked = pb.SandboxStatusRequest(sandbox_id="p1", verbose=True)
        status = await made.service.SandboxStatus(asked, CONTEXT)
        assert json.loads(status.info["info"]) == {"kernel": "6.12"}

    on(work)
