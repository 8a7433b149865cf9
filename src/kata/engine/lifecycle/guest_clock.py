"""Keeps the guest's clock right for as long as its machine runs.

It is looked at from time to time, since no two clocks run equally fast, and at once when the host's clock was set or
the host has slept: the kernel tells (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET), so nobody has to poll for that.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata.agent import clock
from kata.errors import AgentError, AgentTimeoutError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.agent.client import AgentClient
    from kata.sysio import Fd

INTERVAL_S = 30.0
"""Seconds between two looks. Crystals differ by less than 100 millionths: 3 ms in that time."""
TOLD_NS = 1_000_000_000
"""What is told in the log: a clock that was off by this much has shown wrong times to somebody."""


class HostClock:
    """Knows when the host's clock has jumped. Make it inside the event loop, and close it.

    Args:
        timer: From `kata.sysio.clock_change_timer`; it stays the caller's.
    """

    def __init__(self, timer: Fd) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = timer.raw
        self._jumped = asyncio.Event()
        self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        except OSError:  # ECANCELED: that is how it tells
            pass
        self._jumped.set()

    async def jumped(self, timeout_s: float) -> bool:
        """Wait for the next jump, at most so long. Returns whether there was one."""
        try:
            await asyncio.wait_for(self._jumped.wait(), timeout_s)
        except TimeoutError:
            return False
        self._jumped.clear()
        return True

    def close(self) -> None:
        """Watch the timer no longer. Idempotent."""
        self._loop.remove_reader(self._fd)


async def keep(
    agent: AgentClient, timer: Fd, log: Callable[[str], None], interval_s: float = INTERVAL_S
) -> None:
    """Keep the guest's clock right until the agent is gone.

    An agent that cannot be asked for its time (the original's) is given the host's when that has jumped.

    Args:
        agent: The agent; `AgentClient.negotiate_features` was called.
        timer: See `HostClock`.
        log: Is given a sentence when the clock was visibly wrong.
        interval_s: Seconds between two looks.
    """
    host = HostClock(timer)
    try:
        jumped = False
        while True:
            try:
                if clock.FEATURE in agent.features:
                    found = await clock.align(agent)
                    if abs(found.behind_ns) >= TOLD_NS:
                        way = "behind" if found.behind_ns > 0 else "ahead"
                        log(
                            f"the guest's clock was {abs(found.behind_ns) / 1e9:.1f} s {way} and has been set"
                        )
                elif jumped:
                    await agent.set_time(time.time_ns())
            except (AgentError, AgentTimeoutError):
                pass  # the next time
            except KataError:
                return
            jumped = await host.jumped(interval_s)
    finally:
        host.close()
