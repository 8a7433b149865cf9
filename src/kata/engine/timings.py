"""Where the time of a start went: named steps relative to the moment the user's command began."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timings:
    """Steps, each with its start and duration in nanoseconds of CLOCK_MONOTONIC.

    Args:
        origin_ns: When the client's command began.

    Attributes:
        trace: Is told of each step, with begin and end; None where there is no tracing.
    """

    __slots__ = ("_steps", "origin_ns", "trace")

    def __init__(self, origin_ns: int) -> None:
        self.origin_ns = origin_ns
        self.trace: Callable[[str, int, int], None] | None = None
        self._steps: dict[str, tuple[int, int]] = {}

    def add(self, name: str, start_ns: int, end_ns: int | None = None) -> None:
        """Record a step from *start_ns* to *end_ns* (now, if None). The first of a name stands."""
        end = time.monotonic_ns() if end_ns is None else end_ns
        if self.trace is not None and name not in self._steps:
            self.trace(name, start_ns, end)
        self._steps.setdefault(name, (start_ns, max(0, end - start_ns)))

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Name, start relative to the origin, duration; in the order of their starts."""
        ordered = sorted(self._steps.items(), key=lambda item: item[1][0])
        for name, (start, duration) in ordered:
            yield name, start - self.origin_ns, duration

    def in_seconds(self) -> list[dict[str, str | float]]:
        """All of them for a JSON document: ``name``, ``start_seconds``, ``duration_seconds``."""
        return [
            {"name": name, "start_seconds": start / 1e9, "duration_seconds": duration / 1e9}
            for name, start, duration in self
        ]
