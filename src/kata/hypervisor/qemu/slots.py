"""Where each device of a virtual machine sits.

A VM is built with its plugs already in: four disks, one NIC, one share, the agent's channel. A plug that is
not used holds a placeholder and can be filled while the machine runs, without hot-plug (which costs the
guest hundreds of milliseconds). All devices are on the root bus at fixed addresses, so the guest finds them
by address and never by the order in which its kernel happened to name them.

An address is what the agent protocol calls a PCI path: slot numbers as two hexadecimal digits, from the root
bus down, joined by ``/``; for these devices one number.
"""

from __future__ import annotations

SERIAL = 0x02
"""virtio-serial: agent channel and console."""
VSOCK = 0x03
SHARE = 0x04
DISKS = (0x05, 0x06, 0x07, 0x08, *range(0x0F, 0x13))
"""The first `FEWEST_DISKS` are always there."""
FEWEST_DISKS = 4
NIC = 0x09
NICS = (NIC, 0x0C, 0x0D, 0x0E)
"""The plug that is always there, and where further interfaces sit that a machine is started with; or, in their places,
ports for interfaces that come later (`late_port`)."""
RNG = 0x0A
BALLOON = 0x0B
PLUG = 0x13
"""virtio-mem: memory that a running machine is given."""
PLUG_ID = "plug"

PLACEHOLDER_READONLY = (True, False, True, False, *(False,) * 4)
"""Whether an empty disk slot is typed read-only: a disk cannot change that while the machine runs."""
PLACEHOLDER_BYTES = 64 << 30
"""Size of an empty disk. The image that fills it may be smaller."""

AGENT_CHANNEL = "agent.channel.0"
"""Name of the virtio-serial port of the agent (``/sys/class/virtio-ports/*/name`` in the guest)."""
SHARE_TAG = "kataShared"
"""Mount tag of the share."""


def pci_path(slot: int) -> str:
    """The agent protocol's name of a device on the root bus: ``"05"``."""
    return f"{slot:02x}"


def disk_path(index: int) -> str:
    """PCI path of a disk slot."""
    return pci_path(DISKS[index])


def nic_path(index: int = 0) -> str:
    """PCI path of a network interface."""
    return pci_path(NICS[index])


def late_port(index: int) -> str:
    """QEMU's name of the PCI Express port for a network interface that comes later; the one place on its bus is 0."""
    return f"late{index}"


def late_nic_path(index: int) -> str:
    """PCI path of a network interface in such a port."""
    return f"{nic_path(index)}/00"
