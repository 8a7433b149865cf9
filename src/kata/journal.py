"""The journal: a record of what one sandbox (or one container) makes on the host, on disk before it is made.

A journal is a write-ahead intent log in JSON lines. `Journal.begin` records the intent to make a resource; the caller
makes it; `Journal.commit` records an identity that only this resource can match (see `kata.journal_undo`), and
`Journal.mark_gone` that it no longer exists. From the file alone, without a living guest or engine, everything can be
undone in reverse order, any number of times. The keys on disk never change: a journal may be older than its reader.

Lines::

    {"journal": 1, "meta": {...}, "own_dir": [dev, ino] or null, "durable": bool}
    {"owner": {"pid": 1, "start": 2, "boot": "..."}}     the process responsible for it; the last one counts
    {"n": "1a-3", "intend": "mount", "p": {...}}
    {"n": "1a-3", "made": {...}}
    {"n": "1a-3", "gone": true}                          never made, or undone
    {"keep": true, "while": "file"}                      it outlives its owner, as long as that file exists
    {"keep": false}                                      its removal has begun; any process may finish it

Appending a line is atomic (O_APPEND), so the starter and the engine may write to the same journal. A torn last line is
an intent whose resource was never made, or an identity whose intent is complete; both cases are handled.

Imported before the hypervisor is started, so it does without `json` (`kata.json_text`).
"""

from __future__ import annotations

import errno
import os

from kata import paths, sysio
from kata.errors import AlreadyExistsError, JournalError
from kata.json_text import dumps, loads

FILE_NAME = "journal"
NEW_PREFIX = ".new-"
KINDS = (
    *("process", "file", "directory", "content", "socket", "mount", "cgroup"),
    *("netns", "tap", "redirect", "driver", "access"),
)
_PATH_KINDS = ("file", "directory", "socket", "cgroup", "netns")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def unfinished_name() -> str:
    """Make a directory name that tells `reconcile` which process is creating or removing the directory."""
    me = process_identity(os.getpid())
    return f"{NEW_PREFIX}{me['pid']}-{me['start']}-{me['boot'][:8]}-{os.urandom(4).hex()}"


def process_identity(pid: int) -> dict[str, Any]:
    """Return pid, start time and boot id of a running process (or an unreaped child).

    Raises:
        ProcessLookupError: There is no such process.
    """
    start = sysio.proc_starttime(pid)
    if start is None:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid))
    return {"pid": pid, "start": start, "boot": sysio.boot_id()}


class Entry:
    """One resource in the journal: the intent and, once it is made, its identity."""

    __slots__ = ("gone", "id", "identity", "kind", "params")

    def __init__(self, entry_id: str, kind: str, params: dict[str, Any]) -> None:
        self.id = entry_id
        self.kind = kind
        self.params = params
        self.identity: dict[str, Any] | None = None
        self.gone = False

    def __repr__(self) -> str:
        state = "gone" if self.gone else "made" if self.identity is not None else "intended"
        return f"<Entry {self.id} {self.kind} {self.params} {state}>"


