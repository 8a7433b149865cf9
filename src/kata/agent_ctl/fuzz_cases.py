"""The cases of ``fuzz``: byte sequences that are almost valid frames, and requests that are almost valid.

All are derived from a `random.Random`, so that a seed and a number identify a case.
"""

from __future__ import annotations

from kata.agent_ctl.methods import HEALTH
from kata.proto import health_pb
from kata.ttrpc import envelope, frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random
    from typing import Any

    from kata.agent_ctl.methods import Method
    from kata.proto.codec import Field, Message

_NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    65535,
    65536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_TEXTS = (
    "",
    "x",
    "../../../../etc/passwd",
    "/proc/self/root",
    "/run/kata-containers/shared/containers/../../x",
    "a\0b",
    "%s%n",
    "\x1b[2J",
    "-1",
    "tmpfs",
    "\U0010ffff" * 20,
    "y" * 5000,
)
_PLAUSIBLE = {
    "container_id": ("one", "two"),
    "exec_id": ("", "one", "run"),
    "driver": (
        "blk",
        "ephemeral",
        "local",
        "overlayfs",
        "bind",
        "9p",
        "virtio-fs",
        "watchable-bind",
        "scsi",
    ),
    "fstype": ("tmpfs", "ext4", "overlay", "bind"),
    "mount_point": ("/run/kata-containers/one/rootfs", "/run/kata-containers/sandbox/x"),
    "path": ("/run/kata-containers/shared/containers/x",),
    "address": ("10.1.2.3", "fd00::1"),
    "device": ("lo", "eth0"),
    "dest": ("10.0.0.0/8", "", "default"),
    "Path": ("/", "/bin/sh", "/proc/self/exe"),
    "Type": ("mount", "pid", "user", "c", "RLIMIT_NOFILE"),
}
"""Values that pass the first check of a field, by the field's name."""
_MAX_DEPTH = 4
_MAX_PAYLOAD = 1 << 18


class Case:
    """One case.

    Attributes:
        kind: The kind of error in it; for a request the method's name.
        data: The bytes to send.
        due: Numbers of the streams that the agent has to answer.
        pieces: Number of writes in which the data is sent.
    """

    __slots__ = ("data", "due", "kind", "pieces")

    def __init__(self, kind: str, data: bytes, due: set[int] | None = None, pieces: int = 1) -> None:
        self.kind = kind
        self.data = data
        self.due = due or set()
        self.pieces = pieces


def check(stream: int, **fields: Any) -> bytes:
    """A valid call of Health.Check, as a frame.

    Args:
        stream: Number of the stream.
        fields: Fields of the request other than service and method.
    """
    payload = fields.pop("payload", health_pb.CheckRequest().encode())
    return frame.encode(stream, frame.REQUEST, envelope.Request(HEALTH, "Check", payload, **fields).encode())


def _header(length: int, stream: int, kind: int, flags: int) -> bytes:
    return length.to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes((kind, flags))


def _request(stream: int, body: bytes) -> bytes:
    return frame.encode(stream, frame.REQUEST, body)


def _oversized(rng: Random, at: int) -> Case:
    length = rng.choice((frame.MAX_DATA + 1, 1 << 24, 1 << 31, (1 << 32) - 1))
    return Case("a length above the limit", _header(length, at, 1, 0) + rng.randbytes(20))


def _unknown_type(rng: Random, at: int) -> Case:
    kind = rng.choice((0, *range(4, 256)))
    return Case("an unknown frame type", _header(4, at, kind, 0) + rng.randbytes(4))


def _flags(rng: Random, at: int) -> Case:
    body = envelope.Request(HEALTH, "Check", b"").encode()
    return Case("flags on a call", _header(len(body), at, 1, rng.randrange(1, 256)) + body)


def _even(rng: Random, at: int) -> Case:
    return Case("an even stream number", check(rng.choice((0, 2, at + 1, 0xFFFFFFFE))))


def _not_a_request(rng: Random, at: int) -> Case:
    kind = rng.choice((frame.RESPONSE, frame.DATA))
    body = rng.randbytes(rng.randrange(64))
    return Case("a frame that is no request", _header(len(body), at, kind, rng.choice((0, 1, 2, 4))) + body)


def _short_header(rng: Random, at: int) -> Case:
    return Case("half a header", check(at)[: rng.randrange(1, frame.HEADER_SIZE)])


def _short_body(rng: Random, at: int) -> Case:
    length = rng.choice((1, 100, 65536, frame.MAX_DATA))
    return Case("half a frame", _header(length, at, 1, 0) + rng.randbytes(rng.randrange(min(length, 4096))))


def _noise(rng: Random, at: int) -> Case:
    return Case("random bytes", rng.randbytes(rng.choice((1, 10, 11, 100, 4096, 65536))))


