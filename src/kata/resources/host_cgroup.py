"""A sandbox's place in the host's cgroups: a leaf of its own for engine, hypervisor and helpers, with limits.

The specification names the leaf (``cgroupsPath``; with Kubernetes it is in the pod's cgroup), which is then made in the
hierarchies of all controllers of version 1. If the path has systemd's form, systemd makes it. Without ``cgroupsPath``
the leaf is ``kata/<id>`` below the topmost visible cgroup of each hierarchy; an ordinary user's below the topmost one
of those that the caller is in that is delegated to that user, as systemd delegates ``user@UID.service``. It is not
below the caller's own cgroup, which may end with a login session and, under version 2, cannot delegate controllers
since it holds processes.

Version 2 is used for every controller that it has, version 1 for the others; some hosts have a mixture. The limits are
those of `kata.resources.sizing`. Access to the host's devices is restricted by version 1's devices controller, or by a
BPF program on the leaf of version 2.

Moving a process into a cgroup waits for the kernel's other processors (10 to 20 ms), so processes are moved while the
guest boots. The few megabytes that a hypervisor has touched by then are charged to its caller.

Source: the kernel's ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``, ``sched-bwc.rst``.
"""

from __future__ import annotations

import errno
import os
import time

from kata import mount_table, sysio
from kata.resources import systemd_scope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kata.journal import Journal

PARENT = "kata"
DEVICES = (
    *("c *:* m", "b *:* m"),  # a guest may make nodes in shared directories, which are nodev
    *("c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm"),  # null, zero, full, random, urandom
    *("c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm"),  # terminals
    *(
        "c 10:200 rw",
        "c 10:229 rw",
        "c 10:232 rw",
        "c 10:238 rw",
        "c 10:241 rw",
    ),  # tun, fuse, kvm, vhost-net, -vsock
)
"""The host's devices that engine, hypervisor and helpers may use, besides the disks of the sandbox's containers."""
CONTROLLERS = ("memory", "cpu", "pids")
MOST_TASKS = 2048
"""Processes and threads of one sandbox: the hypervisor's (`kata.confinement.MOST_THREADS`), and as many others."""
PERIOD_US = 100_000
_ATTEMPTS = 20
_NOBODYS_S = 60
"""A leaf that has no process at this age (in seconds) is abandoned: processes enter it while the machine boots."""


class Limits:
    """Limits on what a sandbox uses of the host.

    Args:
        memory: Bytes.
        cpus: Number of processors; may be fractional.
    """

    __slots__ = ("cpus", "memory")

    def __init__(self, memory: int, cpus: float) -> None:
        self.memory = memory
        self.cpus = cpus

    def files(self, version: int, controller: str) -> list[tuple[str, str]]:
        """Names and contents of the files that set the limits of one controller in a leaf."""
        quota = str(int(self.cpus * PERIOD_US))
        if controller == "pids":
            return [("pids.max", str(MOST_TASKS))]
        if controller == "memory":
            return [("memory.max" if version == 2 else "memory.limit_in_bytes", str(self.memory))]
        if version == 2:
            return [("cpu.max", f"{quota} {PERIOD_US}")]
        return [("cpu.cfs_period_us", str(PERIOD_US)), ("cpu.cfs_quota_us", quota)]

    def properties(self) -> list[str]:
        """The limits as properties of a systemd unit."""
        return [
            f"MemoryMax={self.memory}",
            f"CPUQuota={self.cpus * 100:.10g}%",
            f"TasksMax={MOST_TASKS}",
        ]


class Hierarchy:
    """A mounted hierarchy.

    Attributes:
        version: 1 or 2.
        top: Directory of its topmost visible cgroup.
        own: Directory of the cgroup that this process is in.
        base: Directory of the topmost cgroup, from `top` to `own`, that this user may make leaves below; `top` where
            there is none.
        controllers: Those of `CONTROLLERS` that it has.
    """

    __slots__ = ("base", "controllers", "own", "top", "version")

    def __init__(self, version: int, top: str, own: str, controllers: Sequence[str]) -> None:
        self.version = version
        self.top = top
        self.own = own
        self.base = _base(version, top, own)
        self.controllers = list(controllers)


def _places(pid: str) -> dict[str, str]:
    """The cgroups of a process by controller, from /proc/pid/cgroup; the key ``""`` is for version 2."""
    place: dict[str, str] = {}
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            _number, names, path = line.rstrip("\n").split(":", 2)
            place.update(dict.fromkeys(names.split(","), path))
    return place


