"""Connections to what listens in the guest, and from the guest to sockets that stand for the host's
(``kata.agent.v1.Dial`` and ``Sockets``, see ``agentext.proto``).
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
"""How an agent announces it (``AgentDetails.extra_features``)."""
SERVICE = "kata.agent.v1.Dial"
SOCKETS_FEATURE = "kata.sockets"
SOCKETS = "kata.agent.v1.Sockets"
INTERNET_FEATURE = "kata.internet"
"""Both services know Internet addresses."""
SOCKET_WINDOW = 1 << 18
"""Of one connection to a socket: the guest makes as many as are let in."""

MAX_DATAGRAM = 4096
"""The longest that the agent hands on; the protocol says so."""


class Connection:
    """A connection in the guest; made by `dial` or `accept`."""

    def __init__(self, agent: AgentClient, pieces: Pieces) -> None:
        self._agent = agent
        self._pieces = pieces

    async def read(self) -> bytes:
        """The next piece; empty when the other side sends no more. It may still be written to.

        Raises:
            KataError: Nobody listens there, or as of `AgentClient`.
        """
        data = await self._pieces.take()
        if not data and self._pieces.error is not None:
            raise await self._agent.explain(self._pieces.error)
        return data

    async def write(self, data: bytes) -> bool:
        """Send all of *data*; returns when the window has taken it. False when the other side is gone."""
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
        """Send no more; what has been written goes before that. The other side may go on."""
        if not self._pieces.over and self._pieces.stream is not None:
            self._pieces.stream.send(agentext_pb.StreamPiece(end=True).encode())

    def close(self) -> None:
        """Close it in both directions, behind what has been written."""
        if not self._pieces.over and self._pieces.stream is not None:
            self._pieces.stream.send(b"", last=True)


async def dial(agent: AgentClient, port: int, address: bytes = b"") -> Connection:
    """Begin to connect to a TCP port in the guest; the first `Connection.read` says how that went.

    Args:
        agent: The agent.
        port: The port.
        address: Four or sixteen bytes; empty is the guest's loopback. Others need `INTERNET_FEATURE`.

    Raises:
        KataError: As of `AgentClient`.
    """
    first = agentext_pb.StreamPiece(port=port, credit=OUTPUT_WINDOW, address=address)
    return await _opened(agent, SERVICE, "Tcp", first, Pieces(OUTPUT_WINDOW))


async def _opened(
    agent: AgentClient, service: str, method: str, first: agentext_pb.StreamPiece, pieces: Pieces
) -> Connection:
    pieces.credit = INPUT_WINDOW
    pieces.stream = await agent.open(service, method, first.encode(), pieces)
    return Connection(agent, pieces)


async def listen(agent: AgentClient, number: int, path: str, mode: int, uid: int, gid: int) -> None:
    """Make a listening unix socket in the guest.

    Raises:
        KataError: As of `AgentClient`.
    """
    request = agentext_pb.ListenSocketRequest(number=number, path=path, mode=mode, uid=uid, gid=gid)
    await agent.call(SOCKETS, "Listen", request, google_pb.Empty)


async def listen_loopback(
    agent: AgentClient, number: int, address: bytes, port: int, *, datagrams: bool = False
) -> None:
    """Have a port of the guest's loopback, without taking it from programs that bind it on every address.

    Args:
        agent: The agent, which has `INTERNET_FEATURE`.
        number: The socket's, for `accept` and `exchange`.
        address: Four bytes.
        port: The port.
        datagrams: UDP, in place of TCP.

    Raises:
        KataError: As of `AgentClient`.
    """
    request = agentext_pb.ListenSocketRequest(number=number, address=address, port=port, datagrams=datagrams)
    await agent.call(SOCKETS, "Listen", request, google_pb.Empty)


class Datagrams:
    """Datagrams that come to a socket in the guest. Never more at a time than was asked for, and none that is too long.

    Args:
        limit: How many may wait for `answer` at a time.
        take: Is given each and its number; must not block.
        over: Is called when no more come, with the reason for `AgentClient.explain`; None where it is a good one.
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
        """Send the answer to a datagram; without data there is none."""
        self._waiting.discard(number)
        if self.stream is not None:
            self.stream.send(agentext_pb.StreamPiece(datagram=number, data=data).encode())


async def exchange(agent: AgentClient, number: int, datagrams: Datagrams) -> None:
    """Let a socket's datagrams come.

    Raises:
        KataError: As of `AgentClient`.
    """
    first = agentext_pb.StreamPiece(socket=number, credit=datagrams.limit)
    datagrams.stream = await agent.open(SOCKETS, "Exchange", first.encode(), datagrams)


async def close_socket(agent: AgentClient, number: int) -> None:
    """Take such a socket away; connections that have been let in go on.

    Raises:
        KataError: As of `AgentClient`.
    """
    await agent.call(SOCKETS, "Close", agentext_pb.CloseSocketRequest(number=number), google_pb.Empty)


async def accept(agent: AgentClient, number: int) -> Connection | None:
    """Wait for the next connection to such a socket; None when it has been taken away.

    Raises:
        KataError: As of `AgentClient`.
    """
    pieces = Pieces(SOCKET_WINDOW)
    first = agentext_pb.StreamPiece(socket=number, credit=SOCKET_WINDOW)
    connection = await _opened(agent, SOCKETS, "Accept", first, pieces)
    try:
        while not pieces.begun and not pieces.over:
            await pieces.news()
    except BaseException:
        connection.close()  # one may have come at this very moment
        raise
    if pieces.begun:
        return connection
    if pieces.error is not None:
        raise await agent.explain(pieces.error)
    return None