def _another_protocol(rng: Random, at: int) -> Case:
    http = b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n"
    return Case(
        "another protocol",
        rng.choice((http, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n")),
    )


def _noise_envelope(rng: Random, at: int) -> Case:
    return Case("an envelope of random bytes", _request(at, rng.randbytes(rng.randrange(1, 300))))


def _mutated(rng: Random, at: int) -> Case:
    body = envelope.Request(HEALTH, "Check", rng.randbytes(20), 1 << 30, [("key", "value")]).encode()
    return Case("a mutated envelope", _request(at, mutate(rng, body)))


def _overlong(rng: Random, at: int) -> Case:
    return Case(
        "an endless varint",
        _request(at, rng.choice((b"\x0a", b"\x20", b"")) + b"\xff" * rng.randrange(11, 40)),
    )


def _lying_length(rng: Random, at: int) -> Case:
    lie = rng.choice((b"\x7f", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"))
    return Case(
        "a field longer than its message",
        _request(at, rng.choice((b"\x0a", b"\x12", b"\x1a", b"\x2a")) + lie + b"x"),
    )


def _strangers(rng: Random, at: int) -> Case:
    service = rng.choice(("", "grpc.Health", "grpc.NoSuch", "x" * 65536, "grpc.AgentService\0"))
    method = rng.choice(("", "NoSuch", "check", "Check\0", "y" * 65536))
    return Case(
        "names that do not exist", _request(at, envelope.Request(service, method, b"").encode()), {at}
    )


def _not_utf8(rng: Random, at: int) -> Case:
    name = bytes((rng.randrange(0x80, 0x100), rng.randrange(0x80, 0x100)))
    return Case("a name that is not UTF-8", _request(at, b"\x0a\x02" + name + b"\x12\x05Check"))


def _strange_timeout(rng: Random, at: int) -> Case:
    nanos = rng.choice((-1, -(1 << 63), (1 << 63) - 1))
    return Case("a strange timeout", check(at, timeout_nano=nanos))


def _metadata(rng: Random, at: int) -> Case:
    pairs = [(f"key{number}", "v" * rng.randrange(20)) for number in range(rng.choice((1, 100, 5000)))]
    return Case("much metadata", check(at, metadata=pairs))


def _byte_by_byte(rng: Random, at: int) -> Case:
    return Case("a right call in small pieces", check(at), {at}, pieces=1 << 10)


def _pipelined(rng: Random, at: int) -> Case:
    streams = range(at, at + 2 * rng.randrange(2, 60), 2)
    return Case("right calls all at once", b"".join(map(check, streams)), set(streams))


def _twice(rng: Random, at: int) -> Case:
    return Case("a stream number twice", check(at) + check(at))


def _biggest(rng: Random, at: int) -> Case:
    text = "z" * (frame.MAX_DATA - 64)
    return Case(
        "a right call of 4 MiB", check(at, payload=health_pb.CheckRequest(service=text).encode()), {at}
    )


_FRAMES: tuple[Callable[[Random, int], Case], ...] = (
    *(_oversized, _unknown_type, _flags, _even, _not_a_request, _short_header, _short_body, _noise),
    *(_another_protocol, _noise_envelope, _mutated, _overlong, _lying_length, _strangers, _not_utf8),
    *(_strange_timeout, _metadata, _byte_by_byte, _pipelined, _twice, _biggest),
)


def frame_case(rng: Random, number: int, stream: int) -> Case:
    """Make a case about frames and envelopes.

    Args:
        rng: The source of randomness.
        number: Number of the case; the kinds take turns.
        stream: The first stream number that it may use, odd.
    """
    return _FRAMES[number % len(_FRAMES)](rng, stream)


# ---- requests ----


def payload(rng: Random, method: Method) -> bytes:
    """Make a request of a method: random values, random bytes, or random values with some bytes changed.

    Args:
        rng: Source of the choices.
        method: The method.
    """
    choice = rng.randrange(10)
    if choice == 0:
        return rng.randbytes(rng.randrange(200))
    if choice == 1:
        return _deep(rng, method.request)
    body = _message(rng, method.request, 0).encode()
    if choice < 5:
        body = mutate(rng, body)
    return body[:_MAX_PAYLOAD]


def mutate(rng: Random, data: bytes) -> bytes:
    """Return *data* with a few bytes changed, removed, doubled or inserted.

    Args:
        rng: Source of the choices.
        data: Bytes to change.
    """
    out = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(5)
        if change == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del out[at : at + rng.randrange(1, 9)]
        elif change == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif change == 3:
            out[at:at] = out[at : at + rng.randrange(1, 33)]
        else:
            del out[at:]
    return bytes(out)


def _deep(rng: Random, cls: type[Message]) -> bytes:
    """Make nested messages, far deeper than any schema."""
    holders = [field.number for field in cls.fields() if field.sub is not None]
    key = (rng.choice(holders) if holders else 1) << 3 | 2
    data = b""
    for _ in range(rng.choice((101, 1000, 5000))):
        body = bytearray()
        _put_varint(body, key)
        _put_varint(body, len(data))
        data = bytes(body) + data
    return data


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _message(rng: Random, cls: type[Message], depth: int) -> Message:
    message = cls()
    for field in cls.fields():
        if rng.randrange(3) == 0 or (field.sub is not None and depth >= _MAX_DEPTH):
            continue
        if field.label == "*":
            count = rng.choice((0, 1, 2, 2, 50)) if depth < 2 else 1
            setattr(message, field.name, [_value(rng, field, depth) for _ in range(count)])
        elif field.label == "%":
            setattr(message, field.name, {rng.choice(_TEXTS): _value(rng, field, depth) for _ in range(3)})
        else:
            setattr(message, field.name, _value(rng, field, depth))
    return message


def _value(rng: Random, field: Field, depth: int) -> Any:
    if field.sub is not None:
        return _message(rng, field.sub, depth + 1)
    if field.kind == "string":
        plausible = _PLAUSIBLE.get(field.name, ())
        return rng.choice(plausible if plausible and rng.random() < 0.6 else _TEXTS)
    if field.kind == "bytes":
        return rng.randbytes(rng.choice((0, 1, 100, 10000)))
    if field.kind == "bool":
        return rng.random() < 0.5
    return fit(field.kind, rng.choice(_NUMBERS))


def fit(kind: str, number: int) -> int:
    """Convert a 64-bit pattern to a value of an integer type, with that type's width and sign.

    Args:
        kind: Type of the field, as in a `.proto`.
        number: The pattern.
    """
    bits = 32 if kind in ("int32", "uint32", "enum") else 64
    number &= (1 << bits) - 1
    signed = kind in ("int32", "int64", "enum")
    return number - (1 << bits) if signed and number >> (bits - 1) else number
