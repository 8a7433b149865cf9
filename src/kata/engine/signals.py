"""Signals of an engine, in its event loop."""

from __future__ import annotations

import asyncio
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def call_on_signals(numbers: tuple[int, ...], call: Callable[[int], None]) -> None:
    """Have the running event loop call something at each of some signals.

    Not by the loop's `add_signal_handler`: to see whether it was given a coroutine function it loads `inspect` (see
    `kata.deferred`).

    Args:
        numbers: The signals.
        call: Gets the number of the one that came.
    """
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def arrived() -> None:
        for number in os.read(reading, 64):
            if number in numbers:
                call(number)

    asyncio.get_running_loop().add_reader(reading, arrived)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # a handler, so that the number is written to the pipe
