"""What is said of a machine between the engine and a hypervisor; `kata.hypervisor.protocols` has who says it.

`MachineShape` and `Attachments` describe a machine without the words of any hypervisor: what it is, and what it is
connected to for this one sandbox. `Capabilities` say what a hypervisor can do on this host.

Addresses: where a device is in the guest is said by the monitor, as the agent protocol writes it. For a PCI device
that is its PCI path: slot numbers as two hexadecimal digits, from the root bus down, joined by ``/``; for a virtio
device without PCI ``mmio:`` and the physical address of its registers in hexadecimal. A disk can also be ``/dev/NODE``
or ``serial:SERIAL``.
"""

from __future__ import annotations

import os

from kata.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kata.errors import KataError
    from kata.hypervisor.virtiofsd import FileServer
    from kata.journal import Journal
    from kata.sysio import Fd


MEMORY_STEP_MIB = 2
"""Memory of a running machine grows in multiples of this: virtio-mem's blocks on x86."""


class Disk:
    """A disk image on the host.

    Args:
        path: Absolute path of a raw image or block device.
        readonly: The guest cannot write; such an image may be used by many machines at once.
        serial: Serial number the guest sees (at most 20 characters), or empty.
        ephemeral: The image does not outlive the machine, so the guest's flushes are not passed on.
        vhost_user: The path is that of a socket, on which a vhost-user-blk server answers. Only for a running machine
            whose shape has `MachineShape.shared_memory`; whether the guest can write is the server's to say.
    """

    __slots__ = ("ephemeral", "path", "readonly", "serial", "vhost_user")

    def __init__(
        self,
        path: str,
        readonly: bool,
        serial: str = "",
        ephemeral: bool = False,
        *,
        vhost_user: bool = False,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.serial = serial
        self.ephemeral = ephemeral
        self.vhost_user = vhost_user


class Nic:
    """A network interface.

    Args:
        mac: Hardware address, ``52:54:00:12:34:56``.
        fd: The machine's end of a connected stream socket on which a network helper speaks length-prefixed Ethernet
            frames (as passt does). With neither this nor a tap, the interface leads nowhere.
        tap_fd: Instead of that, an open tap device, with offload headers (``IFF_VNET_HDR``).
    """

    __slots__ = ("fd", "mac", "tap_fd")

    def __init__(self, mac: str, fd: Fd | None = None, tap_fd: Fd | None = None) -> None:
        self.mac = mac
        self.fd = fd
        self.tap_fd = tap_fd

    @property
    def backend(self) -> str:
        """What it is connected to: ``stream``, ``tap``, or nothing."""
        return "stream" if self.fd is not None else "tap" if self.tap_fd is not None else ""

    def descriptors(self) -> list[Fd]:
        """Its descriptors, as far as it has some."""
        return [fd for fd in (self.fd, self.tap_fd) if fd is not None]

    def close(self) -> None:
        """Close its descriptors, unless they were given away. Idempotent."""
        for fd in self.descriptors():
            fd.close()


def random_mac() -> str:
    """A random, locally administered, unicast hardware address."""
    data = os.urandom(6)
    return ":".join(f"{byte:02x}" for byte in (data[0] & 0xFC | 0x02, *data[1:]))


class MachineShape:
    """What a machine is, whatever it is used for: two with equal shapes can stand for each other. Hashable.

    Args:
        kernel: Path of the guest's kernel (an uncompressed ELF with a PVH entry, or a bzImage).
        initrd: Path of its initial ramdisk.
        extensions: Paths of archives that are unpacked behind it.
        parameters: The kernel's parameters, without those that the monitor itself needs.
        accel: ``kvm`` or ``tcg``.
        vcpus: Number of processors that the guest uses when it starts.
        max_vcpus: Number of processors that it may use later; 0 for as many as at first.
        memory_mib: Memory of the guest, in MiB.
        max_memory_mib: MiB to which its memory may grow; 0 for no growth.
        disks: For each disk slot what it is for: ``readonly``, ``writable``, or ``spare`` for one that is filled
            later.
        nics: Number of network interfaces.
        taps: How many of them, the last ones, are connected to taps, which take from the guest what it would compute
            for each packet.
        hotplug_nics: How many more it may be given while it runs.
        scans_ports: The guest's agent finds a share that is plugged into a port, where nothing announces that.
        share: How files of the host are shared: ``virtio-fs``, ``9p``, or empty for not at all.
        console: ``serial`` (from the first message on), ``virtio`` or ``none``.
        prealloc: Allocate the guest's memory before it boots.
        huge_pages: The guest's memory is in huge pages of the host (hugetlbfs).
        ksm: The host may merge equal pages of its memory and others' (`admin-guide/mm/ksm.rst`).
        reclaim: Give the host back what the guest frees.
        shared_memory: Servers of vhost-user devices can be given the guest's memory.
        host_devices: How many PCI devices of the host it has, which reach all its memory.
        mapped_mib: MiB of the device by which the guest maps the disk in slot 0 (`kata.hypervisor.mapped`); 0 for a
            disk like the others.
        options: The monitor's own (`Monitor.options`): name and value.
    """

    __slots__ = (
        "accel",
        "console",
        "disks",
        "extensions",
        "host_devices",
        "hotplug_nics",
        "huge_pages",
        "initrd",
        "kernel",
        "ksm",
        "mapped_mib",
        "max_memory_mib",
        "max_vcpus",
        "memory_mib",
        "nics",
        "options",
        "parameters",
        "prealloc",
        "reclaim",
        "scans_ports",
        "share",
        "shared_memory",
        "taps",
        "vcpus",
    )

    def __init__(
        self,
        *,
        kernel: str,
        initrd: str,
        extensions: Sequence[str] = (),
        parameters: str = "",
        accel: str = "tcg",
        vcpus: int = 1,
        max_vcpus: int = 0,
        memory_mib: int = 2048,
        max_memory_mib: int = 0,
        disks: Sequence[str] = (),
        nics: int = 0,
        taps: int = 0,
        hotplug_nics: int = 0,
        scans_ports: bool = False,
        share: str = "",
        console: str = "serial",
        prealloc: bool = False,
        huge_pages: bool = False,
        ksm: bool = False,
        reclaim: bool = True,
        shared_memory: bool = False,
        host_devices: int = 0,
        mapped_mib: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.extensions = tuple(extensions)
        self.parameters = parameters
        self.accel = accel
        self.vcpus = vcpus
        self.max_vcpus = max_vcpus
        self.memory_mib = memory_mib
        self.max_memory_mib = max_memory_mib
        self.disks = tuple(disks)
        self.nics = nics
        self.taps = taps
        self.hotplug_nics = hotplug_nics
        self.scans_ports = scans_ports
        self.share = share
        self.console = console
        self.prealloc = prealloc
        self.huge_pages = huge_pages
        self.ksm = ksm
        self.reclaim = reclaim
        self.shared_memory = shared_memory
        self.host_devices = host_devices
        self.mapped_mib = mapped_mib
        self.options = tuple(sorted((options or {}).items()))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MachineShape) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


class Attachments:
    """What a machine is connected to for one sandbox.

    Args:
        sandbox_id: Whose machine it is.
        run_dir: The sandbox's directory: sockets and the like go there, and go with it.
        disks: What is in the shape's disk slots, from the first on; None leaves one empty.
        nics: The network interfaces.
        host_devices: PCI addresses of devices of the host that are the machine's, and set aside for it.
        host_nodes: What the monitor opens for them: ``/dev/vfio/vfio``, and the node of each group.
        share_dir: Directory that is shared with the guest; empty if nothing is.
        share_server: The file server of a share by virtio-fs.
        serves_files: The monitor itself is to serve that directory, with files of any owner.
        confines: The monitor is to lose the host's files once it has started (`Machine.confined`). It takes a mount
            namespace of our own.
        saves_into: An existing directory into which the machine will be saved (`Machine.save`): a monitor may keep its
            memory there from the start. Empty where that is not known.

    Attributes:
        is_closed: A monitor was given it, and has taken or closed what it needs.
    """

    __slots__ = (
        "confines",
        "disks",
        "host_devices",
        "host_nodes",
        "is_closed",
        "nics",
        "run_dir",
        "sandbox_id",
        "saves_into",
        "serves_files",
        "share_dir",
        "share_server",
    )

    def __init__(
        self,
        *,
        sandbox_id: str,
        run_dir: str,
        disks: Sequence[Disk | None] = (),
        nics: Sequence[Nic] = (),
        host_devices: Sequence[str] = (),
        host_nodes: Sequence[str] = (),
        share_dir: str = "",
        share_server: FileServer | None = None,
        serves_files: bool = False,
        confines: bool = True,
        saves_into: str = "",
    ) -> None:
        self.saves_into = saves_into
        self.sandbox_id = sandbox_id
        self.run_dir = run_dir
        self.disks = list(disks)
        self.nics = list(nics)
        self.host_devices = list(host_devices)
        self.host_nodes = list(host_nodes)
        self.share_dir = share_dir
        self.share_server = share_server
        self.serves_files = serves_files
        self.confines = confines
        self.is_closed = False

    def close(self) -> None:
        """Close the descriptors that nobody took. Idempotent."""
        self.is_closed = True
        for nic in self.nics:
            nic.close()


class Capabilities:
    """What machines of a monitor can do on this host.

    Args:
        disk_slots: Number of disks that can be present at once.
        attach_disk: A disk can be given to a running machine.
        vhost_user_disks: So can one that another process serves by vhost-user-blk (`Disk.vhost_user`).
        host_devices: A machine can start with PCI devices of the host (`Attachments.host_devices`).
        nics: Number of network interfaces that can be present at once.
        nic_backends: What they can be connected to: ``stream``, ``tap``.
        hotplug_nics: A network interface can be given to a running machine.
        shares: How files of the host can be shared, the best first: ``virtio-fs``, ``9p``.
        share_note: Why that is not all that this monitor can do elsewhere; empty if it is.
        grow_memory: Memory of a running machine can grow beyond what it was started with, and shrink back to it.
        balloon: A running machine can give memory back that it was started with.
        spare_vcpus: A machine can have processors that it does not use at first.
        pause: A machine can be paused (`Machine.pause`). Containers can be in any case: their guest freezes them.
        snapshot: A machine can be saved (`Machine.save`) and restored (`Monitor.restore`).
        clones: One that was started to be saved (`Attachments.saves_into`) can go on as many, each with disks and
            network interfaces of its own in its slots.
        waits: One that went on so can be given the disks of its slots later (`Machine.fill_disks`).
        maps_image: The guest can map a read-only disk (`MachineShape.mapped_mib`).
    """

    __slots__ = (
        "attach_disk",
        "balloon",
        "clones",
        "disk_slots",
        "grow_memory",
        "host_devices",
        "hotplug_nics",
        "maps_image",
        "nic_backends",
        "nics",
        "pause",
        "share_note",
        "shares",
        "snapshot",
        "spare_vcpus",
        "vhost_user_disks",
        "waits",
    )

    def __init__(
        self,
        *,
        disk_slots: int,
        attach_disk: bool = False,
        vhost_user_disks: bool = False,
        host_devices: bool = False,
        nics: int = 0,
        nic_backends: tuple[str, ...] = (),
        hotplug_nics: bool = False,
        shares: tuple[str, ...] = (),
        share_note: str = "",
        grow_memory: bool = False,
        balloon: bool = False,
        spare_vcpus: bool = False,
        pause: bool = False,
        snapshot: bool = False,
        clones: bool = False,
        waits: bool = False,
        maps_image: bool = False,
    ) -> None:
        self.maps_image = maps_image
        self.clones = clones
        self.waits = waits
        self.disk_slots = disk_slots
        self.attach_disk = attach_disk
        self.vhost_user_disks = vhost_user_disks
        self.host_devices = host_devices
        self.nics = nics
        self.nic_backends = nic_backends
        self.hotplug_nics = hotplug_nics
        self.shares = shares
        self.share_note = share_note
        self.grow_memory = grow_memory
        self.balloon = balloon
        self.spare_vcpus = spare_vcpus
        self.pause = pause
        self.snapshot = snapshot

    def to_plain(self) -> dict[str, Any]:
        """Each by its name, as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Check:
    """One thing that a monitor needs of this host.

    Args:
        name: What was looked at.
        ok: Whether it is as it should be.
        text: What was found.
        hint: What to do about it.
    """

    __slots__ = ("hint", "name", "ok", "text")

    def __init__(self, name: str, ok: bool, text: str, hint: str = "") -> None:
        self.name = name
        self.ok = ok
        self.text = text
        self.hint = hint


def program_check(name: str, program: str, missing: str, install: str) -> Check:
    """Whether the program of a monitor can be executed.

    Args:
        name: The monitor's.
        program: Its path; empty where there is none.
        missing: What it is called where there is none.
        install: How to get it.
    """
    if not program:
        return Check(name, False, f"{missing} is not installed", install)
    if not os.path.isfile(program) or not os.access(program, os.X_OK):
        return Check(name, False, f"{program} is no program that can be executed", install)
    from kata import children

    return Check(name, True, f"{children.version_of(program)} ({program})")


class DiskError:
    """A request of the guest's that the host could not carry out.

    Args:
        path: The file or device behind the disk; empty if that is not known.
        writes: Whether the guest was writing.
        full: Whether the host's file system has no room.
        reason: The host's words.
    """

    __slots__ = ("full", "path", "reason", "writes")

    def __init__(self, path: str, *, writes: bool, full: bool, reason: str) -> None:
        self.path = path
        self.writes = writes
        self.full = full
        self.reason = reason


class Ended:
    """How a machine ended.

    Args:
        status: Exit status of the monitor; minus the signal when one ended it.
        reason: One word: ``"stopped"`` (we did it), ``"poweroff"``, ``"reboot"``, ``"panic"`` (the guest did
            it), ``"crashed"`` (the monitor died), ``"ended"`` (in order, but not by us or the guest).
        error: The error, with a hint, when the machine was not meant to end; otherwise None.
    """

    __slots__ = ("error", "reason", "status")

    def __init__(self, status: int, reason: str, error: KataError | None) -> None:
        self.status = status
        self.reason = reason
        self.error = error


class MonitorBase:
    """What a monitor that cannot do everything has from here: refusals by name."""

    title = ""

    def restore(
        self, directory: str, attachments: Attachments, journal: Journal, shape: MachineShape | None = None
    ) -> Any:
        """See `kata.hypervisor.protocols.Monitor.restore`.

        Raises:
            UnsupportedError: Always.
        """
        attachments.close()
        raise UnsupportedError(
            f"{self.title} cannot restore a machine here: {directory}", "kata run starts a new one"
        )
