"""The proto3 wire format, one value at a time."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_DEPTH = 100
"""Maximum nesting of messages that are encoded or decoded; the default of the official libraries."""


class DecodeError(ValueError):
    """The bytes are not an encoding of the message."""


class EncodeError(ValueError):
    """A field holds a value that its type cannot represent."""


ZERO: dict[str, Any] = {"string": "", "bytes": b"", "bool": False, "double": 0.0, "float": 0.0}
_RANGE = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, (1 << 64) - 1),
    "enum": (-(1 << 31), (1 << 31) - 1),
    "bool": (0, 1),
}


def put_varint(out: bytearray, value: int) -> None:
    """Append a varint; *value* is not negative."""
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def get_varint(buf: bytes, pos: int) -> tuple[int, int]:
    """Read a varint.

    Returns:
        The value, modulo 2**64, and the position after it.

    Raises:
        IndexError: `buf` ends within it.
        DecodeError: It is longer than 10 bytes.
    """
    byte = buf[pos]
    if byte < 0x80:
        return byte, pos + 1
    value = byte & 0x7F
    for shift in (7, 14, 21, 28, 35, 42, 49, 56, 63):
        pos += 1
        byte = buf[pos]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, pos + 1
    raise DecodeError("varint longer than 10 bytes")


def scalar_writer(kind: str) -> Callable[[bytearray, Any], None]:
    """Return a function that checks a value of a scalar type and appends it to a buffer, without its key."""
    if kind == "string":

        def put(out: bytearray, value: Any) -> None:
            raw = str.encode(value)
            put_varint(out, len(raw))
            out += raw

    elif kind == "bytes":

        def put(out: bytearray, value: Any) -> None:
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise TypeError(f"{type(value).__name__} is not bytes")
            put_varint(out, value.nbytes if isinstance(value, memoryview) else len(value))
            out += value

    elif kind in ("double", "float"):
        # Imported here: only statistics have such fields, and they are never part of a start.
        from struct import Struct

        pack = Struct("<d" if kind == "double" else "<f").pack

        def put(out: bytearray, value: Any) -> None:
            if not isinstance(value, (int, float)):
                raise TypeError(f"{type(value).__name__} is not a number")
            out += pack(value)

    else:
        low, high = _RANGE[kind]

        def put(out: bytearray, value: Any) -> None:
            if not isinstance(value, int):
                raise TypeError(f"{type(value).__name__} is not an integer")
            if not low <= value <= high:
                raise ValueError(f"{value} is outside {low}..{high}")
            put_varint(out, value & 0xFFFFFFFFFFFFFFFF)

    return put


def scalar_reader(kind: str) -> Callable[[bytes, int, int], tuple[Any, int]]:  # noqa: C901
    """Return a function that reads a value of a scalar type.

    It takes the buffer, the value's position and the end of its message, and returns the value and the position after
    it.
    """
    if kind in ("string", "bytes"):
        text = kind == "string"

        def get(buf: bytes, pos: int, end: int) -> tuple[Any, int]:
            length, pos = get_varint(buf, pos)
            stop = pos + length
            if stop > end:
                raise DecodeError("truncated")
            raw = buf[pos:stop]
            if not text:
                return raw, stop
            try:
                return raw.decode(), stop
            except UnicodeDecodeError:
                raise DecodeError("a string is not UTF-8") from None

    elif kind in ("double", "float"):
        from struct import Struct

        code = Struct("<d" if kind == "double" else "<f")

        def get(buf: bytes, pos: int, end: int) -> tuple[Any, int]:
            if pos + code.size > end:
                raise DecodeError("truncated")
            return code.unpack_from(buf, pos)[0], pos + code.size

    elif kind == "uint64":

        def get(buf: bytes, pos: int, end: int) -> tuple[Any, int]:
            return get_varint(buf, pos)

    elif kind == "bool":

        def get(buf: bytes, pos: int, end: int) -> tuple[Any, int]:
            value, pos = get_varint(buf, pos)
            return value != 0, pos

    else:
        mask = 0xFFFFFFFF if kind in ("uint32", "int32", "enum") else 0xFFFFFFFFFFFFFFFF
        sign = 0 if kind == "uint32" else (mask + 1) >> 1

        def get(buf: bytes, pos: int, end: int) -> tuple[Any, int]:
            value, pos = get_varint(buf, pos)
            value &= mask
            return (value - mask - 1 if value & sign else value), pos

    return get


def wire_type_of(kind: str) -> int:
    """The wire type of a kind of field: ``string``, ``double`` ...; a message's begins with ``@``."""
    if kind in ("string", "bytes") or kind.startswith("@"):
        return 2
    return {"double": 1, "float": 5}.get(kind, 0)


def field_key(number: int, wire_type: int) -> bytes:
    """The tag that stands before a field."""
    out = bytearray()
    put_varint(out, number << 3 | wire_type)
    return bytes(out)


def get_tag(buf: bytes, pos: int) -> tuple[int, int]:
    """The tag at `pos`, and the position after it.

    Raises:
        DecodeError: It is none.
        IndexError: `buf` ends in it.
    """
    tag, pos = get_varint(buf, pos)
    if not 8 <= tag <= 0xFFFFFFFF:
        raise DecodeError(f"invalid field tag {tag}")
    return tag, pos


def skip(buf: bytes, pos: int, end: int, tag: int, depth: int) -> int:
    """Return the position after the value of an unknown field."""
    wire_type = tag & 7
    if wire_type == 0:
        pos = get_varint(buf, pos)[1]
    elif wire_type == 1:
        pos += 8
    elif wire_type == 2:
        length, pos = get_varint(buf, pos)
        pos += length
    elif wire_type == 5:
        pos += 4
    elif wire_type == 3:
        # A group: proto3 does not use them, but decoders have to skip them.
        if depth >= MAX_DEPTH:
            raise DecodeError(f"groups nested deeper than {MAX_DEPTH}")
        while True:
            inner, pos = get_tag(buf, pos)
            if inner & 7 == 4:
                if inner >> 3 != tag >> 3:
                    raise DecodeError("a group ends that has not begun")
                break
            pos = skip(buf, pos, end, inner, depth + 1)
    else:
        raise DecodeError(f"invalid wire type {wire_type}")
    if pos > end:
        raise DecodeError("truncated")
    return pos
