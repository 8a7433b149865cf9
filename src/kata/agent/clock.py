"""The guest's clock beside the host's: how far it is off, and how it is put right.

A guest under KVM has the host's clock as a device (``ptp_kvm``), and its agent takes the time from there whenever it is
asked. Any other guest is told: it is asked for its time, the answer's place between question and arrival is not known,
so half of the time that the exchange took is how wrong the result can be (as in NTP, RFC 5905).

Whoever stops a machine's processors (`kata.hypervisor.protocols.Machine.pause`) calls `align` when they run again: the
guest's clock may have stood still.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient

FEATURE = "kata.clock"
"""The agent's feature, without which the clock can only be set (`AgentClient.set_time`)."""
_EXCHANGES = 5
_QUICK_NS = 2_000_000
"""An exchange that took no longer than this is good enough."""
_MOST_NS = (1 << 63) - 1


class Reading:
    """A look at the guest's clock.

    Args:
        behind_ns: Nanoseconds by which it is behind the host's; negative when it is ahead.
        error_ns: By how much that can be wrong.
        by_device: The guest has compared its clock with the host's by itself, before it was read.
    """

    __slots__ = ("behind_ns", "by_device", "error_ns")

    def __init__(self, behind_ns: int, error_ns: int, by_device: bool) -> None:
        self.behind_ns = behind_ns
        self.error_ns = error_ns
        self.by_device = by_device


async def look(agent: AgentClient, add_ns: int = 0) -> Reading:
    """Read the guest's clock once. A guest with a device has put it right before.

    Args:
        agent: One with `FEATURE`.
        add_ns: What a guest without a device adds to its clock first.

    Raises:
        KataError: The agent refuses, does not answer, or is gone.
    """
    before, began = time.time_ns(), time.monotonic_ns()
    answer = await agent.clock(add_ns)
    half = (time.monotonic_ns() - began) // 2
    behind = before + half - answer.now_ns
    return Reading(max(-_MOST_NS, min(behind, _MOST_NS)), half, answer.by_device)


async def align(agent: AgentClient) -> Reading:
    """Put the guest's clock right.

    Args:
        agent: One with `FEATURE`.

    Returns:
        How far it was off before, as well as that could be found out; of a guest with a device, how far it is off now.

    Raises:
        KataError: The agent refuses, does not answer, or is gone.
    """
    best = await look(agent)
    for _ in range(_EXCHANGES - 1):
        if best.by_device or best.error_ns * 2 <= _QUICK_NS:
            break
        again = await look(agent)
        if again.error_ns < best.error_ns:
            best = again
    if not best.by_device and abs(best.behind_ns) > best.error_ns:
        await agent.clock(best.behind_ns)
    return best
