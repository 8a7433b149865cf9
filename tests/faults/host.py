"""What the host has of the sorts that a sandbox makes, as lines that are equal before and after a round.

Only what belongs to one daemon of the tests' own is looked at, because other people's virtual machines come and go on
the same host: what is below its directory, in its network namespaces, or named after its containers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

Snapshot = dict[str, list[str]]
_STANDING = str(Path(__file__).resolve().parents[2] / "src/kata/oci_runtime/pid_process.py")
_COMMAND = 240
"""How much of a command line is compared, and shown: conmon's has thousands of bytes."""


class Place:
    """What to look at.

    Attributes:
        net_inodes: Network namespaces of sandboxes so far, by their inodes.

    Args:
        directory: Everything of the daemon's own is below it.
        mark: Is in the environment of the processes that it starts.
        networks: Names of network namespaces (``/run/netns``).
        names: Gives the ids of all sandboxes so far.
        daemons: Gives the pids that are no leftovers: the daemon and its clients.
        more: Further sorts, each with a directory below that one, and how deep it is looked at.
        run: Name of the run directory there.
        more_lines: Further sorts, each with what gives its lines.
    """

    def __init__(
        self,
        directory: Path,
        mark: str,
        networks: list[str],
        names: Callable[[], set[str]],
        daemons: Callable[[], set[int]],
        more: Mapping[str, tuple[str, int]],
        run: str = "r",
        more_lines: Mapping[str, Callable[[], Iterable[str]]] | None = None,
    ) -> None:
        self.directory = directory
        self.mark = mark
        self.networks = networks
        self.names = names
        self.daemons = daemons
        self.net_inodes: set[int] = set()
        self._more = more
        self._run = run
        self._more_lines = more_lines or {}

    def _is_kept(self, name: str) -> bool:
        """Whether a file of the state directory is made once for many: part of a whole image of a snapshot's layers, or
        of a template that has its name."""
        path = self.directory / "s" / name
        if name.startswith("templates/"):
            return not name.split("/")[1].startswith(".")
        both = (path.with_suffix(".erofs"), path.with_suffix(".json"))
        return name.startswith("layers/") and path in both and all(one.exists() for one in both)

    def snapshot(self) -> Snapshot:
        """All of it, by sort; sorted, without what changes by itself (pids, times)."""
        sorts: dict[str, Iterator[str]] = {
            "process": self._processes(),
            "mount": self._mounts(),
            "cgroup": self._cgroups(),
            "loop device": self._loops(),
            "network namespace": self._namespaces(),
            "link": self._in_networks("-d", "address"),
            "qdisc and filter": self._traffic_control(),
            # The files of boot slots are made as they are needed, and stay.
            "run directory": (n for n in self._files(self._run, depth=9) if not n.startswith("boots/")),
            "state directory": (name for name in self._files("s", depth=9) if not self._is_kept(name)),
            "half made template": (name for name in self._files("templates", depth=2) if name[0] == "."),
            "shared memory": (name for name in os.listdir("/dev/shm") if self._is_named(name)),
            "temporary file": (name for name in os.listdir("/tmp") if self._is_named(name)),
            **{sort: self._files(below, depth) for sort, (below, depth) in self._more.items()},
            **{sort: iter(lines()) for sort, lines in self._more_lines.items()},
        }
        return {sort: sorted(lines) for sort, lines in sorts.items()}

    def _is_named(self, text: str) -> bool:
        return any(name in text for name in self.names())

    def _processes(self) -> Iterator[str]:
        known = self.daemons() | {os.getpid()}
        directory = str(self.directory)
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            if pid in known:
                continue
            command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
            environment = _read(f"/proc/{pid}/environ")
            named = directory in command or self._is_named(command) or self._stands(pid, command)
            if command and (named or self.mark in environment.split("\0")):
                yield command[:_COMMAND]

    def _stands(self, pid: int, command: str) -> bool:
        """Whether a process stands for a container here: its words and environment do not say whose it is.

        The inode alone does not tell: the kernel gives that of a namespace which has gone to the next one.
        """
        if _STANDING not in command:
            return False
        try:
            return os.stat(f"/proc/{pid}/ns/net").st_ino in self.net_inodes
        except OSError:
            return False

    def _mounts(self) -> Iterator[str]:
        for line in _read("/proc/self/mountinfo").splitlines():
            if str(self.directory) in line or self._is_named(line):
                fields, _, file_system = line.partition(" - ")
                yield f"{fields.split(' ', 3)[3]} - {file_system}"

    def _cgroups(self) -> Iterator[str]:
        for path, directories, _ in os.walk("/sys/fs/cgroup"):
            yield from (f"{path}/{name}" for name in directories if self._is_named(name))

    def _loops(self) -> Iterator[str]:
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            backing = _read(str(path)).strip()
            if str(self.directory) in backing:
                yield f"{path.parts[3]} of {backing}"

    def _namespaces(self) -> Iterator[str]:
        for name in _names("/run/netns"):
            if name in self.networks or self._is_named(name):
                yield name

    def _in_networks(self, *command: str) -> Iterator[str]:
        """What iproute2 lists in the namespaces, without indices and hardware addresses: a bridge's changes."""
        for network in self.networks:
            done = subprocess.run(
                ["ip", "-n", network, "-j", *command], capture_output=True, text=True, check=True
            )
            for link in json.loads(done.stdout or "[]"):
                kind = (link.get("linkinfo") or {}).get("info_kind", "")
                about = f"{network}: {link['ifname']} {kind} mtu {link['mtu']}"
                yield about
                for one in link.get("addr_info", ()):
                    if one.get("local"):
                        yield f"{about} {one['local']}/{one['prefixlen']}"

    def _traffic_control(self) -> Iterator[str]:
        for network in self.networks:
            for command in (
                ["qdisc", "show"],
                *(["filter", "show", "dev", one, "ingress"] for one in _links(network)),
            ):
                done = subprocess.run(
                    ["tc", "-n", network, *command],
                    capture_output=True,
                    text=True,
                    check=False,  # a link may just have gone
                )
                # The queues of a veth pair get handles of their own with every pair.
                lines = (line.strip() for line in done.stdout.splitlines())
                yield from (f"{network}: {line}" for line in lines if "noqueue" not in line)

    def _files(self, below: str, depth: int) -> Iterator[str]:
        top = str(self.directory / below)
        for path, directories, files in os.walk(top):
            for name in (*directories, *files):
                if not name.startswith(("last_reserved_ip", "lock")):  # a plugin's own memory
                    yield os.path.relpath(os.path.join(path, name), top)
            if os.path.relpath(path, top).count("/") + (path != top) + 1 >= depth:
                directories.clear()


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    """A line for each thing that is there more, or less often than before; empty if they are equal."""
    found = []
    for sort, lines in after.items():
        old, new = list(before[sort]), list(lines)
        for line in list(new):
            if line in old:
                old.remove(line)
                new.remove(line)
        found += [f"left: {sort} {line}" for line in new] + [f"gone: {sort} {line}" for line in old]
    return found


def _links(network: str) -> list[str]:
    done = subprocess.run(["ip", "-n", network, "-o", "link"], capture_output=True, text=True, check=True)
    return [line.split(": ")[1].partition("@")[0] for line in done.stdout.splitlines()]


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
