"""Processor time as a percentage, which takes two looks."""

from __future__ import annotations


class Overhead:
    """What a sandbox takes on the host beside its containers.

    One object for a sandbox: processor time as a percentage needs two looks. The first one is compared with the start,
    so that it is right at once.

    Args:
        since_s: When the sandbox was started, in seconds since the Epoch.
    """

    __slots__ = ("_at_s", "_cpu_s", "_percent")

    def __init__(self, since_s: float) -> None:
        self._at_s = since_s
        self._cpu_s = 0.0
        self._percent = 0.0

    def cpu_percent(self, at_s: float, cpu_s: float) -> float:
        """Percent of one processor since the last look.

        Args:
            at_s: When the figures were taken.
            cpu_s: Processor time of the sandbox on the host less that of its containers.
        """
        passed = at_s - self._at_s
        if passed >= 0.1:  # two that scrape at the same time see the same
            self._percent = max(0.0, 100.0 * (cpu_s - self._cpu_s) / passed)
            self._at_s, self._cpu_s = at_s, cpu_s
        return self._percent
