"""Is the agent still there? A guest that hangs is found out, an overloaded host is not blamed on it.

A check counts as missed only if the hypervisor had processor time while it was unanswered: a VM that is
paused, stopped by a signal or starved by other work says nothing because it cannot.
"""

from __future__ import annotations

import asyncio
import os

from kata.errors import AgentTimeoutError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient

INTERVAL_S = 10.0
PATIENCE_S = 10.0
MISSES = 3


class CpuTime:
    """What the kernel says about a process's threads (``/proc/PID/task/*/schedstat``, ``stat``).

    Args:
        ran_ns: Time on a processor.
        waited_ns: Time runnable and not running: the host's load.
        stopped: Stopped by a signal or a tracer.
    """

    __slots__ = ("ran_ns", "stopped", "waited_ns")

    def __init__(self, ran_ns: int, waited_ns: int, stopped: bool) -> None:
        self.ran_ns = ran_ns
        self.waited_ns = waited_ns
        self.stopped = stopped


def cpu_time(pid: int) -> CpuTime:
    """The times of all threads of *pid* together; zeroes when it is gone."""
    ran = waited = 0
    stopped = False
    base = f"/proc/{pid}/task"
    try:
        for thread in os.listdir(base):
            with open(f"{base}/{thread}/schedstat", "rb") as file:
                fields = file.read().split()
            ran += int(fields[0])
            waited += int(fields[1])
        with open(f"/proc/{pid}/stat", "rb") as file:
            stopped = file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except (OSError, IndexError, ValueError):
        pass
    return CpuTime(ran, waited, stopped)


def was_starved(before: CpuTime, after: CpuTime) -> bool:
    """Whether the hypervisor spent more of the time between the two waiting for a processor than on one."""
    return after.waited_ns - before.waited_ns > after.ran_ns - before.ran_ns


def counts_as_missed(before: CpuTime, after: CpuTime) -> bool:
    """Whether an unanswered check between the two is the guest's fault.

    It is if the VM ran at all and spent less time waiting for a processor than on one: to take the question
    in costs an idle VM some tens of microseconds.
    """
    if before.stopped or after.stopped:
        return False
    return after.ran_ns > before.ran_ns and not was_starved(before, after)


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
