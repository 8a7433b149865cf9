"""All that the monitor knows of its node, wired together."""

from __future__ import annotations

import asyncio

from kata.monitor.cri import Pods
from kata.monitor.discovery import Discovery, Sandbox
from kata.monitor.engines import Engines
from kata.monitor.life import Life
from kata.monitor.sampling import Sampler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Node:
    """The sandboxes of this node, and the ways to ask them. Made inside a running event loop.

    Args:
        places: Directories of sandboxes.
        endpoints: Paths of CRI sockets.
        timeout_s: Deadline for one sandbox.
        parallel: How many sandboxes are asked at a time.
    """

    def __init__(
        self, places: Sequence[str], endpoints: Sequence[str], timeout_s: float, parallel: int
    ) -> None:
        self.engines = Engines(parallel, timeout_s)
        self.pods = Pods(endpoints)
        self._discovery = Discovery(places, self._changed)
        self._life = Life(lambda event: self.sampler.tell("life", event))
        self.sampler = Sampler(self.engines, self.pods, self.sandboxes, self._looked_at)
        self._changed()
        asyncio.get_running_loop().add_reader(self._discovery.fileno(), self._discovery.read)

    async def close(self) -> None:
        """Stop everything that goes on."""
        asyncio.get_running_loop().remove_reader(self._discovery.fileno())
        await self.sampler.close()
        await self.pods.close()
        self._discovery.close()

    @property
    def blind(self) -> bool:
        """Whether sandboxes cannot be watched for."""
        return self._discovery.blind

    def sandboxes(self) -> list[Sandbox]:
        """Those of this node, in the order of their ids."""
        return self._discovery.sandboxes()

    def find(self, name: str) -> Sandbox | None:
        """The sandbox with this id."""
        return self._discovery.find(name)

    def _looked_at(self, by_somebody: bool) -> None:
        if by_somebody:
            self._life.begin()
        else:
            self._life.end()

    def _changed(self) -> None:
        self.pods.now_there(one.id for one in self._discovery.sandboxes())
