"""The command line of a Cloud Hypervisor: a whole machine, whose files it gets as descriptors.

Source: ``cloud-hypervisor --help``, and docs/ of its sources.
"""

from __future__ import annotations

from kata.hypervisor.cloud_hypervisor import slots
from kata.hypervisor.rust_vmm import CID, VSOCK_SOCKET, file, parameters
from kata.hypervisor.virtiofsd import SOCKET_NAME as SHARE_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kata.hypervisor.base import Attachments, Disk, MachineShape, Nic

CONSOLES = {"serial": "console=ttyS0", "virtio": "console=hvc0", "none": ""}
"""What the guest's kernel is told, by kind of console."""


def build(
    program: str, shape: MachineShape, attachments: Attachments, directory: str, fds: Mapping[str, int]
) -> list[str]:
    """The arguments.

    Args:
        program: Absolute path.
        shape: The machine.
        attachments: What it is connected to.
        directory: The monitor's own, as it has it: with the socket of the share's server, and the one that stands for
            the guest's vsock, which it makes.
        fds: Descriptors it inherits: ``kernel``, ``initrd``, ``disk0`` and so on, ``api`` (listens), ``events``.
    """
    shares = attachments.share_server is not None
    argv = [
        program,
        *channels(fds),
        *("--kernel", file(fds["kernel"])),
        *("--initramfs", file(fds["initrd"])),
        *("--cmdline", parameters(shape, CONSOLES[shape.console])),
        *("--cpus", f"boot={max(shape.vcpus, shape.max_vcpus)}"),
        *("--memory", _memory(shape, shared=shares or shape.shared_memory or bool(attachments.saves_into))),
        *("--serial", "tty" if shape.console == "serial" else "off"),
        *("--console", "tty" if shape.console == "virtio" else "off"),
        *("--rng", "src=/dev/urandom"),
        *("--vsock", f"cid={CID},socket={directory}/{VSOCK_SOCKET},id=vsock,pci_device_id={slots.VSOCK}"),
    ]
    if shape.reclaim:
        argv += ["--balloon", "size=0,free_page_reporting=on"]
    disks = [
        _options(disk_config(index, disk, file(fds[f"disk{index}"])))
        for index, disk in enumerate(attachments.disks)
        if disk is not None
    ]
    nics = [_options(nic_config(index, nic)) for index, nic in enumerate(attachments.nics) if nic.backend]
    if disks:
        argv += ["--disk", *disks]
    if nics:
        argv += ["--net", *nics]
    if attachments.host_devices:
        paths = (f"/sys/bus/pci/devices/{address}/" for address in attachments.host_devices)
        argv += ["--device", *(f"path={path},id=host{index}" for index, path in enumerate(paths))]
    if attachments.share_server is not None:
        argv += ["--fs", _options(share_config(directory))]
    return argv


def channels(fds: Mapping[str, int]) -> list[str]:
    """The arguments for what is said between us and it: ``api`` (listens) and ``events``."""
    return ["--api-socket", f"fd={fds['api']}", "--event-monitor", f"fd={fds['events']}"]


def disk_config(index: int, disk: Disk, path: str) -> dict[str, object]:
    """A disk as the API describes it (``DiskConfig``).

    The type is always named: one that is guessed loses writes to its first sector.

    Args:
        index: Its slot.
        disk: The disk.
        path: What the monitor opens, or connects to.
    """
    if disk.vhost_user:
        return {
            "id": f"disk{index}",
            "vhost_user": True,
            "vhost_socket": path,
            "pci_device_id": slots.DISKS[index],
        }
    config: dict[str, object] = {
        "id": f"disk{index}",
        "path": path,
        "image_type": "Raw",
        "readonly": disk.readonly,
        "pci_device_id": slots.DISKS[index],
    }
    if disk.serial:
        config["serial"] = disk.serial
    return config


def share_config(directory: str) -> dict[str, object]:
    """The share as the API describes it (``FsConfig``).

    Args:
        directory: The monitor's own, as it has it: the socket of the share's server is there.
    """
    return {
        "tag": slots.SHARE_TAG,
        "socket": f"{directory}/{SHARE_SOCKET}",
        "id": "share",
        "pci_device_id": slots.SHARE,
        "num_queues": 1,
        "queue_size": 1024,
    }


def nic_config(index: int, nic: Nic) -> dict[str, object]:
    """A network interface as the API describes it (``NetConfig``); it goes with its descriptor when that is sent.

    Args:
        index: Which of the machine's it is.
        nic: It, connected to a tap.
    """
    config: dict[str, object] = {
        "id": f"nic{index}",
        "mac": nic.mac,
        "pci_device_id": slots.NICS[index],
        "num_queues": 2,
    }
    if nic.tap_fd is not None:
        config["fds"] = [nic.tap_fd.raw]
    return config


def _options(config: Mapping[str, object]) -> str:
    """An API's description as the command line has it."""
    words = []
    for name, value in config.items():
        if name == "fds":
            assert isinstance(value, list)
            words.append(f"fd=[{','.join(map(str, value))}]")
        elif isinstance(value, bool):
            words.append(f"{name}={'on' if value else 'off'}")
        else:
            words.append(f"{name}={str(value).lower() if name == 'image_type' else value}")
    return ",".join(words)


def _memory(shape: MachineShape, *, shared: bool) -> str:
    # Memory that is shared is a file, and only of that it saves no more than what the guest has touched.
    words = [f"size={shape.memory_mib}M", f"shared={'on' if shared else 'off'}"]
    if shape.max_memory_mib > shape.memory_mib:
        words += ["hotplug_method=virtio-mem", f"hotplug_size={hotplug_mib(shape)}M"]
    if shape.huge_pages:
        words.append("hugepages=on,hugepage_size=2M")
    if shape.ksm:
        words.append("mergeable=on")
    if shape.prealloc:
        words.append("prefault=on")
    return ",".join(words)


HOTPLUG_STEP_MIB = 128
"""Room for memory that is plugged in is a multiple of this: the guest's kernel takes it in sections of that size."""


def hotplug_mib(shape: MachineShape) -> int:
    """How much memory can be plugged into a machine, in MiB."""
    return -(-(shape.max_memory_mib - shape.memory_mib) // HOTPLUG_STEP_MIB) * HOTPLUG_STEP_MIB
