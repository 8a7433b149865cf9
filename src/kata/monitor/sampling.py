"""What the page shows, taken while somebody looks: one sampling for all who do, and none while nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import time

from kata import __version__
from kata.monitor.engines import Unreachable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kata.monitor.cri import Pods
    from kata.monitor.discovery import Sandbox
    from kata.monitor.engines import Engines

STATE = "/kata/v1/state"
MAX_STATE_BYTES = 512 << 10
MAX_SAMPLE_BYTES = 32 << 20
"""Maximum size of the states of all sandboxes."""
FRESH_S = 0.5
"""A sample that is younger serves another who asks."""
MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 60.0
MAX_WATCHERS = 64
MAX_PENDING = 256
"""How many events wait for a watcher that is slow to read; it loses the oldest."""


class Sampler:
    """Samples the state of all sandboxes.

    Args:
        engines: The way to them.
        pods: Their pods.
        sandboxes: Which there are.
        looked_at: Called with whether anybody watches, when that changes.
    """

    def __init__(
        self,
        engines: Engines,
        pods: Pods,
        sandboxes: Callable[[], Sequence[Sandbox]],
        looked_at: Callable[[bool], None],
    ) -> None:
        self._looked_at = looked_at
        self._engines = engines
        self._pods = pods
        self._sandboxes = sandboxes
        self._lock = asyncio.Lock()
        self._taken = -FRESH_S
        self._sample = b""
        self._room = 0
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def sample(self) -> bytes:
        """All sandboxes, as ``/api/v1/sandboxes`` answers."""
        async with self._lock:
            if time.monotonic() - self._taken >= FRESH_S:
                sandboxes = self._sandboxes()
                self._pods.look_again()
                self._room = MAX_SAMPLE_BYTES
                states = await asyncio.gather(*(self.state(one, counted=True) for one in sandboxes))
                head = encode({"time": time.time(), "node": os.uname().nodename, "version": __version__})
                self._sample = b'%s,"sandboxes":[%s]}' % (head[:-1], b",".join(states))
                self._taken = time.monotonic()
            return self._sample

    async def state(self, sandbox: Sandbox, *, counted: bool = False) -> bytes:
        """What one sandbox says of itself, with what the monitor knows of it, as JSON.

        Args:
            sandbox: Which.
            counted: It is one of a sample, whose size is bounded as a whole.
        """
        try:
            async with self._engines.get(sandbox, STATE) as answer:
                if answer.status != 200:
                    raise Unreachable(f"its engine answered with status {answer.status}")
                if len(answer.body) > MAX_STATE_BYTES:
                    raise Unreachable(f"its state is larger than {MAX_STATE_BYTES} bytes")
                if counted:
                    self._room -= len(answer.body)
                    if self._room < 0:
                        raise Unreachable("the states of all sandboxes are too large together")
                try:
                    return self._completed(sandbox, decode(answer.body), "")
                except RecursionError:  # what could just be read may be too deep to be written
                    raise Unreachable("its state is nested too deeply") from None
        except Unreachable as error:
            return self._completed(sandbox, {"state": "unknown", "name": "", "containers": []}, str(error))

    def _completed(self, sandbox: Sandbox, found: dict[str, Any], problem: str) -> bytes:
        pod = self._pods.of(sandbox.id)
        found["id"] = sandbox.id
        found["cri"] = dict(zip(("uid", "name", "namespace"), pod, strict=True)) if pod is not None else None
        found["reachable"] = not problem
        found["problem"] = problem
        return encode(found)

    # ---- those who watch ----

    def attach(self, interval_s: float) -> Watcher:
        """Begin to send samples to somebody.

        Raises:
            OverflowError: Too many watch already.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise OverflowError
        watcher = Watcher(min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S))
        if not self._watchers:
            self._looked_at(True)
        self._watchers.add(watcher)
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return watcher

    def detach(self, watcher: Watcher) -> None:
        """End that; with the last one, sampling ends."""
        self._watchers.discard(watcher)
        watcher.put(None)
        if not self._watchers:
            self._looked_at(False)
            if self._task is not None:
                self._task.cancel()
                self._task = None

    def tell(self, name: str, data: bytes) -> None:
        """Send an event to all who watch."""
        for watcher in self._watchers:
            watcher.put((name, data))

    async def close(self) -> None:
        """Let everybody go."""
        task = self._task
        for watcher in list(self._watchers):
            self.detach(watcher)
        if task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            now = time.monotonic()
            due = [one for one in self._watchers if one.due <= now + 0.05]
            if due:
                data = await self.sample()
                now = time.monotonic()
                for one in due:
                    one.due = now + one.interval_s
                    one.put(("snapshot", data))
            wait = min((one.due for one in self._watchers), default=now + MAX_INTERVAL_S) - time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.05, wait))


class Watcher:
    """Somebody who watches.

    Args:
        interval_s: How often a sample is wanted.

    Attributes:
        due: When the next one is (monotonic).
    """

    __slots__ = ("_arrived", "_events", "_sample", "due", "interval_s")

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.due = 0.0
        self._sample: bytes | None = None
        self._events: list[tuple[str, bytes] | None] = []
        self._arrived = asyncio.Event()

    def put(self, item: tuple[str, bytes] | None) -> None:
        """Hand something over; of samples only the newest waits, None is the end."""
        if item is not None and item[0] == "snapshot":
            self._sample = item[1]
        else:
            self._events.append(item)
            if len(self._events) > MAX_PENDING:
                del self._events[0]
        self._arrived.set()

    async def next(self) -> tuple[str, bytes] | None:
        """What comes next; None is the end."""
        while True:
            if self._events:
                return self._events.pop(0)
            if self._sample is not None:
                data, self._sample = self._sample, None
                return "snapshot", data
            self._arrived.clear()
            await self._arrived.wait()


def _no_number(text: str) -> None:
    """For ``NaN`` and the like, which Python reads and browsers do not."""


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def decode(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Unreachable: It is none.
        RecursionError: It is nested too deeply.
    """
    try:
        found = json.loads(raw, parse_constant=_no_number, parse_float=_finite)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unreachable("its state is no JSON object")
    return found


def encode(value: object) -> bytes:
    """JSON without line breaks, as server-sent events need it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
