"""What a sandbox's machine takes beside its containers, as a percentage: which takes two looks."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

APART_S = 0.1
"""Two looks that are closer together see the same."""


class Overhead:
    """Processor time that a sandbox takes on the host beside its containers.

    One object for a sandbox. The first look is compared with the start, so that it is right at once.

    Args:
        since_s: When the sandbox was started, in seconds since the Epoch.
    """

    __slots__ = ("_at_s", "_containers", "_host_s", "_percent")

    def __init__(self, since_s: float) -> None:
        self._at_s = since_s
        self._host_s = 0.0
        self._containers: Mapping[str, float] = {}
        self._percent = 0.0

    def cpu_percent(self, at_s: float, host_s: float, containers: Mapping[str, float]) -> float:
        """Percent of one processor since the last look.

        Args:
            at_s: When the figures were taken, in seconds since the Epoch.
            host_s: Processor time of the whole sandbox on the host, in seconds.
            containers: That of each container that is there, in seconds. One that has gone since the last look takes
                its figure with it, so each is compared with itself.
        """
        passed = at_s - self._at_s
        if passed < APART_S:
            return self._percent
        inside = sum(
            max(0.0, used_s - self._containers.get(container, 0.0))
            for container, used_s in containers.items()
        )
        self._percent = max(0.0, 100.0 * (host_s - self._host_s - inside) / passed)
        self._at_s, self._host_s, self._containers = at_s, host_s, containers
        return self._percent
