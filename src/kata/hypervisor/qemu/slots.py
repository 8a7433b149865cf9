"""Where each device of a virtual machine sits.

A machine starts with its slots in place: four to eight disks, at least one network interface, a share and the agent's
channel. An unused slot holds a placeholder and is filled while the machine runs, without hot-plug (which costs the
guest hundreds of milliseconds). Only network interfaces beyond those that the machine started with are hot-plugged,
into PCI Express ports that are there from the start (`hotplug_port`).

Every device has a fixed address, so the guest finds it by that and never by the order in which its kernel named the
devices. An address is what the agent protocol calls a PCI path: slot numbers as two hexadecimal digits, from the root
bus down, joined by ``/``. It is one number, except for an interface behind a port, which has two.

A machine of the type microvm has no PCI bus, but 24 places for virtio devices whose registers are in memory
(hw/i386/microvm.c). The device of a slot is in the place `transport`, and its address is where its registers are.
"""

from __future__ import annotations

SERIAL = 0x02
"""virtio-serial: agent channel and console."""
VSOCK = 0x03
SHARE = 0x04
SHARE_PORT = "lateshare"
"""QEMU's name of the PCI Express port in its place in a machine that goes on from a template: the device of a share by
virtio-fs cannot be saved (QEMU 7.2), so it is plugged in."""
SHARE_PATH = f"{SHARE:02x}/00"
"""PCI path of the device in that port."""
DISKS = (0x05, 0x06, 0x07, 0x08, *range(0x0F, 0x13))
"""Slots of disks; the first `MIN_DISK_SLOTS` are in every machine."""
MIN_DISK_SLOTS = 4
NIC = 0x09
NICS = (NIC, 0x0C, 0x0D, 0x0E)
"""Slot 0 is always populated. Slots 1 to 3 hold further interfaces that are present at boot, or ports for interfaces
that are hot-plugged (`hotplug_port`)."""
RNG = 0x0B
BALLOON = 0x0A
"""It has no message signalled interrupts (QEMU 7.2). Without ACPI, Linux takes for its line what qboot has written into
the device's configuration, and qboot counts as for the older PC's chip set: the same only in every second slot."""
MEMORY = 0x13
"""virtio-mem: memory that is added to a running machine."""
MEMORY_ID = "plug"
VHOST_USER_DISKS = range(0x14, 0x18)
"""PCI Express ports for disks that other processes serve, in machines that can be given such."""
HOST_DEVICES = range(0x18, 0x1C)
"""PCI Express ports of devices of the host, in machines that have such."""

PLACEHOLDER_READONLY = (True, False, True, False, *(False,) * 4)
"""Whether the placeholder in a disk slot is read-only: a disk cannot change that while the machine runs."""
PLACEHOLDER_BYTES = 16 << 40
"""Size of an empty disk. The image that fills it may be smaller; a larger read-only one would not fit: the guest is
not told of its size."""

AGENT_CHANNEL = "agent.channel.0"
"""Name of the virtio-serial port of the agent (``/sys/class/virtio-ports/*/name`` in the guest)."""
INCOMING_SET = 100
"""Number of QEMU's set of descriptors with what a machine goes on from; those with disks have the disks' numbers."""
SHARE_TAG = "kataShared"
"""Mount tag of the share."""


MICROVM = "microvm"
"""QEMU's machine type without PCI."""
_MMIO_BASE, _MMIO_BYTES = 0xFEB00000, 0x200
"""Where a microvm has the registers of its virtio devices, and those of each (include/hw/i386/microvm.h)."""


def transport(slot: int) -> int:
    """Number of the place in a microvm in which the device of a slot is.

    Place 0 stays empty. Its interrupt is the first of the second interrupt controller, which QEMU delivers as that
    controller's third (ioapic_set_irq in hw/intc/ioapic.c; 7.2): a device there would never be heard.
    """
    return slot - SERIAL + 1


def address(slot: int, machine: str) -> str:
    """The agent protocol's name of a device in a machine of this type: ``"05"``, or ``"mmio:feb00600"``."""
    return f"mmio:{_MMIO_BASE + _MMIO_BYTES * transport(slot):x}" if machine == MICROVM else pci_path(slot)


def pci_path(slot: int) -> str:
    """The agent protocol's name of a device on the root bus: ``"05"``."""
    return f"{slot:02x}"


def disk_path(index: int, machine: str = "") -> str:
    """Address of a disk slot."""
    return address(DISKS[index], machine)


def nic_path(index: int = 0, machine: str = "") -> str:
    """Address of a network interface."""
    return address(NICS[index], machine)


def hotplug_port(index: int) -> str:
    """QEMU's name of the PCI Express port for a hot-plugged network interface; its bus has one slot, 0."""
    return f"late{index}"


def vhost_user_port(index: int) -> str:
    """QEMU's name of the PCI Express port for a disk that another process serves; its bus has one slot, 0."""
    return f"served{index}"


def vhost_user_path(index: int) -> str:
    """PCI path of the disk behind `vhost_user_port`."""
    return f"{pci_path(VHOST_USER_DISKS[index])}/00"


def hotplug_nic_path(index: int) -> str:
    """PCI path of the hot-plugged network interface behind `hotplug_port`."""
    return f"{nic_path(index)}/00"
