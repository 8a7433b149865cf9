"""The messages that ttRPC itself defines, encoded by hand so that the package needs no message library.

    Request   1 string service, 2 string method, 3 bytes payload, 4 int64 timeout_nano, 5 KeyValue[] metadata
    KeyValue  1 string key, 2 string value
    Response  1 Status status, 2 bytes payload
    Status    1 int32 code, 2 string message, 3 Any[] details

Encoding: https://protobuf.dev/programming-guides/encoding/. Decoders raise ValueError on anything malformed.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_METADATA = 1024
"""Maximum number of metadata entries, and of details of a status, that are accepted."""


_heads: dict[tuple[str, str], bytes] = {}
"""Cache of encoded names: a program calls few methods, each of them many times."""
_MAX_HEADS = 256


def _head(service: str, method: str) -> bytes:
    found = _heads.get((service, method))
    if found is None:
        parts: list[bytes] = []
        _put(parts, b"\x0a", service.encode())
        _put(parts, b"\x12", method.encode())
        found = b"".join(parts)
        if len(_heads) < _MAX_HEADS:
            _heads[service, method] = found
    return found


class Request:
    """A call on the wire.

    Args:
        service: Full name of the service, including its package.
        method: Name of the method.
        payload: The encoded request.
        timeout_nano: Timeout in nanoseconds; 0 for none.
        metadata: Pairs of key and value.
    """

    __slots__ = ("metadata", "method", "payload", "service", "timeout_nano")

    def __init__(
        self,
        service: str,
        method: str,
        payload: bytes,
        timeout_nano: int = 0,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.service = service
        self.method = method
        self.payload = payload
        self.timeout_nano = timeout_nano
        self.metadata = list(metadata)

    def encode(self) -> bytes:
        """Wire format."""
        parts = [_head(self.service, self.method)]
        _put(parts, b"\x1a", self.payload)
        if self.timeout_nano:
            parts += (b"\x20", _varint(self.timeout_nano & 0xFFFFFFFFFFFFFFFF))
        for key, value in self.metadata:
            entry: list[bytes] = []
            _put(entry, b"\x0a", key.encode())
            _put(entry, b"\x12", value.encode())
            _put(parts, b"\x2a", b"".join(entry), always=True)
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """From wire format; ValueError when it is not one."""
        made = cls("", "", b"")
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                made.service = value.decode()
            elif number == 2 and isinstance(value, bytes):
                made.method = value.decode()
            elif number == 3 and isinstance(value, bytes):
                made.payload = value
            elif number == 4 and isinstance(value, int):
                made.timeout_nano = value - (1 << 64) if value >> 63 else value
            elif number == 5 and isinstance(value, bytes):
                pair = {1: "", 2: ""}
                pair.update((at, text.decode()) for at, text in _fields(value) if isinstance(text, bytes))
                made.metadata.append((pair[1], pair[2]))
                if len(made.metadata) > MAX_METADATA:
                    raise ValueError("too much metadata")
        return made


class Response:
    """An answer on the wire.

    Args:
        payload: The encoded response.
        code: Status code (`status`); 0 is success.
        message: The error's text.
        details: Encoded `google.protobuf.Any` messages.
    """

    __slots__ = ("code", "details", "message", "payload")

    def __init__(
        self, payload: bytes = b"", code: int = 0, message: str = "", details: Iterable[bytes] = ()
    ) -> None:
        self.payload = payload
        self.code = code
        self.message = message
        self.details = list(details)

    def encode(self) -> bytes:
        """Wire format."""
        parts: list[bytes] = []
        if self.code or self.message or self.details:
            status: list[bytes] = []
            if self.code:
                status += (b"\x08", _varint(self.code & 0xFFFFFFFFFFFFFFFF))
            _put(status, b"\x12", self.message.encode("utf-8", "replace"))
            for detail in self.details:
                _put(status, b"\x1a", detail, always=True)
            _put(parts, b"\x0a", b"".join(status), always=True)
        _put(parts, b"\x12", self.payload)
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Response:
        """From wire format; ValueError when it is not one."""
        made = cls()
        if data[:1] == b"\x12":
            # The usual success: its only field is the payload.
            length, at = _read_varint(data, 1)
            if at + length == len(data):
                made.payload = data[at:]
                return made
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                made._decode_status(value)
            elif number == 2 and isinstance(value, bytes):
                made.payload = value
        return made

    def _decode_status(self, data: bytes) -> None:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, int):
                value &= 0xFFFFFFFF
                self.code = value - (1 << 32) if value >> 31 else value
            elif number == 2 and isinstance(value, bytes):
                self.message = value.decode()
            elif number == 3 and isinstance(value, bytes):
                self.details.append(value)
                if len(self.details) > MAX_METADATA:
                    raise ValueError("too many details")


def _put(parts: list[bytes], key: bytes, value: bytes, always: bool = False) -> None:
    if value or always:
        parts += (key, _varint(len(value)), value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("varint longer than 10 bytes")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field. Fixed-width fields, of which these messages have none, are skipped."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if not 8 <= tag <= 0xFFFFFFFF:
            raise ValueError(f"invalid field tag {tag}")
        if kind == 0:
            number, at = _read_varint(data, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            length, at = _read_varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"invalid wire type {kind}")
        end = at + length
        if end > len(data):
            raise ValueError("truncated")
        if kind == 2:
            yield tag >> 3, data[at:end]
        at = end
