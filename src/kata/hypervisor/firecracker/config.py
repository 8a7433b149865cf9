"""The configuration of a Firecracker: one document with the whole machine, whose files it gets as descriptors.

Source: Firecracker's swagger/firecracker.yaml; the document's members are named as those of ``GET /vm/config``.
"""

from __future__ import annotations

from kata.hypervisor.rust_vmm import CID, file, parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.hypervisor.base import Attachments, Disk, MachineShape

KERNEL_FD, INITRD_FD, CONFIG_FD, LOG_FD, METRICS_FD, FIRST_DISK_FD = range(3, 9)
"""Descriptors that it inherits, and the first of those of the disk slots: always the same, since a machine that was
saved names its disks by them."""
SAVED_FDS = (KERNEL_FD, INITRD_FD)
"""Where those are of a machine that was saved: it has its kernel and initrd in its memory."""
NAMES = ("kernel", "initrd", "config", "log", "metrics")
SAVED_FILES = ("vmstate", "memory")
"""Names of what it saves a machine into."""
MAX_DISKS = 8
MAX_NICS = 8
_EMPTY_READONLY = (True, False, True, False, *(False,) * 4)
"""Whether an empty disk slot is read-only: a disk cannot change that while the machine runs."""
_KINDS = {"readonly": True, "writable": False}
"""The same of one that is kept for a disk (`kata.hypervisor.base.MachineShape.disks`)."""
SLOT_MIB = 128
"""Room for memory that is plugged in is a multiple of this (``slot_size_mib``)."""
_REBOOT = "reboot=k"
"""The guest's kernel restarts by the keyboard's controller: the one way by which a guest can end its machine."""


class Slots:
    """What is in each disk slot of a machine, and where each device is in the guest.

    Firecracker numbers the devices of its one PCI bus from 1, in this order: balloon, disks, network interfaces, vsock,
    entropy, memory. What is plugged in later is no device more: the guest would not be told of it. A slot is a disk
    from the beginning, empty or not, and another file is put behind it.

    Args:
        shape: The machine.
        attachments: What it is connected to.

    Attributes:
        disks: By slot; None is an empty one.
        readonly: Whether the guest may not write to it, by slot.
        disk_addresses: By slot.
        nic_addresses: By interface.
    """

    __slots__ = ("disk_addresses", "disks", "nic_addresses", "readonly")

    def __init__(self, shape: MachineShape, attachments: Attachments) -> None:
        self.disks: list[Disk | None] = list(attachments.disks)
        self.disks += [None] * (len(shape.disks) - len(self.disks))
        kinds = dict(enumerate(shape.disks))
        self.readonly = [
            _KINDS.get(kinds.get(index, ""), _EMPTY_READONLY[index]) if disk is None else disk.readonly
            for index, disk in enumerate(self.disks)
        ]
        first_disk = 2 if shape.reclaim else 1
        first_nic = first_disk + len(self.disks)
        self.disk_addresses = [_path(first_disk + index) for index in range(len(self.disks))]
        # One that leads nowhere is none: Firecracker knows taps alone.
        wired = iter(range(first_nic, 32))
        self.nic_addresses = [_path(next(wired)) if nic.backend else "" for nic in attachments.nics]


def _path(number: int) -> str:
    """The agent protocol's name of a device on the root bus: ``"0a"``."""
    return f"{number:02x}"


def build(
    shape: MachineShape,
    attachments: Attachments,
    slots: Slots,
    *,
    vsock: str,
    taps: Mapping[int, str],
) -> dict[str, Any]:
    """The document.

    Args:
        shape: The machine.
        attachments: What it is connected to.
        slots: Its disks.
        vsock: Path of the socket that stands for the guest's vsock; made by the monitor.
        taps: Name of the tap device of each network interface that has one, by the interface's number.
    """
    options = dict(shape.options)
    rx, tx = (
        _limiter(bandwidth=_bucket(options.get(f"{way}_rate_limiter_max_rate", 0) // 8))
        for way in ("rx", "tx")
    )
    disk_limiter = _limiter(
        bandwidth=_bucket(
            options.get("disk_rate_limiter_bw_max_rate", 0) // 8,
            options.get("disk_rate_limiter_bw_one_time_burst", 0) // 8,
        ),
        ops=_bucket(
            options.get("disk_rate_limiter_ops_max_rate", 0),
            options.get("disk_rate_limiter_ops_one_time_burst", 0),
        ),
    )
    document: dict[str, Any] = {
        "boot-source": {
            "kernel_image_path": file(KERNEL_FD),
            "initrd_path": file(INITRD_FD),
            "boot_args": parameters(shape, "" if shape.console == "none" else "console=ttyS0", _REBOOT),
        },
        "machine-config": {
            "vcpu_count": max(shape.vcpus, shape.max_vcpus),
            "mem_size_mib": shape.memory_mib,
        },
        # It has to be there, be it empty.
        "drives": [
            {
                **disk_config(index, disk, file(FIRST_DISK_FD + index), readonly=slots.readonly[index]),
                **_limits(rate_limiter=disk_limiter),
            }
            for index, disk in enumerate(slots.disks)
        ],
        "network-interfaces": [
            {
                "iface_id": f"nic{index}",
                "host_dev_name": name,
                "guest_mac": attachments.nics[index].mac,
                **_limits(rx_rate_limiter=rx, tx_rate_limiter=tx),
            }
            for index, name in taps.items()
        ],
        "vsock": {"guest_cid": CID, "uds_path": vsock},
        "entropy": {},
    }
    if shape.huge_pages:
        document["machine-config"]["huge_pages"] = "2M"
    if shape.reclaim:
        document["balloon"] = {
            "amount_mib": 0,
            # With it a guest would count the balloon as memory that it uses.
            "deflate_on_oom": False,
            "free_page_reporting": True,
            # Without it the balloon's size cannot be asked for. The guest is bothered once an hour.
            "stats_polling_interval_s": 3600,
        }
    if shape.max_memory_mib > shape.memory_mib:
        room = -(-(shape.max_memory_mib - shape.memory_mib) // SLOT_MIB) * SLOT_MIB
        document["memory-hotplug"] = {"total_size_mib": room, "block_size_mib": 2, "slot_size_mib": SLOT_MIB}
    return document


def disk_config(index: int, disk: Disk | None, path: str, *, readonly: bool) -> dict[str, Any]:
    """A disk as the API describes it (``Drive``).

    Args:
        index: Its slot.
        disk: The disk; None for an empty slot.
        path: What the monitor opens.
        readonly: The guest may not write to it.
    """
    return {
        "drive_id": f"disk{index}",
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": readonly,
        # With "Unsafe" the guest's flushes are not passed on; it stays so when another file is put behind the slot.
        "cache_type": "Unsafe" if readonly or (disk is not None and disk.ephemeral) else "Writeback",
    }


def _bucket(rate: int, burst: int = 0) -> dict[str, int] | None:
    """A ``TokenBucket`` of so many tokens a second, and some that are there once at first; None without a limit."""
    if not rate:
        return None
    bucket = {"size": rate, "refill_time": 1000}
    return bucket | {"one_time_burst": burst} if burst else bucket


def _limiter(**buckets: dict[str, int] | None) -> dict[str, Any]:
    """A ``RateLimiter``; empty without a limit."""
    return {name: bucket for name, bucket in buckets.items() if bucket is not None}


def _limits(**limiters: dict[str, Any]) -> dict[str, Any]:
    """Those members of a device that say something."""
    return {name: limiter for name, limiter in limiters.items() if limiter}
