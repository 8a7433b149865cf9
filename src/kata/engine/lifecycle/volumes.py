"""What of the host a guest may see: bind mounts below the sandbox's one share.

The share has two faces in the engine's own mount namespace: ``mounts`` is where the engine binds things,
``share`` is the read-only view of it that the hypervisor exports. So the guest can write into a volume that
is meant to be written, and nowhere else: it cannot plant links among the names that the engine works with.
Everything is nosuid and nodev, and vanishes with the namespace when the engine dies. (What the host mounts later below
a volume that follows it has the flags that the host gives it; the file server opens no devices.)

All of it blocks: called before the event loop runs, or in a helper thread.
"""

from __future__ import annotations

import errno
import os
import stat

from kata import sysio
from kata.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kata.journal import Entry, Journal

SHARE_NAME = "share"
MOUNTS_NAME = "mounts"
FILES_NAME = "files"
STAGED_NAME = "staged"

_MAX_NAME = 200
OPTION_FLAGS = {
    "ro": sysio.MS_RDONLY,
    "nosuid": sysio.MS_NOSUID,
    "nodev": sysio.MS_NODEV,
    "noexec": sysio.MS_NOEXEC,
    "nosymfollow": sysio.MS_NOSYMFOLLOW,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "relatime": 0x20_0000,
}


def own_namespace() -> None:
    """Give this process a mount namespace of its own, in which the host's changes appear but not the
    reverse.

    Call it before any thread is started.

    Raises:
        HostError: Not permitted.
    """
    try:
        sysio.unshare(sysio.CLONE_NEWNS)
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_SLAVE)
    except OSError as error:
        raise HostError(
            f"cannot make a mount namespace for the sandbox: {error.strerror}",
            "run as root, with CAP_SYS_ADMIN",
        ) from error


def absent(source: str, error: OSError) -> UsageError:
    """What is said when a volume's path leads nowhere."""
    return UsageError(f"cannot use the volume {source}: {error.strerror}", "check the path before the colon")


