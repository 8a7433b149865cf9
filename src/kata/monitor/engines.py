"""Asks engines: HTTP on their management sockets, each call with a deadline and a bound on its answer.

An engine is ours and its guest is not: what comes out of a socket may be late, huge, cut off or no HTTP at all, and
each of these is an `Unreachable` with a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.monitor.discovery import Sandbox

MAX_ANSWER_BYTES = 4 << 20
"""Maximum size of one answer of one engine."""
_FREE_BYTES = 512 << 10
"""What an answer may have without asking: more than an ordinary one. Above it, few may be read at a time."""
_MOST_LARGE = 4
_CHUNK_BYTES = 64 << 10


class Unreachable(Exception):
    """A sandbox gave no usable answer. The message is a sentence for people."""


class Answer:
    """What an engine said.

    Attributes:
        status: HTTP's.
        body: At most `MAX_ANSWER_BYTES`.
    """

    __slots__ = ("body", "status")

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body


class Engines:
    """The way to all engines of the node.

    Args:
        parallel: How many are asked at a time.
        timeout_s: Deadline of one call.
    """

    def __init__(self, parallel: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._running = asyncio.Semaphore(parallel)
        self._large = asyncio.Semaphore(_MOST_LARGE)

    @contextlib.asynccontextmanager
    async def get(
        self, sandbox: Sandbox, target: str, timeout_s: float | None = None
    ) -> AsyncIterator[Answer]:
        """GET *target* of a sandbox's engine.

        Its turn lasts until the answer has been dealt with, so that the number of answers in memory is bounded, too.

        Args:
            sandbox: Whose.
            target: Path and query.
            timeout_s: Deadline once it is its turn; the usual one if None.

        Yields:
            The answer.

        Raises:
            Unreachable: There was no whole answer of HTTP in time.
        """
        limit = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        async with self._running, contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(limit):
                    answer = await self._get(sandbox, target, held)
            except TimeoutError:
                raise Unreachable(f"no answer within {limit:g} s") from None
            except (ConnectionError, FileNotFoundError, aiohttp.ClientConnectorError) as error:
                raise Unreachable(f"its engine cannot be reached: {_why(error)}") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise Unreachable(f"its engine did not answer properly: {_why(error)}") from None
            yield answer

    async def _get(self, sandbox: Sandbox, target: str, held: contextlib.AsyncExitStack) -> Answer:
        # A sandbox's directory may be too long for a socket's address.
        short = held.enter_context(sysio.SocketName(sandbox.socket))
        connector = aiohttp.UnixConnector(short, force_close=True)
        # Nothing is followed, kept or unpacked: an answer of a few bytes could lead elsewhere, or become gigabytes.
        async with (
            aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.get(
                f"http://localhost{target}", headers={"Accept-Encoding": "identity"}, allow_redirects=False
            ) as response,
        ):
            body = bytearray()
            free = True
            while chunk := await response.content.read(_CHUNK_BYTES):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise Unreachable(f"its answer is larger than {MAX_ANSWER_BYTES} bytes")
                if free and len(body) > _FREE_BYTES:
                    await held.enter_async_context(self._large)
                    free = False
            return Answer(response.status, bytes(body))


def _why(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown[:200]
