"""From the settings of a virtual machine to QEMU's command line. Pure: no files, no processes.

Block devices are given as JSON, so no path needs quoting; in the older comma syntax a comma is doubled.
Source of the options: qemu(1), and QEMU's QAPI schema (``qapi/block-core.json``) for the block nodes.
"""

from __future__ import annotations

from kata.hypervisor.base import Disk
from kata.hypervisor.qemu import slots
from kata.json_text import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.hypervisor.base import Nic
    from kata.hypervisor.qemu.settings import VMSettings

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's seccomp filter: no set*uid, no fork or exec, no scheduler changes after start."""


PARAMETERS = (
    "pci=lastbus=0",  # do not probe 255 buses: those behind ports are found through their bridges
    "tsc=reliable",
    "no_timer_check",
    "noreplace-smp",
    "i8042.noaux",
    "i8042.nopnp",
)
"""Parameters of a kernel in any of QEMU's PCs."""


class Fds:
    """Numbers of the descriptors that QEMU inherits.

    Args:
        agent: Its end of the agent channel.
        qmp: Its end of the control channel.
        console: Its end of the console, or None.
        kernel: The guest's kernel, opened.
        initrd: Its initial ramdisk.
        disks: Disk images by slot.
        nic: The socket on which an empty network interface listens, or None.
        share: The directory of a share whose files are not QEMU's to serve with anybody's rights, or None.
        vhost: By network interface, an open /dev/vhost-net, by which the host's kernel moves its packets.
        acpi: Files of `kata.hypervisor.qemu.acpi` by their names in fw_cfg, where `has_small_acpi`.

    QEMU is not privileged, and these lie in directories of anybody's: it opens nothing of that by its path.
    """

    __slots__ = ("acpi", "agent", "console", "disks", "initrd", "kernel", "nic", "qmp", "share", "vhost")

    def __init__(
        self,
        agent: int,
        qmp: int,
        console: int | None,
        *,
        kernel: int,
        initrd: int,
        disks: Mapping[int, int],
        nic: int | None = None,
        share: int | None = None,
        vhost: Mapping[int, int] | None = None,
        acpi: Mapping[str, int] | None = None,
    ) -> None:
        self.acpi = dict(acpi or {})
        self.agent = agent
        self.qmp = qmp
        self.console = console
        self.kernel = kernel
        self.initrd = initrd
        self.disks = dict(disks)
        self.nic = nic
        self.share = share
        self.vhost = dict(vhost or {})

    def all(self) -> list[int]:
        """All of them."""
        found = [
            self.agent,
            self.qmp,
            self.console,
            self.kernel,
            self.initrd,
            *self.disks.values(),
            self.nic,
            self.share,
            *self.vhost.values(),
            *self.acpi.values(),
        ]
        return [fd for fd in found if fd is not None]


def comma(value: str) -> str:
    """Quote a value for QEMU's ``key=value,...`` syntax."""
    return value.replace(",", ",,")


def cpu_model(settings: VMSettings) -> str:
    """The ``-cpu`` argument.

    Emulation runs ``rep stosb``/``rep movsb`` byte by byte: a guest that believes in "enhanced rep movsb"
    clears memory fifteen times slower. And a guest whose local APIC's timer never stops ("arat") does not look
    at the HPET's timers (see `hpet_timers`).
    """
    if settings.accel == "kvm":
        return "host"
    return "max,-erms,-arat" if hpet_timers(settings) else "max,-erms"


def hpet_timers(settings: VMSettings) -> int:
    """How many timers the HPET of an emulated machine is to have, each with an interrupt of its own; 0: leave it.

    A guest finds out how fast a local APIC's timer runs by spinning for a tenth of a second. The HPET says how
    fast it is; with message signalled interrupts, Linux gives each processor one of its timers as clock event
    device. The first of them ticks for the machine, and the last Linux keeps for the emulation of a real-time
    clock's interrupt (drivers/clocksource, arch/x86/kernel/hpet.c).

    A machine that starts with several processors keeps to the local timers, which it has measured by then: in one of
    some fifty boots on a busy host, the change to the HPET's while both processors tick left the first one without
    a timer for good, or called through a null pointer (tick_do_broadcast in kernel/time/tick-broadcast.c).
    """
    wanted = max(settings.max_vcpus + 2, 3)
    has_one = "hpet=off" not in settings.machine_options and settings.machine != slots.MICROVM
    has_one = has_one and settings.vcpus == 1
    return wanted if settings.accel == "tcg" and has_one and wanted <= _HPET_MOST else 0


