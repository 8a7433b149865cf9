"""Keeping a running machine as large as what is asked of it: when containers come, and when limits change.

What is asked for is what the CRI said of the pod, and at least the sum of its containers' limits; the machine for
that follows from the formula in `kata.resources.sizing`. A container that comes may let the machine grow; an update
grows it before the limit is raised, and shrinks it after the limit was lowered. Below the size that it was started with
a machine keeps its memory: the limit in the guest holds all the same. What cannot be done is an error, and leaves
everything as it was.
"""

from __future__ import annotations

import asyncio

from ..errors import HypervisorError, KataError, ResourceExhaustedError, UnsupportedError
from ..resources import sizing
from ..resources.sizing import Asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from .sandbox import Sandbox

PLUG_MIB = 2
"""Memory is plugged in multiples of this: virtio-mem's blocks on x86."""
SLACK = 0.04
"""Part of the machine's memory that may stay plugged when it shrinks: so `MemTotal` is within 5 % of what was asked."""
FEATURE = "kata.machine"


class Fitting:
    """The size of one sandbox's machine.

    Args:
        sandbox: Whose.

    Attributes:
        vcpus: How many processors the guest uses.
        plugged_mib: Memory beside what the machine was started with.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        settings = sandbox.settings
        found: dict[str, Any] = settings.get("sizing") or {}
        self._sandbox = sandbox
        self._lock = asyncio.Lock()
        self._kernel = str(found.get("kernel") or "small")
        self._first_vcpus = int(settings.get("vcpus", 1))
        self._first_mib = int(settings.get("memory_mib", 2048))
        self._max_vcpus = max(int(settings.get("max_vcpus") or 0), self._first_vcpus)
        self._max_mib = max(int(settings.get("max_memory_mib") or 0), self._first_mib)
        self._containers: dict[str, Asked] = {}
        self._source = str(found.get("source") or "")
        of_pod = self._source.startswith(sizing.OF_SANDBOX)
        self._pod = Asked(found.get("cpus"), found.get("memory")) if of_pod else Asked()
        self.vcpus = self._first_vcpus
        self.plugged_mib = 0

    @property
    def memory_mib(self) -> int:
        """The machine's memory as it is now."""
        return self._first_mib + self.plugged_mib

    def describe(self) -> dict[str, Any]:
        """What is asked for and by whom, as JSON values."""
        total = self._total()
        return {
            "kernel": self._kernel,
            "source": self._source,
            "pod": {"cpus": self._pod.cpus, "memory": self._pod.memory},
            "containers": {
                name: {"cpus": asked.cpus, "memory": asked.memory}
                for name, asked in self._containers.items()
            },
            "cpus": total.cpus,
            "memory": total.memory,
            "first_vcpus": self._first_vcpus,
            "first_memory_mib": self._first_mib,
            "vcpus": self.vcpus,
            "plugged_mib": self.plugged_mib,
            "max_vcpus": self._max_vcpus,
            "max_memory_mib": self._max_mib,
        }

    async def admit(self, container_id: str, resources: dict[str, Any]) -> None:
        """Let the machine grow for a container that is about to be made.

        Raises:
            KataError: The container asks for more than the machine can become; it is as it was.
        """
        asked = sizing.container_asks(resources)
        async with self._lock:
            self._containers[container_id] = asked
            try:
                vcpus, plugged = self._target()
                if self._keeps_size and (vcpus > self.vcpus or plugged > self.plugged_mib):
                    self._sandbox.complain(
                        f"container {container_id} asks for more than its machine has, which keeps its size:"
                        f" {self.vcpus} CPUs, {self.memory_mib} MiB"
                    )
                    return
                await self._become(max(vcpus, self.vcpus), max(plugged, self.plugged_mib))
            except BaseException:
                self._containers.pop(container_id, None)
                raise

    def forget(self, container_id: str) -> None:
        """A container is gone. The machine stays as it is until the next update."""
        self._containers.pop(container_id, None)

    async def update(
        self,
        container_id: str,
        before: dict[str, Any],
        after: dict[str, Any],
        apply: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Change the limits of a container, and the machine with them.

        Args:
            container_id: The container.
            before: Its resources so far.
            after: What they shall be.
            apply: Sets its limits in the guest.

        Raises:
            KataError: The machine cannot become what follows, or the guest refused; everything is as it was.
        """
        async with self._lock:
            size = (self.vcpus, self.plugged_mib)
            pod, asked = self._pod, self._containers.get(container_id, Asked())
            wanted = sizing.container_asks(after)
            self._containers[container_id] = wanted
            self._pod = _changed(pod, asked, wanted)
            applied = False
            try:
                vcpus, plugged = self._target()
                await self._become(max(vcpus, size[0]), max(plugged, size[1]))
                await apply(after)
                applied = True
                await self._become(vcpus, plugged)
            except BaseException:
                self._containers[container_id], self._pod = asked, pod
                await self._back(*size)
                if applied:
                    await apply(before)
                raise

    @property
    def _keeps_size(self) -> bool:
        return (self._max_vcpus, self._max_mib) == (self._first_vcpus, self._first_mib)

    def _total(self) -> Asked:
        cpus = [one.cpus for one in self._containers.values() if one.cpus is not None]
        memory = [one.memory for one in self._containers.values() if one.memory is not None]
        return Asked(
            max(sum(cpus), self._pod.cpus or 0) or None, max(sum(memory), self._pod.memory or 0) or None
        )

    def _target(self) -> tuple[int, int]:
        """Processors, and MiB to be plugged, for what is asked now."""
        asked = self._total()
        vcpus = self._first_vcpus if asked.cpus is None else sizing.cpus_of(asked.cpus)
        needed = self._first_mib if asked.memory is None else sizing.memory_of(asked.memory, self._kernel)
        return vcpus, -(-max(needed - self._first_mib, 0) // PLUG_MIB) * PLUG_MIB

    async def _become(self, vcpus: int, plugged: int) -> None:
        """Have this size; on an error, the size before.

        Raises:
            KataError: The machine cannot have it.
        """
        if (vcpus, plugged) == (self.vcpus, self.plugged_mib):
            return
        if vcpus > self._max_vcpus:
            raise UnsupportedError(
                f"{vcpus} CPUs are needed, and this virtual machine can have {self._max_vcpus}", _HINT
            )
        if plugged and self._first_mib + plugged > self._max_mib:
            raise ResourceExhaustedError(
                f"{self._first_mib + plugged} MiB of memory are needed, and this virtual machine can have"
                f" {self._max_mib} MiB",
                _HINT,
            )
        before = (self.vcpus, self.plugged_mib)
        try:
            await self._change(vcpus, plugged)
        except BaseException:
            await self._back(*before)
            raise

    async def _change(self, vcpus: int, plugged: int) -> None:
        sandbox = self._sandbox
        agent, vm = await sandbox.ready(), sandbox.vm
        assert vm is not None
        if vcpus != self.vcpus and FEATURE not in agent.features:
            raise UnsupportedError("the agent in the guest cannot turn processors on and off")
        # What runs the machine is charged to its cgroup: room first, and taken back last.
        await self._limit_host(max(vcpus, self.vcpus), max(plugged, self.plugged_mib))
        if plugged != self.plugged_mib:
            slack = int((self._first_mib + plugged) * SLACK)
            plugged = self.plugged_mib = await vm.set_memory(plugged, slack)
        if vcpus != self.vcpus:
            await agent.set_processors(vcpus)
            self.vcpus = vcpus
        await self._limit_host(vcpus, plugged)

    async def _back(self, vcpus: int, plugged: int) -> None:
        """Have the size of before again, as far as that is possible."""
        if (vcpus, plugged) == (self.vcpus, self.plugged_mib) or self._sandbox.is_lost:
            return
        try:
            await self._change(vcpus, plugged)
        except (KataError, HypervisorError) as error:
            self._sandbox.complain(f"the machine keeps a size that nobody asked for: {error.message}")

    async def _limit_host(self, vcpus: int, plugged: int) -> None:
        cgroup, vm = self._sandbox.machine.cgroup, self._sandbox.vm
        if cgroup is None or vm is None:
            return
        from ..resources import host_cgroup

        limits = host_cgroup.Limits(
            sizing.host_memory(self._first_mib + plugged, vm.settings.accel), sizing.host_cpus(vcpus)
        )
        for warning in await self._sandbox.helper(cgroup.limit, limits):
            self._sandbox.complain(warning)


_HINT = "kata explain ID shows how it was sized; default_maxvcpus and default_maxmemory bound it (docs/sizing.md)"


def _changed(pod: Asked, before: Asked, after: Asked) -> Asked:
    """What a pod asks for as a whole when a limit of one of its containers changes."""
    cpus, memory = pod.cpus, pod.memory
    if cpus is not None:
        cpus = max(cpus + (after.cpus or 0) - (before.cpus or 0), 0)
    if memory is not None:
        memory = max(memory + (after.memory or 0) - (before.memory or 0), 0)
    return Asked(cpus, memory)


def merged(before: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Resources with those of a change put over them: what the change does not mention stays."""
    found = dict(before)
    for key, value in change.items():
        if value is None:
            continue
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found
