"""QEMU as a monitor (`kata.hypervisor.protocols.Monitor`). Usable before asyncio is imported."""

from __future__ import annotations

import os

from kata.errors import HypervisorError
from kata.hypervisor.base import Capabilities, MonitorBase
from kata.hypervisor.qemu import slots
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, Check, MachineShape
    from kata.hypervisor.protocols import Started
    from kata.hypervisor.qemu.machine import Qemu
    from kata.hypervisor.qemu.process import QemuProcess
    from kata.hypervisor.qemu.saving import Saved
    from kata.hypervisor.qemu.settings import VMSettings
    from kata.journal import Journal

MACHINE = "q35"
FIRMWARE = "qboot.rom"
HOST_OVERHEAD_MIB = {"kvm": 256, "tcg": 384}
"""By accelerator; under emulation there is the translated code as well."""
NO_BOUNCE = "the guest's kernel cannot have virtio-fs in an emulated machine"


class QemuMonitor(MonitorBase):
    """QEMU."""

    name = "qemu"
    title = "QEMU"
    accelerators: tuple[str, ...] = ("kvm", "tcg")

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        """See `kata.hypervisor.protocols.Monitor.capabilities`."""
        # virtiofsd writes into the guest's memory by itself, of which an emulated processor is not told
        # (`kata.hypervisor.qemu.command.bounces`).
        serves = accel != "tcg" or bounces
        machine = options.get("machine", MACHINE)
        clones = os.uname().machine == "x86_64"  # `template_memory` has its filter for that alone
        return Capabilities(
            disk_slots=len(slots.DISKS),
            attach_disk=True,
            # Their servers write into the guest's memory, too.
            vhost_user_disks=accel == "kvm" and MACHINE in machine,
            host_devices=accel == "kvm" and MACHINE in machine,
            nics=len(slots.NICS),
            nic_backends=("stream", "tap"),
            # Their ports are PCI Express', which QEMU's other machines have not.
            hotplug_nics=MACHINE in machine,
            shares=("virtio-fs", "9p") if serves else ("9p",),
            share_note="" if serves else NO_BOUNCE,
            grow_memory=machine != slots.MICROVM,  # virtio-mem is a PCI device there
            balloon=True,
            spare_vcpus=True,
            pause=True,
            snapshot=True,
            clones=clones,
            maps_image=MACHINE in machine,
            waits=clones,
        )

    def options(self, configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
        """See `kata.hypervisor.protocols.Monitor.options`."""
        from kata.hypervisor.qemu import options

        return options.read(configuration, origin)

    def host_overhead_mib(self, accel: str) -> int:
        """See `kata.hypervisor.protocols.Monitor.host_overhead_mib`."""
        return HOST_OVERHEAD_MIB[accel]

    def start(self, shape: MachineShape, attachments: Attachments, journal: Journal) -> QemuProcess:
        """See `kata.hypervisor.protocols.Monitor.start`."""
        return self._start(shape, attachments, journal)

    def restore(
        self, directory: str, attachments: Attachments, journal: Journal, shape: MachineShape | None = None
    ) -> QemuProcess:
        """See `kata.hypervisor.protocols.Monitor.restore`."""
        from kata.hypervisor.qemu import saving

        # Who knows the shape has it from the key of a template, whose memory is a file of its own.
        by_file = shape is not None
        if shape is None:
            from kata.hypervisor import saved

            shape = saved.shape_of(directory)
        return self._start(shape, attachments, journal, saving.Saved(directory, by_file=by_file))

    def _start(
        self, shape: MachineShape, attachments: Attachments, journal: Journal, saved: Saved | None = None
    ) -> QemuProcess:
        from kata.hypervisor import root
        from kata.hypervisor.qemu import process

        try:
            try:
                vm = settings(shape, attachments)
            except BaseException:
                if saved is not None:
                    saved.close()
                raise
            vm.late_share = shape.share == "virtio-fs" and (
                saved is not None or bool(attachments.saves_into)
            )
            if saved is not None:
                from kata.hypervisor.qemu import queues, saving

                vm.incoming, vm.memory = saved.state, saved.memory
                vm.incoming_in_set = saving.has_file_uris(queues.version(vm.binary))
            elif attachments.saves_into:
                vm.memory, vm.owns_memory = memory_file(attachments.saves_into, vm.memory_mib), True
            if vm.huge_pages:
                from kata.hypervisor import huge_pages

                vm.memory_mib, grown = huge_pages.whole(vm.memory_mib), vm.max_memory_mib - vm.memory_mib
                vm.max_memory_mib = vm.memory_mib + grown
                huge_pages.check(vm.memory_mib)
            try:
                if shape.accel == "kvm":
                    # Under emulation the serial port is the faster of the two.
                    from kata.hypervisor import vsock

                    vm.vsock = vsock.allocate()
                if attachments.confines:
                    vm.root = root.prepare(attachments.run_dir, journal, serves_files=vm.serves_files)
                    # There is a device for a share even where nothing is ever shown through it: what it serves then
                    # is empty and cannot be written.
                    if not vm.late_share:
                        vm.share_dir = vm.share_dir or vm.root
                return process.spawn(vm, journal)
            finally:
                for fd in vm.descriptors():
                    fd.close()
        finally:
            attachments.close()

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> Qemu:
        """See `kata.hypervisor.protocols.Monitor.adopt`."""
        from kata.hypervisor.qemu.machine import Qemu
        from kata.hypervisor.qemu.process import QemuProcess

        if not isinstance(started, QemuProcess):
            raise TypeError(f"{started!r} is not one of {self.title}'s")
        started.complete()
        return Qemu(started, journal, console_path)

    def program(self, options: Mapping[str, Any]) -> str:
        """See `kata.hypervisor.protocols.Monitor.program`."""
        from kata.hypervisor.qemu import process

        return process.find(str(options.get("path", "")))

    def version(self, options: Mapping[str, Any]) -> str:
        """See `kata.hypervisor.protocols.Monitor.version`."""
        from kata import children

        program = self.program(options)
        return children.version_of(program) if program else ""

    def arguments(self, run_dir: str) -> list[tuple[str, str]]:
        from kata.hypervisor.qemu import arguments

        return arguments.read(run_dir)

    def checks(self, options: Mapping[str, Any]) -> list[Check]:
        """See `kata.hypervisor.protocols.Monitor.checks`."""
        from kata.hypervisor.base import program_check
        from kata.hypervisor.qemu import process

        return [program_check(self.name, self.program(options), process.PROGRAM, process.INSTALL)]


def settings(shape: MachineShape, attachments: Attachments) -> VMSettings:
    """The QEMU for a machine.

    Raises:
        GuestAssetError: The guest's initrd cannot be put together.
    """
    from kata.hypervisor.qemu import command, process, queues
    from kata.hypervisor.qemu.settings import VMSettings

    options = dict(shape.options)
    initrd = shape.initrd
    if shape.extensions:
        from kata.hypervisor import initrd as archives

        initrd = archives.whole(shape, attachments.run_dir)
    binary = process.find(options.get("path", ""))
    # What bounce pages and long queues take is the machine's, and not its containers'.
    extra_mib = queues.queues_mib(binary)
    if shape.share == "virtio-fs" and shape.accel == "tcg":
        extra_mib += command.BOUNCE_MIB
    if shape.mapped_mib:
        from kata.hypervisor import mapped

        extra_mib += mapped.overhead_mib(shape.mapped_mib)
    vm = VMSettings(
        name=f"kata-{attachments.sandbox_id[:40]}",
        title=f"kata: machine of {attachments.sandbox_id}",
        run_dir=attachments.run_dir,
        kernel=shape.kernel,
        initrd=initrd,
        cmdline=shape.parameters,
        accel=shape.accel,
        vcpus=shape.vcpus,
        max_vcpus=shape.max_vcpus,
        memory_mib=shape.memory_mib + extra_mib,
        max_memory_mib=shape.max_memory_mib + extra_mib if shape.max_memory_mib else 0,
        extra_memory_mib=extra_mib,
        console=shape.console,
        prealloc=shape.prealloc,
        huge_pages=shape.huge_pages,
        ksm=shape.ksm,
        # An emulated guest's memory has to be written by QEMU, which knows what it has translated of it.
        vhost_net=shape.accel == "kvm" and options.get("vhost_net", True),
        reclaim=shape.reclaim,
        shared_memory=shape.shared_memory,
        host_devices=attachments.host_devices,
        host_nodes=attachments.host_nodes,
        disks=attachments.disks,
        disk_slots=max(len(shape.disks), slots.MIN_DISK_SLOTS),
        nic=attachments.nics[0] if attachments.nics else None,
        extra_nics=attachments.nics[1:],
        hotplug_nics=shape.hotplug_nics,
        share_dir=attachments.share_dir,
        share_fd=attachments.share_server.connect() if attachments.share_server is not None else None,
        serves_files=attachments.serves_files,
        binary=binary,
        machine=options.get("machine", MACHINE),
        firmware=options.get("firmware", FIRMWARE),
        machine_options=options.get("machine_options", ""),
        cpu_features=options.get("cpu_features", ""),
        entropy=options.get("entropy", ""),
        sandbox=options.get("sandbox", ""),
        disk_kinds=shape.disks,
        saves_into=attachments.saves_into and os.path.abspath(attachments.saves_into),
    )
    vm.shape = shape
    return vm


def memory_file(directory: str, mib: int) -> Fd:
    """The file that is the memory of a machine which will be saved into this directory.

    Raises:
        HypervisorError: There is one, or there is no room.
    """
    from kata.hypervisor.qemu import saving

    path = os.path.join(directory, saving.MEMORY)
    try:
        file = Fd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.truncate(file.raw, mib << 20)
    except OSError as error:
        raise HypervisorError(f"cannot make {path}: {error.strerror}") from error
    return file


MONITOR = QemuMonitor()