class Share:
    """The share of one sandbox.

    Args:
        run_dir: The sandbox's directory.
        journal: Its journal.
    """

    __slots__ = ("_files", "_fresh", "_journal", "_mounts", "_staged", "path")

    def __init__(self, run_dir: str, journal: Journal) -> None:
        self.path = os.path.join(run_dir, SHARE_NAME)
        self._mounts = os.path.join(run_dir, MOUNTS_NAME)
        self._files = os.path.join(run_dir, FILES_NAME)
        self._staged = os.path.join(run_dir, STAGED_NAME)
        self._journal = journal
        self._fresh: list[Entry] = []  # mounts whose identity is not in the journal yet

    def prepare(self) -> None:
        """Make both faces; before the hypervisor starts, which opens the exported directory once.

        Raises:
            HostError: A mount failed.
        """
        try:
            for path in (self.path, self._mounts, self._files, self._staged):
                os.mkdir(path, 0o700)
            # Where things are mounted until they are as they should be.
            os.mkdir(os.path.join(self._staged, "directory"), 0o700)
            os.close(
                os.open(os.path.join(self._staged, "file"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            )
            # A mount of its own, shared, so that what is bound below it appears below its slave.
            self._journal.make_mount(self._mounts, self._mounts, None, sysio.MS_BIND)
            sysio.mount(None, self._mounts, None, sysio.MS_SHARED)
            self._journal.make_mount(self._mounts, self.path, None, sysio.MS_BIND)
            sysio.mount(None, self.path, None, sysio.MS_SLAVE)
            self._restrict(self.path, readonly=True)
        except OSError as error:
            raise HostError(f"cannot prepare the sandbox's share {self.path}: {error.strerror}") from error

    def pack(self) -> list[sysio.Fd]:
        """Copies of both faces, for `unpack`. What is bound below them is seen by whoever sees these.

        Raises:
            OSError: This kernel cannot (before Linux 5.2).
        """
        trees: list[sysio.Fd] = []
        try:
            for path in (self._mounts, self.path):
                trees.append(sysio.Fd(sysio.open_tree(path)))
        except BaseException:
            for tree in trees:
                tree.close()
            raise
        return trees

    def unpack(self, trees: Iterable[sysio.Fd], journal: Journal) -> None:
        """Have a share that was made in another mount namespace in this one.

        Args:
            trees: From `pack`; they are used up.
            journal: Of the sandbox, in which all is recorded from now on that is bound below it.

        Raises:
            OSError: A mount failed.
        """
        for tree, path in zip(trees, (self._mounts, self.path), strict=True):
            with tree:
                sysio.move_mount(tree.raw, path)
            target = os.path.realpath(path)
            for entry in self._journal.entries:
                if entry.kind == "mount" and entry.params["target"] == target:
                    self._journal.commit(entry)  # it is another one now
        self._journal = journal

    def add(
        self,
        source: str,
        name: str,
        *,
        readonly: bool,
        tree: int | None = None,
        follows: bool = False,
        whole: bool = True,
    ) -> str:
        """Show a directory or file of the host to the guest.

        Args:
            source: Its path; symbolic links in it are followed, here and now.
            name: What the guest sees below its share directory; one path component or ``<id>/rootfs``.
            readonly: Whether the guest may only read it.
            tree: A copy of the mounts there (`hostns.Namespaces.open_trees`), where the path alone does not lead to
                what the host sees.
            follows: Whether what the host mounts below it later appears as well (``rslave``).
            whole: Whether *readonly* is meant for the mounts below it, too.

        Returns:
            *name*, shortened if need be. `identify` is to be called when all are there.

        Raises:
            UsageError: There is no such path.
            UnsupportedError: It is a device, socket or fifo, which mean nothing in another kernel.
            HostError: It cannot be mounted.
        """
        try:
            real = source if tree is not None else os.path.realpath(source, strict=True)
            about = os.fstat(tree) if tree is not None else os.stat(real)
        except OSError as error:
            raise absent(source, error) from None
        mode = about.st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            from kata.engine.containers import nodes

            raise nodes.refuse(source, about)
        name = name[:_MAX_NAME]
        target = os.path.join(self._mounts, name)
        try:
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            if stat.S_ISDIR(mode):
                os.mkdir(target, 0o700)
            else:
                os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            # A file server has a mount namespace of its own, where only what is being mounted arrives, with the
            # flags that it has at that moment: so it is restricted before it is moved to its place.
            staged = os.path.join(self._staged, "directory" if stat.S_ISDIR(mode) else "file")
            if tree is not None:
                sysio.move_mount(tree, staged)
            else:
                sysio.mount(real, staged, None, sysio.MS_BIND | sysio.MS_REC)
            try:
                # Ours must not travel back to the host; further ones of the host's only appear if they are wanted.
                kind_of = sysio.MS_SLAVE if follows else sysio.MS_PRIVATE
                sysio.mount(None, staged, None, sysio.MS_REC | kind_of)
                self._restrict(staged, readonly=readonly, whole=whole)
                # There it is shared anew, with the other faces alone, so that it also goes from all of them.
                entry = self._journal.begin(
                    "mount", target=os.path.realpath(target), source=real, fstype="none"
                )
                try:
                    sysio.mount(staged, target, None, sysio.MS_MOVE)
                except OSError:
                    self._journal.mark_gone(entry)
                    raise
                self._fresh.append(entry)
            except BaseException:
                sysio.umount2(staged, sysio.MNT_DETACH | sysio.UMOUNT_NOFOLLOW)
                raise
        except OSError as error:
            raise HostError(f"cannot share {source} with the guest: {error.strerror}") from error
        return name

    def identify(self, names: Iterable[str] = ()) -> set[str]:
        """Write down in the journal which mounts `add` has made since the last time: one look at the list for all.

        Args:
            names: What `add` returned.

        Returns:
            Those of the names under which there are several mounts.

        Raises:
            HostError: One of them is gone, or the journal cannot be written.
        """
        from kata import mount_table

        fresh = {entry.params["target"]: entry for entry in self._fresh}
        self._fresh.clear()
        base = os.path.realpath(self.path) + "/"
        wanted = set(names)
        found = set()
        at: dict[str, mount_table.MountInfo] = {}
        for mount in mount_table.mounts() if fresh or wanted else ():
            if mount.target in fresh:
                at[mount.target] = mount
            elif mount.target.startswith(base):
                parts = mount.target[len(base) :].split("/")
                found |= wanted & {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        for target, entry in fresh.items():
            if target not in at:
                raise HostError(f"what was shared with the guest at {target} is not mounted any more")
            self._journal.commit(entry, id=at[target].mount_id, dev=at[target].device)
        return found

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> str:
        """Show the guest a small file of the engine's own, writable there; returns *name*.

        Raises:
            HostError: It cannot be written.
        """
        path = os.path.join(self._files, name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                os.fchmod(fd, mode)
                sysio.write_all(fd, content)
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from error
        name = self.add(path, name, readonly=False)
        self.identify()
        return name

    def remove(self, name: str) -> None:
        """Take back what `add` showed. What is not there is no error."""
        target = os.path.realpath(os.path.join(self._mounts, name))
        for entry in self._journal.entries:
            if entry.kind == "mount" and entry.params["target"] == target and not entry.gone:
                try:
                    sysio.umount2(target, sysio.MNT_DETACH | sysio.UMOUNT_NOFOLLOW)
                except OSError:
                    continue  # the journal keeps it: the end of the sandbox tries again
                self._journal.mark_gone(entry)
                if entry in self._fresh:
                    self._fresh.remove(entry)
                try:
                    os.rmdir(target) if os.path.isdir(target) else os.unlink(target)
                except OSError:
                    pass

    @staticmethod
    def _restrict(path: str, *, readonly: bool, whole: bool = True) -> None:
        """nosuid, nodev and maybe read-only, on the mount at *path* and every one below it; read-only on those below
        only if the *whole* is to be.

        Before Linux 5.12 the list of mounts has to be read for that, and the flags of a bind mount, which belong to
        each mount, are all given anew at a remount (mount(2), MS_REMOUNT).
        """
        attributes = sysio.MOUNT_ATTR_NOSUID | sysio.MOUNT_ATTR_NODEV
        base = os.path.realpath(path)
        try:
            if readonly and whole:
                attributes |= sysio.MOUNT_ATTR_RDONLY
            sysio.mount_setattr(base, attributes, recursive=True)
            if readonly and not whole:
                sysio.mount_setattr(base, sysio.MOUNT_ATTR_RDONLY, recursive=False)
            return
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
        from kata import mount_table

        for entry in mount_table.mounts():
            if entry.target == base or entry.target.startswith(base + "/"):
                flags = sysio.MS_NOSUID | sysio.MS_NODEV
                if readonly and (whole or entry.target == base):
                    flags |= sysio.MS_RDONLY
                for option in entry.options.split(","):
                    flags |= OPTION_FLAGS.get(option, 0)
                sysio.mount(None, entry.target, None, sysio.MS_REMOUNT | sysio.MS_BIND | flags)
