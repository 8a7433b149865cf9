"""The start ledger: by which path a machine started, and where the time went, relative to the moment when the user's
command began. One for each start, always.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kata.engine.lifecycle.booted_machine import BootedMachine


class Timings:
    """Steps, each with its start and duration in nanoseconds of CLOCK_MONOTONIC.

    Args:
        origin_ns: When the client's command began.

    Attributes:
        path: By which the machine started: ``cold`` or ``template``; empty before it is known.
        reason: Why by no faster one, and why its image is not mapped; empty if there is none, or nobody said.
        not_forked: Why the engine was executed although there should be a parent of engines; a part of the reason.
        trace: Is told of each step, with begin and end; None where there is no tracing.
    """

    __slots__ = ("_parts", "_steps", "not_forked", "origin_ns", "path", "reason", "trace")

    def __init__(self, origin_ns: int) -> None:
        self.origin_ns = origin_ns
        self.path = ""
        self.reason = ""
        self.not_forked = ""
        self.trace: Callable[[str, int, int], None] | None = None
        self._steps: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, tuple[int, int, str]] = {}

    def add(self, name: str, start_ns: int, end_ns: int | None = None) -> None:
        """Record a step from *start_ns* to *end_ns* (now, if None). The first of a name stands."""
        end = time.monotonic_ns() if end_ns is None else end_ns
        if self.trace is not None and name not in self._steps:
            self.trace(name, start_ns, end)
        self._steps.setdefault(name, (start_ns, max(0, end - start_ns)))

    def add_part(self, step: str, name: str, start_ns: int, end_ns: int) -> None:
        """Record what a step consists of: shown below it, and no metric of its own. The first of a name stands."""
        self._parts.setdefault(name, (start_ns, max(0, end_ns - start_ns), step))

    def came_by(self, launched_ns: int, entered_ns: int, not_forked: str, *, forked: bool) -> None:
        """Record how this engine came to be: launched by its client, and entered."""
        self.add_part("engine", "client", self.origin_ns, launched_ns)
        self.add_part("engine", "fork" if forked else "interpreter", launched_ns, entered_ns)
        self.not_forked = not_forked

    def took(self, machine: BootedMachine) -> None:
        """Take over what was recorded while the machine was started (`kata.engine.lifecycle.boot`)."""
        self.path = machine.start_path
        self.reason = "; ".join(filter(None, (machine.start_reason, machine.disk_reason, self.not_forked)))
        for name, begin, end in machine.steps:
            if name != "take_boot_slot":  # a step of its own, where it takes any time
                step = "start machine" if begin >= machine.ready_ns > 0 else "engine"
                self.add_part(step, name.replace("_", " "), begin, end)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Name, start relative to the origin, duration; in the order of their starts."""
        ordered = sorted(self._steps.items(), key=lambda item: item[1][0])
        for name, (start, duration) in ordered:
            yield name, start - self.origin_ns, duration

    def whole(self) -> list[tuple[str, int, int, str]]:
        """Steps, and below each its parts with its name as the last, in the order of their starts."""
        found = [(name, start, duration, "") for name, (start, duration) in self._steps.items()]
        found += [(name, start, duration, step) for name, (start, duration, step) in self._parts.items()]
        steps = self._steps
        found.sort(key=lambda one: (steps.get(one[3], one[1:])[0], one[3] or one[0], one[3], one[1]))
        return [(name, start - self.origin_ns, duration, step) for name, start, duration, step in found]

    def in_seconds(self) -> list[dict[str, str | float]]:
        """The steps for a JSON document: ``name``, ``start_seconds``, ``duration_seconds``."""
        return [
            {"name": name, "start_seconds": start / 1e9, "duration_seconds": duration / 1e9}
            for name, start, duration in self
        ]

    def record(self) -> dict[str, Any]:
        """All of it for a JSON document: ``path``, ``reason`` and ``steps``, of which parts have ``part_of``."""
        return {
            "path": self.path,
            "reason": self.reason,
            "steps": [
                {
                    "name": name,
                    "start_seconds": start / 1e9,
                    "duration_seconds": duration / 1e9,
                    **({"part_of": step} if step else {}),
                }
                for name, start, duration, step in self.whole()
            ],
        }
