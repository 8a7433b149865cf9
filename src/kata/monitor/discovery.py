"""Which sandboxes there are: found by watching their directories (inotify), not by looking again and again.

A sandbox is a directory with an engine's management socket, ``shim-monitor.sock``, below one of a few places: ours,
and those where the original has its sandboxes. A place that is not there yet is waited for at the nearest directory
above it that is. An event queue that ran over, or a watch that the kernel refuses, leads to a look at everything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat

from kata import inotify, paths, sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SOCKET_NAME = paths.MANAGEMENT_SOCKET
SETTINGS_NAME = "sandbox.json"
MAX_SANDBOXES = 4096
"""Maximum number of sandboxes on a node that are taken notice of."""
_MAX_SETTINGS_BYTES = 4 << 20

_MASK = (
    inotify.IN_CREATE
    | inotify.IN_MOVED_TO
    | inotify.IN_DELETE
    | inotify.IN_MOVED_FROM
    | inotify.IN_DELETE_SELF
    | inotify.IN_MOVE_SELF
    | inotify.IN_ONLYDIR
)
_APPEARED = inotify.IN_CREATE | inotify.IN_MOVED_TO
_LOG = logging.getLogger("kata.monitor")


class Sandbox:
    """A sandbox of this node.

    Attributes:
        key: The name of its directory, which is unique below one place: ``ID``, or ``NAMESPACE.ID`` of containerd.
        id: Its id, for the label ``sandbox_id``. Where two sandboxes of different clients share one, the second has
            its key here.
        socket: The path of its management socket.
        failed: Whether the last scrape of it failed: then the others come first.
    """

    __slots__ = ("failed", "id", "key", "socket")

    def __init__(self, key: str, sandbox_id: str, socket: str) -> None:
        self.key = key
        self.id = sandbox_id
        self.socket = socket
        self.failed = False


def places() -> list[str]:
    """The directories with a directory for each sandbox; ours first, then the original's."""
    run = paths.run_dir()
    found = [os.path.join(run, "sandboxes"), paths.compat_dir()]
    return [*found, run] if run == "/run/kata" else found


