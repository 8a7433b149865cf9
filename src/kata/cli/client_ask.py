"""Asks programs of other projects what they are, and what they read in their configuration."""

from __future__ import annotations

import subprocess

from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LIMIT_S = 60.0


def ask(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its exit status is the caller's to look at.

    Args:
        command: Its argument vector.
        env: Its environment; None for this one.

    Raises:
        HostError: It cannot be started, or has not ended within `LIMIT_S` seconds.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False, env=env
        )
    except OSError as error:
        raise HostError(
            f"{command[0]} cannot be started: {error.strerror}", f"{command[0]} --version"
        ) from None
    except subprocess.TimeoutExpired:
        raise HostError(f"{command[0]} has not answered within {LIMIT_S:.0f} s", " ".join(command)) from None


def last_words(said: subprocess.CompletedProcess[str]) -> str:
    """The last line that a program has said, for a sentence about its failure."""
    return (said.stderr.strip() or said.stdout.strip() or "it gives no reason").splitlines()[-1]
