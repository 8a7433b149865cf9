"""Connections to servers in the guest, and from the guest to sockets that represent sockets of the host.

The protocol is ``kata.agent.v1.Dial`` and ``kata.agent.v1.Sockets``, see ``agentext.proto``.
"""

from __future__ import annotations

from kata.agent.streams import INPUT_PIECE, INPUT_WINDOW, OUTPUT_WINDOW, Pieces
from kata.proto import agentext_pb, google_pb
from kata.ttrpc.status import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.agent.client import AgentClient
    from kata.ttrpc.client import Stream
    from kata.ttrpc.status import ConnectionLost, TtrpcError

FEATURE = "kata.dial"
"""Feature of an agent (``AgentDetails.extra_features``): it can connect to servers in the guest."""
SERVICE = "kata.agent.v1.Dial"
SOCKETS_FEATURE = "kata.sockets"
"""Feature of an agent: it can listen at sockets in the guest."""
SOCKETS = "kata.agent.v1.Sockets"
DEBUG = "kata.agent.v1.Debug"
INTERNET_FEATURE = "kata.internet"
"""Feature of an agent: both services take Internet addresses."""
SOCKET_WINDOW = 1 << 18
"""Stream window, in bytes, of one connection to a socket. It is small because the guest may open many."""

MAX_DATAGRAM = 4096
"""Longest datagram, in bytes, that the agent passes on, as the protocol defines."""


class Connection:
    """A connection in the guest; made by `dial` or `accept`."""

    def __init__(self, agent: AgentClient, pieces: Pieces) -> None:
        self._agent = agent
        self._pieces = pieces

    async def read(self) -> bytes:
        """Read the next data; empty when the other side has finished sending. Writing may still be possible then.

        Raises:
            KataError: No server listens there; see also `AgentClient`.
        """
        data = await self._pieces.take()
        if not data and self._pieces.error is not None:
            raise await self._agent.explain(self._pieces.error)
        return data

    async def write(self, data: bytes) -> bool:
        """Send all of *data*. Returns when it fits into the window; False when the other side is gone."""
        pieces, at = self._pieces, 0
        while at < len(data):
            while pieces.credit <= 0 and not pieces.over:
                await pieces.news()
            if pieces.over or pieces.stream is None:
                return False
            piece = data[at : at + min(pieces.credit, INPUT_PIECE)]
            pieces.credit -= len(piece)
            at += len(piece)
            pieces.stream.send(agentext_pb.StreamPiece(data=piece).encode())
        return True

    def end(self) -> None:
        """End sending, after everything written so far. The other side may go on sending."""
        if not self._pieces.over and self._pieces.stream is not None:
            self._pieces.stream.send(agentext_pb.StreamPiece(end=True).encode())

    def close(self) -> None:
        """Close both directions, after everything written so far."""
        if not self._pieces.over and self._pieces.stream is not None:
            self._pieces.stream.send(b"", last=True)


async def dial(agent: AgentClient, port: int, address: bytes = b"") -> Connection:
    """Begin to connect to a TCP port in the guest; the first `Connection.read` reports a failure.

    Args:
        agent: The agent.
        port: The port.
        address: Four or sixteen bytes; empty for the guest's loopback. Any other address needs `INTERNET_FEATURE`.

    Raises:
        KataError: See `AgentClient`.
    """
    first = agentext_pb.StreamPiece(port=port, credit=OUTPUT_WINDOW, address=address)
    return await _opened(agent, SERVICE, "Tcp", first, Pieces(OUTPUT_WINDOW))


async def console(agent: AgentClient) -> Connection:
    """Begin a shell of the guest on a terminal of its own; the first `Connection.read` reports a failure.

    Args:
        agent: The agent; its kernel has ``agent.debug_console`` as a parameter.

    Raises:
        KataError: See `AgentClient`.
    """
    first = agentext_pb.StreamPiece(credit=OUTPUT_WINDOW)
    return await _opened(agent, DEBUG, "Console", first, Pieces(OUTPUT_WINDOW))


async def _opened(
    agent: AgentClient, service: str, method: str, first: agentext_pb.StreamPiece, pieces: Pieces
) -> Connection:
    pieces.credit = INPUT_WINDOW
    pieces.stream = await agent.open(service, method, first.encode(), pieces)
    return Connection(agent, pieces)


