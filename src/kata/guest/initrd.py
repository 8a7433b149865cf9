"""The guest's initial root file system: the agent as ``/init`` and, for a packaged kernel, its modules.

It is not compressed. Without KVM, decompression is emulated and costs more than it saves in copying; with KVM, both are
negligible.
"""

from __future__ import annotations

import re
import struct

from kata.errors import GuestAssetError
from kata.guest.cpio import Archive

MODULE_LIST = "etc/modules"
_SCANS_PORTS = b"kata.pci_scan"
_VERSION = re.compile(rb"kata-agent (\d[0-9A-Za-z.+~-]{0,63})")


def build(agent: bytes, modules: list[tuple[str, bytes]], release: str = "") -> bytes:
    """Build an initrd; the same input gives the same bytes.

    Args:
        agent: The agent's static program.
        modules: Path below the kernel's module directory and content of each module, in the order of loading.
        release: The kernel's release, as in ``/lib/modules/<release>``; only needed with modules.

    Returns:
        A newc cpio archive. ``/etc/modules`` in it lists the absolute paths of the modules, in order.

    Raises:
        GuestAssetError: A path in it is invalid.
    """
    archive = Archive()
    for directory in ("dev", "proc", "sys", "run", "tmp"):
        archive.directory(directory)
    # The kernel opens this for init before anything is mounted.
    archive.character_device("dev/console", 5, 1)
    archive.file("init", agent, 0o755)
    names = []
    for path, data in modules:
        name = f"lib/modules/{release}/{path}"
        archive.file(name, data)
        names.append(f"/{name}\n")
    if names:
        archive.file(MODULE_LIST, "".join(names).encode())
    return archive.finish()


def check_agent(data: bytes, path: str) -> None:
    """Check that a program can be PID 1 of a guest without other files: a static x86-64 executable.

    Args:
        data: The program.
        path: Its name, for the error.

    Raises:
        GuestAssetError: It cannot.
    """
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64 or struct.unpack_from("<H", data, 18)[0] != 62:
        raise GuestAssetError(f"the agent {path} is not a 64-bit x86 program", "tools/setup run")
    table = struct.unpack_from("<Q", data, 32)[0]
    entry, count = struct.unpack_from("<HH", data, 54)
    try:
        kinds = [struct.unpack_from("<I", data, table + index * entry)[0] for index in range(count)]
    except struct.error:
        raise GuestAssetError(f"the agent {path} is cut short", "tools/setup run") from None
    if 3 in kinds:  # PT_INTERP
        raise GuestAssetError(
            f"the agent {path} is dynamically linked: there is no loader in the guest",
            "build it with -C target-feature=+crt-static",
        )


def agent_version(data: bytes) -> str:
    """The version that the agent prints with ``--version``, found without running it; ``unknown`` if there is none."""
    match = _VERSION.search(data)
    return match[1].decode() if match else "unknown"


def scans_ports(data: bytes) -> bool:
    """Whether the agent finds a share that is plugged into a port, where nothing announces that
    (``agent/src/pci_scan.rs``): it lists that among its features, which are found without running it.
    """
    return _SCANS_PORTS in data
