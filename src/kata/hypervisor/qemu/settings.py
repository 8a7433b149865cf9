"""What a QEMU shall be: plain values for the command builder."""

from __future__ import annotations

from kata.hypervisor.base import MEMORY_STEP_MIB
from kata.hypervisor.qemu import slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.hypervisor.base import Disk, MachineShape, Nic
    from kata.hypervisor.vsock import Vsock
    from kata.sysio import Fd


class VMSettings:
    """One virtual machine.

    Args:
        name: QEMU's name for it.
        extra_memory_mib: How much of that is for its devices, beside what was asked for.
        title: What the process list shows once the machine is built, instead of QEMU's arguments; empty leaves these.
        run_dir: The sandbox's directory: placeholders and sockets go there.
        kernel: Path of the guest's kernel (an uncompressed ELF with a PVH entry, or a bzImage).
        initrd: Path of its initial ramdisk.
        cmdline: Kernel command line; the console argument is added by the command builder.
        accel: ``"kvm"`` or ``"tcg"``.
        vcpus: Number of virtual CPUs that the guest uses when it starts.
        memory_mib: Memory of the machine (see `kata.resources.sizing`).
        binary: Path of QEMU; empty means looked up.
        machine: QEMU machine type.
        firmware: Name or path of the firmware image.
        disks: What is in the slots, from the first on; None is a placeholder.
        disk_slots: How many slots there are, 4 at least.
        share_dir: Directory offered to the guest over 9p; empty is no such device.
        serves_files: QEMU is to serve that directory, with files of any owner: it keeps the capabilities for that.
        share_fd: Instead of that, a socket on which a vhost-user file server (virtiofsd) answers. An emulated machine
            needs a kernel for it that lets the device use bounce pages.
        nic: The network interface; None is no such device.
        extra_nics: Further ones, each connected to something.
        hotplug_nics: How many more may be plugged in while it runs. Each has a port from the start, which costs the
            boot of an emulated machine some 15 ms.
        vsock: vhost-vsock device, or None: then the agent uses the virtio-serial port.
        console: ``"serial"`` (ttyS0: from the first message on), ``"virtio"`` (hvc0) or ``"none"``.
        tsc_khz: Frequency of the host's time-stamp counter, told to an emulated guest; 0 is not known.
        tb_size_mib: Bound of the software emulation's translation buffer.
        max_vcpus: Number of processors that it may use later; all are present from the start. 0 for as many as at
            first.
        max_memory_mib: MiB to which its memory may grow; 0 for no growth.
        machine_options: Further options of the machine, separated by commas.
        cpu_features: Further options of the processor, separated by commas.
        entropy: File that the guest's entropy device reads; empty is QEMU's own source.
        prealloc: Allocate the guest's memory before it boots.
        vhost_net: Where it can, the host's kernel moves the packets of interfaces that are connected to taps.
        huge_pages: The guest's memory is in huge pages of the host (hugetlbfs).
        ksm: The host may merge equal pages of the guest's memory and others'.
        reclaim: Give the host back what the guest frees.
        host_devices: PCI addresses of devices of the host that are the machine's.
        host_nodes: What QEMU opens for them.
        shared_memory: Servers of vhost-user devices can be given the guest's memory, and their disks have ports.
        sandbox: QEMU's seccomp filter; empty is `kata.hypervisor.qemu.command.SANDBOX`.
        root: Directory that becomes QEMU's root once its machine is built (see `kata.hypervisor.root`); empty
            leaves it the caller's.
        saves_into: Directory into which the machine will be saved; its memory is there. Empty for none.
        memory: File behind the guest's memory, or None.
        owns_memory: That file is this machine's alone, which writes to it.
        late_share: The share by virtio-fs is plugged into a port (`kata.hypervisor.qemu.slots.SHARE_PORT`) once the
            saved machine runs; while it is made, the port is empty.
        incoming: What a machine was saved as, which this one goes on from; None for one that boots. Its memory is
            `memory`, of which it sees a copy, or in here.
        incoming_in_set: QEMU is to take it for a file, by the name that its set of descriptors has.
        shape: What machine it is, as it can be saved; None for one that cannot be.
        disk_kinds: What the slots are for, as in `kata.hypervisor.base.MachineShape`; a slot that is not in here is
            as in `kata.hypervisor.qemu.slots.PLACEHOLDER_READONLY`.
    """

    __slots__ = (
        "accel",
        "binary",
        "cmdline",
        "console",
        "cpu_features",
        "disk_kinds",
        "disks",
        "entropy",
        "extra_memory_mib",
        "extra_nics",
        "firmware",
        "host_devices",
        "host_nodes",
        "hotplug_nics",
        "huge_pages",
        "incoming",
        "incoming_in_set",
        "initrd",
        "kernel",
        "ksm",
        "late_share",
        "machine",
        "machine_options",
        "max_memory_mib",
        "max_vcpus",
        "memory",
        "memory_mib",
        "name",
        "nic",
        "owns_memory",
        "prealloc",
        "reclaim",
        "root",
        "run_dir",
        "sandbox",
        "saves_into",
        "serves_files",
        "shape",
        "share_dir",
        "share_fd",
        "shared_memory",
        "tb_size_mib",
        "title",
        "tsc_khz",
        "vcpus",
        "vhost_net",
        "vsock",
    )

    def __init__(
        self,
        *,
        name: str,
        run_dir: str,
        kernel: str,
        initrd: str,
        cmdline: str = "",
        accel: str = "tcg",
        vcpus: int = 1,
        memory_mib: int = 2048,
        binary: str = "",
        machine: str = "q35",
        firmware: str = "qboot.rom",
        disks: Sequence[Disk | None] = (),
        disk_slots: int = slots.MIN_DISK_SLOTS,
        share_dir: str = "",
        serves_files: bool = True,
        share_fd: Fd | None = None,
        nic: Nic | None = None,
        extra_nics: Sequence[Nic] = (),
        hotplug_nics: int = 0,
        vsock: Vsock | None = None,
        console: str = "serial",
        tsc_khz: int = 0,
        tb_size_mib: int = 128,
        max_vcpus: int = 0,
        max_memory_mib: int = 0,
        machine_options: str = "",
        cpu_features: str = "",
        entropy: str = "",
        prealloc: bool = False,
        huge_pages: bool = False,
        ksm: bool = False,
        vhost_net: bool = False,
        reclaim: bool = True,
        shared_memory: bool = False,
        host_devices: Sequence[str] = (),
        host_nodes: Sequence[str] = (),
        sandbox: str = "",
        root: str = "",
        title: str = "",
        extra_memory_mib: int = 0,
        disk_kinds: Sequence[str] = (),
        saves_into: str = "",
    ) -> None:
        if accel not in ("kvm", "tcg"):
            raise ValueError(f"no such accelerator: {accel}")
        if console not in ("serial", "virtio", "none"):
            raise ValueError(f"no such console: {console}")
        if (nic is not None) + len(extra_nics) + hotplug_nics > len(slots.NICS):
            raise ValueError(f"a machine has {len(slots.NICS)} network interfaces at most")
        if not max(len(disks), slots.MIN_DISK_SLOTS) <= disk_slots <= len(slots.DISKS):
            raise ValueError(f"a machine has {slots.MIN_DISK_SLOTS} to {len(slots.DISKS)} disk slots")
        self.name = name
        self.run_dir = run_dir
        self.kernel = kernel
        self.initrd = initrd
        self.cmdline = cmdline
        self.accel = accel
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self.binary = binary
        self.machine = machine
        self.firmware = firmware
        self.disks: list[Disk | None] = [*disks, *([None] * (disk_slots - len(disks)))]
        self.share_dir = share_dir
        self.serves_files = serves_files and bool(share_dir) and share_fd is None
        self.share_fd = share_fd
        self.nic = nic
        self.extra_nics = list(extra_nics)
        self.hotplug_nics = hotplug_nics
        self.vsock = vsock
        self.console = console
        self.tsc_khz = tsc_khz
        self.tb_size_mib = tb_size_mib
        self.max_vcpus = max(max_vcpus, vcpus)
        # In whole blocks of what can be plugged.
        self.max_memory_mib = (
            memory_mib + max(max_memory_mib - memory_mib, 0) // MEMORY_STEP_MIB * MEMORY_STEP_MIB
        )
        self.machine_options = machine_options
        self.cpu_features = cpu_features
        self.entropy = entropy
        self.prealloc = prealloc
        self.huge_pages = huge_pages
        self.ksm = ksm
        self.vhost_net = vhost_net
        self.reclaim = reclaim
        self.shared_memory = shared_memory
        self.host_devices = list(host_devices)
        self.host_nodes = list(host_nodes)
        self.sandbox = sandbox
        self.root = root
        self.title = title
        self.extra_memory_mib = extra_memory_mib
        self.disk_kinds = tuple(disk_kinds)
        self.saves_into = saves_into
        self.memory: Fd | None = None
        self.owns_memory = False
        self.late_share = False
        self.incoming: Fd | None = None
        self.incoming_in_set = False
        self.shape: MachineShape | None = None

    @property
    def mapped_mib(self) -> int:
        """MiB of the device by which the guest maps the image in the first slot; 0 where that is a disk."""
        return self.shape.mapped_mib if self.shape is not None else 0

    @property
    def scans_ports(self) -> bool:
        """See `kata.hypervisor.base.MachineShape`."""
        return self.shape is not None and self.shape.scans_ports

    def is_readonly(self, index: int) -> bool:
        """Whether the guest cannot write to the disk in a slot, be it there or to come."""
        disk = self.disks[index]
        kind = self.disk_kinds[index] if index < len(self.disk_kinds) else "spare"
        if disk is not None:
            return disk.readonly
        return slots.PLACEHOLDER_READONLY[index] if kind == "spare" else kind == "readonly"

    def nics(self) -> list[Nic]:
        """All network interfaces."""
        return [*([self.nic] if self.nic is not None else []), *self.extra_nics]

    def descriptors(self) -> list[Fd]:
        """All descriptors in here; each of them is in one place only."""
        found = [fd for nic in self.nics() for fd in nic.descriptors()]
        if self.share_fd is not None:
            found.insert(0, self.share_fd)
        if self.vsock is not None:
            found.insert(0, self.vsock.fd)
        return found + [fd for fd in (self.memory, self.incoming) if fd is not None]
