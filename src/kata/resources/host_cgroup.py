"""A sandbox's place in the host's cgroups: a leaf of its own for engine, hypervisor and helpers, with limits.

The leaf is ``kata/<id>`` below the top of each hierarchy that we see, and not below the cgroup of whoever called
us: that one may end with a login session, and under version 2 it holds processes, so it cannot hand controllers
down. Version 2 is used for every controller that it has, version 1 for the others: most hosts have either, some
a mixture. The limits are those of `kata.resources.sizing`.

Moving a process waits for the kernel's other processors (10 to 20 ms), so it is done when the machine has been
started and is booting: what a hypervisor touches before that, some megabytes, is charged to its caller.

Source: the kernel's ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``, ``sched-bwc.rst``.
"""

from __future__ import annotations

import errno
import os

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kata.journal import Journal

PARENT = "kata"
CONTROLLERS = ("memory", "cpu")
PERIOD_US = 100_000
_ATTEMPTS = 20


class Limits:
    """What a sandbox may use of the host.

    Args:
        memory: Bytes.
        cpus: Processors, not necessarily whole ones.
    """

    __slots__ = ("cpus", "memory")

    def __init__(self, memory: int, cpus: float) -> None:
        self.memory = memory
        self.cpus = cpus

    def files(self, version: int, controller: str) -> list[tuple[str, str]]:
        """Names and contents of a leaf's files."""
        quota = str(int(self.cpus * PERIOD_US))
        if controller == "memory":
            return [("memory.max" if version == 2 else "memory.limit_in_bytes", str(self.memory))]
        if version == 2:
            return [("cpu.max", f"{quota} {PERIOD_US}")]
        return [("cpu.cfs_period_us", str(PERIOD_US)), ("cpu.cfs_quota_us", quota)]


class Hierarchy:
    """A mounted hierarchy.

    Attributes:
        version: 1 or 2.
        top: The directory of its uppermost cgroup that we see.
        own: The directory of the cgroup that we are in.
        controllers: Those of `CONTROLLERS` that it has.
    """

    __slots__ = ("controllers", "own", "top", "version")

    def __init__(self, version: int, top: str, own: str, controllers: Sequence[str]) -> None:
        self.version = version
        self.top = top
        self.own = own
        self.controllers = list(controllers)


def hierarchies() -> list[Hierarchy]:
    """The hierarchies that have our controllers, each controller in one of them only."""
    place: dict[str, str] = {}
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            _number, names, path = line.rstrip("\n").split(":", 2)
            place.update(dict.fromkeys(names.split(","), path))
    mounted = sysio.mounts()
    found: list[Hierarchy] = []
    missing = list(CONTROLLERS)
    # Version 2 first; there is one such hierarchy, however often it is mounted.
    for mount in sorted(mounted, key=lambda mount: mount.fstype != "cgroup2"):
        if mount.fstype not in ("cgroup2", "cgroup"):
            continue
        version = 2 if mount.fstype == "cgroup2" else 1
        listed = f"{mount.target}/cgroup.controllers"
        offered = _words(listed) if version == 2 else mount.super_options.split(",")
        here = [name for name in missing if name in offered]
        if here:
            own = place.get("" if version == 2 else here[0], "/")
            found.append(Hierarchy(version, mount.target, mount.target + _below(own, mount.root), here))
            missing = [name for name in missing if name not in here]
    return found


