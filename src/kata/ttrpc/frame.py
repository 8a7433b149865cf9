"""Frames of ttRPC, without I/O: a header of 10 bytes, then the data."""

from __future__ import annotations

from kata.ttrpc.status import ProtocolError

HEADER_SIZE = 10
MAX_DATA = 4 << 20
"""Maximum length of a frame's data in bytes; the protocol demands that longer frames are refused."""

REQUEST = 1
RESPONSE = 2
DATA = 3

REMOTE_CLOSED = 1
"""Flag: this is the sender's last frame of a streaming call."""
REMOTE_OPEN = 2
"""Flag of a request: the sender will send data frames."""
NO_DATA = 4
"""Flag: the frame has no message."""


_SMALL = 1 << 12


class Frame:
    """One frame.

    Args:
        stream: Number of the call; clients use ascending odd numbers.
        kind: REQUEST, RESPONSE or DATA.
        data: The encoded envelope, or for DATA the message itself.
        flags: Flags of a streaming call; 0 in unary calls.
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
    """Encode a frame.

    Args:
        stream: Number of the call.
        kind: REQUEST, RESPONSE or DATA.
        data: The data, or its beginning.
        flags: Flags of a streaming call.
        tail: The rest of the data, so that the caller need not join the two.

    Returns:
        The frame in wire format.

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

    It holds at most one incomplete frame and refuses a forbidden length as soon as it has the header, so a peer cannot
    make it grow. A frame that arrives whole is copied once.
    """

    __slots__ = ("_broken", "_needed", "_pieces", "pending")

    def __init__(self) -> None:
        self.pending = 0
        """Bytes held of an incomplete frame; if not 0 at the end of the stream, the stream was cut off."""
        self._pieces: list[bytes | bytearray] = []
        self._needed = HEADER_SIZE
        self._broken = ""

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes.

        Raises:
            ProtocolError: A header is invalid. The stream cannot be continued: every later call raises too. Frames
                before the invalid one in the same `data` are dropped with it.
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
            # Join small pieces: a peer that sends single bytes must not cost an object for each.
            self._pieces.append(bytearray(data) if len(data) < _SMALL else data)

    def _fail(self, reason: str) -> None:
        self._broken = f"the peer sent {reason}"
        self._pieces.clear()
        self.pending = 0
        raise ProtocolError(self._broken)