class Discovery:
    """The sandboxes below some places, kept up to date from the events of one inotify queue.

    Args:
        roots: The places; a sandbox that occurs in several counts for the first.
        on_change: Called with nothing after the set of sandboxes has changed from what it is at first.
    """

    def __init__(self, roots: Sequence[str], on_change: Callable[[], None] = lambda: None) -> None:
        self._roots = [os.path.abspath(root) for root in roots]
        self._on_change: Callable[[], None] = lambda: None
        self._queue = sysio.Fd(inotify.init())
        self._watched: dict[int, str] = {}
        self._found: dict[str, tuple[int, int]] = {}  # directory -> identity of the socket in it
        self._ids: dict[str, str] = {}  # directory -> what its settings say
        self._sandboxes: dict[str, Sandbox] = {}
        self._blind = self._told = False  # a watch was refused: look whenever somebody asks
        self.rescan()
        self._on_change = on_change

    def fileno(self) -> int:
        """The descriptor that becomes readable when `read` has something to do."""
        return self._queue.raw

    def close(self) -> None:
        """End watching."""
        self._queue.close()

    @property
    def blind(self) -> bool:
        """Whether the kernel has refused a watch, so that a sandbox is only found when somebody asks."""
        return self._blind

    def sandboxes(self) -> list[Sandbox]:
        """Those that are there now, in the order of their ids."""
        if self._blind:
            self.rescan()
        elif any(directory not in self._ids for directory in self._sandboxes):
            self._settle()
        return sorted(self._sandboxes.values(), key=lambda one: one.id)

    def find(self, name: str) -> Sandbox | None:
        """The sandbox with this id or key."""
        for sandbox in self.sandboxes():
            if name in (sandbox.id, sandbox.key):
                return sandbox
        return None

    def read(self) -> None:
        """Take the waiting events in. Called whenever the descriptor is readable."""
        changed = False
        for watch, mask, name in inotify.read(self._queue.raw):
            if mask & inotify.IN_Q_OVERFLOW:
                _LOG.warning("the kernel dropped file system events; looking at everything again")
                self.rescan()
                return
            changed |= self._take(watch, mask, name)
        if changed:
            self._settle()

    def rescan(self) -> None:
        """Look at all places, as if nothing were known."""
        self._blind = False
        before = self._found
        self._found = {}
        for root in self._roots:
            self._arm(root)
        if self._found != before:
            self._settle()

    # ---- watching ----

    def _take(self, watch: int, mask: int, name: str) -> bool:
        directory = self._watched.get(watch)
        if directory is None:
            return False
        if mask & (inotify.IN_DELETE_SELF | inotify.IN_MOVE_SELF | inotify.IN_IGNORED):
            self._watched.pop(watch, None)
            if mask & inotify.IN_MOVE_SELF:
                with contextlib.suppress(
                    OSError
                ):  # it has another name now, under which it is found if it counts
                    inotify.rm_watch(self._queue.raw, watch)
            gone = self._forget(directory)
            if any(self._is_above(directory, root) for root in self._roots):
                before = dict(self._found)
                self._arm_all(directory)
                return gone or self._found != before
            return gone
        path = os.path.join(directory, name)
        if directory in self._roots:
            if mask & _APPEARED:
                before = dict(self._found)
                self._look(path)
                self._arm_all(path)
                return self._found != before
            return self._forget(path)
        if name == SOCKET_NAME and os.path.dirname(directory) in self._roots:
            return self._check(directory)
        if mask & _APPEARED:
            before = dict(self._found)
            self._arm_all(path)
            return self._found != before
        return False

    @staticmethod
    def _is_above(directory: str, root: str) -> bool:
        return root == directory or root.startswith(directory.rstrip("/") + "/")

    def _arm_all(self, path: str) -> None:
        """Something has changed at *path*: look again at every root at or below it."""
        for root in self._roots:
            if self._is_above(path, root):
                self._arm(root)

    def _arm(self, root: str) -> None:
        """Watch a root and all that is in it; where it is not there, the nearest directory above it."""
        path = root
        while True:
            try:
                self._watch(path)
            except (FileNotFoundError, NotADirectoryError):
                path = os.path.dirname(path)
                continue
            except OSError:
                break  # refused: what is there now is found all the same
            if path == root:
                break
            below = root[len(path.rstrip("/")) :].lstrip("/").split("/")[0]
            if not os.path.isdir(os.path.join(path, below)):
                return
            path = root  # it has come since the first try
        try:
            names = os.listdir(root)
        except OSError:
            return
        for name in names:
            self._look(os.path.join(root, name))

    def _watch(self, path: str) -> None:
        try:
            self._watched[inotify.add_watch(self._queue.raw, path, _MASK)] = path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EACCES):
                if not self._told:
                    _LOG.warning(
                        "%s cannot be watched (%s); looking whenever somebody asks", path, error.strerror
                    )
                self._blind = self._told = True
            raise

    def _look(self, directory: str) -> None:
        """Watch what may be the directory of a sandbox, and see whether it has a socket."""
        if len(self._found) >= MAX_SANDBOXES and directory not in self._found:
            return
        try:
            self._watch(directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
        self._check(directory)

    def _check(self, directory: str) -> bool:
        """Whether the socket in a directory has come or gone, or is another one."""
        before = self._found.get(directory)
        try:
            status = os.stat(os.path.join(directory, SOCKET_NAME))
        except OSError:
            return self._forget(directory)
        if not stat.S_ISSOCK(status.st_mode):
            return self._forget(directory)
        identity = (status.st_dev, status.st_ino)
        self._found[directory] = identity
        if identity != before:
            self._ids.pop(directory, None)
        return identity != before

    def _forget(self, directory: str) -> bool:
        self._ids.pop(directory, None)
        return self._found.pop(directory, None) is not None

    def _id(self, directory: str) -> str:
        """The sandbox's id; until its settings are written, or for ever in the original's places, its directory's
        name."""
        known = self._ids.get(directory)
        if known is None:
            known = id_of(directory)
            if known or os.path.dirname(directory) != self._roots[0]:
                known = self._ids[directory] = known or os.path.basename(directory)
        return known or os.path.basename(directory)

    # ---- what it amounts to ----

    def _settle(self) -> None:
        """Make the set of sandboxes of what was found: each once, ours before the original's."""
        fresh: dict[str, Sandbox] = {}
        sockets: set[tuple[int, int]] = set()
        ids: set[str] = set()
        order = sorted(self._found, key=lambda path: (self._roots.index(os.path.dirname(path)), path))
        for directory in order:
            identity, sandbox_id = self._found[directory], self._id(directory)
            key = os.path.basename(directory)
            first = os.path.dirname(directory) == self._roots[0]
            if identity in sockets or (sandbox_id in ids and not first):
                continue  # the same sandbox by another path
            sockets.add(identity)
            if sandbox_id in ids:
                sandbox_id = key
            ids.add(sandbox_id)
            old = self._sandboxes.get(directory)
            path = os.path.join(directory, SOCKET_NAME)
            fresh[directory] = (
                old if old is not None and old.id == sandbox_id else Sandbox(key, sandbox_id, path)
            )
        changed = fresh.keys() != self._sandboxes.keys() or any(
            fresh[directory] is not self._sandboxes[directory] for directory in fresh
        )
        self._sandboxes = fresh
        if changed:
            self._on_change()


def id_of(directory: str) -> str:
    """The id of the sandbox in a directory, as its settings say it; empty where there are none."""
    try:
        with open(os.path.join(directory, SETTINGS_NAME), "rb") as file:
            found = json.loads(file.read(_MAX_SETTINGS_BYTES))["id"]
        if isinstance(found, str) and 0 < len(found) <= 128 and found.isprintable():
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return ""
