"""A root file system that containerd hands over as mounts (of its overlayfs or native snapshotter).

One that is on a disk (of its devmapper or blockfile snapshotter) the guest mounts itself, see `disks`. Others are
mounted where the bundle expects it, but in the engine's own mount namespace: the host never sees them, and they are
gone with the engine. From there the root is shared with the guest live, so that commit and diff keep working. The
directories that they name may themselves be mounts (of containerd 2's erofs snapshotter) which the host has made since
the engine has a namespace of its own: then they are mounted where the host's are seen, and taken from there.

Blocks: for the helper thread.
"""

from __future__ import annotations

import contextlib
import errno
import os

from kata import sysio
from kata.engine.containers.binds import MountTable
from kata.engine.containers.disks import root_of
from kata.engine.lifecycle.volumes import OPTION_FLAGS
from kata.errors import HostError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kata.engine.hostns import Namespaces
    from kata.journal import Entry, Journal
    from kata.proto.task_pb import Mount

_FLAGS = {
    **OPTION_FLAGS,
    "rw": 0,
    "defaults": 0,
    "bind": sysio.MS_BIND,
    "rbind": sysio.MS_BIND | sysio.MS_REC,
    "sync": 0x10,
    "dirsync": 0x80,
    "strictatime": 0x100_0000,
}
_PAGE = 4096
"""mount(2) takes one page of options, final zero included; a dozen layers of an overlay are more."""


class _Step:
    """One mount(2).

    Args:
        source: As mount(2) has it.
        kind: The file system's type.
        flags: MS_*.
        data: The file system's options.
        base: The directory that paths in them are relative to, or empty.
        made_of: The paths in them.
    """

    __slots__ = ("_base", "_data", "_flags", "kind", "made_of", "source")

    def __init__(self, source: str, kind: str, flags: int, data: str, base: str, made_of: list[str]) -> None:
        self.source = source
        self.kind = kind
        self.made_of = made_of
        self._flags = flags
        self._data = data
        self._base = base

    def mount(self, target: str) -> None:
        """Carry it out.

        Raises:
            OSError: The kernel refused.
        """
        _mount_from(self._base, self.source, target, self.kind, self._flags, self._data)
        if self._flags & sysio.MS_BIND and self._flags & sysio.MS_RDONLY:
            # A bind mount takes its flags only from a second call.
            sysio.mount(None, target, None, sysio.MS_REMOUNT | sysio.MS_BIND | sysio.MS_RDONLY)


