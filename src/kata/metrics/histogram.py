"""Durations of calls, counted in buckets: cheap enough to be kept for each call of an engine.

The buckets are those of the original: 1, 2, 4 ... 512 milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.metrics.exposition import Text

BUCKETS = 10
MAX_NAMES = 256
"""A client names the methods that it calls; further ones are not told apart."""


class Durations:
    """Histograms of durations, one for each name."""

    __slots__ = ("_by_name",)

    def __init__(self) -> None:
        # By name: the number of calls below 1, 2, 4 ... 512 ms and above; the last item is their sum in ns.
        self._by_name: dict[str, list[int]] = {}

    def add(self, name: str, duration_ns: int) -> None:
        """Count one call.

        Args:
            name: What was called.
            duration_ns: How long it took.
        """
        counts = self._by_name.get(name)
        if counts is None:
            if len(self._by_name) >= MAX_NAMES:
                return
            counts = self._by_name[name] = [0] * (BUCKETS + 2)
        # ceil(log2(ms)): the bucket with le=2^n takes what is above 2^(n-1) ms and at most 2^n ms.
        bucket = ((duration_ns + 999_999) // 1_000_000 - 1).bit_length() if duration_ns > 1_000_000 else 0
        counts[bucket if bucket < BUCKETS else BUCKETS] += 1
        counts[-1] += duration_ns

    def write(self, text: Text, family: str, label: Callable[[str], str | None]) -> None:
        """Write all of them as one family with the label ``action``.

        Args:
            text: Where to.
            family: Its name; the unit is milliseconds.
            label: Gives the label's value for a name, as the format writes it; one for several names adds them up, and
                nothing leaves it out: clients have their own names sent to the agent.
        """
        by_action: dict[str, list[int]] = {}
        for name, counts in self._by_name.items():
            action = label(name)
            if action:
                so_far = by_action.get(action)
                by_action[action] = counts if so_far is None else list(map(int.__add__, so_far, counts))
        lines = text.lines(family)
        for action, counts in by_action.items():
            total = 0
            for index in range(BUCKETS):
                total += counts[index]
                lines.append(f'{family}_bucket{{action="{action}",le="{1 << index}.0"}} {total}')
            total += counts[BUCKETS]
            lines.append(f'{family}_bucket{{action="{action}",le="+Inf"}} {total}')
            lines.append(f'{family}_sum{{action="{action}"}} {counts[-1] / 1e6!r}')
            lines.append(f'{family}_count{{action="{action}"}} {total}')
