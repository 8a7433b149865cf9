"""A process's standard streams: direct streams where the agent offers them, otherwise one call for each read or write.

A direct stream is one streaming call (`kata.agent.v1.Streams`, see ``agentext.proto``). Neither side sends more than
the other one has granted credit for, so a slow reader stops only its own stream, and a fast one does not wait for a
round trip with each message.
"""

from __future__ import annotations

import asyncio
from collections import deque

from kata.agent.client import STREAMS
from kata.proto import agentext_pb
from kata.proto.wire import get_varint, put_varint
from kata.ttrpc.status import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient
    from kata.ttrpc.client import Stream
    from kata.ttrpc.status import ConnectionLost, TtrpcError

FEATURE = STREAMS
SERVICE = "kata.agent.v1.Streams"
NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}
OUTPUT_WINDOW = 1 << 20
"""Bytes of output that may be in transit, or buffered here."""
INPUT_WINDOW = 1 << 20
"""Bytes of input that may be in transit before the agent grants credit, as the protocol defines."""
INPUT_PIECE = 1 << 18
READ_BYTES = 1 << 20
"""Bytes that one ReadStdout asks for; the agent answers as soon as it has any data."""
JOINED = 1 << 16
SMALL = 1 << 12
"""Pieces shorter than this are joined: a process that writes single bytes must not cost an object for each."""
_DATA_KEY = b"\x0a"
"""Key of field 1 of a StreamPiece, its data."""


def first_piece(container_id: str, exec_id: str, name: str, credit: int = 0) -> bytes:
    """Encode the message that begins a direct stream.

    Args:
        container_id: The container.
        exec_id: The process in it.
        name: ``stdin``, ``stdout`` or ``stderr``.
        credit: Bytes that the agent may send.
    """
    target = agentext_pb.StreamTarget(container_id=container_id, exec_id=exec_id, stream=NUMBERS[name])
    return agentext_pb.StreamPiece(target=target, credit=credit).encode()


def decode_piece(data: bytes) -> tuple[bytes, int, bool]:
    """Decode a StreamPiece: its data, the credit that it grants, and whether it ends the data.

    Raises:
        ValueError, IndexError: It is malformed.
    """
    if data[:1] == _DATA_KEY:
        # The usual piece has data and nothing else: one copy, and no message object.
        length, at = get_varint(data, 1)
        if at + length == len(data):
            return data[at:], 0, False
    piece = agentext_pb.StreamPiece.decode(data)
    return piece.data, piece.credit, piece.end


def data_head(length: int) -> bytes:
    """Encode what precedes the data in a StreamPiece that has no other field."""
    out = bytearray(_DATA_KEY)
    put_varint(out, length)
    return bytes(out)


