"""Settings of sandboxes for tests that drive an engine themselves."""

from __future__ import annotations

from typing import Any

from kata.cli.session import client_policy
from kata.settings import (
    ContainerSettings,
    GuestSettings,
    HypervisorSettings,
    LogSettings,
    MachineSettings,
    RootfsSettings,
    SandboxSettings,
    SizeSettings,
)
from kata.settings_part import Part


def sandbox(sandbox_id: str, directory: str, *, accel: str, kernel: str, initrd: str) -> SandboxSettings:
    """A sandbox of the `kata` command with one container on two disks, and without a network.

    Args:
        sandbox_id: Its id.
        directory: The container's.
        accel: ``kvm`` or ``tcg``.
        kernel: The guest's kernel.
        initrd: Its initrd.
    """
    return SandboxSettings(
        id=sandbox_id,
        client=client_policy(),
        machine=MachineSettings(
            hypervisor=HypervisorSettings(accel=accel),
            guest=GuestSettings(kernel=kernel, initrd=initrd),
            size=SizeSettings(vcpus=1, memory_mib=256),
        ),
        container=ContainerSettings(
            directory=directory,
            rootfs=RootfsSettings(kind="erofs", lower_slot=0, upper_slot=1),
            log=LogSettings(path=f"{directory}/log", max_bytes=1 << 20, files=2),
        ),
    )


def change(part: Part, **changes: Any) -> None:
    """Set keys of *part*; a dict sets keys of a part of it."""
    for name, value in changes.items():
        inner = getattr(part, name)
        if isinstance(value, dict) and isinstance(inner, Part):
            change(inner, **value)
        else:
            setattr(part, name, value)