class Journal:
    """A journal that is open for writing. Made by `create`, `create_dir`, `open` or `attach`."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self.owner: dict[str, Any] | None = None
        self.retained = False
        self.witness = ""
        self.entries: list[Entry] = []
        self._fd = fd
        self._own_dir: tuple[int, int] | None = None
        self._durable = False
        self._count = 0

    # ---- making and opening ----

    @classmethod
    def create(cls, path: str, meta: dict[str, Any], *, durable: bool = False) -> Journal:
        """Create a journal in an existing directory; its owner is this process.

        Args:
            path: Path of the file.
            meta: Information for users and clients (client, id), as JSON values.
            durable: Sync every line to the disk: for journals whose resources survive a power failure.

        Raises:
            AlreadyExistsError: There is a journal at this path already.
            JournalError: It cannot be written.
        """
        return cls._create(path, meta, durable, None)

    @classmethod
    def create_dir(cls, parent: str, name: str, meta: dict[str, Any], *, durable: bool = False) -> Journal:
        """Create the directory ``parent/name`` (mode 0700) with a journal in it, atomically.

        The directory belongs to the journal: after undoing, it is removed with everything in it. It is created under a
        temporary name with its creator's identity and then renamed, so `reconcile` can clean up after a crash.

        Raises:
            AlreadyExistsError: ``parent/name`` exists.
            JournalError: It cannot be made.
        """
        making = os.path.join(parent, unfinished_name())
        target = os.path.join(parent, name)
        try:
            paths.make_dirs(parent, 0o711)
            os.mkdir(making, 0o700)
            status = os.stat(making)
            try:
                journal = cls._create(
                    os.path.join(making, FILE_NAME), meta, durable, (status.st_dev, status.st_ino)
                )
            except BaseException:
                for left in os.listdir(making):
                    os.unlink(os.path.join(making, left))
                os.rmdir(making)
                raise
            try:
                if os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
                # A directory that was created meanwhile holds its journal, so rename cannot replace it.
                os.rename(making, target)
            except OSError:
                journal.close()
                os.unlink(journal.path)
                os.rmdir(making)
                raise
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(target):
                raise AlreadyExistsError(
                    f"cannot make {target}: it exists already", "Choose another name, or remove the old one."
                ) from None
            raise JournalError(f"cannot make {target}: {error.strerror}", _space_hint(error)) from error
        journal.path = os.path.join(target, FILE_NAME)
        return journal

    @classmethod
    def _create(cls, path: str, meta: dict[str, Any], durable: bool, own: tuple[int, int] | None) -> Journal:
        # Written under another name and then linked: a reader of the journal always sees its header and owner.
        aside = f"{path}.{os.urandom(4).hex()}"
        try:
            fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(
                f"cannot make the journal {path}: {error.strerror}", _space_hint(error)
            ) from error
        journal = cls(path, fd)
        try:
            journal.meta = meta
            journal._own_dir = own
            journal._append({"journal": 1, "meta": meta, "own_dir": own, "durable": durable})
            journal.set_owner(os.getpid())
            try:
                os.link(aside, path)
            except FileExistsError:
                raise AlreadyExistsError(f"there is a journal at {path} already") from None
        except BaseException:
            journal.close()
            raise
        finally:
            os.unlink(aside)
        journal._durable = durable
        journal._sync()
        return journal

    @classmethod
    def open(cls, path: str) -> Journal:
        """Open a journal and read it.

        Raises:
            JournalError: It does not exist, cannot be read, is another user's, or is not a journal of ours.
        """
        journal = cls(path, _opened(path))
        try:
            journal.reload()
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def attach(cls, path: str) -> Journal:
        """Open a journal for writing without reading it, which would need `json`.

        For an engine in its first milliseconds; `kata.journal_undo.undo` reads the file later.

        Raises:
            JournalError: It does not exist, is another user's, or cannot be written.
        """
        return cls(path, _opened(path))

    def close(self) -> None:
        """Close the file; the journal stays on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- what callers write ----

    def begin(self, kind: str, **params: Any) -> Entry:
        """Record the intent to make a resource. The caller may make it when this returns.

        Kinds and their parameters (further ones are allowed, as notes):

        ``process``
            ``role`` (a word for messages), ``signal`` (how it is ended: "KILL", the default; "TERM": TERM first;
            "WAIT": wait a moment until it ends by itself, then TERM).
        ``file``, ``socket``, ``directory``
            ``path``, absolute.
        ``content`` (of a directory that is somebody else's)
            ``path`` of the directory, absolute.
        ``cgroup``
            ``path``, absolute; for version 2 also ``inside``, the path within the hierarchy. ``parents``: directories,
            the innermost first, that are removed with the last cgroup below them.
        ``mount``
            ``target``, ``source``, ``fstype``.
        ``netns``
            ``path`` at which the namespace is (or will be) bind-mounted.
        ``tap``, ``redirect`` (an ingress qdisc)
            ``name`` of the interface; ``netns``: path of its namespace, absent for our own.
        ``driver`` (of a PCI device, by its ``driver_override``)
            ``path`` of the device in sysfs, ``driver``: the one that it gets, ``former``: the one before, or empty.
        ``access`` (a user's entry in a file's access control list)
            ``path`` of the file, ``user``; `commit` is given ``dev`` and ``ino``.

        Raises:
            ValueError: There is no such kind, or a path is not absolute.
            JournalError: It cannot be written.
        """
        if kind not in KINDS:
            raise ValueError(f"no such kind of resource: {kind}")
        if kind in _PATH_KINDS:
            # Without an identity (its maker died before `commit`), a resource is taken for ours only if nothing was
            # there before.
            params["absent"] = not os.path.lexists(params["path"])
        entry = Entry(f"{os.getpid():x}-{self._count}", kind, params)
        self._append({"n": entry.id, "intend": kind, "p": params})
        self.entries.append(entry)
        return entry

    def commit(self, entry: Entry, **identity: Any) -> None:
        """Record the identity of the resource that was made.

        For ``process``, pass ``pid``. For other kinds the identity is read from the resource itself; for ``mount`` a
        caller that has read the list of mounts may pass ``id`` and ``dev``.

        Raises:
            OSError: The resource does not exist.
        """
        entry.identity = {**self._identify(entry, identity), **identity}
        self._append({"n": entry.id, "made": entry.identity})

    def mark_gone(self, entry: Entry) -> None:
        """Record that the resource is gone, or was never made. Does nothing after the journal was undone."""
        if not entry.gone:
            entry.gone = True
            if self._fd >= 0:
                self._append({"n": entry.id, "gone": True})

    def set_owner(self, pid: int) -> None:
        """Make a process the owner of this journal: `reconcile` leaves the journal alone while it runs."""
        self.owner = process_identity(pid)
        self._append({"owner": self.owner})

    def retain(self, witness: str) -> None:
        """Record that the journal's resources outlive its owner (a created container).

        Args:
            witness: Name of a file in the journal's directory. If it is missing, or empty after a power failure, the
                creation or removal was interrupted, and the resources are of no use any more.
        """
        if not self.retained:
            self.retained, self.witness = True, witness
            self._append({"keep": True, "while": witness})

    def begin_removal(self) -> None:
        """Revoke `retain`: from now on this process, or one that finds it dead, undoes the journal."""
        if self.retained:
            self.retained = False
            try:
                self._append({"keep": False})
                self.set_owner(os.getpid())
            except JournalError:
                pass  # the disk is full, and the removal frees space

    def outlives_owner(self) -> bool:
        """Whether it is retained, and its witness intact."""
        if not self.retained or not self.witness:
            return self.retained
        try:
            return os.stat(os.path.join(os.path.dirname(self.path), self.witness)).st_size > 0
        except FileNotFoundError:
            return False

    def make_directory(self, path: str, mode: int = 0o700) -> Entry:
        """Make a directory as an entry of this journal: intent, mkdir, identity.

        Raises:
            OSError: From mkdir; the entry is then marked as gone.
        """
        entry = self.begin("directory", path=path)
        try:
            os.mkdir(path, mode)
        except OSError:
            self.mark_gone(entry)
            raise
        self.commit(entry)
        return entry

    def make_mount(
        self, source: str, target: str, fstype: str | None = None, flags: int = 0, data: str = ""
    ) -> Entry:
        """Mount as an entry of this journal, at an existing target. See `kata.sysio.mount` for the arguments.

        Raises:
            OSError: From mount; the entry is then marked as gone.
        """
        target = os.path.realpath(target)
        entry = self.begin("mount", target=target, source=source, fstype=fstype or "none")
        try:
            sysio.mount(source, target, fstype, flags, data)
        except OSError:
            self.mark_gone(entry)
            raise
        self.commit(entry)
        return entry

    # ---- its owner ----

    def owner_alive(self) -> bool:
        """Whether the owner is still running."""
        owner = self.owner
        if owner is None:
            return False
        try:
            return sysio.process_alive(int(owner["pid"]), int(owner["start"]), str(owner["boot"]))
        except (KeyError, ValueError):
            return False

    @property
    def own_dir(self) -> tuple[int, int] | None:
        """Device and inode of the directory that belongs to this journal; None if there is none."""
        return self._own_dir

    def signal_owner(self, number: int, patience_s: float) -> bool:
        """Send a signal to the owner, and to no other process.

        Args:
            number: The signal.
            patience_s: Seconds to wait for the end of the owner.

        Returns:
            Whether the owner has ended.
        """
        owner = self.owner
        if owner is None or not self.owner_alive():
            return True
        try:
            pidfd = sysio.pidfd_open(int(owner["pid"]))
        except ProcessLookupError:
            return True
        try:
            if not self.owner_alive():  # the pid was reused before we opened it
                return True
            sysio.pidfd_send_signal(pidfd, number)
            return sysio.pidfd_wait(pidfd, patience_s)
        except ProcessLookupError:
            return True
        finally:
            os.close(pidfd)

    def fileno(self) -> int:
        """The descriptor, for flock(2)."""
        return self._fd

    # ---- the file ----

    def reload(self) -> None:
        """Read the file again: other processes may have written to it.

        Raises:
            JournalError: It cannot be read.
        """
        try:
            data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        except OSError as error:
            raise JournalError(f"cannot read the journal {self.path}: {error.strerror}") from error
        entries: dict[str, Entry] = {}
        header = None
        self.owner, self.retained = None, False
        lines = data.split(b"\n")
        for line in lines:
            try:
                record = loads(line)
            except ValueError:
                continue  # torn by a crash or a full disk, see the module's docstring
            if not isinstance(record, dict):
                continue
            if "journal" in record:
                header = header or record
            elif "owner" in record:
                self.owner = record["owner"]
            elif "keep" in record:
                self.retained, self.witness = bool(record["keep"]), str(record.get("while") or "")
            else:
                _read_entry(entries, record)
        if header is None or header["journal"] != 1:
            raise JournalError(
                f"{self.path} is not a journal that this version can read",
                "If the sandbox is long gone, remove its directory by hand.",
            )
        self.meta = header.get("meta") or {}
        own = header.get("own_dir")
        self._own_dir = (int(own[0]), int(own[1])) if own else None
        self._durable = bool(header.get("durable"))
        self.entries = list(entries.values())
        self._count = len(lines)
        if data and not data.endswith(b"\n"):
            # Terminate the torn line, so that our next line is separate.
            os.write(self._fd, b"\n")

    def _append(self, record: dict[str, Any]) -> None:
        line = dumps(record).encode("ascii") + b"\n"
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise JournalError(
                f"cannot write the journal {self.path}: {error.strerror}", _space_hint(error)
            ) from error
        if written != len(line):
            raise JournalError(
                f"cannot write the journal {self.path}: no space left", "Free space on that file system."
            )
        self._count += 1
        self._sync()

    def _sync(self) -> None:
        if self._durable:
            os.fdatasync(self._fd)

    @staticmethod
    def _identify(entry: Entry, given: dict[str, Any]) -> dict[str, Any]:
        kind, params = entry.kind, entry.params
        if kind == "process":
            return process_identity(given["pid"])
        if kind in ("file", "socket", "directory", "content", "cgroup"):
            status = os.lstat(params["path"])
            return {"dev": status.st_dev, "ino": status.st_ino}
        if kind == "netns":
            status = os.stat(params["path"])  # follows the bind mount to the namespace's own inode
            return {"dev": status.st_dev, "ino": status.st_ino}
        if kind == "driver":
            return {"boot": sysio.boot_id()}
        if kind == "access":
            return {}  # the device and inode that were given
        if kind == "mount" and "id" in given:
            return {"ns": sysio.namespace_inode("mnt")}
        if kind == "mount":
            from kata import mount_table

            found = mount_table.mount_at(params["target"])
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "not mounted", params["target"])
            return {"ns": sysio.namespace_inode("mnt"), "id": found.mount_id, "dev": found.device}
        import socket

        netns = params.get("netns")
        inode = os.stat(netns).st_ino if netns else sysio.namespace_inode("net", "thread-self")
        if netns and inode != sysio.namespace_inode("net", "thread-self"):
            return {"netns": inode, "ifindex": int(given["ifindex"])}
        return {"netns": inode, "ifindex": socket.if_nametoindex(params["name"])}


