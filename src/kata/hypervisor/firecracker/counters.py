"""What a Firecracker has counted: lines of JSON, each with what was added since the one before.

It writes one when it is asked to, and every minute. Source: Firecracker's docs/metrics.md, and
src/vmm/src/logger/metrics.rs for which are sums and which the last value.
"""

from __future__ import annotations

import json

_LAST_VALUES = frozenset({"latencies_us", "api_server"})
"""Groups whose values are the latest, and no sums."""
_MAX_LINE = 256 << 10
_MAX_GROUPS = 64
_MAX_ITEMS = 128


class Counters:
    """Adds up what comes."""

    __slots__ = ("_groups", "_rest")

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, int]] = {}
        self._rest = b""

    def feed(self, data: bytes) -> bool:
        """Take bytes in. Returns whether they were the end of a line. What is no such line is passed over."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b""
        for line in lines:
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(document, dict):
                self._add(document)
        return bool(lines)

    def values(self) -> dict[str, dict[str, int]]:
        """By group (``block``, ``net``, ``vcpu``) or device (``disk0``, ``nic0``), by name."""
        return {
            group.removeprefix("block_").removeprefix("net_"): dict(items)
            for group, items in self._groups.items()
        }

    def _add(self, document: dict[str, object]) -> None:
        for group, items in document.items():
            if not isinstance(items, dict) or (
                group not in self._groups and len(self._groups) >= _MAX_GROUPS
            ):
                continue
            known = self._groups.setdefault(group, {})
            for name, value in items.items():
                # Times of single requests are objects: least, most and sum.
                if isinstance(value, bool) or not isinstance(value, int):
                    continue
                if name in known or len(known) < _MAX_ITEMS:
                    known[name] = value if group in _LAST_VALUES else known.get(name, 0) + value