def has_small_acpi(settings: VMSettings) -> bool:
    """Whether the machine is one for which `kata.hypervisor.qemu.acpi` is enough.

    It is emulated, where a guest takes long over the rest; has one processor; cannot grow; and its firmware is the one
    whose MP table has the interrupts. Nothing is plugged into it by ACPI: its guest is not told when its share comes,
    so its agent has to look for that.
    """
    return (
        hpet_timers(settings) > 0
        and settings.vcpus == settings.max_vcpus == 1
        and not settings.hotplug_nics
        and (settings.scans_ports or not settings.late_share)
        and settings.max_memory_mib <= settings.memory_mib
        and settings.machine == "q35"
        and settings.firmware == "qboot.rom"
        and "acpi" not in settings.machine_options
    )


def _acpi(fds: Fds) -> list[str]:
    # A saved machine has the sizes of tables that QEMU has made, and these are none.
    argv = ["-global", "fw_cfg.acpi-mr-restore=off"] if fds.acpi else []
    for name, fd in fds.acpi.items():
        argv += ["-fw_cfg", f"name={name},file={opened(fd)}"]
    return argv


_HPET_MOST = 32
"""Timers of an HPET (IA-PC HPET Specification 1.0a, 2.3.4)."""


def file_node(name: str, disk: Disk, filename: str = "") -> dict[str, Any]:
    """The protocol node of a disk image; *filename* is another name of it, by which QEMU can open it."""
    node: dict[str, Any] = {
        "driver": "host_device" if disk.path.startswith("/dev/") else "file",
        "node-name": name,
        "filename": filename or disk.path,
        "read-only": disk.readonly,
        "auto-read-only": False,
        "aio": "threads",
        "locking": "auto",
        "cache": {"direct": False, "no-flush": disk.ephemeral},
    }
    if not disk.readonly:
        node["discard"] = "unmap"
    return node


def placeholder_node(name: str, readonly: bool) -> dict[str, Any]:
    """The protocol node of an empty slot: zeroes, as large as any image."""
    return {
        "driver": "null-co",
        "node-name": name,
        "size": slots.PLACEHOLDER_BYTES,
        "read-zeroes": True,
        "read-only": readonly,
    }


def slot_node(index: int, file: str, readonly: bool) -> dict[str, Any]:
    """The node that the disk device of a slot holds on to; only its file is ever exchanged."""
    node: dict[str, Any] = {
        "driver": "raw",
        "node-name": f"slot{index}",
        "file": file,
        "read-only": readonly,
    }
    if not readonly:
        node["discard"] = "unmap"
    return node


