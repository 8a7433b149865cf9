"""An image that the guest maps from the host's page cache, instead of reading it from a disk into pages of its own.

The device is persistent memory (virtio-pmem); its file system reads the files in place (DAX). So machines of one image
share its pages, and none of them keeps a copy. The guest's kernel has a ``struct page`` for each page of the device
though, used or not, and the size of the device is part of the machine's shape: an image goes into the next of a few
sizes. Its file becomes as large, by a hole at its end.

Sources: the kernel's ``filesystems/dax.rst`` and ``drivers/nvdimm/virtio_pmem.c``; virtio 1.2, 5.19.
"""

from __future__ import annotations

import os
import stat

SIZES_MIB = (128, 512, 2048, 8192)
"""Sizes of the device: whole sections of the guest's memory map. Each is a template of its own."""
PAGES_SHARE = 64
"""One byte in so many is what the guest's memory map takes: a ``struct page`` of 64 for 4096."""
MOST_SHARE = 16
"""The memory map of the device may take one byte in so many of the guest's memory."""
OPTIONS = ("ro", "dax=always")
"""How the guest mounts the image."""


def overhead_mib(mapped_mib: int) -> int:
    """What the guest's memory map takes for a device of this size, in MiB."""
    return -(-mapped_mib // PAGES_SHARE)


def prepare(path: str, memory_mib: int) -> tuple[int, str]:
    """Have the file of an image be such that a monitor can map it. Blocks for a moment.

    Args:
        path: The image. Nobody but us may write to it, or reach it by its name.
        memory_mib: Memory of the guest.

    Returns:
        The size of its device in MiB; or 0, and why it has to be a disk, as a clause.
    """
    try:
        status = os.stat(path)
        fitting = [mib for mib in SIZES_MIB if mib << 20 >= status.st_size]
        if not fitting:
            return 0, f"its image is larger than {SIZES_MIB[-1]} MiB"
        mib = fitting[0]
        if overhead_mib(mib) * MOST_SHARE > memory_mib:
            return 0, (
                f"the memory map of its image takes {overhead_mib(mib)} MiB, more than a"
                f" {MOST_SHARE}th of the machine's memory"
            )
        if os.stat(os.path.dirname(path)).st_mode & stat.S_IRWXO:
            return 0, f"others can reach {path}"
        # The monitor opens it anew, as a user of its own.
        if not status.st_mode & stat.S_IROTH:
            os.chmod(path, stat.S_IMODE(status.st_mode) | stat.S_IROTH)
        if status.st_size < mib << 20:
            os.truncate(path, mib << 20)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        return 0, f"its image cannot be made ready: {error.strerror}"
    return mib, ""
