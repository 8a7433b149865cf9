"""Attaches block devices and disk images of the host to a running machine, and takes them out again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

from kata.errors import KataError, UnsupportedError
from kata.hypervisor.base import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.engine.access import MachineAccess
    from kata.engine.tasks import Tasks


class AttachedDisks:
    """The disks of one container.

    Args:
        runtime: The machine that gets them.
        tasks: The engine's.
    """

    __slots__ = ("_addresses", "_allowed", "_attaching", "_runtime", "_tasks")

    def __init__(self, runtime: MachineAccess, tasks: Tasks) -> None:
        self._runtime = runtime
        self._tasks = tasks
        self._addresses: list[str] = []
        self._allowed: list[tuple[int, int]] = []
        self._attaching: set[asyncio.Task[str]] = set()

    async def insert(
        self, path: str, *, readonly: bool, ephemeral: bool = False, vhost_user: bool = False
    ) -> str:
        """Give the machine a disk; its address in the guest. The guest need not have booted yet.

        Args:
            path: A raw image or block device.
            readonly: The guest cannot write.
            ephemeral: It does not outlive the machine, so nothing has to reach the host's disk.
            vhost_user: The path is that of a vhost-user-blk server's socket.

        Raises:
            KataError: The machine has no room for it, or cannot use it, or is gone.
        """
        if self._runtime.vm is None:
            await self._runtime.ready()
        assert self._runtime.vm is not None
        capabilities = self._runtime.machine.capabilities
        if capabilities is not None and not capabilities.attach_disk:
            raise UnsupportedError(
                f"a machine that runs cannot be given the disk {path} by this sandbox's hypervisor",
                "Use a snapshotter that makes directories (overlayfs), and no block devices.",
            )
        if vhost_user and capabilities is not None and not capabilities.vhost_user_disks:
            raise UnsupportedError(
                f"a machine of this sandbox's hypervisor cannot be given the vhost-user device {path}",
                "docs/hypervisors.md says which ones can; none without KVM.",
            )
        await self._tasks.run_blocking(self._allow, path)
        # Exchanging a disk cannot be cut short: a caller that is cancelled leaves it to end, and `remove_all` waits.
        attaching = asyncio.create_task(
            self._runtime.vm.attach_disk(Disk(path, readonly, ephemeral=ephemeral, vhost_user=vhost_user))
        )
        self._attaching.add(attaching)
        attaching.add_done_callback(self._attached)
        return await self._runtime.race_vm_exit(attaching, outlives_caller=True)

    def _attached(self, attaching: asyncio.Task[str]) -> None:
        self._attaching.discard(attaching)
        if not attaching.cancelled() and attaching.exception() is None:
            self._addresses.append(attaching.result())

    def _allow(self, path: str) -> None:
        """Let hypervisor and engine open the device, if it is one. Blocks."""
        cgroup = self._runtime.machine.cgroup
        try:
            about = os.stat(path)
        except OSError:
            return  # the hypervisor says so
        if cgroup is not None and stat.S_ISBLK(about.st_mode):
            numbers = (os.major(about.st_rdev), os.minor(about.st_rdev))
            cgroup.allow_disk(numbers)
            self._allowed.append(numbers)

    def _take_back(self) -> None:
        cgroup = self._runtime.machine.cgroup
        while cgroup is not None and self._allowed:
            cgroup.take_disk(self._allowed.pop())

    async def remove_all(self) -> None:
        """Take them out again, when the guest has let go of them. What cannot be taken is logged."""
        vm = self._runtime.vm
        for attaching in list(self._attaching):
            with contextlib.suppress(KataError):
                await self._runtime.race_vm_exit(asyncio.wait({attaching}))
        while self._addresses:
            address = self._addresses.pop()
            if vm is None or self._runtime.is_lost:
                continue
            try:
                await vm.detach_disk(address)
            except KataError as error:
                self._tasks.log(f"a disk stays in the virtual machine: {error.message}")
        if self._allowed:
            await self._tasks.run_blocking(self._take_back)
