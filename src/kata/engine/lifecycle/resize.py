"""Keeping a running machine as large as what is asked of it: when containers come, and when limits change.

What is asked for is what the CRI said of the pod, and at least the sum of its containers' limits; the machine for
that follows from the formula in `kata.resources.sizing`, with `default_memory` on top for containers without a limit.
A container that comes may let the machine grow; an update grows it before the limit is raised, and shrinks it after the
limit was lowered. Beyond what a machine was started with its memory comes and goes by virtio-mem; below that, the
guest's balloon gives memory back, if every container has a limit: one without may be using it.

A limit that a container cannot have is an error, and leaves everything as it was. Memory that a guest does not give
back is none: the limit holds, and the engine's log and ``kata explain`` say how much is still the guest's.
"""

from __future__ import annotations

import asyncio

from kata.errors import HypervisorError, KataError, ResourceExhaustedError, UnsupportedError
from kata.hypervisor.base import MEMORY_STEP_MIB
from kata.resources import sizing
from kata.resources.sizing import ResourceRequest
from kata.settings import SizeSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.access import MachineAccess
    from kata.engine.tasks import Tasks
    from kata.hypervisor.protocols import Machine
    from kata.settings import SandboxSettings

FEATURE = "kata.machine"


class Size:
    """How large a machine is, or is to be.

    Args:
        vcpus: Processors that the guest uses.
        memory_mib: Memory by the formula of `kata.resources.sizing`.
        total_bytes: The ``MemTotal`` that a balloon leaves the guest; 0 without one.
    """

    __slots__ = ("memory_mib", "total_bytes", "vcpus")

    def __init__(self, vcpus: int, memory_mib: int, total_bytes: int = 0) -> None:
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self.total_bytes = total_bytes

    def _values(self) -> tuple[int, int, int]:
        return self.vcpus, self.memory_mib, self.total_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


