"""Which storages make a container's root file system in the guest.

Three shapes: a read-only lower layer (an erofs disk, or a directory of the host through the share) with a
writable layer over it, a directory of the host used as it is, or a disk used as it is.
"""

from __future__ import annotations

from kata.engine.containers.spec import GUEST_RUN, GUEST_SHARE
from kata.errors import ConfigError
from kata.proto.agent_pb import Storage
from kata.settings import RootfsSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="
"""Driver option of an overlay: a directory to make before mounting it."""


class HostDirectory:
    """A directory of the host that a client hands over as a root file system, shared with the guest as it is.

    Args:
        source: Its path.
        mounted_by_host: The host has mounted it, where the engine's mount namespace may not see it.
    """

    __slots__ = ("mounted_by_host", "source")

    def __init__(self, source: str, *, mounted_by_host: bool) -> None:
        self.source = source
        self.mounted_by_host = mounted_by_host


class DiskRoot:
    """A root file system that is a disk of the machine by itself.

    Args:
        address: Where the guest finds the disk.
        fstype: Its file system.
        options: Mount options.
    """

    __slots__ = ("address", "fstype", "options")

    def __init__(self, address: str, fstype: str, options: list[str]) -> None:
        self.address = address
        self.fstype = fstype
        self.options = options


class LayerDisksRoot:
    """A root file system of two disks: one to read, one to write to (`kata.engine.containers.snapshot_root`).

    Args:
        lower: Where the guest finds the disk with the read-only layers.
        upper: Where it finds the writable one.
    """

    __slots__ = ("lower", "upper")

    def __init__(self, lower: str, upper: str) -> None:
        self.lower = lower
        self.upper = upper


def upper_path(container_id: str) -> str:
    """The upper directory of the container's overlay in the guest."""
    return f"{GUEST_RUN}/{container_id}/upper/fs"


def lower_path(container_id: str, *, shared: bool = False) -> str:
    """The directory in the guest with the files that the writable layer lies over.

    Args:
        container_id: The container.
        shared: They are a directory of the host, and not a disk.
    """
    return f"{GUEST_SHARE}/{share_name(container_id)}" if shared else f"{GUEST_RUN}/{container_id}/lower"


def path(container_id: str) -> str:
    """The container's root directory in the guest."""
    return f"{GUEST_RUN}/{container_id}/rootfs"


def share_name(container_id: str) -> str:
    """Where a root directory of the host appears below the share."""
    return f"{container_id}/rootfs"


if TYPE_CHECKING:
    Rootfs: TypeAlias = RootfsSettings | HostDirectory | DiskRoot | LayerDisksRoot


def shared_directory(root: Rootfs | None) -> str:
    """The directory of the host that a root file system needs the share for; empty if it needs none."""
    if isinstance(root, HostDirectory):
        return root.source
    return root.source if isinstance(root, RootfsSettings) and root.kind == "share" else ""


def storages(
    container_id: str, root: Rootfs | None, addresses: Sequence[str] = (), *, mapped: bool = False
) -> list[Storage]:
    """What the agent is to mount, in this order.

    Args:
        container_id: The container.
        root: What its root file system is made of.
        addresses: Where the machine's disks are in the guest, by slot.
        mapped: The guest maps the image in the first slot (`kata.hypervisor.mapped`).

    Raises:
        ConfigError: Nothing is known of it, or it is of a kind that there is not.
    """
    base = f"{GUEST_RUN}/{container_id}"
    shared = lower_path(container_id, shared=True)
    as_it_is = Storage(
        driver="bind", source=shared, fstype="bind", options=["rbind"], mount_point=path(container_id)
    )
    if isinstance(root, DiskRoot):
        return [
            Storage(
                driver="blk",
                source=root.address,
                fstype=root.fstype,
                options=root.options,
                mount_point=path(container_id),
            )
        ]
    if isinstance(root, HostDirectory):
        return [as_it_is]
    if isinstance(root, LayerDisksRoot):
        return [
            _disk(root.lower, "erofs", ["ro"], f"{base}/lower"),
            _disk(root.upper, "ext4", ["rw"], f"{base}/upper"),
            _overlay(container_id, f"{base}/lower", ["index=off", "metacopy=off", "redirect_dir=off"]),
        ]
    if root is None:
        raise ConfigError(f"nobody says what the root file system of container {container_id} is made of")
    mounts: list[Storage] = []
    if root.kind == "erofs":
        lower = f"{base}/lower"
        slot = root.lower_slot or 0
        mounts.append(
            _image(addresses[slot], lower)
            if mapped and slot == 0
            else _disk(addresses[slot], "erofs", ["ro"], lower)
        )
    elif root.kind == "share":
        lower = shared
    else:
        raise ConfigError(f"unknown kind of root file system: {root.kind!r}")
    upper = f"{base}/upper"
    if root.upper_slot is not None:
        mounts.append(_disk(addresses[root.upper_slot], "ext4", ["rw", "nodev"], upper))
    elif root.upper == "tmpfs":
        mounts.append(_tmpfs(upper))
    elif root.kind == "share":
        return [as_it_is]
    else:
        raise ConfigError("the root file system has no writable layer: give upper_slot or upper")
    mounts.append(_overlay(container_id, lower))
    return mounts


def empty(container_id: str, share_tag: str) -> list[Storage]:
    """What the agent is to mount for a root file system with nothing in it, as much like others as can be.

    Args:
        container_id: The container.
        share_tag: Mount tag of a share by virtio-fs that is to be its lower layer; empty for one in memory.
    """
    base = f"{GUEST_RUN}/{container_id}"
    lower = Storage(
        driver="virtio-fs" if share_tag else "ephemeral",
        source=share_tag or "tmpfs",
        fstype="virtiofs" if share_tag else "tmpfs",
        options=["nodev"],
        mount_point=f"{base}/lower",
    )
    return [lower, _tmpfs(f"{base}/upper"), _overlay(container_id, lower.mount_point)]


def _tmpfs(mount_point: str) -> Storage:
    return Storage(
        driver="ephemeral", source="tmpfs", fstype="tmpfs", options=["mode=0755"], mount_point=mount_point
    )


def _overlay(container_id: str, lower: str, options: Sequence[str] = ()) -> Storage:
    upper, work = upper_path(container_id), f"{GUEST_RUN}/{container_id}/upper/work"
    return Storage(
        driver="overlayfs",
        source="overlay",
        fstype="overlay",
        driver_options=[f"{CREATE_DIRECTORY}{upper}", f"{CREATE_DIRECTORY}{work}"],
        options=[f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}", *options],
        mount_point=path(container_id),
    )


def _disk(address: str, fstype: str, options: list[str], mount_point: str) -> Storage:
    return Storage(driver="blk", source=address, fstype=fstype, options=options, mount_point=mount_point)


def _image(address: str, mount_point: str) -> Storage:
    from kata.hypervisor import mapped

    return Storage(
        driver="pmem", source=address, fstype="erofs", options=list(mapped.OPTIONS), mount_point=mount_point
    )