def build(settings: VMSettings, fds: Fds) -> list[str]:
    """QEMU's argument vector.

    Args:
        settings: The machine. `settings.binary` is an absolute path by now.
        fds: What is inherited besides the descriptors in the settings.

    Returns:
        The arguments, program first. The descriptors to pass are `inherited_fds`.
    """
    kvm = settings.accel == "kvm"
    timers = hpet_timers(settings)
    argv = [
        settings.binary,
        *("-name", comma(settings.name)),
        # One that was paused to be saved runs when it goes on.
        *("-global", "migration.store-global-state=off"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", _machine(settings)),
        *("-accel", "kvm" if kvm else f"tcg,thread=multi,tb-size={settings.tb_size_mib}"),
        *("-cpu", ",".join(filter(None, (cpu_model(settings), settings.cpu_features)))),
        *("-smp", str(settings.max_vcpus)),
        *(("-global", "hpet.msi=on", "-global", f"hpet.timers={timers}") if timers else ()),
        *(("-global", "virtio-mmio.force-legacy=off") if settings.machine == slots.MICROVM else ()),
        *_memory(settings),
        *("-bios", settings.firmware),
        *_acpi(fds),
        *_boots(settings, fds),
        *("-sandbox", settings.sandbox or SANDBOX),
        *_first_file(settings, fds),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp}", "-mon", "chardev=qmp,mode=control"),
        *_serial(settings, fds),
    ]
    if settings.vsock is not None:
        vsock = settings.vsock
        argv += _device(
            settings, "vhost-vsock", slots.VSOCK, id="vsock", vhostfd=str(vsock.fd.raw), guest_cid=vsock.cid
        )
    argv += _share(settings, fds)
    for index, disk in enumerate(settings.disks):
        if index == 0 and settings.mapped_mib:
            argv += _mapped(settings, fds)
            continue
        if disk is not None:
            argv += ["-add-fd", f"fd={fds.disks[index]},set={index}"]
        argv += _disk(settings, index, disk)
    for index, nic in enumerate(settings.nics()):
        argv += _nic(settings, index, nic, fds)
    first = len(settings.nics())
    for index in range(first, first + settings.hotplug_nics):
        place = f"addr={slots.NICS[index]:#04x},chassis={index},slot={index}"
        argv += ["-device", f"pcie-root-port,id={slots.hotplug_port(index)},{place}"]
    for index, slot in enumerate(slots.VHOST_USER_DISKS if settings.shared_memory else ()):
        place = f"addr={slot:#04x},chassis={slot},slot={slot}"
        argv += ["-device", f"pcie-root-port,id={slots.vhost_user_port(index)},{place}"]
    for slot, host in zip(slots.HOST_DEVICES, settings.host_devices, strict=False):
        port = f"host{slot - slots.HOST_DEVICES[0]}"
        argv += ["-device", f"pcie-root-port,id={port},addr={slot:#04x},chassis={slot},slot={slot}"]
        argv += ["-device", f"vfio-pci,host={host},bus={port}"]
    argv += [
        *("-object", _entropy(settings)),
        *_device(settings, "virtio-rng", slots.RNG, rng="rng"),
        *_device(
            settings, "virtio-balloon", slots.BALLOON, id="balloon", free_page_reporting=settings.reclaim
        ),
    ]
    return argv


def _share(settings: VMSettings, fds: Fds) -> list[str]:
    """What shares files of the host, or the port that is left for it."""
    argv = []
    if settings.late_share:
        port = f"id={slots.SHARE_PORT},addr={slots.SHARE:#04x},chassis={slots.SHARE},slot={slots.SHARE}"
        argv += ["-device", f"pcie-root-port,{port}"]
    if settings.share_fd is not None:
        argv += ["-chardev", f"socket,id=share,fd={settings.share_fd.raw}"]
        if not settings.late_share:
            argv += _device(settings, "vhost-user-fs", slots.SHARE, chardev="share", tag=slots.SHARE_TAG)
    elif settings.share_dir and not settings.late_share:
        path = opened(fds.share) if fds.share is not None else comma(settings.share_dir)
        argv += [
            *("-fsdev", f"local,id=share,path={path},{_SHARE_OPTIONS}"),
            *_device(settings, "virtio-9p", slots.SHARE, fsdev="share", mount_tag=slots.SHARE_TAG),
        ]
    return argv


def _boots(settings: VMSettings, fds: Fds) -> list[str]:
    """What the machine boots; one that goes on from where it was saved has that in its memory."""
    if settings.incoming is not None:
        named = settings.incoming_in_set
        file = ["-add-fd", f"fd={settings.incoming.raw},set={slots.INCOMING_SET}"] if named else []
        return [*file, "-incoming", "defer"]
    return [
        *("-kernel", opened(fds.kernel)),
        *("-initrd", opened(fds.initrd)),
        *("-append", command_line(settings)),
    ]


def opened(fd: int) -> str:
    """The name by which QEMU opens once more what it has inherited."""
    return f"/proc/self/fd/{fd}"


def _first_file(settings: VMSettings, fds: Fds) -> list[str]:
    """What QEMU has to try out while it has its first root directory."""
    if not settings.root or any(settings.disks[1 if settings.mapped_mib else 0 :]):
        return []
    # Whether the host has locks that belong to an open file is tried out on /dev/null at the first image. Without,
    # an image that is inserted later would not be locked.
    return ["-blockdev", dumps(file_node("first", Disk(settings.kernel, True), opened(fds.kernel)))]


# The guest's owner and mode changes are the host's; devices made through it are refused by the mount
# (nodev), and files of several host file systems beneath it keep distinct inode numbers.
_SHARE_OPTIONS = "security_model=passthrough,multidevs=remap"


