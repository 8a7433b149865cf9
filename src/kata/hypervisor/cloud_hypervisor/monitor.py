"""Cloud Hypervisor as a monitor (`kata.hypervisor.protocols.Monitor`). Usable before asyncio is imported."""

from __future__ import annotations

from kata.hypervisor.base import Capabilities
from kata.hypervisor.cloud_hypervisor import slots
from kata.hypervisor.rust_vmm import Program, RustVmmMonitor, read_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, MachineShape
    from kata.hypervisor.cloud_hypervisor.machine import CloudHypervisor
    from kata.hypervisor.cloud_hypervisor.process import CloudHypervisorProcess
    from kata.hypervisor.protocols import Started
    from kata.journal import Journal

HOST_OVERHEAD_MIB = 192


class CloudHypervisorMonitor(RustVmmMonitor):
    """Cloud Hypervisor."""

    name = "cloud-hypervisor"
    title = "Cloud Hypervisor"
    disks = len(slots.DISKS)
    PROGRAM = Program(
        title,
        "cloud-hypervisor",
        "KATA_CLOUD_HYPERVISOR",
        "https://github.com/cloud-hypervisor/cloud-hypervisor",
    )

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        """See `kata.hypervisor.protocols.Monitor.capabilities`."""
        return Capabilities(
            disk_slots=self.disks,
            attach_disk=True,
            vhost_user_disks=True,
            host_devices=True,
            nics=len(slots.NICS),
            nic_backends=("tap",),
            hotplug_nics=True,
            shares=("virtio-fs",),
            grow_memory=True,
            balloon=True,
            spare_vcpus=True,
            pause=True,
            snapshot=True,
            clones=True,
        )

    def options(self, configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
        """See `kata.hypervisor.protocols.Monitor.options`."""
        return read_path(configuration, origin)

    def host_overhead_mib(self, accel: str) -> int:
        """See `kata.hypervisor.protocols.Monitor.host_overhead_mib`."""
        return HOST_OVERHEAD_MIB

    def start(
        self, shape: MachineShape, attachments: Attachments, journal: Journal
    ) -> CloudHypervisorProcess:
        """See `kata.hypervisor.protocols.Monitor.start`."""
        from kata.hypervisor.cloud_hypervisor import process

        try:
            program = self.PROGRAM.of(shape)
            initrd = self.initrd(shape, attachments)
            root = self.root(attachments, journal)
            return process.spawn(program, shape, initrd, attachments, journal, root)
        finally:
            attachments.close()

    def restore(
        self, directory: str, attachments: Attachments, journal: Journal, shape: MachineShape | None = None
    ) -> CloudHypervisorProcess:
        """See `kata.hypervisor.protocols.Monitor.restore`."""
        from kata.hypervisor import saved
        from kata.hypervisor.cloud_hypervisor import process
        from kata.hypervisor.cloud_hypervisor.saved import FILES

        shape = shape or saved.shape_of(directory)
        saved.check_whole(directory, FILES)
        try:
            program = self.PROGRAM.of(shape)
            root = self.root(attachments, journal)
            return process.restore(program, shape, directory, attachments, journal, root)
        finally:
            attachments.close()

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> CloudHypervisor:
        """See `kata.hypervisor.protocols.Monitor.adopt`."""
        from kata.hypervisor.cloud_hypervisor.machine import CloudHypervisor
        from kata.hypervisor.cloud_hypervisor.process import CloudHypervisorProcess

        if not isinstance(started, CloudHypervisorProcess):
            raise TypeError(f"{started!r} is not one of {self.title}'s")
        return CloudHypervisor(started, journal, console_path)


MONITOR = CloudHypervisorMonitor()