async def listen(agent: AgentClient, number: int, path: str, mode: int, uid: int, gid: int) -> None:
    """Create a listening unix socket in the guest.

    Args:
        agent: The agent.
        number: Number of the socket, for `accept` and `close_socket`.
        path: Path of the socket in the guest.
        mode: Its permission bits.
        uid: Its owner.
        gid: Its group.

    Raises:
        KataError: See `AgentClient`.
    """
    request = agentext_pb.ListenSocketRequest(number=number, path=path, mode=mode, uid=uid, gid=gid)
    await agent.call(SOCKETS, "Listen", request, google_pb.Empty)


async def listen_loopback(
    agent: AgentClient, number: int, address: bytes, port: int, *, datagrams: bool = False
) -> None:
    """Listen at a port of the guest's loopback. Programs in the guest can still bind the port on all addresses.

    Args:
        agent: The agent; it has `INTERNET_FEATURE`.
        number: Number of the socket, for `accept`, `exchange` and `close_socket`.
        address: Four bytes.
        port: The port.
        datagrams: UDP instead of TCP.

    Raises:
        KataError: See `AgentClient`.
    """
    request = agentext_pb.ListenSocketRequest(number=number, address=address, port=port, datagrams=datagrams)
    await agent.call(SOCKETS, "Listen", request, google_pb.Empty)


class Datagrams:
    """Datagrams that arrive at a socket in the guest, bounded in number and length.

    Args:
        limit: How many may wait for `answer` at a time.
        take: Called with the number and the content of each datagram; must not block.
        over: Called when no more datagrams will come: with the error (see `AgentClient.explain`), or with None when
            the socket was closed on request.
    """

    def __init__(
        self,
        limit: int,
        take: Callable[[int, bytes], None],
        over: Callable[[ConnectionLost | TtrpcError | None], None],
    ) -> None:
        self.stream: Stream | None = None
        self.limit = limit
        self._take = take
        self._over = over
        self._waiting: set[int] = set()

    def received(self, data: bytes) -> None:
        """`Receiver`'s."""
        try:
            piece = agentext_pb.StreamPiece.decode(data)
        except (ValueError, IndexError) as error:
            raise ProtocolError(f"the server sent a malformed datagram: {error}") from None
        number = piece.datagram
        if number in self._waiting or len(self._waiting) >= self.limit:
            raise ProtocolError("the server sent more datagrams than it was asked for")
        if not 0 < len(piece.data) <= MAX_DATAGRAM:
            raise ProtocolError(f"the server sent a datagram of {len(piece.data)} bytes")
        self._waiting.add(number)
        self._take(number, piece.data)

    def ended(self, error: ConnectionLost | TtrpcError | None) -> None:
        """`Receiver`'s."""
        self._over(error)

    def answer(self, number: int, data: bytes) -> None:
        """Answer a datagram; with empty *data* it is dropped without an answer."""
        self._waiting.discard(number)
        if self.stream is not None:
            self.stream.send(agentext_pb.StreamPiece(datagram=number, data=data).encode())


async def exchange(agent: AgentClient, number: int, datagrams: Datagrams) -> None:
    """Start to receive a socket's datagrams.

    Args:
        agent: The agent.
        number: Number of the socket, made by `listen_loopback`.
        datagrams: Takes them.

    Raises:
        KataError: See `AgentClient`.
    """
    first = agentext_pb.StreamPiece(socket=number, credit=datagrams.limit)
    datagrams.stream = await agent.open(SOCKETS, "Exchange", first.encode(), datagrams)


async def close_socket(agent: AgentClient, number: int) -> None:
    """Close a socket made by `listen` or `listen_loopback`; accepted connections go on.

    Raises:
        KataError: See `AgentClient`.
    """
    await agent.call(SOCKETS, "Close", agentext_pb.CloseSocketRequest(number=number), google_pb.Empty)


async def accept(agent: AgentClient, number: int) -> Connection | None:
    """Wait for the next connection to a socket made by `listen` or `listen_loopback`.

    Returns:
        The connection; None when the socket was closed.

    Raises:
        KataError: See `AgentClient`.
    """
    pieces = Pieces(SOCKET_WINDOW)
    first = agentext_pb.StreamPiece(socket=number, credit=SOCKET_WINDOW)
    connection = await _opened(agent, SOCKETS, "Accept", first, pieces)
    try:
        while not pieces.begun and not pieces.over:
            await pieces.news()
    except BaseException:
        connection.close()  # one may have been accepted at this very moment
        raise
    if pieces.begun:
        return connection
    if pieces.error is not None:
        raise await agent.explain(pieces.error)
    return None
