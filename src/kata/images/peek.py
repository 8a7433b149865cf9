"""Guesses the kind of an image file from its beginning, for hints."""

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
"""Maximum size of the headers that are read, in bytes; file contents between them are skipped."""


class _Beginning:
    """A plain tar file of which at most `_MOST_BYTES` are read."""

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
    """Guess the kind of a file.

    Args:
        path: The file; only a regular file is opened.

    Returns:
        `PACKED` (compressed, and not decompressed here), `OCI`, `DOCKER`, `TAR` (another archive), or "".
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        # The file may have been replaced meanwhile, and opening a fifo would block.
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
