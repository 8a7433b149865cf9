"""Is the agent still there? A guest that hangs is found out, an overloaded host is not blamed on it.

A check counts as missed only if the hypervisor had processor time while it was unanswered: a VM that is
paused, stopped by a signal or starved by other work says nothing because it cannot.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata.errors import AgentTimeoutError, KataError, StarvedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent.client import AgentClient

INTERVAL_S = 10.0
PATIENCE_S = 10.0
MISSES = 3
SLICE_S = 1.0
"""How often it is looked at whether a machine that is waited for gets to run."""
MOST_STARVED = 0.5
"""How much longer a machine is waited for that does not get to run, as a part of the time that it has otherwise."""


class CpuTime:
    """What the kernel says about a process's threads (``/proc/PID/task/*/schedstat``, ``stat``).

    Args:
        ran_ns: Time on a processor.
        waited_ns: Time runnable and not running, the host's load; of a wait that goes on nothing yet.
        stopped: Stopped by a signal or a tracer.
        runnable: A thread is on a processor, or waits for one.
        blocked: A thread waits in the kernel for what no signal ends: the host's disk, or memory from it.
        at_ns: When that was, by CLOCK_MONOTONIC.
    """

    __slots__ = ("at_ns", "blocked", "ran_ns", "runnable", "stopped", "waited_ns")

    def __init__(
        self,
        ran_ns: int,
        waited_ns: int,
        stopped: bool,
        *,
        runnable: bool = False,
        blocked: bool = False,
        at_ns: int = 0,
    ) -> None:
        self.ran_ns = ran_ns
        self.waited_ns = waited_ns
        self.stopped = stopped
        self.runnable = runnable
        self.blocked = blocked
        self.at_ns = at_ns


def cpu_time(pid: int) -> CpuTime:
    """The times of all threads of *pid* together; zeroes when it is gone."""
    ran = waited = 0
    states = set()
    base = f"/proc/{pid}/task"
    try:
        for thread in os.listdir(base):
            with open(f"{base}/{thread}/schedstat", "rb") as file:
                fields = file.read().split()
            ran += int(fields[0])
            waited += int(fields[1])
            with open(f"{base}/{thread}/stat", "rb") as file:
                states.add(file.read().rpartition(b") ")[2][:1])
    except (OSError, IndexError, ValueError):
        pass
    return CpuTime(
        ran,
        waited,
        bool(states & {b"T", b"t"}),
        runnable=b"R" in states,
        blocked=b"D" in states,
        at_ns=time.monotonic_ns(),
    )


def was_starved(before: CpuTime, after: CpuTime) -> bool:
    """Whether the host's load kept the hypervisor from running between the two.

    It did if the hypervisor wanted a processor for half of the time at least, and waited for one longer than it had it.
    One whose guest does nothing waits longer than it runs as well where others are busy, each time that it looks at its
    clock; but it wants little. A wait that goes on is not in the times yet.
    """
    ran, waited = after.ran_ns - before.ran_ns, after.waited_ns - before.waited_ns
    took = after.at_ns - before.at_ns
    if before.runnable and after.runnable and 2 * ran < took:
        return True
    return waited > ran and 2 * (waited + ran) >= took


def counts_as_missed(before: CpuTime, after: CpuTime) -> bool:
    """Whether an unanswered check between the two is the guest's fault.

    It is if the VM ran at all and was not starved: to take the question in costs an idle VM some tens of microseconds.
    """
    if before.stopped or after.stopped:
        return False
    return after.ran_ns > before.ran_ns and not was_starved(before, after)


class Patience:
    """How long a machine is waited for that comes up: time in which the host keeps it from running does not count.

    It is kept from running while it is starved, stopped, or hangs in the kernel. There is a bound to that, too.

    Args:
        pid: The hypervisor's process, which has just been started.
        patience_s: How long it has in seconds of its own.

    Attributes:
        counted_s: How much of that it has had.
        starved_s: How long it was kept from running.
    """

    __slots__ = ("_before", "_pid", "counted_s", "patience_s", "starved_s")

    def __init__(self, pid: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self.counted_s = self.starved_s = 0.0
        self._pid = pid
        # At its start: most machines come up without a look.
        self._before = CpuTime(0, 0, False, at_ns=time.monotonic_ns())

    async def wait(self, *answers: asyncio.Future[Any], what: str = "answer") -> None:
        """Return when one of these is done.

        Args:
            answers: What is waited for.
            what: What the agent has not done if none of them comes.

        Raises:
            StarvedError: None is, and the machine did not have its time.
            AgentTimeoutError: None is, although it had.
        """
        while (left_s := self._left_s) > 0:
            slice_s = min(SLICE_S, left_s)
            done, _ = await asyncio.wait(answers, timeout=slice_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            # However long that took: this process may have been kept from running, too.
            now = cpu_time(self._pid)
            if was_kept_from_running(self._before, now):
                self.starved_s += slice_s
            else:
                self.counted_s += slice_s
            self._before = now
        raise self._too_late(what)

    @property
    def _left_s(self) -> float:
        """How much longer it is waited for, in seconds."""
        in_all = self.patience_s * (1 + MOST_STARVED)
        return min(self.patience_s - self.counted_s, in_all - self.counted_s - self.starved_s)

    def _too_late(self, what: str) -> AgentTimeoutError:
        said = f"the agent did not {what} within {self.counted_s + self.starved_s:.3g} s"
        if self.counted_s >= self.patience_s:
            return AgentTimeoutError(said)
        return StarvedError(
            f"{said}, in {self.starved_s:.3g} of which the host kept its virtual machine from running",
            "the host is overloaded, or the hypervisor was stopped: kata top; KATA_BOOT_TIMEOUT gives guests more time",
        )


def was_kept_from_running(before: CpuTime, after: CpuTime) -> bool:
    """Whether the host is why a machine did nothing between the two: it was starved, stopped, or hung in the kernel."""
    if before.stopped or after.stopped or was_starved(before, after):
        return True
    ran, took = after.ran_ns - before.ran_ns, after.at_ns - before.at_ns
    return before.blocked and after.blocked and 2 * ran < took


async def watch(
    agent: AgentClient,
    pid: int,
    interval_s: float = INTERVAL_S,
    patience_s: float = PATIENCE_S,
) -> str:
    """Check the agent's health for ever.

    Args:
        agent: The connection.
        pid: The hypervisor's process.
        interval_s: Seconds between checks.
        patience_s: Seconds for an answer.

    Returns:
        Why the agent is given up, when it is. Ends without a word of its own if the connection ends: others
        notice.
    """
    missed = 0
    while True:
        await asyncio.sleep(interval_s)
        before = cpu_time(pid)
        try:
            await agent.check(patience_s)
            missed = 0
        except AgentTimeoutError:
            if not counts_as_missed(before, cpu_time(pid)):
                continue
            missed += 1
            if missed >= MISSES:
                return f"the agent in the guest did not answer {MISSES} health checks in a row"
        except KataError:
            await asyncio.Event().wait()