def command_line(settings: VMSettings) -> str:
    """The kernel's command line: the caller's, and what follows from the machine."""
    console = {"serial": "console=ttyS0", "virtio": "console=hvc0", "none": ""}[settings.console]
    channel = "agent.channel=vsock" if settings.vsock is not None else "agent.channel=serial"
    # An end of the guest is an end of the machine: a triple fault is the way that takes no driver.
    parts = [
        *PARAMETERS,
        settings.cmdline,
        "reboot=t",
        _bounce_pages(settings),
        console,
        channel,
        *_emulation(settings),
    ]
    if settings.max_vcpus > settings.vcpus:
        # All processors are present from the start, and the guest uses `vcpus` of them until the agent brings more
        # online; an unused one is a sleeping thread. Hot-plug does not work under emulation: Linux expects further
        # processors only in a machine that it recognises as virtual, which an emulated one is not; and QEMU 7.2 ends
        # when a processor is added after another one was removed.
        parts.append(f"maxcpus={settings.vcpus}")
    return " ".join(part for part in parts if part)


BOUNCE_SLOTS = 1024
"""Bounce pages of an emulated machine with a file server, in slots of 2 KiB (IO_TLB_SIZE in linux/swiotlb.h). A quarter
of it is as fast, and more is no faster: requests wait for free ones."""
BOUNCE_MIB = BOUNCE_SLOTS * 2 // 1024
"""What that takes of the guest's memory."""


def bounces(settings: VMSettings) -> bool:
    """Whether the guest's file server must not reach the guest's own pages.

    virtiofsd writes into the guest's memory by itself. Software emulation is not told, and goes on executing what it
    has translated of a page before. It never translates bounce pages, since they hold no code; what the guest's
    processor copies out of them, it sees.
    """
    return settings.accel == "tcg" and has_file_server(settings)


def _bounce_pages(settings: VMSettings) -> str:
    """The guest's pool of bounce pages.

    No device of ours has narrow DMA, so otherwise the 64 MiB that larger guests set aside are spared. Only a virtio-fs
    device is subject to ``force``, by ``guest/virtio-fs-by-bounce-pages.patch``.
    """
    return f"swiotlb={BOUNCE_SLOTS},force" if bounces(settings) else "swiotlb=noforce"


def _emulation(settings: VMSettings) -> list[str]:
    """Parameters for software emulation that spare the guest measurements; guests under KVM have better clocks."""
    if settings.accel != "tcg":
        return []
    parts = ["mitigations=off"]
    if has_small_acpi(settings):
        parts.append("pci=noacpi")
        if settings.late_share:
            # Without ACPI the kernel would take the port for its own to manage, and switch an empty slot off.
            parts += ["pcie_ports=compat", f"agent.pci_scan={slots.SHARE_PATH}"]
    if settings.tsc_khz:
        parts.append(f"tsc_early_khz={settings.tsc_khz}")
    has_another = settings.machine != slots.MICROVM
    if has_another and settings.vcpus == 1 and (hpet_timers(settings) or settings.max_vcpus == 1):
        # A single processor does without, whatever else the machine has. More than one, and no timer for each:
        # the guest would tick along at full rate for ever, idle or not. A machine that starts with several has no
        # other (`hpet_timers`), and spends the time: about 0.2 s.
        parts.append("nolapic_timer")
    return parts


def inherited_fds(settings: VMSettings, fds: Fds) -> list[int]:
    """All descriptors that the command line of `build` refers to."""
    return fds.all() + [fd.raw for fd in settings.descriptors()]


def nic_socket(run_dir: str) -> str:
    """The socket on which an unconnected network interface waits for its network (only the owner can reach it)."""
    return f"{run_dir}/nic.sock"


_ON_BOARD = ("usb=off", "vmport=off", "smm=off", "smbus=off", "sata=off")
"""Options of a q35: all that it can do without."""


_MICROVM = (
    *("pcie=off", "usb=off", "acpi=on", "ioapic2=on", "isa-serial=off", "auto-kernel-cmdline=off"),
    *("x-option-roms=off", "pit=off", "pic=off"),
)
"""Options of a microvm.

Its ACPI tables are small, and say more than its guest can find out otherwise: that there is a second interrupt
controller, without which there are places for eight devices only; and how to switch the machine off. They say besides
that there is no more of an old PC: Linux would not use its timer and its interrupt controller if they were there.
"""


