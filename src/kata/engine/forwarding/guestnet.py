"""The guest's network as its owner has it, from the machine's start to its end.

What the guest is told is compared with what it was told before. While containers run, the network namespace is
watched: interfaces that come and go (``docker network connect``), addresses, routes and rules that change.
"""

from __future__ import annotations

import asyncio
import socket
import time

from kata.errors import AgentError, KataError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.access import HasConfig, MachineAccess
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.hypervisor.base import Nic
    from kata.hypervisor.protocols import Machine
    from kata.network.bridge import BridgedPlan
    from kata.network.routing import Entry
    from kata.network.user import NetworkPlan
    from kata.settings import EndpointSettings, SandboxSettings

FEATURE = "kata.network"
"""How an agent announces it (``AgentDetails.extra_features``)."""
_PERMISSION_DENIED = 7
_MAX_SYSCTLS = 4096
"""The agent takes so many in one request (``agent/src/network.rs``)."""
_QUIET_S = 0.1
"""CNI plugins configure a namespace in several steps: the guest is told after this much time (in seconds) without a
change."""
_AT_LATEST_S = 1.0
_GROUPS = (1, 5, 7, 8, 9, 11, 12, 19, 24, 25)
"""Of rtnetlink: links, addresses, routes, rules and parameters of both families (``linux/rtnetlink.h``)."""
_SOL_NETLINK, _MEMBERSHIP = 270, 1
_READ = 1 << 16


