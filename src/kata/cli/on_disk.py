"""What files take on the host's disk."""

from __future__ import annotations

import os

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def taken(paths: Iterable[str]) -> int:
    """Bytes that files take on the disk; those that are gone take none. A file with several names counts once."""
    found = {}
    for path in paths:
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            continue
        found[status.st_dev, status.st_ino] = sysio.disk_bytes(status)
    return sum(found.values())


def files_in(directory: str) -> list[str]:
    """The paths of the files of a directory; none if it is gone."""
    try:
        return [entry.path for entry in os.scandir(directory) if not entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def files_below(directory: str) -> list[str]:
    """The paths of the files and directories below a directory; none if it is gone."""
    return [
        os.path.join(place, name) for place, names, files in os.walk(directory) for name in (*names, *files)
    ]