def _machine(settings: VMSettings) -> str:
    if settings.machine == slots.MICROVM:
        options = [settings.machine, *_MICROVM]
    else:
        options = [settings.machine, *(_ON_BOARD if "q35" in settings.machine else _ON_BOARD[:3])]
    options += [f"mem-merge={_value(settings.ksm)}", "dump-guest-core=off"]
    if _has_backend(settings):
        options.append("memory-backend=ram")
    if has_small_acpi(settings):
        options.append("acpi=off")
    if settings.machine_options:
        options.append(settings.machine_options)
    return ",".join(options)


def _has_backend(settings: VMSettings) -> bool:
    """Whether the guest's memory is an object of its own."""
    by_file = settings.memory is not None
    return _is_shared(settings) or settings.prealloc or settings.huge_pages or by_file


def _is_shared(settings: VMSettings) -> bool:
    """Whether a vhost-user server is to read and write the guest's memory itself."""
    return has_file_server(settings) or settings.shared_memory


def has_file_server(settings: VMSettings) -> bool:
    """Whether the machine has a share by virtio-fs, or is to get one."""
    return settings.share_fd is not None or settings.late_share


def _entropy(settings: VMSettings) -> str:
    if settings.entropy:
        return f"rng-random,id=rng,filename={comma(settings.entropy)}"
    return "rng-builtin,id=rng"


def _memory(settings: VMSettings) -> list[str]:
    """The object behind the guest's memory, where that is not QEMU's own."""
    prealloc = ",prealloc=on" if settings.prealloc else ""
    kind = "memory-backend-memfd,share=on" if _is_shared(settings) else "memory-backend-ram"
    if settings.huge_pages:
        kind = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"
    first = kind
    if settings.memory is not None:
        # A machine that goes on has its own copy of what it changes, or of all.
        own = "on" if settings.owns_memory else "off"
        first = f"memory-backend-file,mem-path={opened(settings.memory.raw)},share={own}"
    more = settings.max_memory_mib - settings.memory_mib
    most = settings.max_memory_mib + settings.mapped_mib
    if settings.mapped_mib and has_small_acpi(settings):
        most = 2 * settings.memory_mib + 1024 + _GAP_MIB + settings.mapped_mib
    argv = [
        "-m",
        f"size={settings.memory_mib}M" + (f",maxmem={most}M" if most > settings.memory_mib else ""),
    ]
    if _has_backend(settings):
        argv += ["-object", f"{first},id=ram,size={settings.memory_mib}M{prealloc}"]
    if more:
        argv += [
            *("-object", f"{kind},id={slots.MEMORY_ID}-ram,size={more}M,reserve=off"),
            # Of huge pages there may be none left when memory is plugged in: it is refused then, and not missed later.
            *_device(
                settings,
                "virtio-mem",
                slots.MEMORY,
                id=slots.MEMORY_ID,
                memdev=f"{slots.MEMORY_ID}-ram",
                **({"prealloc": True} if settings.huge_pages else {}),
            ),
        ]
    return argv


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return comma(str(value))


def _device(settings: VMSettings, driver: str, slot: int, **properties: object) -> list[str]:
    """A device in its slot. In property names ``_`` stands for ``-``, but in these two."""
    named = {k if k in ("mount_tag", "max_ports") else k.replace("_", "-"): v for k, v in properties.items()}
    if settings.machine == slots.MICROVM:
        driver += "-device"
        named["bus"] = f"virtio-mmio-bus.{slots.transport(slot)}"
    else:
        # A ROM and the registers of the time before virtio 1.0 only cost firmware and guest time.
        named |= {"addr": f"{slot:02x}.0", "romfile": ""}
        if driver not in ("vhost-vsock", "vhost-user-fs", "virtio-pmem"):  # those never had them
            named["disable-legacy"] = True
        driver += "-pci"
    return ["-device", ",".join([driver, *(f"{k}={_value(v)}" for k, v in named.items())])]


def _serial(settings: VMSettings, fds: Fds) -> list[str]:
    argv = [
        *_device(settings, "virtio-serial", slots.SERIAL, id="serial", max_ports=2),
        *("-chardev", f"socket,id=agent,fd={fds.agent}"),
        *("-device", f"virtserialport,bus=serial.0,nr=1,chardev=agent,name={slots.AGENT_CHANNEL}"),
    ]
    if fds.console is not None and settings.console != "none":
        argv += ["-chardev", f"socket,id=console,fd={fds.console}"]
        if settings.console == "serial":
            argv += ["-device", "isa-serial,chardev=console"]
        else:
            argv += ["-device", "virtconsole,bus=serial.0,nr=0,chardev=console"]
    return argv


