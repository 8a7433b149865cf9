"""Which storages make a container's root file system in the guest.

Three shapes: a read-only lower layer (an erofs disk, or a directory of the host through the share) with a
writable layer over it, a directory of the host used as it is, or a disk used as it is.
"""

from __future__ import annotations

from kata.engine.spec import GUEST_RUN, GUEST_SHARE
from kata.errors import ConfigError
from kata.hypervisor.qemu import slots
from kata.proto.agent_pb import Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="
"""Driver option of an overlay: a directory to make before mounting it."""


def path(container_id: str) -> str:
    """The container's root directory in the guest."""
    return f"{GUEST_RUN}/{container_id}/rootfs"


def share_name(container_id: str) -> str:
    """Where a root directory of the host appears below the share."""
    return f"{container_id}/rootfs"


def storages(container_id: str, rootfs: dict[str, Any]) -> list[Storage]:
    """What the agent is to mount, in this order.

    Args:
        container_id: The container.
        rootfs: The ``rootfs`` object of the settings.

    Raises:
        ConfigError: The object is not one of the known shapes.
    """
    base = f"{GUEST_RUN}/{container_id}"
    mounts: list[Storage] = []
    kind = rootfs.get("kind")
    if kind == "erofs":
        lower = f"{base}/lower"
        mounts.append(_disk(rootfs.get("lower_slot", 0), "erofs", ["ro"], lower))
    elif kind == "disk":
        return [
            Storage(
                driver="blk",
                source=rootfs["address"],
                fstype=rootfs["fstype"],
                options=rootfs["options"],
                mount_point=path(container_id),
            )
        ]
    elif kind == "share":
        lower = f"{GUEST_SHARE}/{share_name(container_id)}"
    else:
        raise ConfigError(f"unknown kind of root file system: {kind!r}")
    upper = f"{base}/upper"
    if rootfs.get("upper_slot") is not None:
        mounts.append(_disk(rootfs["upper_slot"], "ext4", ["rw", "nodev"], upper))
    elif rootfs.get("upper") == "tmpfs":
        mounts.append(
            Storage(
                driver="ephemeral", source="tmpfs", fstype="tmpfs", options=["mode=0755"], mount_point=upper
            )
        )
    elif kind == "share":
        mounts.append(
            Storage(
                driver="bind", source=lower, fstype="bind", options=["rbind"], mount_point=path(container_id)
            )
        )
        return mounts
    else:
        raise ConfigError("the root file system has no writable layer: give upper_slot or upper")
    mounts.append(
        Storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            driver_options=[f"{CREATE_DIRECTORY}{upper}/fs", f"{CREATE_DIRECTORY}{upper}/work"],
            options=[f"lowerdir={lower}", f"upperdir={upper}/fs", f"workdir={upper}/work"],
            mount_point=path(container_id),
        )
    )
    return mounts


def _disk(slot: int, fstype: str, options: list[str], mount_point: str) -> Storage:
    return Storage(
        driver="blk", source=slots.disk_path(slot), fstype=fstype, options=options, mount_point=mount_point
    )
