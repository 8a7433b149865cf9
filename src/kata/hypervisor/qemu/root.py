"""The root directory that QEMU is left with: an empty, read-only one, in a mount namespace where nothing else is.

QEMU is executed in a mount namespace of its own and opens what it needs while it builds its machine. Then, before a
container is made, `enter` replaces the root directory of that namespace by an empty one from outside and detaches the
host's file systems (pivot_root(2)), for which QEMU needs no capability. A hypervisor that was taken over finds no file
of the host by its name; and ``/proc/PID/root`` of a task, which clients take for the container's root directory, is
not the host's. `prepare` is usable before asyncio is imported.

Where QEMU serves a share by 9p, that share and the names of QEMU's own descriptors (chmod and extended attributes go
by ``/proc/self/fd/N``) are the two things in that directory.
"""

from __future__ import annotations

import os

from kata import children, host_cache, paths, sysio
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

NAME = "root"
_CACHE = "hypervisor-version"
DESCRIPTORS = "proc/self/fd"
SHARE = "share"
_FLAGS = sysio.MS_NOSUID | sysio.MS_NODEV | sysio.MS_NOEXEC
_HINT = "It takes mounts, as root: `kata doctor` checks the host."


def prepare(run_dir: str, journal: Journal, *, serves_files: bool) -> str:
    """Make the directory, in the engine's own mount namespace, before QEMU is started.

    Root may write where no mode allows it, so what keeps it empty is a mount.

    Args:
        run_dir: The sandbox's directory.
        journal: Its journal.
        serves_files: QEMU serves a share by 9p.

    Returns:
        Its path, for `enter`.

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
            os.mkdir(os.path.join(path, SHARE), 0o555)
            sysio.mount(None, path, None, sysio.MS_REMOUNT | sysio.MS_RDONLY | _FLAGS)
    except OSError as error:
        raise HostError(
            f"cannot make the hypervisor's root directory {path}: {error.strerror}", _HINT
        ) from error
    return path


def enter(path: str, pid: int, share: str) -> None:
    """Make the directory QEMU's root. QEMU has built its machine: it finds no other file from now on.

    Blocks for a millisecond.

    Args:
        path: What `prepare` returned.
        pid: QEMU's; it is in a mount namespace of its own.
        share: The directory that it serves by 9p, if `prepare` was told so; a mount. What is mounted below it later
            appears.

    Raises:
        HostError: A mount failed.
    """
    import threading

    failed: list[OSError] = []

    def work() -> None:
        try:
            _enter(path, pid, share)
        except OSError as error:
            failed.append(error)

    # Namespace, root and working directory of this thread alone, which ends with them.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise HostError(
            f"cannot give the hypervisor its root directory {path}: {failed[0].strerror}", _HINT
        ) from failed[0]


def _enter(path: str, pid: int, share: str) -> None:
    flags = os.O_RDONLY | os.O_CLOEXEC
    sysio.unshare(sysio.CLONE_FS)
    namespace = os.open(f"/proc/{pid}/ns/mnt", flags)
    try:
        root = os.open(f"/proc/{pid}/root", flags | os.O_DIRECTORY)
        try:
            sysio.setns(namespace, sysio.CLONE_NEWNS)
            os.fchdir(root)
            os.chroot(".")
        finally:
            os.close(root)
    finally:
        os.close(namespace)
    if os.path.isdir(os.path.join(path, SHARE)):
        sysio.mount(share, os.path.join(path, SHARE), None, sysio.MS_MOVE)
        sysio.mount(f"/proc/{pid}/fd", os.path.join(path, DESCRIPTORS), None, sysio.MS_BIND)
    sysio.pivot_root(path)


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
        return LONG_QUEUES_MIB if _version(binary).startswith("10.") else 0
    except OSError:
        return 0


def _version(binary: str) -> str:
    """What QEMU says of itself, remembered for as long as the program does not change.

    Raises:
        OSError: It cannot be executed.
    """
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
