"""Firecracker as a monitor (`kata.hypervisor.protocols.Monitor`). Usable before asyncio is imported."""

from __future__ import annotations

from kata.hypervisor.base import Capabilities, MonitorBase
from kata.hypervisor.firecracker import config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, Check, MachineShape
    from kata.hypervisor.firecracker.machine import Firecracker
    from kata.hypervisor.firecracker.process import FirecrackerProcess
    from kata.hypervisor.protocols import Started
    from kata.journal import Journal

HOST_OVERHEAD_MIB = 128


class FirecrackerMonitor(MonitorBase):
    """Firecracker."""

    name = "firecracker"
    title = "Firecracker"
    accelerators: tuple[str, ...] = ("kvm",)

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        """See `kata.hypervisor.protocols.Monitor.capabilities`."""
        return Capabilities(
            disk_slots=config.MAX_DISKS,
            attach_disk=True,
            nics=config.MAX_NICS,
            nic_backends=("tap",),
            grow_memory=True,
            balloon=True,
            spare_vcpus=True,
            pause=True,
            snapshot=True,
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
            if shape.huge_pages:
                from kata.hypervisor import huge_pages

                huge_pages.check(shape.memory_mib)
            initrd = shape.initrd
            if shape.extensions:
                from kata.hypervisor import initrd as archives

                initrd = archives.whole(shape, attachments.run_dir)
            directory = self._root(attachments, journal)
            program = process.find(str(dict(shape.options).get("path", "")))
            return process.spawn(program, shape, initrd, attachments, journal, directory)
        finally:
            attachments.close()

    def restore(self, directory: str, attachments: Attachments, journal: Journal) -> FirecrackerProcess:
        """See `kata.hypervisor.protocols.Monitor.restore`."""
        from kata.hypervisor import saved
        from kata.hypervisor.firecracker import process

        try:
            shape = saved.shape_of(directory)
            program = process.find(str(dict(shape.options).get("path", "")))
            return process.restore(
                program, shape, directory, attachments, journal, self._root(attachments, journal)
            )
        finally:
            attachments.close()

    def _root(self, attachments: Attachments, journal: Journal) -> str:
        """The directory that becomes its root; empty where it is to keep the caller's."""
        from kata.hypervisor import root

        return (
            root.prepare(attachments.run_dir, journal, disks=config.MAX_DISKS)
            if attachments.confines
            else ""
        )

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> Firecracker:
        """See `kata.hypervisor.protocols.Monitor.adopt`."""
        from kata.hypervisor.firecracker.machine import Firecracker
        from kata.hypervisor.firecracker.process import FirecrackerProcess

        if not isinstance(started, FirecrackerProcess):
            raise TypeError(f"{started!r} is not one of {self.title}'s")
        return Firecracker(started, journal, console_path)

    def program(self, options: Mapping[str, Any]) -> str:
        """See `kata.hypervisor.protocols.Monitor.program`."""
        from kata.hypervisor.firecracker import process

        return process.find(str(options.get("path", "")))

    def version(self) -> str:
        """See `kata.hypervisor.protocols.Monitor.version`."""
        from kata import children
        from kata.hypervisor.firecracker import process

        program = process.find()
        if not program:
            return ""
        try:
            first = (
                children.output_of([program, "--version"])[:200].decode(errors="replace").splitlines()[:1]
            )
        except OSError:
            first = []
        return first[0] if first else "unknown"

    def arguments(self, run_dir: str) -> list[tuple[str, str]]:
        """See `kata.hypervisor.protocols.Monitor.arguments`. They are in the process list, and not written down."""
        return []

    def checks(self) -> list[Check]:
        """See `kata.hypervisor.protocols.Monitor.checks`."""
        from kata.hypervisor.base import program_check
        from kata.hypervisor.firecracker import process

        program = process.find()
        return [program_check(self.name, program, self.version, process.PROGRAM, process.INSTALL)]


MONITOR = FirecrackerMonitor()