def hierarchies() -> list[Hierarchy]:
    """The hierarchies of the controllers that we use; each controller is listed in only one of them."""
    place = _places("self")
    mounted = mount_table.mounts()
    found: list[Hierarchy] = []
    missing = list(CONTROLLERS)
    # Version 2 first. There is only one such hierarchy, however often it is mounted.
    for mount in sorted(mounted, key=lambda mount: mount.fstype != "cgroup2"):
        if mount.fstype not in ("cgroup2", "cgroup"):
            continue
        version = 2 if mount.fstype == "cgroup2" else 1
        mounted_names = mount.super_options.split(",")
        mine = next(
            (place[name] for name in ([""] if version == 2 else mounted_names) if name in place), "/"
        )
        one = Hierarchy(version, mount.target, mount.target + _below(mine, mount.root), [])
        # With version 2, what is delegated need not have all that the host has.
        offered = _read_fields(f"{one.base}/cgroup.controllers") if version == 2 else mounted_names
        one.controllers = [name for name in missing if name in offered]
        if one.controllers:
            found.append(one)
            missing = [name for name in missing if name not in one.controllers]
    return found


def may_divide(directory: str, version: int) -> bool:
    """Whether this user may make leaves below a cgroup: root may, others where it is delegated to them.

    Args:
        directory: The cgroup's.
        version: Of its hierarchy. With version 2, the kernel also asks for ``cgroup.procs`` of the cgroup that the
            leaf and the process's former cgroup have in common (cgroup-v2.rst, "Delegation Containment").
    """
    parent = f"{directory}/{PARENT}"
    if not os.access(parent if os.path.isdir(parent) else directory, os.W_OK | os.X_OK):
        return False
    return version == 1 or os.access(f"{directory}/cgroup.procs", os.W_OK)


def _base(version: int, top: str, own: str) -> str:
    """See `Hierarchy`."""
    if not f"{own}/".startswith(f"{top}/"):
        return top
    directory = top
    for level in ("", *own[len(top) :].split("/")):
        directory = f"{directory}/{level}" if level else directory
        if may_divide(directory, version):
            return directory
    return top


def others() -> list[tuple[str, list[str], str]]:
    """The other hierarchies of version 1, not in `hierarchies`: (mount point, controllers, our own place)."""
    taken = {one.top for one in hierarchies()}
    place = _places("self")
    found = []
    for mount in mount_table.mounts():
        names = [name for name in mount.super_options.split(",") if name in place and "=" not in name]
        if mount.fstype != "cgroup" or mount.target in taken or not names:
            continue
        taken.add(mount.target)
        found.append((mount.target, names, mount.target + _below(place[names[0]], mount.root)))
    return found


def join_cgroups_of(pid: int) -> None:
    """Move this process into the cgroups of another one, in all hierarchies.

    Raises:
        OSError: One of them cannot be entered, or is not mounted here.
    """
    wanted, mine = _places(str(pid)), _places("self")
    for mount in mount_table.mounts():
        if mount.fstype not in ("cgroup2", "cgroup"):
            continue
        names = [""] if mount.fstype == "cgroup2" else mount.super_options.split(",")
        name = next((name for name in names if name in wanted and mine.get(name) != wanted[name]), None)
        if name is not None:
            sysio.write_existing(f"{mount.target}{_below(wanted[name], mount.root)}/cgroup.procs", "0")
            mine = _places("self")
    if mine != wanted:
        raise OSError(errno.ENOENT, "a hierarchy of cgroups is not mounted")


def place_of(cgroups_path: str, sandbox_id: str) -> str:
    """Return where a sandbox's leaf is, below the top of a hierarchy.

    Args:
        cgroups_path: The specification's ``cgroupsPath``: a path, or systemd's ``slice:prefix:name``; may be empty.
        sandbox_id: Id of the sandbox; names the leaf if *cgroups_path* is empty.

    Returns:
        A path without leading and trailing slashes.
    """
    if not cgroups_path.strip("/"):
        return f"{PARENT}/{sandbox_id}"
    named = systemd_scope.unit_of(cgroups_path)
    if named is not None:
        cgroups_path = f"{_slice_path(named[0])}/{named[1]}"
    return os.path.normpath("/" + cgroups_path).strip("/")


def _slice_path(name: str) -> str:
    """The path of a systemd slice: a-b.slice is in a.slice (systemd.slice(5)); "-.slice" is the root slice."""
    words = name.removesuffix(".slice").split("-")
    if not any(words):
        return ""
    return "/".join("-".join(words[: count + 1]) + ".slice" for count in range(len(words)))


