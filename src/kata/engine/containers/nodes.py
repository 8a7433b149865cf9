"""Device nodes of the host that a specification names, and what each is in a guest with a kernel of its own.

* A character device that the guest has by the same number (``/dev/null``, ``/dev/fuse``) is the guest's. Any other one
  is refused by name: its node would be there, and nothing behind it. A privileged container's list is merely all that
  the host has, so from that one the others are left out.
* A block device is made a disk of the machine, whether it comes in ``linux.devices`` (`kata.engine.containers.disks`)
  or as a bind mount (Kubernetes' hostPath): then it becomes a device of the specification here.

Sources: the kernel's ``Documentation/admin-guide/devices.txt``; runtime-spec config-linux.md, "Devices".
"""

from __future__ import annotations

import os
import stat

from kata.engine.containers import disks, spec
from kata.errors import KataError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

GUEST_NODES = {
    (1, 3): "null",
    (1, 5): "zero",
    (1, 7): "full",
    (1, 8): "random",
    (1, 9): "urandom",
    (1, 11): "kmsg",
    (5, 0): "tty",
    (5, 1): "console",
    (5, 2): "ptmx",
    (10, 183): "hwrng",
    (10, 200): "net/tun",
    (10, 229): "fuse",
    (10, 237): "loop-control",
}
"""Character devices whose numbers are the same on every kernel, and which the guest's has: name in its /dev."""
OF_PRIVILEGED = (
    *(
        (f"/dev/{name}", "c", number)
        for number, name in GUEST_NODES.items()
        if name in ("kmsg", "net/tun", "fuse", "loop-control")
    ),
    *((f"/dev/loop{number}", "b", (7, number)) for number in range(8)),
)
"""What a privileged container has besides: path, kind, numbers. An ordinary host has these nodes, too; the kernel makes
a loop device when it is first asked for one."""
_HINT = "Of a host's character devices the guest has these itself: " + ", ".join(
    f"/dev/{name}" for name in GUEST_NODES.values()
)


def of_guest(
    config: Mapping[str, Any], given: Sequence[int] = ()
) -> tuple[dict[str, Any], list[disks.Device]]:
    """A specification whose character devices are all the guest's, and whose bind mounts are no block devices. Blocks.

    Args:
        config: The specification; it is left as it is.
        given: IOMMU groups whose devices the machine has: their nodes are the host's, and the guest's own drivers take
            the devices.

    Returns:
        The other specification, and the block devices that were bind mounts.

    Raises:
        UnsupportedError: A device that cannot be in the guest.
    """
    linux = config.get("linux") or {}
    listed = linux.get("devices") or []
    privileged = disks.is_privileged(config)
    kept = []
    for device in listed:
        numbers = (int(device.get("major") or 0), int(device.get("minor") or 0))
        if device.get("type") in ("c", "u") and numbers not in GUEST_NODES:
            if privileged or _is_given(str(device.get("path") or ""), given):
                continue
            _refuse_vfio(str(device.get("path") or ""))
            raise UnsupportedError(
                f"cannot give the container the device {device.get('path')}: the character device"
                f" {numbers[0]}:{numbers[1]} is this host's, and the container runs on another kernel",
                _HINT,
            )
        kept.append(device)
    mounts, volumes = [], []
    for mount in config.get("mounts") or ():
        found = _block_device(mount) if spec.is_bind(mount) else None
        if found is None:
            mounts.append(mount)
        else:
            volumes.append(found)
    if not volumes and len(kept) == len(listed):
        return dict(config), []
    return {**config, "mounts": mounts, "linux": {**linux, "devices": kept}}, volumes


def _is_given(path: str, given: Sequence[int]) -> bool:
    if not given or not path.startswith("/dev/vfio/"):
        return False
    from kata.hypervisor import vfio

    return path == vfio.CONTAINER or vfio.number_of(path) in given


def _refuse_vfio(path: str) -> None:
    """Say of the node of an IOMMU group what is in the way of giving its devices to a machine.

    Raises:
        UnsupportedError: It is one.
    """
    number = path.removeprefix("/dev/vfio/")
    if number == path or not (number == "vfio" or (number.isdecimal() and len(number) < 10)):
        return
    from kata.hypervisor import vfio

    try:
        if number == "vfio":
            vfio.groups()
        else:
            vfio.require(vfio.group(int(number)))
        why = "its devices are no part of this machine"
        hint = (
            'A machine gets devices of the host when it starts, with cold_plug_vfio = "root-port": those of the'
            " container that it is started for, and not those of a pod's."
        )
    except KataError as error:
        why, hint = error.message, error.hint
    raise UnsupportedError(f"cannot pass {path} through to the machine: {why}", hint)


def with_volumes(config: Mapping[str, Any], volumes: list[disks.Device]) -> dict[str, Any]:
    """*config* with devices for what were bind mounts of block devices; the agent puts the guest's numbers in."""
    if not volumes:
        return dict(config)
    linux = config.get("linux") or {}
    more = [
        {"path": one.container_path, "type": "b", "major": one.numbers[0], "minor": one.numbers[1]}
        for one in volumes
    ]
    return {**config, "linux": {**linux, "devices": [*(linux.get("devices") or []), *more]}}


def with_guests(config: Mapping[str, Any]) -> dict[str, Any]:
    """*config* with the nodes that a privileged container finds in its guest; others as they are.

    Not with a user namespace: no nodes can be made there.
    """
    linux = config.get("linux") or {}
    own = any(one.get("type") == "user" for one in linux.get("namespaces") or ())
    if own or not disks.is_privileged(config):
        return dict(config)
    listed = linux.get("devices") or []
    there = {os.path.normpath(str(one.get("path"))) for one in listed}
    there |= {os.path.normpath(str(one.get("destination"))) for one in config.get("mounts") or ()}
    more = [
        {"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o660}
        for path, kind, (major, minor) in OF_PRIVILEGED
        if path not in there
    ]
    return {**config, "linux": {**linux, "devices": [*listed, *more]}}


def _block_device(mount: Mapping[str, Any]) -> disks.Device | None:
    try:
        about = os.stat(str(mount.get("source") or ""))
    except OSError:
        return None  # told when it is shared
    if not stat.S_ISBLK(about.st_mode):
        return None
    numbers = (os.major(about.st_rdev), os.minor(about.st_rdev))
    readonly = bool({"ro", "rro"} & set(mount.get("options") or ()))
    return disks.Device(str(mount.get("destination") or ""), numbers, readonly)


def guest_path(about: os.stat_result) -> str:
    """Where the guest has the character device that a bind mount's source is; empty for anything else."""
    numbers = (os.major(about.st_rdev), os.minor(about.st_rdev))
    if not stat.S_ISCHR(about.st_mode) or numbers not in GUEST_NODES:
        return ""
    return f"/dev/{GUEST_NODES[numbers]}"


def refuse(source: str, about: os.stat_result) -> UnsupportedError:
    """Why a bind mount's source that is neither directory nor file cannot be in the guest."""
    hint = "Share the directory or file behind it."
    if stat.S_ISSOCK(about.st_mode):
        kind, hint = (
            "a socket",
            "Whoever listens is on the host's kernel: reach it over the network instead.",
        )
    elif stat.S_ISFIFO(about.st_mode):
        kind = "a fifo"
    else:
        kind = f"the character device {os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
        hint = _HINT
    return UnsupportedError(
        f"cannot use the volume {source}: it is {kind} of this host, and the container runs on another kernel",
        hint,
    )
