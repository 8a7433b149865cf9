"""Status codes and the exceptions of failed calls.

Source of the codes: ``google/rpc/code.proto``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# google.rpc.Code
OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15
UNAUTHENTICATED = 16

NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""Names by number."""

_HINT = "\nhint: "
_HINT_TYPE = b"type.googleapis.com/kata.Hint"
"""The type of the detail that carries a hint. The hint is not part of the message, because other clients wrap messages
in sentences of their own, and it would end up in the middle of them."""


class TtrpcError(Exception):
    """A call that was answered with a status other than OK, or that timed out.

    Args:
        code: One of the numbers above.
        message: Text from the other side; may end with a line that begins with ``hint: ``.
        details: Encoded `google.protobuf.Any` messages, as received.
    """

    def __init__(self, code: int, message: str, details: Sequence[bytes] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = tuple(details)

    def __str__(self) -> str:
        name = NAMES[self.code] if 0 <= self.code < len(NAMES) else f"code {self.code}"
        return f"{self.message} ({name})"

    def split_hint(self) -> tuple[str, str]:
        """Return the message and its hint (empty when there is none)."""
        for detail in self.details:
            head = _any(_HINT_TYPE, b"")
            if detail.startswith(head):
                return self.message, _value_behind(detail[len(head) :])
        message, _, hint = self.message.partition(_HINT)
        return message, hint


class ConnectionLost(Exception):
    """The connection ended before the call was answered; whether the call took effect is unknown."""


class ProtocolError(ConnectionLost):
    """The other side broke the protocol, so the connection was closed."""


def describe(error: BaseException) -> TtrpcError:
    """Turn a handler's exception into a status.

    An exception carries its status code in an integer attribute `grpc_code`, and advice in a string attribute `hint`.
    An exception without `grpc_code` becomes INTERNAL, with its type and text in one line.
    """
    if isinstance(error, TtrpcError):
        return error
    code = getattr(error, "grpc_code", None)
    if isinstance(code, int) and code != OK:
        hint = getattr(error, "hint", "")
        details = [_any(_HINT_TYPE, str(hint).encode(errors="replace")[:_LONGEST_HINT])] if hint else []
        return TtrpcError(code, str(error), details)
    text = " ".join(str(error).split())
    return TtrpcError(INTERNAL, f"{type(error).__name__}: {text}" if text else type(error).__name__)


_LONGEST_HINT = 16_000


def _any(type_url: bytes, value: bytes) -> bytes:
    """Encode a `google.protobuf.Any` of a type below 128 bytes and a value of at most `_LONGEST_HINT` bytes."""
    size = len(value)
    behind = b"\x12" + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + value
    return bytes([0x0A, len(type_url)]) + type_url + (behind if value else b"")


def _value_behind(field: bytes) -> str:
    """The value of an Any, given the bytes after its type."""
    skip = 3 if len(field) > 1 and field[1] & 128 else 2
    return field[skip:].decode("utf-8", "replace")
