"""Frames of ttRPC, without I/O: a header of 10 bytes, then the data."""

from __future__ import annotations

from kata.ttrpc.status import ProtocolError

HEADER_SIZE = 10
MAX_DATA = 4 << 20
"""Longest data of one frame, bytes; longer ones must be refused."""

REQUEST = 1
RESPONSE = 2
DATA = 3

REMOTE_CLOSED = 1
"""Flag: the sender's last frame of a streaming call."""
REMOTE_OPEN = 2
"""Flag of a request: data frames of the sender's follow."""
NO_DATA = 4
"""Flag: the frame has no message."""


_SMALL = 1 << 12


class Frame:
    """One message as it is on the wire.

    Args:
        stream: Number of the call; clients use odd ones, ascending.
        kind: REQUEST, RESPONSE or DATA.
        data: The envelope.
        flags: Of streams; 0 in unary calls.
    """

    __slots__ = ("data", "flags", "kind", "stream")

    def __init__(self, stream: int, kind: int, data: bytes, flags: int = 0) -> None:
        self.stream = stream
        self.kind = kind
        self.data = data
        self.flags = flags

    def __repr__(self) -> str:
        return f"Frame(stream={self.stream}, kind={self.kind}, flags={self.flags}, <{len(self.data)} bytes>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frame):
            return NotImplemented
        return (self.stream, self.kind, self.flags, self.data) == (
            other.stream,
            other.kind,
            other.flags,
            other.data,
        )


def encode(
    stream: int, kind: int, data: bytes, flags: int = 0, tail: bytes | memoryview[int] = b""
) -> bytes:
    """The frame in wire format; *tail* is the rest of its data, which so need not be joined beforehand.

    Raises:
        ValueError: The data is longer than a frame may be, or a number does not fit.
    """
    length = len(data) + len(tail)
    if length > MAX_DATA:
        raise ValueError(f"{length} bytes do not fit into a frame of {MAX_DATA}")
    if not 0 <= stream <= 0xFFFFFFFF:
        raise ValueError(f"stream number {stream} does not fit into 32 bits")
    head = length << 48 | stream << 16 | kind << 8 | flags
    return b"".join((head.to_bytes(HEADER_SIZE, "big"), data, tail))


class Parser:
    """Cuts a byte stream into frames.

    It holds at most one incomplete frame, and a length that is not allowed is refused when its header is
    there, so a peer cannot make it grow. What arrives whole is copied once, out of what was received.
    """

    __slots__ = ("_broken", "_needed", "_pieces", "pending")

    def __init__(self) -> None:
        self.pending = 0
        """Bytes of an incomplete frame; not 0 at the end of the stream means that it was cut."""
        self._pieces: list[bytes | bytearray] = []
        self._needed = HEADER_SIZE
        self._broken = ""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: A header is not one. The stream cannot be continued: every later call raises too.
                Frames before the bad one in the same `data` are dropped with it.
        """
        if self._broken:
            raise ProtocolError(self._broken)
        if self.pending:
            self._keep(data)
            if self.pending < self._needed:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
            self.pending = 0
        frames = []
        at = 0
        size = len(data)
        self._needed = HEADER_SIZE
        while size - at >= HEADER_SIZE:
            length = int.from_bytes(data[at : at + 4], "big")
            kind = data[at + 8]
            if length > MAX_DATA:
                self._fail(f"a frame of {length} bytes; {MAX_DATA} are allowed")
            if not REQUEST <= kind <= DATA:
                self._fail(f"a frame of the unknown type {kind}")
            end = at + HEADER_SIZE + length
            if end > size:
                self._needed = end - at
                break
            stream = int.from_bytes(data[at + 4 : at + 8], "big")
            frames.append(Frame(stream, kind, data[at + HEADER_SIZE : end], data[at + 9]))
            at = end
        if at < size:
            self._keep(data[at:] if at else data)
        return frames

    def _keep(self, data: bytes) -> None:
        self.pending += len(data)
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray) and len(last) < _SMALL:
            last += data
        else:
            # Not an object for each byte of a peer that sends them one by one.
            self._pieces.append(bytearray(data) if len(data) < _SMALL else data)

    def _fail(self, reason: str) -> None:
        self._broken = f"the peer sent {reason}"
        self._pieces.clear()
        self.pending = 0
        raise ProtocolError(self._broken)
