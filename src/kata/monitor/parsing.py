"""Work on answers, one at a time in a thread, the small ones first: so a huge answer delays no ordinary one."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from concurrent.futures import ThreadPoolExecutor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


class SmallFirst:
    """A thread, and who waits for it.

    One thread, since parsing holds the interpreter anyway, and this bounds what it holds in memory.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "parser")
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._busy = False

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Do some work when everything smaller that waits has been done.

        Args:
            size: How much it is.
            work: A function, which may raise.
            arguments: Its arguments.

        Returns:
            What the function does.
        """
        loop = asyncio.get_running_loop()
        if self._busy:
            turn: asyncio.Future[None] = loop.create_future()
            heapq.heappush(self._waiting, (size, next(self._numbers), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # it was handed over, and is handed on
                    self._hand_over()
                raise
        self._busy = True
        running = loop.run_in_executor(self._thread, work, *arguments)
        # Whoever gives up waiting does not end the thread's work: the turn lasts as long as that.
        running.add_done_callback(self._finished)
        return await asyncio.shield(running)

    def _finished(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # or asyncio would complain of one that nobody waits for any more
        self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False
