"""Waiting in tests: for how long, and until what."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import TypeVar

from kata import sysio

PATIENCE = float(os.environ.get("KATA_TEST_PATIENCE", "120"))
"""Seconds that anything may take; ``KATA_TEST_PATIENCE`` gives a very slow machine more."""

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    what: str | Callable[[], str],
    more: Callable[[], str] = str,
    patience_s: float = PATIENCE,
    *,
    poll_s: float = 0.05,
) -> T:
    """Return when a condition holds.

    Args:
        condition: Asked again and again.
        what: What is waited for; a function is called when it was in vain.
        more: What else to say then.
        patience_s: How long it may take.
        poll_s: Seconds between two questions.

    Returns:
        What the condition gave.

    Raises:
        AssertionError: It did not hold in time.
    """
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, (
            f"not within {patience_s:g} s: {what if isinstance(what, str) else what()}\n{more()}".rstrip()
        )
        time.sleep(poll_s)
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    start = sysio.proc_starttime(pid)
    return start is not None and sysio.process_alive(pid, start, sysio.boot_id())


def until_gone(pid: int, what: str = "", patience_s: float = PATIENCE) -> None:
    """Return when a process has ended.

    Raises:
        AssertionError: It did not in time; with what `what` says.
    """
    until(lambda: not alive(pid), f"the end of process {pid}. {what}", patience_s=patience_s)


class Reader:
    """What comes out of a descriptor (a terminal, a pipe), looked at word by word.

    Args:
        fd: The descriptor.

    Attributes:
        seen: What was read and not passed yet.
    """

    def __init__(self, fd: int) -> None:
        self.seen = b""
        self._fd = fd

    def until(self, words: bytes, patience_s: float = PATIENCE) -> bytes:
        """Read until *words* have come, and pass them: the next call looks behind them.

        Returns:
            What came before them.

        Raises:
            AssertionError: They did not in time, or all was read before.
        """
        deadline = time.monotonic() + patience_s
        while words not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"not within {patience_s:g} s: {words!r} in {self.seen!r}"
            if select.select([self._fd], [], [], left)[0]:
                try:
                    data = os.read(self._fd, 1 << 16)
                except OSError:
                    data = b""  # a terminal whose other side is closed
                assert data, f"the end instead of {words!r}: {self.seen!r}"
                self.seen += data
        before, _, self.seen = self.seen.partition(words)
        return before
