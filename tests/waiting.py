"""Waiting in tests: for how long, and until what."""

from __future__ import annotations

import os
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
