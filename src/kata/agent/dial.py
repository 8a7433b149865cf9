"""Connections to what listens on the guest's loopback (``kata.agent.v1.Dial``, see ``agentext.proto``)."""

from __future__ import annotations

from ..proto import agentext_pb
from .streams import INPUT_PIECE, INPUT_WINDOW, OUTPUT_WINDOW, Pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .client import AgentClient

FEATURE = "kata.dial"
"""How an agent announces it (``AgentDetails.extra_features``)."""
SERVICE = "kata.agent.v1.Dial"


class Connection:
    """A TCP connection in the guest; made by `dial`."""

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


async def dial(agent: AgentClient, port: int) -> Connection:
    """Begin to connect to a port of the guest's loopback; the first `Connection.read` says how that went.

    Raises:
        KataError: As of `AgentClient`.
    """
    pieces = Pieces(OUTPUT_WINDOW)
    pieces.credit = INPUT_WINDOW
    first = agentext_pb.StreamPiece(port=port, credit=OUTPUT_WINDOW).encode()
    pieces.stream = await agent.open(SERVICE, "Tcp", first, pieces)
    return Connection(agent, pieces)
