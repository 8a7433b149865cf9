"""Where each device of a machine of Cloud Hypervisor sits: all on one PCI bus, each at a number that we choose.

What we name no number for (entropy, balloon, virtio-mem) gets the lowest that are free. A slot that is empty holds
nothing: disks and network interfaces are plugged in while the machine runs.
"""

from __future__ import annotations

VSOCK = 0x08
SHARE = 0x09
DISKS = range(0x0A, 0x18)
NICS = range(0x18, 0x20)

SHARE_TAG = "kataShared"
"""Mount tag of the share."""


def path(number: int) -> str:
    """The agent protocol's name of a device on the root bus: ``"0a"``."""
    return f"{number:02x}"