class HostCgroup:
    """The leaves of one sandbox.

    Attributes:
        paths: Directory of the leaf by controller; a controller that is missing has no limit.
        warnings: Sentences that say why limits are missing.
    """

    __slots__ = (
        "_disks",
        "_leaf",
        "_origins",
        "_scope",
        "_unit",
        "_units",
        "_versions",
        "paths",
        "warnings",
    )

    def __init__(self) -> None:
        self._disks: list[str] = []
        self._leaf = ""  # directory of the leaf of version 2, if there is one
        self.paths: dict[str, str] = {}
        self.warnings: list[str] = []
        self._origins: list[tuple[str, str]] = []
        self._scope: systemd_scope.Scope | None = None  # held until our processes are in the scope
        self._unit = ""  # name of the scope
        self._units: list[str] = []  # directories of the scope, also in hierarchies without controllers
        self._versions: dict[str, int] = {}

    def make(  # noqa: C901
        self,
        journal: Journal,
        place: str,
        limits: Limits,
        *,
        all_controllers: bool = False,
        unit: tuple[str, str] | None = None,
    ) -> None:
        """Make the leaves.

        A limit that the host refuses is no error but a sentence in `warnings`: the limits only protect the host, and
        the guest's memory and processors are limited without them.

        Args:
            journal: The sandbox's journal.
            place: The leaf's path, from `place_of`.
            limits: The limits of the leaves.
            all_controllers: Also make leaves in the hierarchies of version 1's other controllers.
            unit: Slice and scope, if *place* belongs to systemd. Only in the main thread.
        """
        if unit is not None and systemd_scope.managed_by_systemd(unit[1]):
            try:
                self._scope = systemd_scope.Scope(journal, *unit, limits.properties())
            except OSError as error:
                self.warnings.append(
                    f"systemd does not know the sandbox's cgroup {unit[1]}: {error.strerror}"
                )
            else:
                self._unit = unit[1]
                self._units = _directories_of(self._scope.pid, unit[1])
        mounted = hierarchies()
        for hierarchy in mounted:
            try:
                path = self._make_leaf(journal, hierarchy, place)
            except OSError as error:
                self.warnings += [_warning(controller, error) for controller in hierarchy.controllers]
                continue
            self._origins.append((hierarchy.own, hierarchy.base))
            if hierarchy.version == 2:
                self._limit_devices(path)
            for controller in hierarchy.controllers:
                try:
                    for file, content in limits.files(hierarchy.version, controller):
                        sysio.write_existing(f"{path}/{file}", content)
                except OSError as error:
                    self.warnings.append(_warning(controller, error))
                else:
                    self.paths[controller] = path
                    self._versions[controller] = hierarchy.version
        present = [controller for hierarchy in mounted for controller in hierarchy.controllers]
        self.warnings += [
            f"no limit on the host's {controller}: no cgroup hierarchy that can be used here has that controller"
            for controller in CONTROLLERS
            if controller not in present
        ]
        for top, controllers, own in others() if all_controllers else ():
            try:
                path = self._make_leaf(journal, Hierarchy(1, top, own, controllers), place)
                self._fill(path, top, controllers)
            except OSError as error:
                text = f"not in the host's cgroup of {', '.join(controllers)}: {error.strerror} ({error.filename})"
                self.warnings.append(text)
                continue
            self._origins.append((own, top))
            self.paths.update(dict.fromkeys(controllers, path))

    def _limit_devices(self, path: str) -> None:
        """Apply device rules to a leaf of version 2."""
        from kata.resources import device_rules

        try:
            device_rules.attach(path, (*DEVICES, *self._disks))
        except OSError as error:
            self.warnings.append(
                f"the host's devices are not closed to the sandbox's processes: {error.strerror}"
            )
        else:
            self._leaf = path

    def allow_nodes(self, numbers: Iterable[tuple[int, int]]) -> None:
        """Before `make`: let the sandbox's processes open further character devices of the host.

        Args:
            numbers: Major and minor number of each.
        """
        self._disks += [f"c {major}:{minor} rw" for major, minor in numbers]

    def allow_disk(self, numbers: tuple[int, int]) -> None:
        """Let the sandbox's processes open one of the host's block devices. Calls are counted: see `take_disk`.

        Args:
            numbers: Major and minor number.
        """
        rule = f"b {numbers[0]}:{numbers[1]} rw"
        self._disks.append(rule)
        self._change_disk("devices.allow", rule)

    def take_disk(self, numbers: tuple[int, int]) -> None:
        """Undo one call of `allow_disk`. Descriptors that are open stay usable.

        Args:
            numbers: Major and minor number.
        """
        rule = f"b {numbers[0]}:{numbers[1]} rw"
        self._disks.remove(rule)
        if rule not in self._disks:
            self._change_disk("devices.deny", rule)

    def _change_disk(self, file: str, rule: str) -> None:
        if self._leaf:
            self._limit_devices(self._leaf)
        if "devices" in self.paths:
            try:
                sysio.write_existing(f"{self.paths['devices']}/{file}", rule)
            except OSError as error:
                self.warnings.append(
                    f"cannot write {rule!r} to {file} of the sandbox's cgroup: {error.strerror}"
                )

    def _fill(self, path: str, top: str, controllers: Sequence[str]) -> None:
        """Set what a new leaf of version 1 needs before it can take processes (cpuset), and its device rules."""
        if "cpuset" in controllers:
            # A cgroup with an empty cpuset takes no process, and the parents that we have made have empty ones too.
            levels = path[len(top) + 1 :].split("/")
            for count in range(len(levels)):
                above = "/".join((top, *levels[:count]))
                for file in ("cpuset.cpus", "cpuset.mems"):
                    here = f"{above}/{levels[count]}/{file}"
                    if not _read_fields(here):
                        sysio.write_existing(here, " ".join(_read_fields(f"{above}/{file}")))
        if "devices" in controllers:
            sysio.write_existing(f"{path}/devices.deny", "a")
            for rule in (*DEVICES, *self._disks):
                try:
                    sysio.write_existing(f"{path}/devices.allow", rule)
                except PermissionError:
                    continue  # our own cgroup may not use the device, so neither may the leaf

    def _make_leaf(self, journal: Journal, hierarchy: Hierarchy, place: str) -> str:  # noqa: C901, PLR0912
        # A specification may name the whole path of what lies below the user's own part.
        inside = hierarchy.base[len(hierarchy.top) :].strip("/")
        *levels, name = place.removeprefix(f"{inside}/").split("/")
        above = [hierarchy.base]
        for level in levels:
            above.append(f"{above[-1]}/{level}")
        parent = above[-1]
        path = f"{parent}/{name}"
        # Parents that exist already are not ours. Those that we make are removed when they are no longer used.
        made = [directory for directory in above[1:] if not os.path.isdir(directory)]
        if levels == [PARENT]:
            made = [parent]  # shared by all sandboxes: the last one removes it
        # In a hierarchy that systemd manages, systemd has just made this directory and its parents.
        is_scope = bool(self._unit) and os.path.isdir(path)
        if is_scope:
            made = []
        entry = journal.begin("cgroup", path=path, parents=made[::-1])
        created = False
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    for directory in above:
                        if directory != hierarchy.base:
                            _make_parent(directory)
                        if hierarchy.version == 2:
                            _hand_down(directory, hierarchy.controllers)
                    if not created and not is_scope:
                        _make_new(path)
                        created = True
                    if hierarchy.version == 2:
                        # Another sandbox may have just made the parent anew. Now it stays, since we have a child there.
                        _hand_down(parent, hierarchy.controllers)
                    break
                except OSError as error:
                    # The last other sandbox has ended and removed the parent meanwhile (ENODEV: while we were writing
                    # to a file in it).
                    gone = error.errno in (errno.ENOENT, errno.ENODEV)
                    if not gone or attempt == _ATTEMPTS - 1:
                        raise
        except OSError:
            if created:
                os.rmdir(path)
            journal.mark_gone(entry)
            raise
        journal.commit(entry)
        return path

    def join(self, pids: Iterable[int]) -> None:
        """Move processes into the leaves. It is no error if one has ended."""
        members = list(pids)
        for path in dict.fromkeys([*self.paths.values(), *self._units]):
            for pid in members:
                try:
                    sysio.write_existing(f"{path}/cgroup.procs", str(pid))
                except ProcessLookupError:
                    pass
                except OSError as error:
                    self.warnings.append(f"cannot move process {pid} to {path}: {error.strerror}")
        if self._scope is not None:
            self._scope.release()
            self._scope = None

    def limit(self, limits: Limits) -> list[str]:
        """Change the limits. Returns a sentence for each change that the kernel or systemd refuses."""
        refused = []
        # systemd first: it writes the same files, and would later restore the values that it remembers.
        if self._unit and (why := systemd_scope.change(self._unit, limits.properties())):
            refused.append(f"systemd does not change the limits of {self._unit}: {why}")
        for controller, version in self._versions.items():
            try:
                for file, content in limits.files(version, controller):
                    sysio.write_existing(f"{self.paths[controller]}/{file}", content)
            except OSError as error:
                refused.append(f"cannot change the limit on the host's {controller}: {error.strerror}")
        return refused

    def leave(self) -> None:
        """Move this process back to its former cgroups, or to the topmost ones: a cgroup with processes cannot be
        removed.
        """
        for places in self._origins:
            for place in places:
                try:
                    sysio.write_existing(f"{place}/cgroup.procs", "0")
                    break
                except OSError:
                    continue
        self._origins.clear()

    def oom_kills(self) -> int:
        """Number of processes that the kernel has killed because the memory limit was reached."""
        path = self.paths.get("memory", "")
        for file in ("memory.events", "memory.oom_control"):
            words = _read_fields(f"{path}/{file}") if path else []
            if "oom_kill" in words:
                return int(words[words.index("oom_kill") + 1])
        return 0

    def usage(self) -> tuple[int, int]:
        """CPU time used so far (nanoseconds) and present memory (bytes); 0 where unknown."""
        cpu, memory = self.paths.get("cpu", ""), self.paths.get("memory", "")
        words = _read_fields(f"{cpu}/cpu.stat")
        if "usage_usec" in words:
            cpu_ns = int(words[words.index("usage_usec") + 1]) * 1000
        else:
            found = _read_fields(f"{self.paths.get('cpuacct') or cpu}/cpuacct.usage")
            cpu_ns = int(found[0]) if found else 0
        found = _read_fields(f"{memory}/memory.current") or _read_fields(f"{memory}/memory.usage_in_bytes")
        return cpu_ns, int(found[0]) if found else 0


