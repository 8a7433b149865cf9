"""How the guest's clock is kept right, against a clock that is no guest's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import pytest

from kata import sysio
from kata.agent import clock
from kata.engine.lifecycle import guest_clock
from kata.errors import AgentError, AgentTimeoutError, KataError, VMLostError
from kata.proto import agentext_pb

SECOND = 10**9


class Guest:
    """An agent whose clock is some nanoseconds behind, and whose answers take their time."""

    def __init__(self, behind_ns: int, delays_s: tuple[float, ...] = (), *, device: bool = False) -> None:
        self.features = frozenset({clock.FEATURE})
        self.behind_ns = behind_ns
        self.delays_s = list(delays_s)
        self.device = device
        self.added: list[int] = []
        self.given: list[int] = []
        self.failures: list[KataError] = []
        self.asked = 0

    async def clock(self, add_ns: int) -> agentext_pb.ClockResponse:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        if self.device:
            self.behind_ns = 0
        elif add_ns:
            self.added.append(add_ns)
            self.behind_ns -= add_ns
        answer = agentext_pb.ClockResponse(now_ns=time.time_ns() - self.behind_ns, by_device=self.device)
        if self.delays_s:
            await asyncio.sleep(self.delays_s.pop(0))
        return answer

    async def set_time(self, now_ns: int) -> None:
        self.given.append(now_ns)


def align(guest: Guest) -> clock.Reading:
    return asyncio.run(clock.align(guest))  # type: ignore[arg-type]


@pytest.mark.parametrize("behind", [3 * SECOND, -3600 * SECOND, 20_000_000, -20_000_000])
def test_a_clock_that_is_wrong_is_put_right(behind: int) -> None:
    guest = Guest(behind)
    found = align(guest)
    assert abs(found.behind_ns - behind) < 5_000_000
    assert abs(guest.behind_ns) < 5_000_000


def test_the_exchange_that_took_the_shortest_counts() -> None:
    guest = Guest(SECOND, (0.2, 0.0, 0.2, 0.2, 0.2, 0.2))
    assert align(guest).error_ns < 50_000_000
    assert abs(guest.behind_ns) < 50_000_000


def test_what_may_be_the_way_of_the_answer_alone_changes_nothing() -> None:
    guest = Guest(-5_000_000, (0.1,) * 6)
    assert align(guest).error_ns >= 40_000_000
    assert guest.added == []


def test_a_guest_with_the_hosts_clock_is_asked_once_and_told_nothing() -> None:
    guest = Guest(7 * SECOND, device=True)
    found = align(guest)
    assert found.by_device
    assert (guest.asked, guest.added) == (1, [])
    assert abs(found.behind_ns) < 5_000_000


@pytest.mark.parametrize("behind", [2**63, -(2**64), 2**80])
def test_a_hostile_time_is_bounded(behind: int) -> None:
    class Hostile(Guest):
        async def clock(self, add_ns: int) -> agentext_pb.ClockResponse:
            assert -(2**63) < add_ns < 2**63
            return agentext_pb.ClockResponse(now_ns=-behind, by_device=False)

    assert abs(align(Hostile(0)).behind_ns) == 2**63 - 1


def keep(guest: Guest, seconds: float, interval_s: float) -> list[str]:
    """What the log says after that time."""
    said: list[str] = []

    async def work() -> None:
        with sysio.Fd(sysio.clock_change_timer()) as timer:
            keeping = guest_clock.keep(guest, timer, said.append, interval_s)  # type: ignore[arg-type]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(keeping, seconds)

    asyncio.run(work())
    return said


def test_it_is_looked_at_again_and_again_also_after_failures() -> None:
    guest = Guest(90 * SECOND)
    guest.failures = [AgentTimeoutError("silence"), AgentError("not now")]
    said = keep(guest, 0.5, 0.02)
    assert said == ["the guest's clock was 90.0 s behind and has been set"]
    assert guest.asked > 5
    assert abs(guest.behind_ns) < 20_000_000


def test_it_ends_with_the_machine() -> None:
    guest = Guest(0)
    guest.failures = [VMLostError("gone")]
    began = time.monotonic()
    keep(guest, 10, 5)
    assert time.monotonic() - began < 3


def test_a_jump_of_the_hosts_clock_is_noticed_at_once() -> None:
    """The clock of this machine is not set for a test, so an event descriptor stands for the kernel's timer; the real
    one is in tests/kvm/test_clock.py."""
    for features, asked, given in ((frozenset({clock.FEATURE}), 2, 0), (frozenset[str](), 0, 1)):
        guest = Guest(0)
        guest.features = features

        async def work(guest: Guest = guest) -> None:
            with sysio.Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) as timer:
                keeping = asyncio.create_task(guest_clock.keep(guest, timer, print, 60))  # type: ignore[arg-type]
                await asyncio.sleep(0.1)
                os.eventfd_write(timer.raw, 1)
                await asyncio.sleep(0.1)
                keeping.cancel()
                await asyncio.wait([keeping])

        asyncio.run(work())
        assert (guest.asked, len(guest.given)) == (asked, given)


def test_the_kernels_timer_is_quiet_while_nobody_sets_the_clock() -> None:
    async def work() -> bool:
        with sysio.Fd(sysio.clock_change_timer()) as timer:
            host = guest_clock.HostClock(timer)
            try:
                return await host.jumped(0.2)
            finally:
                host.close()
                host.close()

    assert not asyncio.run(work())
