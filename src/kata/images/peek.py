"""What kind of image a file may be, by a short look at its beginning: for hints."""

from __future__ import annotations

import os
import stat

from kata.errors import ImageError
from kata.storage import layers_codec, layers_tar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

PACKED, OCI, DOCKER, TAR = "packed", "oci-archive", "docker-archive", "tar"
_MOST_MEMBERS = 1000
_MOST_BYTES = 4 << 20
"""Of headers: what is between them is passed over unread."""


class _Beginning:
    """A plain tar file of which so much is read, and then no more."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._room = _MOST_BYTES

    def read(self, size: int) -> bytes:
        self._room -= size
        if self._room < 0:
            raise ImageError(f"the headers of its first members are larger than {_MOST_BYTES} bytes")
        return self._file.read(size)

    def pieces(self, size: int) -> Iterator[bytes]:
        yield self.read(size)

    def skip(self, size: int) -> int:
        at = self._file.tell()
        end = min(at + size, self._size)
        self._file.seek(end)
        return end - at


def kind_of(path: str) -> str:
    """Look at a file.

    Args:
        path: Nothing but a regular file is opened.

    Returns:
        `PACKED` (compressed: not undone here), `OCI`, `DOCKER`, `TAR` (an archive of something else), or "": none.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        # What is there may be another thing by now: a fifo would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return ""
            if layers_codec.kind_of(file.read(6)) != "plain":
                return PACKED
            file.seek(0)
            reader = layers_tar.Reader(_Beginning(file, status.st_size))
            for number in range(_MOST_MEMBERS):
                entry = reader.next()
                if entry is None:
                    return TAR if number else ""
                name = entry.name.removeprefix(b"./")
                if name in (b"oci-layout", b"index.json"):
                    return OCI
                if name in (b"manifest.json", b"repositories"):
                    return DOCKER
        return TAR
    except (ImageError, OSError):
        return ""