class GuestNetwork:
    """Tells the guest of its network.

    Args:
        settings: The sandbox's.
        runtime: The machine.
        tasks: The engine's.
        timings: Where the first time is noted down.
        containers: Those of the sandbox, by their ids.
        names_up: Is called with a container's specification when the network has changed: what it asks for names may be
            another server then.
    """

    def __init__(
        self,
        settings: SandboxSettings,
        runtime: MachineAccess,
        tasks: Tasks,
        timings: Timings,
        containers: Mapping[str, HasConfig],
        names_up: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._runtime = runtime
        self._tasks = tasks
        self._timings = timings
        self._containers = containers
        self._names_up = names_up
        self._lock = asyncio.Lock()
        self._sysctls: dict[str, dict[str, str]] = {}
        self._routes: list[Entry] = []
        self._rules: list[Entry] = []
        self._hidden: set[str] = set()
        self._names: dict[str, str] = {}
        self._said: set[str] = set()
        self._is_denied = False
        self._socket: socket.socket | None = None
        self._is_watching = False
        self._attaching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._first_event_s = 0.0

    @property
    def _plan(self) -> NetworkPlan | None:
        return self._runtime.machine.network

    async def configure(self, agent: AgentClient) -> None:
        """Give the guest's interfaces what they have outside, if there are any (yet).

        Raises:
            KataError: The guest refused, or the network's helper is gone.
        """
        async with self._lock:
            await self._configure(agent)

    async def come_up(self) -> None:
        """Return when the guest has the network that a container is to find. From then on it follows what happens.

        Raises:
            KataError: It could not be set up.
        """
        plan = self._plan
        async with self._lock:
            # Some clients wire a container's network namespace only between create and start.
            if plan is not None and plan.external_netns:
                if self._socket is None:
                    self._listen()  # before the look: what happens meanwhile is followed afterwards
                is_new = await self._tasks.run_blocking(lambda: plan.rescan(is_running=self._is_watching))
                if is_new:
                    agent = await self._runtime.ready()
                    await self._plug_in(plan)
                    await self._runtime.race_vm_exit(self._configure(agent))
            await self._hide_idle()
        if self._socket is not None and not self._is_watching:
            self._is_watching = True
            asyncio.get_running_loop().add_reader(self._socket, self._something_happened)

    async def connect(self, endpoint: EndpointSettings) -> None:
        """Put the guest into a further network of `kata network`.

        Args:
            endpoint: The network.

        Raises:
            UnsupportedError: Its machine has no interface for that.
            KataError: The network is gone, or the guest refused.
        """
        async with self._lock:
            plan = self._bridged(endpoint.network)
            await self._tasks.run_blocking(plan.connect, endpoint)
            try:
                await self._tell()
            except BaseException:
                await self._tasks.run_blocking(plan.disconnect, endpoint.network)
                raise
            self._settings.network.endpoints.append(endpoint)

    async def disconnect(self, network: str) -> None:
        """Take the guest out of a network of `kata network`, by its name.

        Raises:
            NotFoundError: It is not in that network.
            KataError: The guest refused.
        """
        async with self._lock:
            await self._tasks.run_blocking(self._bridged(network).disconnect, network)
            kept = [one for one in self._settings.network.endpoints if one.network != network]
            self._settings.network.endpoints = kept
            await self._tell()

    def _bridged(self, network: str) -> BridgedPlan:
        from kata.network.bridge import BridgedPlan

        if not isinstance(self._plan, BridgedPlan):
            raise UnsupportedError(
                f"the machine of {self._settings.id} was started without an interface for the network {network}",
                f"kata stop {self._settings.id}; kata network connect {network} {self._settings.id};"
                f" kata start {self._settings.id}",
            )
        return self._plan

    async def _tell(self) -> None:
        agent = await self._runtime.ready()
        await self._runtime.race_vm_exit(self._configure(agent))
        await self._hide_idle()

    def close(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    # ---- telling ----

    async def _configure(self, agent: AgentClient) -> None:
        from kata.proto import types_pb

        plan = self._plan
        if plan is None or not (plan.interfaces or self._names):
            return
        began = time.monotonic_ns()
        self._forget_gone(plan)
        parameters = await self._tasks.run_blocking(plan.sysctls) if self._is_able(agent) else []
        for number, interface in enumerate(plan.interfaces):
            if self._is_able(agent):
                try:
                    await self._prepare(
                        agent, interface["devicePath"], interface["name"], parameters[number]
                    )
                except AgentError as error:
                    if error.code != _PERMISSION_DENIED:
                        raise
                    self._is_denied = True  # by a policy in the guest that does not know of it
            await agent.update_interface(types_pb.Interface.from_dict(interface))
        if plan.external_netns and not self._is_able(agent):
            self._say("the guest has no kernel parameters of its network: its agent cannot set them")
        await self._tell_routes(agent, plan, is_able=self._is_able(agent))
        if plan.neighbors:
            await agent.add_neighbors([types_pb.ARPNeighbor.from_dict(one) for one in plan.neighbors])
        for sentence in plan.left_out:
            self._say(sentence)
        failure = plan.failure()
        if failure is not None:
            raise failure
        self._timings.add("network", began)

    def _is_able(self, agent: AgentClient) -> bool:
        return FEATURE in agent.features and not self._is_denied

    def _forget_gone(self, plan: NetworkPlan) -> None:
        """What an interface was told is gone with it, and with its name."""
        now = {interface["devicePath"]: interface["name"] for interface in plan.interfaces}
        for path, name in self._names.items():
            if now.get(path) != name:
                self._sysctls.pop(path, None)
        self._names = now

    async def _prepare(self, agent: AgentClient, path: str, name: str, wanted: Mapping[str, str]) -> None:
        from kata.network import sysctls
        from kata.proto import agentext_pb

        before = self._sysctls.get(path)
        told = sysctls.changes(wanted, before or {})
        if before is not None and any(sysctls.reaches_all(parameter) for parameter in told):
            # Which may have changed those of each interface in the guest.
            told = {**told, **wanted}
            self._sysctls.clear()
        for parameter in self._of_containers():
            told.pop(parameter, None)
        if before is not None and not told:
            return
        for first in range(0, max(len(told), 1), _MAX_SYSCTLS):
            names = list(told)[first : first + _MAX_SYSCTLS]
            request = agentext_pb.PrepareNetworkRequest(
                device_path=path,
                name=name,
                sysctls=[agentext_pb.NetworkSysctl(name=key, value=told[key]) for key in names],
            )
            refused = await agent.prepare_network(request)
            self._hidden.discard(path)
            for position, reason in refused[: len(names)]:
                if position < len(names):
                    parameter = f"net/{names[position]}".translate({ord("."): "/", ord("/"): "."})
                    self._say(f"{parameter}={told[names[position]]} is not set in the guest: {reason}")
        self._sysctls[path] = {**(before or {}), **told}

    def _of_containers(self) -> set[str]:
        """The kernel parameters that containers set themselves, which the namespace's stand behind."""
        from kata.network import sysctls

        named = set(self._settings.sysctls)
        for container in self._containers.values():
            named |= set((container.config.get("linux") or {}).get("sysctl") or {})
        return {sysctls.path(name) for name in named}

    async def _tell_routes(self, agent: AgentClient, plan: NetworkPlan, *, is_able: bool) -> None:
        from kata.network import routing
        from kata.proto import agentext_pb, types_pb

        if plan.routing is None or not is_able:
            routes = plan.routes
            if plan.routing is not None:
                left_out: list[str] = []
                routes = routing.in_stock_protocol(plan.routing, plan.names, left_out)
                left_out += [
                    f"the rule {rule.text} is not in the guest: its agent cannot say it"
                    for rule in plan.rules
                    if rule not in routing.DEFAULT_RULES
                ]
                for sentence in left_out:
                    self._say(sentence)
            await agent.update_routes([types_pb.Route.from_dict(route) for route in routes])
            return
        # There may be thousands of each.
        old_rules = dict.fromkeys(self._rules or routing.DEFAULT_RULES)
        new_routes, new_rules = set(plan.routing), set(plan.rules)
        rules = [rule for rule in plan.rules if rule not in old_rules]
        request = agentext_pb.RouteRequest(
            remove_routes=[route.body for route in self._routes if route not in new_routes],
            # All of them: with an address, or with an interface that was down, the guest's kernel has dropped some.
            routes=[route.body for route in plan.routing],
            remove_rules=[rule.body for rule in old_rules if rule not in new_rules],
            rules=[rule.body for rule in rules],
            interfaces=[
                agentext_pb.NumberedInterface(number=number, name=name)
                for number, name in plan.names.items()
            ],
        )
        refused = await agent.route(request)
        told = [*plan.routing, *rules]
        for position, reason in refused[: len(told)]:
            if position < len(told):
                kind = "route" if position < len(plan.routing) else "rule"
                self._say(f"the {kind} {told[position].text} is not in the guest as it should be: {reason}")
        self._routes, self._rules = list(plan.routing), list(plan.rules)

    def _say(self, sentence: str) -> None:
        """Into the log, once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._tasks.log(sentence)

    async def _plug_in(self, plan: NetworkPlan) -> None:
        """Give the machine the interfaces that have come.

        A caller that is cancelled leaves this to end, since the machine cannot be told to stop in the middle of it:
        each interface's descriptor stays open until then, and its address is known afterwards.
        """
        vm = self._runtime.vm
        assert vm is not None
        if self._attaching is not None and not self._attaching.done():  # its caller was cancelled
            await self._runtime.race_vm_exit(asyncio.wait({self._attaching}))
        arrived = plan.take_pending_hotplugs()
        attaching = self._attaching = asyncio.create_task(_attach(vm, plan, arrived))

        def attached(_task: asyncio.Task[None]) -> None:
            for _, nic in arrived:
                nic.close()

        attaching.add_done_callback(attached)
        try:
            await self._runtime.race_vm_exit(attaching, outlives_caller=True)
        except asyncio.CancelledError:
            attaching.add_done_callback(self._say_failure)
            raise

    def _say_failure(self, attaching: asyncio.Task[None]) -> None:
        error = None if attaching.cancelled() else attaching.exception()
        if error is not None:
            self._say(f"an interface was not given to the machine: {error}")

    async def _hide_idle(self) -> None:
        """What stands for nothing is not seen: a container without a network has no interface."""
        plan = self._plan
        paths = plan.idle() if plan is not None else self._runtime.machine.nic_addresses
        if self._hidden.issuperset(paths):
            return
        agent = await self._runtime.ready()
        if not self._is_able(agent):
            return
        for path in paths:
            if path not in self._hidden:
                try:
                    await self._runtime.race_vm_exit(agent.hide_interface(path))
                except AgentError as error:
                    # A container has an interface too many then, which is down.
                    self._say(
                        f"the interface at {path} that stands for nothing is not hidden: {error.message}"
                    )
                self._hidden.add(path)
                self._sysctls.pop(path, None)

    # ---- watching ----

    def _listen(self) -> None:
        # The engine is in the namespace.
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        self._socket.bind((0, 0))
        for group in _GROUPS:
            self._socket.setsockopt(_SOL_NETLINK, _MEMBERSHIP, group)

    def _something_happened(self) -> None:
        assert self._socket is not None
        try:
            while self._socket.recv(_READ):
                pass
        except OSError:
            pass  # all is read; or there was more than fits, and something has happened for certain
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is None:
            self._first_event_s = now
        else:
            self._timer.cancel()
        at = min(now + _QUIET_S, max(now, self._first_event_s + _AT_LATEST_S))
        self._timer = loop.call_at(at, self._begin_to_follow)

    def _begin_to_follow(self) -> None:
        self._timer = None
        if self._runtime.is_lost or self._runtime.vm is None:
            return
        self._tasks.create_task(self._follow())

    async def _follow(self) -> None:
        """Do in the guest what has happened in the namespace. What fails is told in the log."""
        plan = self._plan
        assert plan is not None
        try:
            async with self._lock:
                await self._tasks.run_blocking(lambda: plan.rescan(is_running=True))
                agent = await self._runtime.ready()
                await self._plug_in(plan)
                await self._runtime.race_vm_exit(self._configure(agent))
                await self._hide_idle()
            for container in list(self._containers.values()):
                await self._names_up(container.config)
        except (KataError, OSError) as error:
            self._say(f"the guest does not follow a change of its network: {error}")


async def _attach(vm: Machine, plan: NetworkPlan, arrived: list[tuple[int, Nic]]) -> None:
    for index, nic in arrived:
        plan.place(index, await vm.attach_nic(index, nic))
