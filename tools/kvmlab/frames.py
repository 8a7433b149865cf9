"""What the lab and its host say to each other: frames of a kind, a length and so many bytes, on one stream.

One stream keeps an order that several ports would not: all output of the command comes before its end.
No I/O in here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEAD = struct.Struct("<BI")
LIMIT = 1 << 20
CHUNK = 64 << 10

# From the host.
SPEC = 1  # JSON: what to run; see `inside.Spec`
STDIN = 2  # data; empty is its end
SIGNAL = 3  # JSON: the number
SIZE = 4  # JSON: rows, columns
FROZEN = 5  # part of the tar stream of frozen files, after SPEC if that has any; empty is its end

# From the lab.
HELLO = 16  # the lab is up and waits for its SPEC
STARTED = 17  # the command is about to be executed
STDOUT = 18
STDERR = 19
WANT = 20  # the command's standard input has room for one STDIN frame
EXIT = 21  # JSON: {"code": N}
ARCHIVE = 22  # part of the tar stream of the files to bring back, after EXIT
DONE = 23  # JSON: list of sentences about what could not be brought back
FAILED = 24  # a sentence: the lab could not do it


class WrongFrame(Exception):
    """The other side does not speak this protocol."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame on the wire."""
    return HEAD.pack(kind, len(payload)) + payload


class Decoder:
    """Puts frames together from whatever pieces arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take bytes in; gives each frame that is complete as (kind, payload).

        Raises:
            WrongFrame: A length is beyond the limit.
        """
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            kind, length = HEAD.unpack_from(self._buffer)
            if length > LIMIT:
                raise WrongFrame(f"a frame of {length} bytes")
            end = HEAD.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEAD.size : end])
            del self._buffer[:end]
            yield kind, payload
