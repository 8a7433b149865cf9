"""Disks that another process of the host serves (vhost-user-blk), as the original finds them.

A server, such as SPDK's, listens on a socket in the host's store; a block device node of the
same name stands for it, so that a client can name the device to a container. Nothing is behind that node on the host::

    STORE/block/sockets/NAME
    STORE/block/devices/NAME    (mknod NAME b 241 0)

Source: Kata Containers' ``docs/use-cases/using-SPDK-vhostuser-and-kata.md``.
"""

from __future__ import annotations

import os
import stat

from kata.errors import HostError


def socket_of(store: str, numbers: tuple[int, int]) -> str:
    """The socket of the server that a block device stands for; empty where it stands for none. Blocks.

    Args:
        store: The host's store (`vhost_user_store_path`).
        numbers: The device's major and minor number.

    Raises:
        HostError: The device is in the store, and its socket is not.
    """
    devices = os.path.join(store, "block", "devices")
    try:
        names = sorted(os.listdir(devices))
    except OSError:
        return ""
    for name in names:
        try:
            about = os.lstat(os.path.join(devices, name))
        except OSError:
            continue
        if stat.S_ISBLK(about.st_mode) and about.st_rdev == os.makedev(*numbers):
            return _socket(os.path.join(store, "block", "sockets", name), numbers)
    return ""


def _socket(path: str, numbers: tuple[int, int]) -> str:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
        why = "it is no socket"
    except OSError as error:
        is_socket, why = False, os.strerror(error.errno or 0)
    if not is_socket:
        raise HostError(
            f"the vhost-user device {numbers[0]}:{numbers[1]} has no server at {path}: {why}",
            "Start what serves it first (SPDK's vhost, a storage daemon).",
        )
    return path