class HostCgroup:
    """The leaves of one sandbox.

    Attributes:
        paths: Directory by controller; a controller that is missing here has no limit.
        warnings: Why there is none.
    """

    __slots__ = ("_origins", "paths", "warnings")

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.warnings: list[str] = []
        self._origins: list[tuple[str, str]] = []

    def make(self, journal: Journal, name: str, limits: Limits) -> None:
        """Make the leaves. What a host does not allow is in `warnings`, and no error: the limits are for the
        host's sake, and the guest's own memory and processors are what they are without them.

        Args:
            journal: The sandbox's.
            name: The sandbox's id.
            limits: What is written into them.
        """
        found = hierarchies()
        for hierarchy in found:
            try:
                path = self._make_leaf(journal, hierarchy, name)
            except OSError as error:
                self.warnings += [_warning(controller, error) for controller in hierarchy.controllers]
                continue
            self._origins.append((hierarchy.own, hierarchy.top))
            for controller in hierarchy.controllers:
                try:
                    for file, content in limits.files(hierarchy.version, controller):
                        _write(f"{path}/{file}", content)
                except OSError as error:
                    self.warnings.append(_warning(controller, error))
                else:
                    self.paths[controller] = path
        present = [controller for hierarchy in found for controller in hierarchy.controllers]
        self.warnings += [
            f"no limit on the host's {controller}: this host has no cgroup hierarchy with that controller"
            for controller in CONTROLLERS
            if controller not in present
        ]

    @staticmethod
    def _make_leaf(journal: Journal, hierarchy: Hierarchy, name: str) -> str:
        parent = f"{hierarchy.top}/{PARENT}"
        path = f"{parent}/{name}"
        entry = journal.intend("cgroup", path=path, parent=parent)
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    if hierarchy.version == 2:
                        _hand_down(hierarchy.top, hierarchy.controllers)
                    _make_parent(parent)
                    if hierarchy.version == 2:
                        _hand_down(parent, hierarchy.controllers)
                    os.mkdir(path, 0o755)
                    break
                except FileNotFoundError:
                    # The end of the last other sandbox took the parent away under our hands.
                    if attempt == _ATTEMPTS - 1:
                        raise
        except OSError:
            journal.forget(entry)
            raise
        journal.made(entry)
        return path

    def join(self, pids: Iterable[int]) -> None:
        """Move processes into the leaves; one that has ended meanwhile is no error."""
        members = list(pids)
        for path in dict.fromkeys(self.paths.values()):
            for pid in members:
                try:
                    _write(f"{path}/cgroup.procs", str(pid))
                except ProcessLookupError:
                    pass
                except OSError as error:
                    self.warnings.append(f"cannot move process {pid} to {path}: {error.strerror}")

    def leave(self) -> None:
        """Move our own process back to where it came from, or to the top: who is in a cgroup cannot remove
        it."""
        for places in self._origins:
            for place in places:
                try:
                    _write(f"{place}/cgroup.procs", "0")
                    break
                except OSError:
                    continue
        self._origins.clear()

    def oom_kills(self) -> int:
        """How many processes the kernel has killed because the limit on memory was reached."""
        path = self.paths.get("memory", "")
        for file in ("memory.events", "memory.oom_control"):
            words = _words(f"{path}/{file}") if path else []
            if "oom_kill" in words:
                return int(words[words.index("oom_kill") + 1])
        return 0


def _make_parent(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass


def _hand_down(directory: str, wanted: Sequence[str]) -> None:
    """Let a version 2 cgroup's children have controllers.

    Raises:
        OSError: It holds processes itself (EBUSY), and so it cannot.
    """
    enabled = _words(f"{directory}/cgroup.subtree_control")
    for controller in wanted:
        if controller not in enabled:
            _write(f"{directory}/cgroup.subtree_control", f"+{controller}")


def _below(path: str, root: str) -> str:
    """*path* of a hierarchy as seen below a mount of its cgroup *root*; ends without a slash."""
    if root != "/" and (path + "/").startswith(root + "/"):
        path = path[len(root) :]
    return "" if path == "/" else path


def _warning(controller: str, error: OSError) -> str:
    why = (
        "the cgroup that we see as the top one holds processes"
        if error.errno == errno.EBUSY
        else error.strerror
    )
    return f"no limit on the host's {controller}: {why}" + (f" ({error.filename})" if error.filename else "")


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)
