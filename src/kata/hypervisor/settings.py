"""What a virtual machine shall be: plain values for the command builder."""

from __future__ import annotations

from kata.hypervisor.qemu import slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


PLUG_MIB = 2
"""What is plugged into a running machine is a multiple of this: virtio-mem's blocks on x86."""


class Disk:
    """A disk image on the host.

    Args:
        path: Absolute path of a raw image or block device.
        readonly: The guest cannot write; such an image may be used by many machines at once.
        serial: Serial number the guest sees (at most 20 characters), or empty.
        ephemeral: The image does not outlive the machine, so the guest's flushes are not passed on.
    """

    __slots__ = ("ephemeral", "path", "readonly", "serial")

    def __init__(self, path: str, readonly: bool, serial: str = "", ephemeral: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.serial = serial
        self.ephemeral = ephemeral


class Nic:
    """The network interface.

    Args:
        mac: Hardware address, ``52:54:00:12:34:56``.
        fd: The hypervisor's end of a connected stream socket on which a network helper speaks
            length-prefixed Ethernet frames (QEMU's ``-netdev stream``); None leaves the plug empty.
        tap_fd: Instead of that, an open tap device, with offload headers (``IFF_VNET_HDR``).
    """

    __slots__ = ("fd", "mac", "tap_fd")

    def __init__(self, mac: str, fd: int | None = None, tap_fd: int | None = None) -> None:
        self.mac = mac
        self.fd = fd
        self.tap_fd = tap_fd

    def fds(self) -> list[int]:
        """Its descriptors, as far as it has some."""
        return [fd for fd in (self.fd, self.tap_fd) if fd is not None]

    def give_away(self) -> list[int]:
        """Its descriptors, which are somebody else's from here on."""
        found = self.fds()
        self.fd = None if self.fd is None else -1
        self.tap_fd = None if self.tap_fd is None else -1
        return found

    @property
    def is_empty(self) -> bool:
        """Whether it is a plug with nothing in it."""
        return self.fd is None and self.tap_fd is None


class Vsock:
    """A vhost-vsock device: an open ``/dev/vhost-vsock`` on which the CID is already ours."""

    __slots__ = ("cid", "fd")

    def __init__(self, cid: int, fd: int) -> None:
        self.cid = cid
        self.fd = fd


class VMSettings:
    """One virtual machine.

    Args:
        name: QEMU's name for it.
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
        share_fd: Instead of that, a socket on which a vhost-user file server (virtiofsd) answers; -1 is none. An
            emulated machine needs a kernel for it that lets the device use bounce pages.
        nic: The network interface; None is no such device.
        more_nics: Further ones, none of them empty.
        late_nics: How many more it may be given while it runs. Each has a port from the start, which costs the boot
            of an emulated machine some 15 ms.
        vsock: vhost-vsock device, or None: then the agent uses the virtio-serial port.
        console: ``"serial"`` (ttyS0: from the first message on), ``"virtio"`` (hvc0) or ``"none"``.
        tsc_khz: Frequency of the host's time-stamp counter, told to an emulated guest; 0 is not known.
        tb_size_mib: Bound of the software emulation's translation buffer.
        max_vcpus: Up to so many it may use later; all are there from the start. 0 is as many as at first.
        max_memory_mib: Up to so much its memory may grow; 0 is not at all.
        machine_options: Further options of the machine, separated by commas.
        cpu_features: Further options of the processor, separated by commas.
        entropy: File that the guest's entropy device reads; empty is QEMU's own source.
        prealloc: Allocate the guest's memory before it boots.
        reclaim: Give the host back what the guest frees.
        sandbox: QEMU's seccomp filter; empty is `kata.hypervisor.qemu.command.SANDBOX`.
        root: Directory that becomes QEMU's root once its machine is built (see `kata.hypervisor.qemu.root`); empty
            leaves it the caller's.
    """

    __slots__ = (
        "accel",
        "binary",
        "cmdline",
        "console",
        "cpu_features",
        "disks",
        "entropy",
        "firmware",
        "initrd",
        "kernel",
        "late_nics",
        "machine",
        "machine_options",
        "max_memory_mib",
        "max_vcpus",
        "memory_mib",
        "more_nics",
        "name",
        "nic",
        "prealloc",
        "reclaim",
        "root",
        "run_dir",
        "sandbox",
        "serves_files",
        "share_dir",
        "share_fd",
        "tb_size_mib",
        "title",
        "tsc_khz",
        "vcpus",
        "vsock",
    )

    def nics(self) -> list[Nic]:
        """All network interfaces."""
        return [*([self.nic] if self.nic is not None else []), *self.more_nics]

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
        disk_slots: int = slots.FEWEST_DISKS,
        share_dir: str = "",
        serves_files: bool = True,
        share_fd: int = -1,
        nic: Nic | None = None,
        more_nics: Sequence[Nic] = (),
        late_nics: int = 0,
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
        reclaim: bool = True,
        sandbox: str = "",
        root: str = "",
        title: str = "",
    ) -> None:
        if accel not in ("kvm", "tcg"):
            raise ValueError(f"no such accelerator: {accel}")
        if console not in ("serial", "virtio", "none"):
            raise ValueError(f"no such console: {console}")
        if len(more_nics) + late_nics >= len(slots.NICS):
            raise ValueError(f"a machine has {len(slots.NICS)} network interfaces at most")
        if not max(len(disks), slots.FEWEST_DISKS) <= disk_slots <= len(slots.DISKS):
            raise ValueError(f"a machine has {slots.FEWEST_DISKS} to {len(slots.DISKS)} disk slots")
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
        self.serves_files = serves_files and bool(share_dir) and share_fd < 0
        self.share_fd = share_fd
        self.nic = nic
        self.more_nics = list(more_nics)
        self.late_nics = late_nics
        self.vsock = vsock
        self.console = console
        self.tsc_khz = tsc_khz
        self.tb_size_mib = tb_size_mib
        self.max_vcpus = max(max_vcpus, vcpus)
        # In whole blocks of what can be plugged.
        self.max_memory_mib = memory_mib + max(max_memory_mib - memory_mib, 0) // PLUG_MIB * PLUG_MIB
        self.machine_options = machine_options
        self.cpu_features = cpu_features
        self.entropy = entropy
        self.prealloc = prealloc
        self.reclaim = reclaim
        self.sandbox = sandbox
        self.root = root
        self.title = title