def _opened(path: str) -> int:
    """A descriptor of a journal, for writing.

    What it says is done with all rights of this process: only the same user may have written it, and nobody else.

    Raises:
        JournalError: It does not exist, is another user's, or cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise JournalError(f"cannot open the journal {path}: {error.strerror}") from error
    about = os.fstat(fd)
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        os.close(fd)
        raise JournalError(
            f"the journal {path} is not this user's alone: what it says is not done",
            "rm it, or ask its owner",
        )
    return fd


def _read_entry(entries: dict[str, Entry], record: dict[str, Any]) -> None:
    number = str(record.get("n"))
    if "intend" in record:
        entries[number] = Entry(number, str(record["intend"]), dict(record.get("p") or {}))
    elif number in entries:
        if "made" in record:
            entries[number].identity = dict(record["made"])
        elif "gone" in record:
            entries[number].gone = True


def _space_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free space on that file system, or move the directory (KATA_RUN_DIR, KATA_STATE_DIR)."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Run as root, or point KATA_RUN_DIR and KATA_STATE_DIR at directories you may write."
    return ""


def find(base: str) -> Iterator[str]:
    """Yield the paths of the journals in the directories below `base`, sorted by name."""
    try:
        names = sorted(os.listdir(base))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        path = os.path.join(base, name, FILE_NAME)
        if not name.startswith(NEW_PREFIX) and os.path.lexists(path):
            yield path
