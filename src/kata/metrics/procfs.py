"""Figures of a process from /proc, under the names that the original's metrics have.

proc_pid_stat(5), proc_pid_status(5), proc_pid_io(5), proc_pid_net(5).
"""

from __future__ import annotations

import functools
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

STATUS_ITEMS = frozenset(
    (
        "hugetlbpages",
        "nonvoluntary_ctxt_switches",
        "rssanon",
        "rssfile",
        "rssshmem",
        "vmdata",
        "vmexe",
        "vmhwm",
        "vmlck",
        "vmlib",
        "vmpeak",
        "vmpin",
        "vmpmd",
        "vmpte",
        "vmrss",
        "vmsize",
        "vmstk",
        "vmswap",
        "voluntary_ctxt_switches",
    )
)
NET_ITEMS = tuple(
    f"{way}_{what}"
    for way, kinds in (
        ("recv", "bytes packets errs drop fifo frame compressed multicast"),
        ("sent", "bytes packets errs drop fifo colls carrier compressed"),
    )
    for what in kinds.split()
)
_IO_SPELLINGS = {
    "read_bytes": ("readbytes", "read_bytes"),
    "write_bytes": ("writebytes", "write_bytes"),
    "cancelled_write_bytes": ("cancelledwritebytes", "cancelled_write_bytes"),
}
"""The original's two runtimes spell them differently."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def read(path: str) -> bytes:
    """The content of a file of /proc; empty if it cannot be read, since its process has gone or is not ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


@functools.cache
def _booted_s() -> int:
    """When the host was booted, in seconds since the Epoch. Of many processors, /proc/stat takes long to read."""
    for line in read("/proc/stat").split(b"\n"):
        if line.startswith(b"btime "):
            return int(line.split()[1])
    return 0


class ProcessFigures:
    """One process at one time.

    Args:
        pid: Its id on the host.
        role: What it is to its sandbox: engine, hypervisor, virtiofsd, passt, logger.

    Attributes:
        stat: Processor time in clock ticks: utime, stime, cutime, cstime.
        status: Items of `STATUS_ITEMS`.
        io: Bytes and calls; empty where they may not be read.
        threads: Number of threads; 0 if there is no such process.
        start_ticks: Its start in clock ticks since boot.
        virtual_bytes: Its virtual memory.
        resident_bytes: Its resident memory.
    """

    __slots__ = (
        "io",
        "pid",
        "resident_bytes",
        "role",
        "start_ticks",
        "stat",
        "status",
        "threads",
        "virtual_bytes",
    )

    def __init__(self, pid: int, role: str) -> None:
        self.pid = pid
        self.role = role
        self.threads = self.start_ticks = self.virtual_bytes = self.resident_bytes = 0
        self.stat: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.io: dict[str, int] = {}
        fields = read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
        if len(fields) < 22:
            return
        utime, stime, cutime, cstime = map(int, fields[11:15])
        self.stat = {"utime": utime, "stime": stime, "cutime": cutime, "cstime": cstime}
        self.threads = int(fields[17])
        self.start_ticks = int(fields[19])
        self.virtual_bytes = int(fields[20])
        self.resident_bytes = int(fields[21]) * PAGE_BYTES
        for line in read(f"/proc/{pid}/status").split(b"\n"):
            key, _, rest = line.partition(b":\t")
            item = key.decode("ascii", "replace").lower()
            if item in STATUS_ITEMS:
                self.status[item] = int(rest.split(None, 1)[0])
        for line in read(f"/proc/{pid}/io").split(b"\n"):
            key, _, count = line.partition(b": ")
            if count:
                name = key.decode("ascii", "replace")
                for item in _IO_SPELLINGS.get(name, (name,)):
                    self.io[item] = int(count)

    @property
    def cpu_s(self) -> float:
        """Processor time of itself in seconds."""
        return (self.stat.get("utime", 0) + self.stat.get("stime", 0)) / TICKS_PER_S

    @property
    def started_s(self) -> float:
        """Its start, in seconds since the Epoch."""
        return _booted_s() + self.start_ticks / TICKS_PER_S

    def open_files(self) -> int | None:
        """The number of its open files; None if that may not be known."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return None


MAX_INTERFACES = 64


def interfaces(pid: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The interfaces of the network namespace that a process is in.

    Yields:
        Name, and value by item of `NET_ITEMS`; at most `MAX_INTERFACES`.
    """
    lines = read(f"/proc/{pid}/net/dev").decode("utf-8", "replace").split("\n")
    for line in lines[2 : 2 + MAX_INTERFACES]:
        name, colon, rest = line.partition(":")
        numbers = rest.split()
        if colon and len(numbers) >= len(NET_ITEMS):
            yield name.strip(), dict(zip(NET_ITEMS, map(int, numbers), strict=False))
