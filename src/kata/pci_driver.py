"""Which driver of the host a PCI device has, and how it gets another one.

Source: the kernel's ``Documentation/ABI/testing/sysfs-bus-pci`` (driver_override, unbind, drivers_probe).
"""

from __future__ import annotations

import os

from kata import sysio


def give(device: str, driver: str, *, probe: bool = True) -> None:
    """Take a device from its driver, and give it to another.

    Args:
        device: Its directory in sysfs.
        driver: The other one; empty for the one that the kernel chooses.
        probe: Without it, the device is left without a driver.

    Raises:
        OSError: The kernel refused.
    """
    address = os.path.basename(device)
    sysio.write_existing(f"{device}/driver_override", driver or "\n")
    if of(device):
        sysio.write_existing(f"{device}/driver/unbind", address)
    if probe:
        sysio.write_existing(f"{os.path.dirname(os.path.dirname(device))}/drivers_probe", address)


def override(device: str) -> str:
    """The only driver that a device may have; empty if the kernel chooses.

    Raises:
        FileNotFoundError: There is no such device.
    """
    with open(f"{device}/driver_override", encoding="ascii", errors="replace") as file:
        text = file.read().strip()
    return "" if text == "(null)" else text


def of(device: str) -> str:
    """The driver of a device by its directory in sysfs; empty without one."""
    try:
        return os.path.basename(os.readlink(f"{device}/driver"))
    except OSError:
        return ""
