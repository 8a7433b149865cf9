"""Which block devices and disk images of the host a container gets as disks of its virtual machine.

Two things come this way: a root file system that a snapshotter keeps on a block device or in an image (containerd's
devmapper and blockfile), which the guest mounts itself, and the block devices in a specification's
``linux.devices`` (Docker's ``--device``, a raw block volume of Kubernetes). `kata.engine.containers.attached_disks`
attaches them.
"""

from __future__ import annotations

import os

from kata.errors import HostError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.proto.task_pb import Mount

FILE_SYSTEMS = ("ext4", "xfs", "erofs")
"""Those that the guest's kernels can mount from a disk."""
_HOST_OPTIONS = ("loop", "rw", "defaults")
"""Mount options that say something to the host's mount(8) only."""


class Root:
    """A root file system on a disk.

    Args:
        mount: What the client would have mounted.
    """

    __slots__ = ("fstype", "options", "path", "readonly")

    def __init__(self, mount: Mount) -> None:
        self.path = mount.source
        self.fstype = mount.type
        self.readonly = "ro" in mount.options
        self.options = [option for option in mount.options if option not in _HOST_OPTIONS]


def root_of(mounts: list[Mount]) -> Root | None:
    """The disk that a container's root file system is on; None where the host's own mounts make it.

    Raises:
        UnsupportedError: It is on one, and is not that alone.
    """
    on_disks = [
        mount for mount in mounts if mount.type not in ("bind", "overlay") and mount.source.startswith("/")
    ]
    if not on_disks:
        return None
    first = on_disks[0]
    if first.type not in FILE_SYSTEMS:
        raise UnsupportedError(
            f"a root file system of type {first.type} on {first.source} is not supported",
            f"The guest mounts {', '.join(FILE_SYSTEMS)}: have the snapshotter make one of these (fs_type).",
        )
    if len(mounts) != 1 or first.target:
        raise UnsupportedError(
            f"a root file system of several mounts, one of them on {first.source}, is not supported",
            "Use containerd's overlayfs, native, devmapper or blockfile snapshotter.",
        )
    return Root(first)


class Device:
    """A block device of the host in a specification.

    Args:
        container_path: Where the container is to find it.
        numbers: Its major and minor number on the host.
        readonly: No rule allows writing to it.
    """

    __slots__ = ("container_path", "numbers", "readonly")

    def __init__(self, container_path: str, numbers: tuple[int, int], readonly: bool) -> None:
        self.container_path = container_path
        self.numbers = numbers
        self.readonly = readonly

    def host_path(self) -> str:
        """Its node, by the name that the host's kernel has for it. Blocks.

        Raises:
            HostError: The host has no such device.
        """
        major, minor = self.numbers
        try:
            with open(f"/sys/dev/block/{major}:{minor}/uevent", encoding="utf-8") as lines:
                name = next(line[8:].strip() for line in lines if line.startswith("DEVNAME="))
            status = os.stat(f"/dev/{name}")
        except (OSError, StopIteration):
            raise self._missing() from None
        if status.st_rdev != os.makedev(major, minor):
            raise self._missing()
        return f"/dev/{name}"

    def _missing(self) -> HostError:
        return HostError(
            f"there is no block device {self.numbers[0]}:{self.numbers[1]} on this host for {self.container_path}",
            "lsblk shows those that there are.",
        )


def is_privileged(spec: Mapping[str, Any]) -> bool:
    """Whether a specification allows every device: then those that it lists are merely all that the host has."""
    resources = (spec.get("linux") or {}).get("resources") or {}
    return any(
        rule.get("allow") and rule.get("type") in (None, "", "a") and rule.get("major") in (None, -1)
        for rule in resources.get("devices") or ()
    )


def devices_of(spec: Mapping[str, Any]) -> list[Device]:
    """The block devices that a container is to have: none where it is privileged, in its guest only."""
    linux = spec.get("linux") or {}
    if is_privileged(spec):
        return []
    rules = (linux.get("resources") or {}).get("devices") or ()
    found = []
    for device in linux.get("devices") or ():
        if device.get("type") == "b":
            numbers = (int(device.get("major") or 0), int(device.get("minor") or 0))
            writable = any(
                rule.get("allow")
                and (rule.get("major"), rule.get("minor")) == numbers
                and "w" in (rule.get("access") or "")
                for rule in rules
            )
            found.append(Device(str(device.get("path") or ""), numbers, not writable))
    return found


def drop_host_devices(spec: Mapping[str, Any]) -> dict[str, Any]:
    """*spec* without block devices that only name the host's: their numbers are other devices' in the guest."""
    linux = spec.get("linux") or {}
    devices = linux.get("devices")
    if not devices or not is_privileged(spec):
        return dict(spec)
    return {**spec, "linux": {**linux, "devices": [one for one in devices if one.get("type") != "b"]}}
