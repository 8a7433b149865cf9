"""The root directory that a monitor is left with: an empty, read-only one, in a mount namespace where nothing else is.

A monitor is executed in a mount namespace of its own and opens what it needs while it builds its machine. Then, before
a container is made, `enter` replaces the root directory of that namespace by an empty one from outside and detaches the
host's file systems (pivot_root(2)), for which the monitor needs no capability. One that was taken over finds no file
of the host by its name; and ``/proc/PID/root`` of a task, which clients take for the container's root directory, is
not the host's. `prepare` is usable before asyncio is imported.

What else is in that directory: where the monitor serves a share by 9p, that share and the names of its own descriptors
(chmod and extended attributes go by ``/proc/self/fd/N``); and for a monitor that opens disks by name while the machine
runs, an empty file for each, onto which its image is mounted for that moment, and an empty directory for that into
which the machine is saved (`shown`).
"""

from __future__ import annotations

import os

from kata import sysio
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

NAME = "root"
DESCRIPTORS = "proc/self/fd"
SHARE = "share"
DISKS = "disks"
STATE = "state"
_FLAGS = sysio.MS_NOSUID | sysio.MS_NODEV | sysio.MS_NOEXEC
_HINT = "It takes mounts, as root: `kata doctor` checks the host."


def prepare(run_dir: str, journal: Journal, *, serves_files: bool = False, disks: int = 0) -> str:
    """Make the directory, in the engine's own mount namespace, before the monitor is started.

    Root may write where no mode allows it, so what keeps it empty is a mount.

    Args:
        run_dir: The sandbox's directory.
        journal: Its journal.
        serves_files: The monitor serves a share by 9p.
        disks: How many disks it may open by name later.

    Returns:
        Its path, for `enter`.

    Raises:
        HostError: A mount failed.
    """
    path = os.path.join(run_dir, NAME)
    try:
        os.mkdir(path, 0o700)
        filled = serves_files or disks
        flags = _FLAGS if filled else _FLAGS | sysio.MS_RDONLY
        journal.make_mount("kata-root", path, "tmpfs", flags, f"mode=0555,size=4k,nr_inodes={9 + disks}")
        if serves_files:
            os.makedirs(os.path.join(path, DESCRIPTORS), 0o555)
            os.mkdir(os.path.join(path, SHARE), 0o555)
        if disks:
            for name in (STATE, DISKS):
                os.mkdir(os.path.join(path, name))
                os.chmod(os.path.join(path, name), 0o555)  # whatever the umask, for its user
            for number in range(disks):
                file = os.path.join(path, disk(number))
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400))
            # What is mounted below it later is to appear in the monitor's namespace.
            sysio.mount(None, path, None, sysio.MS_SHARED)
        if filled:
            sysio.mount(None, path, None, sysio.MS_REMOUNT | sysio.MS_RDONLY | _FLAGS)
    except OSError as error:
        raise HostError(
            f"cannot make the hypervisor's root directory {path}: {error.strerror}", _HINT
        ) from error
    return path


def disk(number: int) -> str:
    """The name for a disk, below the root directory."""
    return f"{DISKS}/{number}"


class shown:
    """Shows a monitor a file or directory under a name in its root directory, as long as the context lasts.

    Args:
        path: What `prepare` returned.
        name: Below that: that of a disk (`disk`), or `STATE`.
        source: The disk's image, or a directory.

    Raises:
        HostError: It cannot be mounted.
    """

    def __init__(self, path: str, name: str, source: str) -> None:
        self._place = os.path.join(path, name)
        self._name = f"/{name}"
        self._source = source

    def __enter__(self) -> str:
        """Returns the name, as the monitor has it."""
        try:
            sysio.mount(self._source, self._place, None, sysio.MS_BIND)
        except OSError as error:
            raise HostError(f"cannot show the hypervisor {self._source}: {error.strerror}", _HINT) from error
        return self._name

    def __exit__(self, *_error: object) -> None:
        sysio.umount2(self._place, sysio.MNT_DETACH)


def enter(path: str, pid: int, share: str = "") -> None:
    """Make the directory the monitor's root. It has built its machine: it finds no other file from now on.

    Blocks for a millisecond.

    Args:
        path: What `prepare` returned.
        pid: The monitor's; it is in a mount namespace of its own.
        share: The directory that it serves by 9p, if `prepare` was told so; a mount. What is mounted below it later
            appears.

    Raises:
        HostError: A mount failed.
    """
    from kata import threads

    try:
        threads.aside(lambda: _enter(path, pid, share))
    except OSError as error:
        raise HostError(
            f"cannot give the hypervisor its root directory {path}: {error.strerror}", _HINT
        ) from error


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
