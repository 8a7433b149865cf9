"""Telling containerd what happens to tasks: `containerd.services.events.ttrpc.v1.Events`, method Forward.

Events go out one after another, in the order in which they happened, and again until containerd has taken them:
it may be restarting. What waits is bounded; the oldest is dropped first, and that is said in the log.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque

from kata.proto import events_pb, google_pb
from kata.proto.task_pb import Envelope
from kata.ttrpc.client import Client
from kata.ttrpc.status import ConnectionLost, TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata.proto.codec import Message

SERVICE = "containerd.services.events.ttrpc.v1.Events"
LIMIT = 2048
CALL_S = 10.0
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class Publisher:
    """Sends events to containerd's socket.

    Args:
        address: Path of the socket (``TTRPC_ADDRESS``).
        namespace: containerd's namespace of the sandbox.
        log: Is given a sentence about what was lost.
    """

    def __init__(self, address: str, namespace: str, log: Callable[[str], None]) -> None:
        self._address = address
        self._namespace = namespace
        self._log = log
        self._waiting: deque[Envelope] = deque()
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._client: Client | None = None
        self._worker = asyncio.create_task(self._work())

    def publish(self, topic: str, event: Message) -> None:
        """Queue an event; never blocks."""
        if len(self._waiting) >= LIMIT:
            lost = self._waiting.popleft()
            self._log(f"containerd has not taken an event for long: {lost.topic} is dropped")
        now = time.time_ns()
        self._waiting.append(
            Envelope(
                timestamp=google_pb.Timestamp(seconds=now // 10**9, nanos=now % 10**9),
                namespace=self._namespace,
                topic=topic,
                event=google_pb.Any(type_url=event.FULL_NAME, value=event.encode()),
            )
        )
        self._empty.clear()
        self._news.set()

    async def close(self, patience_s: float) -> None:
        """Return when all events are delivered, or after `patience_s` seconds; nothing is sent afterwards."""
        try:
            await asyncio.wait_for(self._empty.wait(), patience_s)
        except TimeoutError:
            self._log(f"containerd did not take the last {len(self._waiting)} events")
        self._worker.cancel()
        self._hang_up()

    async def _work(self) -> None:
        attempt = 0
        while True:
            if not self._waiting:
                self._empty.set()
                self._news.clear()
                await self._news.wait()
            envelope = self._waiting[0]
            try:
                client = self._client = self._client or await self._connect()
                await client.call(
                    SERVICE, "Forward", events_pb.ForwardRequest(envelope=envelope), google_pb.Empty, CALL_S
                )
            except (OSError, ConnectionLost):
                self._hang_up()
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
                continue
            except TtrpcError as error:
                # It was taken and refused: the same again would be refused again.
                self._log(f"containerd refused the event {envelope.topic}: {error}")
            attempt = 0
            if self._waiting and self._waiting[0] is envelope:
                self._waiting.popleft()

    async def _connect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._address)
            return await Client.connect(sock)
        except BaseException:
            sock.close()
            raise

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
