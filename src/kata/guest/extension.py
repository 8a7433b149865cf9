"""Optional programs for a guest, as a second archive after the initrd.

Linux unpacks archives that follow one another into the same initial root file system. The files of an extension are
below ``/ext/<name>`` there, with the libraries that they need, as a root directory of its own: the agent keeps that
directory and runs the programs in it.

``iptables`` is the programs behind GetIPTables and SetIPTables. ``shell`` is the debug console's shell, and a root
directory of its own is what it does not have: the agent takes what is in ``/debug`` into the guest's own ``/bin``. Both
are made of Debian's packages.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct

from kata import paths
from kata.errors import GuestAssetError
from kata.guest import packages
from kata.guest.cpio import Archive
from kata.guest.manifest import SHELL
from kata.guest.progress import Progress

NAMES = ("iptables", SHELL)

_PACKAGES = {
    "iptables": ("iptables", "libxtables12", "libmnl0", "libnftnl11", "libc6"),
    SHELL: ("busybox-static",),
}
_BUSYBOX = "busybox"
_PROGRAM = "xtables-nft-multi"
_COMMANDS = ("iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore")
LOADER = "ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_MATCHES = ("libip6t_", "libipt_", "libxt_")
"""Modules for IPv4 and IPv6; those for ARP and bridges have commands of their own."""


class Extension:
    """A finished archive.

    Attributes:
        name: One of `NAMES`.
        image: The archive.
        sources: Versions of the packages that it was made from.
    """

    __slots__ = ("image", "name", "sources")

    def __init__(self, name: str, image: bytes, sources: dict[str, str]) -> None:
        self.name = name
        self.image = image
        self.sources = sources

    @property
    def digest(self) -> str:
        """SHA-256 of the archive."""
        return hashlib.sha256(self.image).hexdigest()


def build(name: str, progress: Progress) -> Extension:
    """Build an extension.

    Args:
        name: One of `NAMES`.
        progress: Reports downloads.

    Raises:
        GuestAssetError: There is no such extension, no apt, or the packages do not have the expected files.
        ResourceExhaustedError: There is not enough space for the packages.
    """
    if name not in NAMES:
        raise GuestAssetError(f"there is no guest extension {name!r}", f"choose one of: {', '.join(NAMES)}")
    if not packages.have_apt():
        raise GuestAssetError("the extension is made from Debian's packages, and this machine has no apt")
    sources = {}
    work = os.path.join(paths.cache_dir(), f"extension-{name}.{os.getpid()}")
    try:
        for package in map(packages.describe, _PACKAGES[name]):
            packages.unpack(packages.fetch(package, progress.note), work)
            sources[package.name] = package.version
        if name == SHELL:
            return Extension(name, pack_shell(files_below(work, _BUSYBOX)), sources)
        return Extension(name, pack(name, files_below(work, _PROGRAM)), sources)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def files_below(directory: str, program: str) -> dict[str, str]:
    """A program and the shared objects below a directory: file name to path, links included."""
    found = {}
    for base, _directories, names in os.walk(directory):
        for name in names:
            if name == program or ".so" in name:
                found[name] = os.path.join(base, name)
    return found


def take(name: str, files: dict[str, str], contents: dict[str, bytes]) -> bool:
    """Add a file and every library that it needs to `contents`.

    Args:
        name: A file name.
        files: Path by file name, from `files_below`.
        contents: Content by file name; what is there already is left.

    Returns:
        Whether all of it is there; if not, the file itself has not been added.
    """
    if name in contents:
        return True
    if name not in files:
        return False
    with open(files[name], "rb") as file:
        data = file.read()
    if not all(take(library, files, contents) for library in needed(data)):
        return False
    contents[name] = data
    return True


def pack(name: str, files: dict[str, str]) -> bytes:
    """Make the archive of an extension from its program and what that needs.

    Args:
        name: Name of the extension.
        files: Path by file name, from `files_below`.

    Returns:
        The archive.

    Raises:
        GuestAssetError: The program, or a library that it needs, is missing.
    """
    contents: dict[str, bytes] = {}

    if not all(take(file, files, contents) for file in (_PROGRAM, LOADER)):
        raise GuestAssetError(f"Debian's packages do not hold {_PROGRAM} with all its libraries")
    # A module whose library is in none of the packages (connlabel) is left out; rules that use it are refused.
    for module in sorted(files):
        if module.startswith(_MATCHES):
            take(module, files, contents)
    root = f"ext/{name}"
    archive = Archive()
    for directory in ("proc", "run", "tmp"):
        archive.directory(f"{root}/{directory}")
    for file in sorted(contents):
        if file == _PROGRAM:
            archive.file(f"{root}/usr/sbin/{file}", contents[file], 0o755)
        elif file == LOADER:
            archive.file(f"{root}/lib64/{file}", contents[file], 0o755)
        else:
            below = "xtables/" if file.startswith(_MATCHES) else ""
            archive.file(f"{root}/{_LIBRARIES}/{below}{file}", contents[file])
    for command in _COMMANDS:
        archive.symlink(f"{root}/usr/sbin/{command}", _PROGRAM)
    return archive.finish()


def pack_shell(files: dict[str, str]) -> bytes:
    """Make the archive of the debug console's shell: busybox, whose shell runs its other programs by their names.

    Args:
        files: Path by file name, from `files_below`.

    Returns:
        The archive.

    Raises:
        GuestAssetError: There is no busybox, or it needs libraries, which the guest has not.
    """
    data = b""
    if _BUSYBOX in files:
        with open(files[_BUSYBOX], "rb") as file:
            data = file.read()
    if not data.startswith(b"\x7fELF") or needed(data):
        raise GuestAssetError(f"Debian's package holds no {_BUSYBOX} that needs no libraries")
    archive = Archive()
    archive.directory("debug")
    archive.file("debug/sh", data, 0o755)
    return archive.finish()


def needed(data: bytes) -> list[str]:
    """The libraries that a 64-bit ELF file needs (``DT_NEEDED``); empty for any other file.

    Source: the System V ABI, "Dynamic Section".
    """
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    table = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQ", data, table + at * size) for at in range(count)]
    loaded = [(address, offset, length) for kind, _f, offset, address, _p, length in headers if kind == 1]
    found = []
    for kind, _flags, offset, _address, _physical, length in headers:
        if kind != 2:
            continue
        entries = list(struct.iter_unpack("<qQ", data[offset : offset + length - length % 16]))
        strings = next((value for tag, value in entries if tag == 5), 0)
        for address, start, extent in loaded:
            if address <= strings < address + extent:
                strings += start - address
                break
        for tag, value in entries:
            if tag == 0:
                break
            if tag == 1:
                end = data.index(b"\0", strings + value)
                found.append(data[strings + value : end].decode())
    return found