class Pieces:
    """Received data of a streaming call, kept until it is read; bounded by the window.

    Args:
        window: Bytes that the server may send before it is granted more credit.

    Attributes:
        begun: A message has arrived.
        finished: The server has ended its data; the other direction of a connection may go on.
        over: The call has ended; `error` says why (None: successfully).
        credit: Bytes that the server still accepts.
    """

    def __init__(self, window: int) -> None:
        self.stream: Stream | None = None
        self.error: ConnectionLost | TtrpcError | None = None
        self.over = False
        self.begun = False
        self.finished = False
        self.credit = 0
        self._window = window
        self._expected = window
        self._owed = 0
        self._pieces: deque[bytes | bytearray] = deque()
        self._news = asyncio.Event()

    def received(self, data: bytes) -> None:
        """`Receiver`'s."""
        try:
            content, credit, end = decode_piece(data)
        except (ValueError, IndexError) as error:
            raise ProtocolError(f"the server sent a malformed piece of a stream: {error}") from None
        self.begun = True
        self.credit += credit
        if self.credit > INPUT_WINDOW:
            raise ProtocolError("the server gave more credit than was used")
        self._expected -= len(content)
        if self._expected < 0 or (content and self.finished):
            raise ProtocolError("the server sent more of a stream than it was asked for")
        self.finished |= end
        if content:
            last = self._pieces[-1] if self._pieces else None
            if isinstance(last, bytearray) and len(last) + len(content) <= JOINED:
                last += content
            else:
                self._pieces.append(bytearray(content) if len(content) < SMALL else content)
        self._news.set()

    def ended(self, error: ConnectionLost | TtrpcError | None) -> None:
        """`Receiver`'s."""
        self.over, self.error = True, error
        self._news.set()

    async def news(self) -> None:
        """Wait until a message has arrived, or the call has ended, since the previous call of this method."""
        await self._news.wait()
        self._news.clear()

    async def take(self) -> bytes:
        """Wait for the next data; empty at the end."""
        while not self._pieces and not self.finished and not self.over:
            await self.news()
        if not self._pieces:
            return b""
        piece = bytes(self._pieces.popleft())
        self._owed += len(piece)
        if self._owed >= self._window // 2 and self.stream is not None:
            # Grant credit once half the window is used, rather than with each piece.
            self.stream.send(agentext_pb.StreamPiece(credit=self._owed).encode())
            self._expected += self._owed
            self._owed = 0
        return piece


class Output:
    """One output stream of a process.

    Args:
        agent: The agent; `AgentClient.negotiate_features` was called.
        container_id, exec_id: The process.
        name: ``stdout`` or ``stderr``.
    """

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str, name: str) -> None:
        self._agent = agent
        self._process = (container_id, exec_id)
        self._name = name
        self._direct = FEATURE in agent.features
        self._pieces: Pieces | None = None

    async def read(self) -> bytes:
        """Read the next data; empty at end of file.

        Raises:
            KataError: See `AgentClient`.
        """
        if not self._direct:
            return await self._agent.read(*self._process, self._name, READ_BYTES)
        if self._pieces is None:
            self._pieces = pieces = Pieces(OUTPUT_WINDOW)
            first = first_piece(*self._process, self._name, OUTPUT_WINDOW)
            pieces.stream = await self._agent.open(SERVICE, "Attach", first, pieces)
        data = await self._pieces.take()
        if not data and self._pieces.error is not None:
            raise await self._agent.explain(self._pieces.error)
        return data


class Input:
    """The standard input of a process. See `Output` for its parameters."""

    def __init__(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._process = (container_id, exec_id)
        self._direct = FEATURE in agent.features
        self._pieces: Pieces | None = None

    async def write(self, data: bytes) -> None:
        """Send all of *data*. Returns when the process has taken it, or the stream's window has room for it.

        Raises:
            KataError: The process accepts no more input; see also `AgentClient`.
        """
        if not self._direct:
            await self._agent.write_stdin(*self._process, data)
            return
        pieces = await self._open()
        at = 0
        view = memoryview(data)
        while at < len(data):
            while pieces.credit <= 0 and not pieces.over:
                await pieces.news()
            if pieces.over:
                break
            piece = view[at : at + min(pieces.credit, INPUT_PIECE)]
            pieces.credit -= len(piece)
            at += len(piece)
            assert pieces.stream is not None
            pieces.stream.send(data_head(len(piece)), piece)
        if pieces.error is not None:
            raise await self._agent.explain(pieces.error)

    async def close(self) -> None:
        """Close standard input, after everything written so far.

        Raises:
            KataError: See `AgentClient`.
        """
        if not self._direct or self._pieces is None:
            await self._agent.close_stdin(*self._process)
            return
        assert self._pieces.stream is not None
        self._pieces.stream.send(b"", last=True)

    async def _open(self) -> Pieces:
        if self._pieces is None:
            pieces = Pieces(0)
            pieces.credit = INPUT_WINDOW
            pieces.stream = await self._agent.open(
                SERVICE, "Attach", first_piece(*self._process, "stdin"), pieces
            )
            self._pieces = pieces
        return self._pieces
