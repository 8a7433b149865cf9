"""One run of the command line in a forked child: what it said, how it ended, how long it took and how much memory."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LONGEST_S = 30.0
"""After that a child is ended, and has failed. Most take milliseconds; the machine may be busy."""
LARGEST_MB = 400
"""Memory (peak resident set) of a child; the program and its libraries take some 30."""
_MOST_OUTPUT = 1 << 20


@dataclass
class Outcome:
    """How one child ended.

    Attributes:
        name: What it was given.
        status: Exit status; -n when signal n ended it.
        said: Its standard error, at most 1 MiB.
        seconds: From the fork to its end.
        megabytes: Peak resident set.
    """

    name: str
    status: int
    said: str
    seconds: float
    megabytes: float

    def wrong(self, allowed: Callable[[int], bool]) -> str:
        """Why that is no proper end; empty if it is one."""
        for words in ("Traceback (most recent call last)", "met a fault of its own"):
            if words in self.said:
                return f"{words}: " + self.said.strip().splitlines()[-1]
        if self.status < 0:
            return f"ended by signal {-self.status}"
        if not allowed(self.status):
            return f"exit status {self.status}: {self.said[-200:]!r}"
        if self.status and not self.said:
            return f"exit status {self.status} without a word"
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", self.said.replace("\x1b[1;31m", "")):
            return f"control characters on standard error: {self.said[:200]!r}"
        if self.seconds > LONGEST_S:
            return f"{self.seconds:.0f} s"
        if self.megabytes > LARGEST_MB:
            return f"{self.megabytes:.0f} MB"
        return ""


@dataclass
class Tally:
    """What a part of the sweep has come to.

    Attributes:
        title: Of the part.
        count: Inputs tried.
        slowest: (seconds, input).
        largest: (megabytes, input).
        failures: (input, why).
    """

    title: str
    count: int = 0
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[float, str] = (0.0, "")
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(
        self, outcome: Outcome, allowed: Callable[[int], bool] = lambda status: status in (0, 125)
    ) -> None:
        """Count one, and print it if it is a failure."""
        self.count += 1
        self.slowest = max(self.slowest, (outcome.seconds, outcome.name))
        self.largest = max(self.largest, (outcome.megabytes, outcome.name))
        if why := outcome.wrong(allowed):
            self.failures.append((outcome.name, why))
            print(f"  FAILED {outcome.name}: {why}", flush=True)

    def line(self) -> str:
        """For the table at the end."""
        slowest, largest = (
            f"{value:.1f} {unit} ({name[:40]})"
            for (value, name), unit in ((self.slowest, "s"), (self.largest, "MB"))
        )
        counts = f"{self.count:6} inputs, {len(self.failures)} failed"
        return f"{self.title:<12} {counts}; longest {slowest}; largest {largest}"


def run(name: str, work: Callable[[], int], closed: Sequence[int] = ()) -> Outcome:
    """Fork, do the work there, and see how it ends.

    Args:
        name: Of the input.
        work: Its result is the exit status; an exception is printed as Python would.
        closed: Descriptors that the child begins without.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(work, writing, closed)
    os.close(writing)
    said = bytearray()
    ended_by_us = False
    while True:
        left = started + LONGEST_S - time.monotonic()
        if left <= 0 and not ended_by_us:
            os.kill(pid, signal.SIGKILL)
            ended_by_us = True
        if select.select([reading], [], [], max(left, 1.0))[0]:
            data = os.read(reading, 1 << 16)
            if not data:
                break
            if len(said) < _MOST_OUTPUT:
                said += data
        elif ended_by_us:
            break  # a grandchild holds on to the pipe
    os.close(reading)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    text = said.decode(errors="backslashreplace") + ("; it did not end" if ended_by_us else "")
    return Outcome(name, os.waitstatus_to_exitcode(status), text, seconds, usage.ru_maxrss / 1024)


def _child(work: Callable[[], int], writing: int, closed: Sequence[int]) -> None:
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(writing, 2)
        for fd in closed:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 0xFF)
