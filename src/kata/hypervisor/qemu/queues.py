"""What the length of virtio queues takes of a guest's memory, which differs among QEMU's versions."""

from __future__ import annotations

import os

from kata import children, host_cache, paths

_CACHE = "hypervisor-version"
LONG_QUEUES_MIB = 12
"""What virtio queues of 1024 entries take of a guest's memory: Linux fills those in which it waits for something with
buffers of a page each (fill_queue in drivers/char/virtio_console.c: 8 MiB for our two; the network's the rest)."""


def queues_mib(binary: str) -> int:
    """MiB of the guest's memory that longer virtio queues of this QEMU take than those of others.

    QEMU 10.0 gives every queue 1024 entries, whatever its device says; 7.2 and 11.1 do not.

    Args:
        binary: Its absolute path; one that cannot be used takes nothing.
    """
    return LONG_QUEUES_MIB if version(binary).startswith("10.") else 0


def version(binary: str) -> str:
    """What QEMU says of its version, remembered for as long as the program does not change; empty for a program that
    cannot be executed.
    """
    try:
        return _version(binary)
    except OSError:
        return ""


def _version(binary: str) -> str:
    key = host_cache.program_key(binary)
    cache = os.path.join(paths.run_dir(), _CACHE)
    known = host_cache.read(cache, key)
    if known:
        return known[0]
    # "QEMU emulator version 10.0.13 (Debian ...)"
    words = children.output_of([binary, "--version"])[:200].partition(b" version ")[2].split(maxsplit=1)[:1]
    version = words[0].decode("ascii", "replace") if words else "unknown"
    host_cache.write(cache, key, version)
    return version