def _disk(settings: VMSettings, index: int, disk: Disk | None) -> list[str]:
    readonly = settings.is_readonly(index)
    if disk is None:
        node, serial = placeholder_node(f"file{index}", readonly), ""
    else:
        node, serial = file_node(f"file{index}", disk, f"/dev/fdset/{index}"), disk.serial
    properties: dict[str, object] = {"id": f"disk{index}", "drive": f"slot{index}"}
    if serial:
        properties["serial"] = serial
    return [
        *("-blockdev", dumps(node)),
        *("-blockdev", dumps(slot_node(index, f"file{index}", readonly))),
        # An error of the host's file (no space, bad sector) is the guest's to see, not a reason to halt it.
        *_device(
            settings,
            "virtio-blk",
            slots.DISKS[index],
            werror="report",
            rerror="report",
            share_rw=False,
            **properties,
        ),
    ]


_GAP_MIB = 16 << 10
"""Of addresses between a small machine's memory and what it maps. Without ACPI, Linux does not know that QEMU keeps
those behind the memory for such devices, and gives the first of them to the registers of PCI devices."""


def _mapped(settings: VMSettings, fds: Fds) -> list[str]:
    """The device by which the guest maps an image, in the first disk's slot.

    Shared and read-only: what the guest writes is lost, and a machine that goes on from a template has its own image
    there, or a template none (``x-ignore-shared``).
    """
    size = settings.mapped_mib
    file = f"mem-path={opened(fds.disks[0])},size={size}M,share=on,readonly=on"
    place = {}
    if has_small_acpi(settings):
        # `maxmem` reaches beyond this wherever the memory behind 4 GiB ends.
        place["memaddr"] = hex((4 << 10) + -(-settings.memory_mib // 1024) * 1024 + _GAP_MIB << 20)
    return [
        *("-object", f"memory-backend-file,id=image,{file}"),
        *_device(settings, "virtio-pmem", slots.DISKS[0], id="disk0", memdev="image", **place),
    ]


def late_share() -> dict[str, Any]:
    """Arguments of ``device_add`` for the share of a machine that was saved without."""
    return {
        "driver": "vhost-user-fs-pci",
        "id": "share",
        "bus": slots.SHARE_PORT,
        "chardev": "share",
        "tag": slots.SHARE_TAG,
        "romfile": "",
    }


def hotplug_nic(index: int, mac: str, fd_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``netdev_add`` and ``device_add`` for a network interface in a port; QEMU knows its tap by name."""
    backend = {"type": "tap", "id": f"net{index}", "fd": fd_name}
    device = {
        "driver": "virtio-net-pci",
        "id": f"nic{index}",
        "bus": slots.hotplug_port(index),
        "netdev": f"net{index}",
        "mac": mac,
        "romfile": "",
        "disable-legacy": "on",
    }
    return backend, device


def vhost_user_disk(index: int, fd_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``chardev-add`` and ``device_add`` for a disk in a port; QEMU knows the connection to its server by
    name."""
    name = f"served-disk{index}"
    address = {"type": "fd", "data": {"str": fd_name}}
    backend = {
        "id": name,
        "backend": {"type": "socket", "data": {"addr": address, "server": False}},
    }
    device = {
        "driver": "vhost-user-blk-pci",
        "id": name,
        "bus": slots.vhost_user_port(index),
        "chardev": name,
        "num-queues": 1,
        "romfile": "",
        "disable-legacy": "on",
    }
    return backend, device


def _nic(settings: VMSettings, index: int, nic: Nic, fds: Fds) -> list[str]:
    if nic.tap_fd is not None:
        backend = f"tap,id=net{index},fd={nic.tap_fd.raw}"
        if index in fds.vhost:
            backend += f",vhost=on,vhostfd={fds.vhost[index]}"
    elif nic.fd is not None:
        backend = f"stream,id=net{index},server=off,addr.type=fd,addr.str={nic.fd.raw}"
    else:
        backend = f"stream,id=net{index},server=on,addr.type=fd,addr.str={fds.nic}"
    return [
        *("-netdev", backend),
        *_device(
            settings, "virtio-net", slots.NICS[index], id=f"nic{index}", netdev=f"net{index}", mac=nic.mac
        ),
    ]
