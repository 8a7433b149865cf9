"""When an agent that does not answer counts as lost."""

from __future__ import annotations

import asyncio
import os

import pytest

from kata.engine.lifecycle import watch
from kata.errors import (
    AgentTimeoutError,
    KataError,
)


class DeafAgent:
    """An agent whose health check never comes back."""

    def __init__(self, answers: list[KataError | None]) -> None:
        self.answers = answers
        self.asked = 0

    async def check(self, timeout_s: float) -> None:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else AgentTimeoutError("silence")
        if answer is not None:
            raise answer


def busy(pid: int) -> watch.CpuTime:
    busy.calls += 1  # type: ignore[attr-defined]
    return watch.CpuTime(busy.calls * 1000, 0, False)  # type: ignore[attr-defined]


busy.calls = 0  # type: ignore[attr-defined]


def test_three_misses_in_a_row_are_a_lost_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "cpu_time", busy)
    miss = AgentTimeoutError("silence")
    agent = DeafAgent([miss, miss, None, miss, miss, miss])
    reason = asyncio.run(watch.watch(agent, 1, 0.0, 0.0))  # type: ignore[arg-type]
    assert "3 health checks" in reason
    assert agent.asked == 6


@pytest.mark.parametrize("why", ["stopped", "starved", "idle"])
def test_a_machine_that_could_not_run_is_not_blamed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "stopped": lambda pid: watch.CpuTime(busy(pid).ran_ns, 0, True),
        "starved": lambda pid: watch.CpuTime(busy(pid).ran_ns, busy(pid).ran_ns * 100, False),
        "idle": lambda pid: watch.CpuTime(5, 0, False),
    }
    monkeypatch.setattr(watch, "cpu_time", times[why])
    agent = DeafAgent([])

    async def work() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.watch(agent, 1, 0.0, 0.0), 0.05)  # type: ignore[arg-type]

    asyncio.run(work())
    assert agent.asked > 3


def test_cpu_time_of_a_real_process() -> None:
    before = watch.cpu_time(os.getpid())
    sum(range(2_000_000))
    after = watch.cpu_time(os.getpid())
    assert after.ran_ns > before.ran_ns
    assert not after.stopped
    assert watch.cpu_time(2**22 + 1).ran_ns == 0
