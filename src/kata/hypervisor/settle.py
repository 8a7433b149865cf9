"""Waiting for a guest that takes memory, or gives it back."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PATIENCE_S = 20.0
"""How long a guest may take to take memory, without anything moving."""
BEGIN_S = 10.0
LET_GO_S = 3.0
"""How long it may take to begin to give some back, and to give more: what it holds in place it never gives."""
_POLL_S = 0.02


async def settle(
    look: Callable[[], Awaitable[int]], wanted: int, patience_s: float = PATIENCE_S, *, comes: bool
) -> int:
    """Wait until a size is reached, or no longer changes; returns the size.

    Args:
        look: Returns the present size, in bytes.
        wanted: The size to reach.
        patience_s: Give up after this many seconds without a change.
        comes: True while the guest takes memory. Otherwise it gives memory back, and `LET_GO_S` bounds the wait.
    """
    first = last = await look()
    quiet_s = 0.0
    while last != wanted:
        limit_s = patience_s
        if not comes:
            limit_s = min(limit_s, BEGIN_S if last == first else LET_GO_S)
        if quiet_s >= limit_s:
            break
        await asyncio.sleep(_POLL_S)
        now = await look()
        quiet_s = 0.0 if now != last else quiet_s + _POLL_S
        last = now
    return last