def _directories_of(pid: int, unit: str) -> list[str]:
    """The directories of the systemd unit that a process is in, one for each hierarchy where the unit has one."""
    place = _places(str(pid))
    found = {}
    for mount in mount_table.mounts():
        if mount.fstype not in ("cgroup", "cgroup2"):
            continue
        names = [""] if mount.fstype == "cgroup2" else mount.super_options.split(",")
        path = next((place[name] for name in names if name in place), "")
        if path.endswith(f"/{unit}"):
            found[path, *names] = mount.target + _below(path, mount.root)
    return list(found.values())


def _make_new(path: str) -> None:
    """Make a leaf. An abandoned one of the same name is removed first, together with its settings.

    A leaf is abandoned if it belonged to an engine that was killed and whose directory was removed. A recent leaf
    without processes may belong to another sandbox whose processes have yet to enter it. Two sandboxes must never share
    a leaf, because at the end of a sandbox all processes in its leaf are killed.

    Raises:
        FileExistsError: It is in use, or was made a moment ago.
    """
    try:
        os.mkdir(path, 0o755)
    except FileExistsError as error:
        members = len(_read_fields(f"{path}/cgroup.procs"))
        if members:
            text = f"it is there already, with {members} process{'es' if members > 1 else ''} in it"
            raise FileExistsError(errno.EEXIST, text, path) from error
        try:
            if time.time() - os.stat(path).st_mtime < _NOBODYS_S:
                raise
            os.rmdir(path)
        except FileNotFoundError:
            pass  # its owner has just removed it
        os.mkdir(path, 0o755)


def _make_parent(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass


def _hand_down(directory: str, wanted: Sequence[str]) -> None:
    """Enable controllers for the children of a version 2 cgroup.

    Raises:
        OSError: It cannot, since it holds processes itself (EBUSY).
    """
    enabled = _read_fields(f"{directory}/cgroup.subtree_control")
    for controller in wanted:
        if controller not in enabled:
            sysio.write_existing(f"{directory}/cgroup.subtree_control", f"+{controller}")


def _below(path: str, root: str) -> str:
    """The path of a cgroup relative to a mount whose root is the cgroup *root*; without a trailing slash."""
    if root != "/" and (path + "/").startswith(root + "/"):
        path = path[len(root) :]
    return "" if path == "/" else path


def _warning(controller: str, error: OSError) -> str:
    why = (
        "the cgroup that sandboxes would be made in holds processes itself"
        if error.errno == errno.EBUSY
        else error.strerror
    )
    return f"no limit on the host's {controller}: {why}" + (f" ({error.filename})" if error.filename else "")


def _read_fields(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []
