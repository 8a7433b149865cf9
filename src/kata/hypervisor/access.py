"""Files of others that a monitor with a user of its own opens by name: disks, and machines that were saved.

Their owners and modes stay. While the monitor opens one, its user is in the file's access control list; then it
is taken out again, by us or by the journal.

Usable before asyncio is imported.
"""

from __future__ import annotations

import os

from kata import acl, confinement
from kata.errors import HypervisorError
from kata.hypervisor import root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kata.hypervisor.base import Disk
    from kata.journal import Entry, Journal


class Access:
    """What the user of one monitor may open for the moment.

    Args:
        journal: The sandbox's.
        user: Its id; 0 for root, who needs none of this.
    """

    __slots__ = ("_entries", "_journal", "user")

    def __init__(self, journal: Journal, user: int = 0) -> None:
        self._journal = journal
        self._entries: list[Entry] = []
        self.user = user

    def grant(self, path: str, fd: int, rights: int) -> None:
        """Let it open a file by our descriptor, or by a mount of the file.

        Args:
            path: The file's.
            fd: It, open.
            rights: `kata.acl.READ`, and `kata.acl.WRITE`.

        Raises:
            OSError: The file system has no access control lists, or its own list forbids it.
        """
        status = os.fstat(fd)
        if not self.user or status.st_mode & rights == rights:
            return
        entry = self._journal.begin("access", path=os.path.realpath(path), user=self.user)
        self._journal.commit(entry, dev=status.st_dev, ino=status.st_ino)
        self._entries.append(entry)
        acl.add(fd, self.user, rights)

    def give(self, fd: int) -> None:
        """Make it the owner of a file of its sandbox's alone, or of a pipe.

        Raises:
            OSError: It cannot be.
        """
        if self.user:
            os.fchown(fd, self.user, self.user)

    def revoke(self) -> None:
        """Take all of it back: what it has opened stays open. Idempotent. What cannot be is left to the journal."""
        entries, self._entries = self._entries, []
        for entry in entries:
            try:
                acl.take_out(entry.params["path"], entry.params["user"], entry.identity or {})
            except OSError:
                continue
            self._journal.mark_gone(entry)

    def shown(self, directory: str, name: str, source: str, rights: int) -> _Shown:
        """A context in which a running monitor may open one more file.

        Args:
            directory: Its root directory (`kata.hypervisor.root.prepare`); empty if that is the host's.
            name: The name there.
            source: The file.
            rights: As for `grant`.

        Raises:
            HostError: It cannot be mounted there.
            HypervisorError: Its user cannot be allowed to open it, or there is no such file.
        """
        return _Shown(Access(self._journal, self.user), directory, name, source, rights)


class _Shown:
    __slots__ = ("_access", "_mount", "_rights", "_source")

    def __init__(self, access: Access, directory: str, name: str, source: str, rights: int) -> None:
        self._access = access
        self._mount = root.shown(directory, name, source) if directory else None
        self._source = source
        self._rights = rights

    def __enter__(self) -> str:
        """Returns the name, as the monitor has it."""
        try:
            if self._access.user:
                self._grant()
            return self._mount.__enter__() if self._mount is not None else self._source
        except BaseException:
            self._access.revoke()
            raise

    def _grant(self) -> None:
        try:
            # By its place: a socket cannot be opened, and others need not be.
            fd = os.open(self._source, os.O_PATH | os.O_CLOEXEC)
            try:
                self._access.grant(self._source, fd, self._rights)
            finally:
                os.close(fd)
        except OSError as error:
            raise HypervisorError(
                f"cannot let the hypervisor's user open {self._source}: {error.strerror}",
                f"With {confinement.VARIABLE}=0 hypervisors stay root's.",
            ) from error

    def __exit__(self, *_error: object) -> None:
        if self._mount is not None:
            self._mount.__exit__()
        self._access.revoke()


class File:
    """A file that a monitor opens once more by our descriptor.

    Args:
        name: Of the descriptor: ``disk0``.
        path: Its path.
        rights: As for `Access.grant`.
    """

    __slots__ = ("name", "path", "rights")

    def __init__(self, name: str, path: str, rights: int = acl.READ) -> None:
        self.name = name
        self.path = path
        self.rights = rights


def disk_files(disks: Iterable[Disk | None]) -> list[File]:
    """Those of a machine's disks, by slot."""
    return [
        File(f"disk{index}", disk.path, rights_to(disk))
        for index, disk in enumerate(disks)
        if disk is not None
    ]


def rights_to(disk: Disk) -> int:
    """What a monitor needs to open it."""
    return acl.READ if disk.readonly and not disk.vhost_user else acl.READ | acl.WRITE


def for_monitor(program: str, files: Iterable[File], opened: Mapping[str, int], journal: Journal) -> Access:
    """Choose the user of a monitor, and let this one open its files.

    Args:
        program: Its absolute path.
        files: The files.
        opened: Our descriptors, by name.
        journal: The sandbox's.

    Returns:
        What was granted; its user is 0 where no user but root can have all of that.
    """
    access = Access(journal, confinement.user_for(program))
    try:
        for file in files:
            access.grant(file.path, opened[file.name], file.rights)
    except OSError:
        access.revoke()
        access.user = 0
    return access


def make_directory(path: str, user: int) -> None:
    """Make a directory of the monitor's.

    Args:
        path: Its path; in the sandbox's directory, with which it goes.
        user: The monitor's.

    Raises:
        HypervisorError: It cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
        if user:
            os.chown(path, user, user)
    except OSError as error:
        raise HypervisorError(f"cannot make the hypervisor's directory {path}: {error.strerror}") from error
