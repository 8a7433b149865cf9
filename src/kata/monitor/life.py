"""What happens to the sandboxes, for those who watch: the engines' record (`kata.events`) is followed meanwhile."""

from __future__ import annotations

import asyncio
import logging

from kata import events
from kata.monitor.sampling import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_LOG = logging.getLogger("kata.monitor")


class Life:
    """Follows the record while it is told to.

    Args:
        tell: Called with each event, as JSON.
    """

    def __init__(self, tell: Callable[[bytes], None]) -> None:
        self._tell = tell
        self._follower: events.Follower | None = None

    def begin(self) -> None:
        """Follow from now on."""
        if self._follower is not None:
            return
        try:
            self._follower = events.Follower()
        except OSError as error:
            _LOG.warning("what happens to sandboxes cannot be followed: %s", error.strerror)
            return
        asyncio.get_running_loop().add_reader(self._follower.fd, self._read)

    def end(self) -> None:
        """Follow no longer."""
        if self._follower is not None:
            asyncio.get_running_loop().remove_reader(self._follower.fd)
            self._follower.close()
            self._follower = None

    def _read(self) -> None:
        assert self._follower is not None
        try:
            found = self._follower.poll()
        except OSError as error:
            _LOG.warning("what happens to sandboxes cannot be followed: %s", error.strerror)
            self.end()
            return
        for event in found:
            self._tell(encode(sound(event)))


def newest(limit: int) -> bytes:
    """The newest events that are kept, oldest first, as ``/api/v1/events`` answers.

    Raises:
        OSError: They cannot be read.
    """
    return encode({"events": [sound(event) for event in events.read(limit)]})


def sound(event: dict[str, Any]) -> dict[str, Any]:
    """An event without numbers that JSON does not have, which Python reads all the same."""
    return {
        name: value if not isinstance(value, float) or abs(value) < float("inf") else None
        for name, value in event.items()
    }