class MachineResizer:
    """The size of one sandbox's machine.

    Args:
        settings: The sandbox's.
        runtime: The machine.
        tasks: The engine's.

    Attributes:
        vcpus: How many processors the guest uses.
        plugged_mib: Memory beside what the machine was started with.
        returned_mib: Memory that the guest has given back, in its balloon.
        on_resize: Is given the processors and the memory (MiB) of a machine that has a new size.
    """

    def __init__(self, settings: SandboxSettings, runtime: MachineAccess, tasks: Tasks) -> None:
        # A pod that is not described yet has no machine that anybody could ask about.
        size = settings.machine.size if settings.machine else SizeSettings(vcpus=1, memory_mib=0)
        self._runtime = runtime
        self._tasks = tasks
        self._lock = asyncio.Lock()
        self._kernel = size.kernel
        self._first_vcpus = size.vcpus
        self._first_mib = size.memory_mib
        self._wanted_max_vcpus = max(size.max_vcpus, size.vcpus)
        self._wanted_max_mib = max(size.max_memory_mib, size.memory_mib)
        self._fixed_memory = size.fixed_memory
        self._default_mib = size.default_memory_mib
        self._containers: dict[str, ResourceRequest] = {}
        self._pause_containers: set[str] = set()
        self._source = size.asked_by
        of_pod = self._source.startswith(sizing.OF_SANDBOX)
        self._pod = ResourceRequest(size.asked_cpus, size.asked_memory) if of_pod else ResourceRequest()
        self.vcpus = self._first_vcpus
        self.plugged_mib = 0
        self.returned_mib = 0
        self.on_resize: Callable[[int, int], None] | None = None
        self._current = Size(self._first_vcpus, self._first_mib)

    @property
    def _max_vcpus(self) -> int:
        """Processors that the machine can have: no more than at first where its hypervisor gives it no spare ones."""
        can = self._runtime.machine.capabilities
        return self._wanted_max_vcpus if can is None or can.spare_vcpus else self._first_vcpus

    @property
    def _max_mib(self) -> int:
        """Memory that the machine can have, in MiB: no more than at first where its hypervisor adds none."""
        can = self._runtime.machine.capabilities
        return self._wanted_max_mib if can is None or can.grow_memory else self._first_mib

    @property
    def memory_mib(self) -> int:
        """The machine's memory as it is now."""
        return self._first_mib + self.plugged_mib - self.returned_mib

    def describe(self) -> dict[str, Any]:
        """What is asked for and by whom, as JSON values."""
        total = self._total()
        return {
            "kernel": self._kernel,
            "source": self._source,
            "pod": {"cpus": self._pod.cpus, "memory": self._pod.memory},
            "containers": {
                name: {"cpus": asked.cpus or len(asked.cpuset) or None, "memory": asked.memory}
                for name, asked in self._containers.items()
            },
            "cpus": total.cpus,
            "memory": total.memory,
            "unlimited": self._unlimited(),
            "default_memory_mib": self._default_mib,
            "first_vcpus": self._first_vcpus,
            "first_memory_mib": self._first_mib,
            "vcpus": self.vcpus,
            "plugged_mib": self.plugged_mib,
            "returned_mib": self.returned_mib,
            "besides_mib": self._runtime.machine.extra_memory_mib,
            "host_overhead_mib": self._runtime.machine.host_overhead_mib,
            "fixed_memory": self._fixed_memory,
            "max_vcpus": self._max_vcpus,
            "max_memory_mib": self._max_mib,
        }

    async def admit(self, container_id: str, resources: dict[str, Any], *, is_sandbox: bool = False) -> None:
        """Let the machine grow for a container that is about to be made.

        Args:
            container_id: The container.
            resources: Its limits.
            is_sandbox: It is the one that stands for its pod: what it uses is not worth a limit.

        Raises:
            KataError: The container asks for more than the machine can become; it is as it was.
        """
        asked = sizing.container_request(resources)
        async with self._lock:
            self._containers[container_id] = asked
            if is_sandbox:
                self._pause_containers.add(container_id)
            try:
                wanted, has = self._target(), self._current
                if self._keeps_size and (wanted.vcpus > has.vcpus or wanted.memory_mib > has.memory_mib):
                    self._tasks.log(
                        f"container {container_id} asks for more than its machine has, which keeps its size:"
                        f" {self.vcpus} CPUs, {self.memory_mib} MiB"
                    )
                    return
                await self._resize_to(_larger(wanted, has))
            except BaseException:
                self.remove_container(container_id)
                raise

    def remove_container(self, container_id: str) -> None:
        """A container is gone. The machine stays as it is until the next update."""
        self._containers.pop(container_id, None)
        self._pause_containers.discard(container_id)

    async def update(
        self,
        container_id: str,
        after: dict[str, Any],
        apply: Callable[[], Awaitable[None]],
    ) -> None:
        """Change the limits of a container, and the machine with them.

        Args:
            container_id: The container.
            after: What its resources shall be.
            apply: Sets its limits in the guest, all or none of them.

        Raises:
            KataError: The machine cannot become what follows, or the guest refused; everything is as it was.
        """
        async with self._lock:
            has = self._current
            pod, asked = self._pod, self._containers.get(container_id, ResourceRequest())
            wanted = sizing.container_request(after)
            self._containers[container_id] = wanted
            self._pod = _changed(pod, asked, wanted)
            try:
                target = self._target()
                await self._resize_to(_larger(target, has))
                await apply()
            except BaseException:
                self._containers[container_id], self._pod = asked, pod
                await self._roll_back(has)
                raise
            await self._shrink(target)

    @property
    def _keeps_size(self) -> bool:
        return (self._max_vcpus, self._max_mib) == (self._first_vcpus, self._first_mib)

    def _total(self) -> ResourceRequest:
        asked = self._containers.values()
        cpus = sum(one.cpus for one in asked if one.cpus is not None)
        memory = sum(one.memory for one in asked if one.memory is not None)
        # Sets overlap, and the kubelet gives every container without a quota all that is left of a large node.
        allowed = min(len(frozenset().union(*(one.cpuset for one in asked))), self._max_vcpus)
        return ResourceRequest(
            max(cpus, allowed, self._pod.cpus or 0) or None, max(memory, self._pod.memory or 0) or None
        )

    def _unlimited(self) -> list[str]:
        """The containers that may use all the memory there is; one that stands for its pod uses next to none."""
        return [
            name
            for name, one in self._containers.items()
            if one.memory is None and name not in self._pause_containers
        ]

    def _target(self) -> Size:
        """The machine for what is asked now."""
        asked = self._total()
        vcpus = self._first_vcpus if asked.cpus is None else sizing.cpus_of(asked.cpus)
        if asked.memory is None:
            return Size(vcpus, self._first_mib)
        needed = sizing.memory_of(asked.memory, self._kernel)
        if self._unlimited():
            # As much as a machine has for which nobody asks, as far as there is room: it is no limit of theirs.
            room = self._first_mib + (self._max_mib - self._first_mib) // MEMORY_STEP_MIB * MEMORY_STEP_MIB
            needed = max(needed, min(needed + self._default_mib, room), self._first_mib)
        if needed >= self._first_mib:
            return Size(vcpus, needed)
        if self._fixed_memory:
            return Size(vcpus, self._first_mib)
        return Size(
            vcpus,
            needed,
            max(
                sizing.total_of(asked.memory, self._kernel),
                max(sizing.LEAST_MIB[self._kernel], sizing.SHRUNK_MIB) * sizing.MIB,
            ),
        )

    async def _resize_to(self, target: Size) -> None:
        """Have this size; on an error, the size before.

        Raises:
            KataError: The machine cannot have it.
        """
        vcpus, mib = target.vcpus, target.memory_mib
        if target == self._current:
            return
        if vcpus > self._max_vcpus:
            raise UnsupportedError(
                f"{vcpus} CPUs are needed, and this virtual machine can have {self._max_vcpus}", _HINT
            )
        whole_mib = self._first_mib + self._hotplug_mib(mib)
        if mib > self._first_mib and whole_mib > self._max_mib:
            raise ResourceExhaustedError(
                f"{whole_mib} MiB of memory are needed, and this virtual machine can have {self._max_mib} MiB",
                _HINT,
            )
        before = self._current
        try:
            await self._change(target)
        except BaseException:
            await self._roll_back(before)
            raise
        if self.on_resize is not None:
            self.on_resize(self.vcpus, self.memory_mib)

    def _hotplug_mib(self, mib: int) -> int:
        """MiB to be plugged into a machine that is to have so much."""
        return -(-max(mib - self._first_mib, 0) // MEMORY_STEP_MIB) * MEMORY_STEP_MIB

    async def _shrink(self, target: Size) -> None:
        """Have this size after limits were lowered, as far as the guest gives back what it has."""
        if target == self._current:
            return
        try:
            await self._change(target)
        except (KataError, HypervisorError) as error:
            self._tasks.log(f"the machine stays larger than what is asked for: {error.message}")
            return
        kept_mib = self._current.memory_mib - target.memory_mib
        if kept_mib > 0:
            self._tasks.log(f"the guest has not given back {kept_mib} MiB of memory; the limits hold in it")

    async def _change(self, target: Size) -> None:
        vcpus, mib = target.vcpus, target.memory_mib
        agent, vm = await self._runtime.ready(), self._runtime.vm
        assert vm is not None
        if vcpus != self.vcpus and FEATURE not in agent.features:
            raise UnsupportedError("the agent in the guest cannot turn processors on and off")
        # What runs the machine is charged to its cgroup: room first, and taken back last.
        most = self._first_mib + max(self._hotplug_mib(mib), self.plugged_mib)
        await self._limit_host(max(vcpus, self.vcpus), most)
        if mib != self._current.memory_mib:
            await self._change_memory(vm, agent, target)
        if vcpus != self.vcpus:
            await agent.set_processors(vcpus)
            self.vcpus = vcpus
        self._current = Size(vcpus, self._current.memory_mib, self._current.total_bytes)
        await self._limit_host(vcpus, self.memory_mib)

    async def _change_memory(self, vm: Machine, agent: AgentClient, target: Size) -> None:
        plugs = self._hotplug_mib(target.memory_mib)
        if plugs and self.returned_mib:
            await self._balloon(vm, 0)
        if plugs != self.plugged_mib:
            # By these figures the host's limits are set: a monitor that was taken over raises none of them.
            most_mib = max(plugs, self.plugged_mib)
            self.plugged_mib = min(max(await vm.set_memory(plugs), 0), most_mib)
            self._current = Size(self._current.vcpus, self.memory_mib)
        has_mib = self._first_mib + self.plugged_mib
        surplus_mib = spare_mib = max(has_mib - target.memory_mib, 0)
        wanted_mib = 0
        if self._can_balloon and surplus_mib > slack_mib(target) and (target.total_bytes or plugs):
            if target.total_bytes:
                # Not by the formula: what the kernel keeps for itself depends on what it was started with.
                guest = await agent.memory_total() - vm.extra_memory_mib * sizing.MIB
                spare_mib = spare_in_guest_mib(target, guest, self.returned_mib)
            wanted_mib = balloon_mib(spare_mib, has_mib, self._first_mib)
        if wanted_mib != self.returned_mib:
            await self._balloon(vm, wanted_mib)
        kept_mib = (spare_mib or surplus_mib) - self.returned_mib
        more_mib = kept_mib if kept_mib > slack_mib(target) else 0
        self._current = Size(self._current.vcpus, target.memory_mib + more_mib, target.total_bytes)

    @property
    def _can_balloon(self) -> bool:
        """Whether the guest can give memory back that the machine was started with."""
        capabilities = self._runtime.machine.capabilities
        return capabilities is not None and capabilities.balloon

    async def _balloon(self, vm: Machine, mib: int) -> None:
        self.returned_mib = min(max(await vm.set_balloon(mib), 0), mib)
        self._current = Size(self._current.vcpus, self.memory_mib)

    async def _roll_back(self, size: Size) -> None:
        """Have the size of before again, as far as that is possible."""
        if size == self._current or self._runtime.is_lost:
            return
        try:
            await self._change(size)
        except (KataError, HypervisorError) as error:
            self._tasks.log(f"the machine keeps a size that nobody asked for: {error.message}")

    async def _limit_host(self, vcpus: int, mib: int) -> None:
        cgroup, vm = self._runtime.machine.cgroup, self._runtime.vm
        if cgroup is None or vm is None:
            return
        limits = self._runtime.machine.host_limits(vcpus, mib)
        for warning in await self._tasks.run_blocking(cgroup.limit, limits):
            self._tasks.log(warning)


_HINT = "kata explain ID shows how it was sized; default_maxvcpus and default_maxmemory bound it (docs/sizing.md)"


def slack_mib(target: Size) -> int:
    """How much larger than *target* a machine may be before it is worth a balloon, in MiB."""
    return int(target.memory_mib * sizing.SLACK)


def spare_in_guest_mib(target: Size, guest_bytes: int, returned_mib: int) -> int:
    """MiB that a guest has too many by its own figures, those in its balloon included.

    Args:
        target: What it is to have.
        guest_bytes: Its ``MemTotal``, without what its devices take.
        returned_mib: What is in its balloon.
    """
    return max(returned_mib + (guest_bytes - target.total_bytes) // sizing.MIB, 0)


def balloon_mib(spare_mib: int, has_mib: int, first_mib: int) -> int:
    """MiB that a guest is to give back.

    Args:
        spare_mib: What it has too many.
        has_mib: What its machine has, the balloon included: whatever the guest says, it keeps `sizing.SHRUNK_MIB`.
        first_mib: What its machine was started with: only of that there can be something in the balloon.
    """
    return min(spare_mib, has_mib - sizing.SHRUNK_MIB, first_mib - 1)


def _larger(one: Size, other: Size) -> Size:
    """The larger of each of two machines."""
    memory = one if one.memory_mib > other.memory_mib else other
    return Size(max(one.vcpus, other.vcpus), memory.memory_mib, memory.total_bytes)


def _changed(pod: ResourceRequest, before: ResourceRequest, after: ResourceRequest) -> ResourceRequest:
    """What a pod asks for as a whole when a limit of one of its containers changes."""
    cpus, memory = pod.cpus, pod.memory
    if cpus is not None:
        cpus = max(cpus + (after.cpus or 0) - (before.cpus or 0), 0)
    if memory is not None:
        memory = max(memory + (after.memory or 0) - (before.memory or 0), 0)
    return ResourceRequest(cpus, memory)


def merged(before: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Resources with those of a change put over them: what the change does not mention stays."""
    found = dict(before)
    for key, value in change.items():
        if value is None:
            continue
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found
