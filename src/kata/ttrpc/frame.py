"""Frames of ttRPC, without I/O: a header of 10 bytes, then the data."""

from __future__ import annotations

from .status import ProtocolError

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


def encode(stream: int, kind: int, data: bytes, flags: int = 0) -> bytes:
    """The frame in wire format.

    Raises:
        ValueError: `data` is longer than a frame may be, or a number does not fit.
    """
    if len(data) > MAX_DATA:
        raise ValueError(f"{len(data)} bytes do not fit into a frame of {MAX_DATA}")
    if not 0 <= stream <= 0xFFFFFFFF:
        raise ValueError(f"stream number {stream} does not fit into 32 bits")
    head = len(data).to_bytes(4, "big") + stream.to_bytes(4, "big")
    return b"".join((head, bytes((kind, flags)), data))


class Parser:
    """Cuts a byte stream into frames.

    It holds at most one incomplete frame, and a length that is not allowed is refused when its header is
    there, so a peer cannot make it grow.
    """

    __slots__ = ("_broken", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = ""

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame; not 0 at the end of the stream means that it was cut."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: A header is not one. The stream cannot be continued: every later call raises too.
                Frames before the bad one in the same `data` are dropped with it.
        """
        if self._broken:
            raise ProtocolError(self._broken)
        buffer = self._buffer
        buffer += data
        frames = []
        at = 0
        size = len(buffer)
        while size - at >= HEADER_SIZE:
            length = int.from_bytes(buffer[at : at + 4], "big")
            kind = buffer[at + 8]
            if length > MAX_DATA:
                self._fail(f"a frame of {length} bytes; {MAX_DATA} are allowed")
            if not REQUEST <= kind <= DATA:
                self._fail(f"a frame of the unknown type {kind}")
            end = at + HEADER_SIZE + length
            if end > size:
                break
            stream = int.from_bytes(buffer[at + 4 : at + 8], "big")
            frames.append(Frame(stream, kind, bytes(buffer[at + HEADER_SIZE : end]), buffer[at + 9]))
            at = end
        if at:
            del buffer[:at]
        return frames

    def _fail(self, reason: str) -> None:
        self._broken = f"the peer sent {reason}"
        self._buffer.clear()
        raise ProtocolError(self._broken)
