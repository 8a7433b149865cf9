"""Firecracker as a monitor (`kata.hypervisor.protocols.Monitor`). Usable before asyncio is imported."""

from __future__ import annotations

from kata.hypervisor.base import Capabilities
from kata.hypervisor.firecracker import config
from kata.hypervisor.rust_vmm import Program, RustVmmMonitor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, MachineShape
    from kata.hypervisor.firecracker.machine import Firecracker
    from kata.hypervisor.firecracker.process import FirecrackerProcess
    from kata.hypervisor.protocols import Started
    from kata.journal import Journal

HOST_OVERHEAD_MIB = 128


class FirecrackerMonitor(RustVmmMonitor):
    """Firecracker."""

    name = "firecracker"
    title = "Firecracker"
    disks = config.MAX_DISKS
    PROGRAM = Program(
        title, "firecracker", "KATA_FIRECRACKER", "https://github.com/firecracker-microvm/firecracker"
    )

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        """See `kata.hypervisor.protocols.Monitor.capabilities`."""
        return Capabilities(
            disk_slots=self.disks,
            attach_disk=True,
            nics=config.MAX_NICS,
            nic_backends=("tap",),
            grow_memory=True,
            balloon=True,
            spare_vcpus=True,
            pause=True,
            snapshot=True,
            clones=True,
        )

    def options(self, configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
        """See `kata.hypervisor.protocols.Monitor.options`."""
        from kata.hypervisor.firecracker import options

        return options.read(configuration, origin)

    def host_overhead_mib(self, accel: str) -> int:
        """See `kata.hypervisor.protocols.Monitor.host_overhead_mib`."""
        return HOST_OVERHEAD_MIB

    def start(self, shape: MachineShape, attachments: Attachments, journal: Journal) -> FirecrackerProcess:
        """See `kata.hypervisor.protocols.Monitor.start`."""
        from kata.hypervisor.firecracker import process

        try:
            program = self.PROGRAM.of(shape)
            initrd = self.initrd(shape, attachments)
            root = self.root(attachments, journal)
            return process.spawn(program, shape, initrd, attachments, journal, root)
        finally:
            attachments.close()

    def restore(
        self, directory: str, attachments: Attachments, journal: Journal, shape: MachineShape | None = None
    ) -> FirecrackerProcess:
        """See `kata.hypervisor.protocols.Monitor.restore`."""
        from kata.hypervisor import saved
        from kata.hypervisor.firecracker import config, process

        shape = shape or saved.shape_of(directory)
        saved.check_whole(directory, config.SAVED_FILES)
        try:
            program = self.PROGRAM.of(shape)
            root = self.root(attachments, journal)
            return process.restore(program, shape, directory, attachments, journal, root)
        finally:
            attachments.close()

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> Firecracker:
        """See `kata.hypervisor.protocols.Monitor.adopt`."""
        from kata.hypervisor.firecracker.machine import Firecracker
        from kata.hypervisor.firecracker.process import FirecrackerProcess

        if not isinstance(started, FirecrackerProcess):
            raise TypeError(f"{started!r} is not one of {self.title}'s")
        return Firecracker(started, journal, console_path)


MONITOR = FirecrackerMonitor()
