"""A call's request and answer, as both clients write and read them."""

from __future__ import annotations

from kata.ttrpc import envelope, frame
from kata.ttrpc.status import RESOURCE_EXHAUSTED, ProtocolError, TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kata.ttrpc.messages import Encodable, R


def encoded(
    service: str,
    method: str,
    request: Encodable,
    timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The content of a request's frame.

    Args:
        service: Full name of the service, including its package.
        method: Name of the method.
        request: Anything with `encode`.
        timeout: Seconds that the server is told; None is no limit.
        metadata: The protocol's metadata.

    Raises:
        TtrpcError: RESOURCE_EXHAUSTED: it does not fit into a frame.
    """
    timeout_ns = 0 if timeout is None else max(1, int(timeout * 1e9))
    pairs = (metadata or {}).items()
    data = envelope.Request(service, method, request.encode(), timeout_ns, pairs).encode()
    if len(data) > frame.MAX_DATA:
        raise TtrpcError(RESOURCE_EXHAUSTED, f"a request of {len(data)} bytes does not fit into a frame")
    return data


def decoded(answer: envelope.Response, response: type[R], method: str) -> R:
    """What a server has answered.

    Args:
        answer: The content of the answer's frame.
        response: Class of what is in it.
        method: Name of the method, for the error.

    Raises:
        TtrpcError: The status from the server.
        ProtocolError: It cannot be decoded.
    """
    if answer.code:
        raise TtrpcError(answer.code, answer.message, answer.details)
    try:
        return response.decode(answer.payload)
    except ValueError as error:
        raise ProtocolError(f"the answer to {method} is malformed: {error}") from None


def response_in(item: frame.Frame) -> envelope.Response:
    """The response that a frame from a server carries.

    Raises:
        ProtocolError: It carries none, or a malformed one.
    """
    if item.kind != frame.RESPONSE:
        raise ProtocolError(f"the server sent a frame of type {item.kind} instead of a response")
    try:
        return envelope.Response.decode(item.data)
    except ValueError as error:
        raise ProtocolError(f"the server sent a malformed response: {error}") from None
