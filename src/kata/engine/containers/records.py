"""What the engine leaves on disk for those who look without it: ``state.json``.

``ps``, ``wait``, ``inspect`` read it, during the container's life and after. A reader never sees half of it: it is
replaced in one step, or, when the disk is full, written over in the room that it has, behind a lock that readers
take (`sysio.read_file`). It outlives its engine; it is not written for a power failure, of which the boot id tells.
"""

from __future__ import annotations

import errno
import json

from kata import events, sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def rfc3339(ns: int) -> str:
    """Nanoseconds of the epoch as ``2026-01-02T03:04:05.000000006Z``; empty for 0 (it has not happened)."""
    return events.stamp(ns) if ns else ""


_ROOM = 4096
"""What a record takes on its disk at least. So there is room for its next state when that disk is full."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Replace *path* by *content*, in one step; on a full disk within the room that it has, if that is enough.

    Raises:
        OSError: The directory is gone, or the disk is full; the old content is still there then.
    """
    raw = json.dumps(content, indent=1).encode().ljust(_ROOM)
    try:
        sysio.replace_file(path, raw)
    except OSError as error:
        if error.errno not in _FULL or not sysio.overwrite_file(path, raw):
            raise


def read_json(path: str) -> dict[str, Any]:
    """The content of *path*; an empty dict if there is none or it is not an object.

    Raises:
        OSError: It cannot be read for another reason than not being there.
    """
    try:
        found = json.loads(sysio.read_file(path))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class StateFile:
    """A container's ``state.json``.

    Args:
        path: Where; empty for a client that keeps no such file.
        engine: Identity of the engine: ``{"pid", "starttime", "boot_id"}``.
    """

    __slots__ = ("_content", "_path")

    def __init__(self, path: str, engine: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "status": "created",
            "pid": 0,
            "engine": engine,
            "created_at": "",
            "started_at": "",
            "finished_at": "",
            "exit_code": None,
            "oom_killed": False,
            "error": "",
            "disk_error": "",
        }

    def reserve(self) -> None:
        """See to it that there is a file with room for what comes; what a former engine wrote stays in it.

        Raises:
            OSError: There is no room.
        """
        if self._path:
            write_json(self._path, read_json(self._path) or self._content)

    def write(self, **changed: Any) -> None:
        """Change fields and write the file.

        Raises:
            OSError: It cannot be written.
        """
        self._content.update(changed)
        if self._path:
            write_json(self._path, self._content)
