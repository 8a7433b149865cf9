"""What a client does while faults happen, and what has to hold afterwards: what all of them have in common."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Protocol

import waiting

from faults.target import Failure

SETTLE_S = 60.0
"""How long a client may take to have the right view; it takes a second, but the host may be busy."""

CRASHES = ("engine", "hypervisor", "virtiofsd", "standing")
"""Victims whose end is the end of the container."""

Step = tuple[str, Callable[[], "subprocess.CompletedProcess[str]"]]


class Scenario(Protocol):
    """One container, or pod, of a client."""

    before_containerd: str
    """The step before whose end containerd itself is not killed."""

    def steps(self) -> list[Step]:
        """The client's calls, in order."""

    def sandbox(self) -> str:
        """Name of the sandbox's run directory, whether it exists or not; empty until it is known."""

    def check(self, victim: str) -> str:
        """What has to hold, up to and with the removal; returns in a word what became of the container.

        Args:
            victim: Who was killed; empty if nobody was.

        Raises:
            Failure: It does not.
        """


def until(condition: Callable[[], bool], what: str, patience_s: float = SETTLE_S) -> None:
    """Return when a condition holds.

    Raises:
        Failure: It did not in time.
    """
    try:
        waiting.until(condition, what, patience_s=patience_s)
    except AssertionError as error:
        raise Failure(str(error)) from None
