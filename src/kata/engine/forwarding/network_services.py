"""What the engine carries between the host's network and the guest's.

Connections to published ports, connections to the loopback of the sandbox's network namespace, and questions to
Docker's resolver: all of it once the guest is up, and only where its agent can.
"""

from __future__ import annotations

import asyncio

from kata.engine.containers import etc_files
from kata.errors import KataError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.access import MachineAccess
    from kata.engine.forwarding import forward, names
    from kata.engine.tasks import Tasks
    from kata.network import sk_lookup


class NetworkServices:
    """The services of one sandbox.

    Args:
        runtime: The machine.
        tasks: The engine's.

    Attributes:
        configured: Is done when the guest has been told of its network for the first time; None before the boot.
    """

    __slots__ = ("_forwarder", "_names", "_redirect", "_runtime", "_tasks", "configured")

    def __init__(self, runtime: MachineAccess, tasks: Tasks) -> None:
        self._runtime = runtime
        self._tasks = tasks
        self.configured: asyncio.Future[None] | None = None
        self._forwarder: forward.Forwarder | None = None
        self._redirect: sk_lookup.LoopbackRedirect | None = None
        self._names: names.Names | None = None  # once a container asks Docker's resolver

    def start(self, agent: AgentClient) -> None:
        """Pass connections to published ports and to the namespace's loopback on to the guest, where both can do that.

        Raises:
            UnsupportedError: The guest's agent cannot, and a published port needs it.
        """
        from kata.agent import dial

        plan = self._runtime.machine.network
        if plan is None or not (plan.listeners or plan.external_netns):
            return
        from kata.engine.forwarding import forward

        if plan.listeners:
            if dial.INTERNET_FEATURE not in agent.features:
                raise UnsupportedError(
                    "neither this host's passt nor the guest's agent can publish TCP ports as it should be",
                    "use the guest that this program builds (kata guest build), or a newer passt",
                )
            self._forwarder = forward.published(self._runtime, self._tasks, plan, self.wait_configured)
        if not plan.external_netns or dial.FEATURE not in agent.features:
            return
        from kata.network import sk_lookup

        try:
            self._redirect = sk_lookup.LoopbackRedirect()
        except KataError as error:
            self._tasks.log(f"{error.message}. {error.hint}")
        else:
            self._forwarder = forward.to_loopback(self._runtime, self._tasks, self._redirect.listeners)

    async def wait_configured(self) -> None:
        """Return when the guest has been told of its network for the first time.

        Raises:
            KataError: It could not be set up.
        """
        if self.configured is not None:
            await asyncio.shield(self.configured)

    async def names_up(self, config: dict[str, Any], dns: list[str]) -> None:
        """Return when a container can ask for names, of whom its ``resolv.conf`` says. A failure is logged.

        Args:
            config: Its specification.
            dns: Lines of the resolv.conf that it has where it brings none of its own.
        """
        from kata.agent import dial
        from kata.network import resolver

        plan = self._runtime.machine.network
        if plan is None or not (plan.external_netns or plan.own_names):
            return
        if self._names is None and resolver.DOCKER not in await self._tasks.run_blocking(
            etc_files.name_servers, config, dns
        ):
            return
        try:
            if self._names is None:
                agent = await self._runtime.ready()
                if dial.INTERNET_FEATURE not in agent.features:
                    raise UnsupportedError("the guest's agent cannot do that", "kata guest build")
                from kata.engine.forwarding import names

                self._names = names.Names(self._runtime, self._tasks, plan.own_names)
                try:
                    await self._runtime.race_vm_exit(self._names.start(agent))
                except BaseException:
                    # The next container that asks there has it tried again.
                    self._names.close()
                    self._names = None
                    raise
            await self._tasks.run_blocking(plan.let_replies_in)
        except KataError as error:
            self._tasks.log(f"not all names are found ({resolver.DOCKER}): {error.message}")

    def close(self) -> None:
        """Carry nothing any more."""
        if self._forwarder is not None:
            self._forwarder.close()
        if self._redirect is not None:
            self._redirect.close()
        if self._names is not None:
            self._names.close()
