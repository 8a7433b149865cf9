"""The root directory that QEMU is left with: an empty, read-only one of its own.

QEMU opens what it needs while it builds its machine, and goes there before it serves anything. So a hypervisor that
was taken over finds no file of the host by its name; and ``/proc/PID/root`` of a task, which clients take for the
container's root directory, is not the host's. Usable before asyncio is imported.

QEMU serves a share by 9p through the names of its own descriptors (chmod and extended attributes go by
``/proc/self/fd/N``), so where it does, these are the one thing in that directory.
"""

from __future__ import annotations

import os

from kata import children, paths, remembered, sysio
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

NAME = "root"
DESCRIPTORS = "proc/self/fd"
_FLAGS = sysio.MS_NOSUID | sysio.MS_NODEV | sysio.MS_NOEXEC
_CACHE = "qemu-root"
_HINT = "It takes mounts, as root: `kata doctor` checks the host."


def prepare(run_dir: str, journal: Journal, *, serves_files: bool) -> str:
    """Make the directory, in the engine's own mount namespace.

    Root may write where no mode allows it, so what keeps it empty is a mount.

    Args:
        run_dir: The sandbox's directory.
        journal: Its journal.
        serves_files: QEMU serves a share by 9p; then `show_descriptors` is to follow.

    Returns:
        Its path.

    Raises:
        HostError: A mount failed.
    """
    path = os.path.join(run_dir, NAME)
    try:
        os.mkdir(path, 0o700)
        flags = _FLAGS if serves_files else _FLAGS | sysio.MS_RDONLY
        journal.make_mount("kata-root", path, "tmpfs", flags, "mode=0555,size=4k,nr_inodes=8")
        if serves_files:
            os.makedirs(os.path.join(path, DESCRIPTORS), 0o555)
            sysio.mount(None, path, None, sysio.MS_REMOUNT | sysio.MS_RDONLY | _FLAGS)
    except OSError as error:
        raise HostError(
            f"cannot make the hypervisor's root directory {path}: {error.strerror}", _HINT
        ) from error
    return path


def show_descriptors(path: str, pid: int) -> None:
    """Give QEMU the names of its descriptors, before the guest can ask for a file.

    They go with the mount that `prepare` has noted in the journal.

    Args:
        path: What `prepare` returned.
        pid: QEMU's.

    Raises:
        HostError: They cannot be mounted there.
    """
    try:
        sysio.mount(f"/proc/{pid}/fd", os.path.join(path, DESCRIPTORS), None, sysio.MS_BIND)
    except OSError as error:
        raise HostError(
            f"cannot show the hypervisor its descriptors in {path}: {error.strerror}", _HINT
        ) from error


LONG_QUEUES_MIB = 12
"""What virtio queues of 1024 entries take of a guest's memory: Linux fills those in which it waits for something with
buffers of a page each (fill_queue in drivers/char/virtio_console.c: 8 MiB for our two; the network's the rest)."""


def queues_mib(binary: str) -> int:
    """MiB of the guest's memory that longer virtio queues of this QEMU take than those of others.

    QEMU 10.0 gives every queue 1024 entries, whatever its device says; 7.2 and 11.1 do not.

    Args:
        binary: Its absolute path; one that cannot be used takes nothing.
    """
    try:
        return LONG_QUEUES_MIB if _about(binary)[1].startswith("10.") else 0
    except HostError:
        return 0


def option(binary: str) -> str:
    """How this QEMU is told its root directory: ``-chroot``, or ``-run-with`` from 8.2 on.

    Args:
        binary: Its absolute path.

    Raises:
        HostError: It cannot be executed, or knows neither.
    """
    return _about(binary)[0]


def _about(binary: str) -> tuple[str, str]:
    """`option`, and the version.

    QEMU's own help tells; the answer is kept for as long as the program does not change.

    Raises:
        HostError: As `option`.
    """
    try:
        key = remembered.program_key(binary)
        cache = os.path.join(paths.run_dir(), _CACHE)
        known = remembered.read(cache, key)
        if len(known) == 2:
            return known[0], known[1]
        said = children.said_by([binary, "--help"])
        found = "-run-with" if b"chroot=dir" in said else "-chroot" if b"\n-chroot dir" in said else ""
        if not found:
            raise HostError(
                f"the hypervisor {binary} has no option for its root directory (-chroot, -run-with)",
                "apt-get install qemu-system-x86",
            )
        # "QEMU emulator version 10.0.13 (Debian ...)"
        version = said[:200].partition(b" version ")[2].split(maxsplit=1)[:1]
        words = found, version[0].decode("ascii", "replace") if version else ""
        remembered.write(cache, key, *words)
    except OSError as error:
        raise HostError(
            f"cannot execute the hypervisor {binary}: {error.strerror}", "apt-get install qemu-system-x86"
        ) from error
    return words
