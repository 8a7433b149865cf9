"""Having a guest take memory, or give it back: it takes part in that, as its devices ask.

What it does not take within the patience is taken back, so that an error leaves the machine as it was; what it does not
give back it keeps, and is not asked for it any further.
"""

from __future__ import annotations

import asyncio
import time

from kata.errors import HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

MIB = 1 << 20
PATIENCE_S = 20.0
"""How long a guest may take to take memory, without anything moving."""
BEGIN_S = 10.0
LET_GO_S = 3.0
"""How long it may take to begin to give some back, and to give more: what it holds in place it never gives."""
MOST_S = 600.0
"""How long all of it may take, however it goes on."""
_POLL_S = 0.02


def number(answer: Any, *names: str) -> int:
    """A whole number in an answer.

    Args:
        answer: The JSON value.
        names: Where it is in that: names of members, the outermost first.

    Raises:
        HypervisorError: There is none. Who answers may have been taken over.
    """
    found = answer
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, int):
        raise HypervisorError("the hypervisor does not say how much memory its guest has")
    return found


async def settle(
    look: Callable[[], Awaitable[int]], wanted: int, patience_s: float | None = None, *, comes: bool
) -> int:
    """Wait until a size is reached, or comes no nearer; returns the size. The guest says what it is: it may go to and
    fro for ever, or a byte at a time.

    Args:
        look: Returns the present size, in bytes.
        wanted: The size to reach.
        patience_s: Give up after this many seconds in which it has come no nearer; None stands for `PATIENCE_S`.
        comes: True while the guest takes memory. Otherwise it gives memory back, and `LET_GO_S` bounds the wait.
    """
    last = await look()
    first = nearest = abs(wanted - last)
    began = moved = time.monotonic()
    while last != wanted:
        limit_s = PATIENCE_S if patience_s is None else patience_s
        if not comes:
            limit_s = min(limit_s, BEGIN_S if nearest == first else LET_GO_S)
        now = time.monotonic()
        if now - moved >= limit_s or now - began >= MOST_S:
            break
        await asyncio.sleep(_POLL_S)
        last = await look()
        if abs(wanted - last) < nearest:
            nearest, moved = abs(wanted - last), time.monotonic()
    return last


async def plug(
    look: Callable[[], Awaitable[int]],
    request: Callable[[int], Awaitable[object]],
    wanted_mib: int,
    patience_s: float | None = None,
) -> int:
    """Have a guest plug in so much memory, or give up what is plugged in beyond that.

    Args:
        look: Returns how much is plugged in, in bytes.
        request: Asks the guest's device for so many bytes.
        wanted_mib: How much, in MiB.
        patience_s: How long the guest may go without plugging in a block before it is given up (None:
            `PATIENCE_S`).

    Returns:
        MiB that are plugged in now: more than asked for where the guest does not release all of them.

    Raises:
        HypervisorError: The machine cannot grow that far, or the guest does not plug in all of it. Nothing is changed
            then.
    """
    wanted = wanted_mib * MIB
    before = await look()
    try:
        await request(wanted)
    except HypervisorError as error:
        raise HypervisorError(
            f"the virtual machine cannot have {wanted_mib} MiB plugged into it: {error.message}"
        ) from None
    last = await settle(look, wanted, patience_s, comes=wanted > before)
    if last < wanted:
        await request(before)
        raise HypervisorError(
            f"the guest did not take {(wanted - last) // MIB} of {(wanted - before) // MIB} MiB of memory"
        )
    if last > wanted:
        await request(last)
    return last // MIB


async def inflate(
    look: Callable[[], Awaitable[int]],
    request: Callable[[int], Awaitable[object]],
    wanted_mib: int,
    patience_s: float | None = None,
) -> int:
    """Have a guest's balloon hold so much memory, which is the host's again.

    Args:
        look: Returns how much it holds, in bytes.
        request: Asks it to hold so many bytes, a multiple of `MIB`.
        wanted_mib: How much, in MiB.
        patience_s: How long the guest may make no progress in taking memory back before it is given up (None:
            `PATIENCE_S`).

    Returns:
        MiB that it holds: fewer than asked for where the guest cannot spare them.

    Raises:
        HypervisorError: The guest does not take back what it had given; nothing is changed then.
    """
    wanted = wanted_mib * MIB
    before = await look()
    await request(wanted)
    last = await settle(look, wanted, patience_s, comes=wanted < before)
    if last > wanted:
        await request(before)
        raise HypervisorError(
            f"the guest did not take back {(last - wanted) // MIB} MiB of memory that it had given back"
        )
    if last < wanted:
        last -= last % MIB
        await request(last)
    return last // MIB