class HostRoot:
    """The root directory of one container on the host.

    Args:
        path: The directory; it exists.
        mounts: What is to be mounted on it, lowest first; may be empty.
        journal: The sandbox's.
        host: The host's namespaces, where this process has left them.

    Attributes:
        disk: The disk that it is on, if it is; then nothing is mounted here.

    Raises:
        UnsupportedError: It is on a disk in a way that cannot be carried into the guest.
    """

    __slots__ = ("_entries", "_host", "_journal", "_mounts", "disk", "path")

    def __init__(
        self, path: str, mounts: Sequence[Mount], journal: Journal, host: Namespaces | None = None
    ) -> None:
        self.path = path
        self._mounts = list(mounts)
        self.disk = root_of(self._mounts)
        self._journal = journal
        self._host = host
        self._entries: list[Entry] = []

    @property
    def mounts(self) -> Sequence[Mount]:
        """What is to be mounted, lowest first."""
        return self._mounts

    @property
    def mounted_by_host(self) -> bool:
        """Whether the host has made it already (CRI-O, ``ctr run --rootfs``): nothing is to be mounted there."""
        return not self._mounts

    def mount(self) -> None:
        """Mount it.

        Raises:
            UnsupportedError: A mount below the root.
            HostError: The kernel refused.
        """
        try:
            os.makedirs(self.path, mode=0o711, exist_ok=True)
            if self._mounts:
                self._mount_all([self._step(one) for one in self._mounts])
        except OSError as error:
            self.unmount()
            raise HostError(
                f"cannot mount the root file system on {self.path}: {error.strerror}",
                "The kernel's log (dmesg) says more; the mounts are those that containerd's snapshotter made.",
            ) from error
        except BaseException:
            self.unmount()
            raise

    def _step(self, one: Mount) -> _Step:
        """What is to be done for one mount.

        Raises:
            UnsupportedError: A mount below the root.
            HostError: Its options do not fit.
        """
        if one.target:
            raise UnsupportedError(
                f"a root file system with a mount of its own at {one.target!r} is not supported",
                "Use containerd's overlayfs or native snapshotter.",
            )
        kind = one.type
        flags, data = 0, []
        for option in one.options:
            if option in _FLAGS:
                flags |= _FLAGS[option]
            else:
                data.append(option)
        if kind == "bind":
            flags |= sysio.MS_BIND
        text = ",".join(data)
        base = ""
        if len(text) >= _PAGE:
            base, text = _shortened(data)
        if len(text) >= _PAGE:
            raise HostError(
                f"the mount options of the root file system {self.path} are {len(text)} bytes long, and {_PAGE} fit",
                "The image has too many layers: have it built with fewer.",
            )
        made_of = [one.source] if kind == "bind" else _paths(data)
        return _Step(one.source or "none", kind, flags, text, base, made_of)

    def _mount_all(self, steps: list[_Step]) -> None:
        target = os.path.realpath(self.path)
        last = steps[-1]
        if self._host is not None and self._hidden(steps):

            def work() -> None:
                for step in steps:
                    step.mount(target)

            with self._noted(last, target):
                tree = self._host.mounted(work, target)
                try:
                    sysio.move_mount(tree, target)
                finally:
                    os.close(tree)
            return
        for step in steps:
            with self._noted(step, target):
                step.mount(target)

    @contextlib.contextmanager
    def _noted(self, step: _Step, target: str) -> Iterator[None]:
        """Have the journal know of a mount before it is made."""
        entry = self._journal.begin("mount", target=target, source=step.source, fstype=step.kind)
        try:
            yield
        except OSError:
            self._journal.mark_gone(entry)
            raise
        self._journal.commit(entry)
        self._entries.append(entry)

    def _hidden(self, steps: list[_Step]) -> bool:
        """Whether something that it is made of may be another thing here than on the host."""
        here = MountTable()
        above = {os.path.dirname(path) for step in steps for path in step.made_of}
        return not all(here.is_live(path) for path in above)

    def unmount(self) -> None:
        """Take the mounts off again.

        Raises:
            OSError: One is still in use.
        """
        while self._entries:
            entry = self._entries[-1]
            try:
                sysio.umount2(entry.params["target"], sysio.UMOUNT_NOFOLLOW | sysio.MNT_DETACH)
            except FileNotFoundError:
                pass
            self._journal.mark_gone(entry)
            self._entries.pop()


def _paths(options: list[str]) -> list[str]:
    """The directories that an overlay's options name."""
    found = []
    for option in options:
        key, _, value = option.partition("=")
        if key in ("lowerdir", "upperdir", "workdir"):
            found += value.split(":")
    return found


def _shortened(options: list[str]) -> tuple[str, str]:
    """Overlay options relative to the directory that their paths have in common: (that directory, options)."""
    paths = _paths(options)
    if not paths or not all(path.startswith("/") for path in paths):
        return "", ",".join(options)
    base = os.path.commonpath(paths)
    out = []
    for option in options:
        key, equals, value = option.partition("=")
        if key in ("lowerdir", "upperdir", "workdir"):
            value = ":".join(os.path.relpath(path, base) for path in value.split(":"))
        out.append(f"{key}{equals}{value}")
    return base, ",".join(out)


def _mount_from(base: str, source: str, target: str, kind: str, flags: int, data: str) -> None:
    if not base:
        sysio.mount(source, target, kind, flags, data)
        return
    # The working directory belongs to the whole process, so a child changes its own.
    child = os.fork()
    if child == 0:
        number = errno.EIO
        try:
            os.chdir(base)
            sysio.mount(source, target, kind, flags, data)
            number = 0
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os._exit(number)
    _, status = os.waitpid(child, 0)
    number = os.waitstatus_to_exitcode(status)
    if number:
        raise OSError(abs(number), os.strerror(abs(number)), target)
