"""When an agent that does not answer counts as lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from kata.engine.lifecycle import watch
from kata.errors import AgentTimeoutError, KataError, StarvedError


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


SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"
IDLE = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); "
HANG = (
    "import os, sys; opens = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], 0, 0);"
    " os.posix_spawn('/bin/true', ['true'], {}, file_actions=[opens])"
)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of a test, which stand for a hypervisor and the host's other work."""
    monkeypatch.setattr(watch, "SLICE_S", 0.1)
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.communicate()


def python(programs: list[subprocess.Popen[bytes]], *words: str) -> int:
    """Start an interpreter; the pid."""
    programs.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", *words], stdout=subprocess.PIPE))
    return programs[-1].pid


def outlasts(pid: int, patience_s: float, answers_after_s: float = 60.0) -> watch.Patience:
    """Wait for an answer of a process: how that was. Raises what `Patience.wait` does."""

    async def work() -> watch.Patience:
        answer = asyncio.ensure_future(asyncio.sleep(answers_after_s))
        one = watch.Patience(pid, patience_s)
        try:
            await one.wait(answer)
        finally:
            answer.cancel()
        return one

    return asyncio.run(work())


def test_who_gets_no_processor_is_waited_for_longer_and_not_blamed(
    programs: list[subprocess.Popen[bytes]],
) -> None:
    processor = str(min(os.sched_getaffinity(0)))
    for words in (SPIN, IDLE + SPIN):
        python(programs, words, processor)
        assert programs[-1].stdout is not None
        programs[-1].stdout.readline()
    starved = programs[1]
    began = time.monotonic()
    with pytest.raises(StarvedError, match="kept its virtual machine from running") as caught:
        outlasts(starved.pid, 2.0)
    assert time.monotonic() - began >= 3.0
    assert caught.value.hint
    one = outlasts(starved.pid, 2.0, answers_after_s=0.5)
    assert one.starved_s > one.counted_s


def test_who_is_stopped_or_hangs_in_the_kernel_is_not_blamed(
    programs: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    sleeping = python(programs, "import time; time.sleep(600)")
    os.kill(sleeping, signal.SIGSTOP)
    with pytest.raises(StarvedError):
        outlasts(sleeping, 0.6)
    os.kill(sleeping, signal.SIGCONT)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    hanging = python(programs, HANG, str(fifo))  # until its child has opened it (vfork(2))
    until(lambda: watch.cpu_time(hanging).blocked, "a process that hangs")
    with pytest.raises(StarvedError):
        outlasts(hanging, 0.6)
    os.close(os.open(fifo, os.O_WRONLY))
    # A guest that waits for what never comes does nothing, and nobody keeps it from that.
    with pytest.raises(AgentTimeoutError) as blamed:
        outlasts(sleeping, 0.6)
    assert not isinstance(blamed.value, StarvedError)


def test_an_answer_in_time_costs_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(watch, "cpu_time")
    one = outlasts(2**22 + 1, 60.0, answers_after_s=0.0)
    assert (one.counted_s, one.starved_s) == (0.0, 0.0)
