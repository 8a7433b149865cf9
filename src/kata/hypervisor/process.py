"""The process of a monitor: what all of them have, whatever it is that they run (`kata.hypervisor.protocols.Started`).

Usable before asyncio is imported: the machine boots while the rest of the engine loads.
"""

from __future__ import annotations

import os

from kata import sysio
from kata.errors import GuestAssetError, HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata import children
    from kata.errors import KataError
    from kata.hypervisor.base import Disk
    from kata.hypervisor.channel import Channel
    from kata.journal import Entry


class MonitorProcess:
    """A monitor that was started, and our ends of its channels.

    The descriptors are this object's until somebody takes them (`detach_fd`); `close` closes the rest.

    No `children.SupervisedChild`, which the helpers of a sandbox are: that watches its program itself, and its end is
    a sentence. This one is started before there is an event loop and watched by `kata.hypervisor.running.Running` from
    then on, which waits for its last words on several channels, and its end is an error that depends on what it said
    and how it was set up.

    Args:
        child: The process.
        fds: Our end of each channel by its name; ``console`` is the guest's console.
        stderr_tail: What it says on standard error.
        entries: Of the journal, each with the ``path`` of a file that goes with the machine.
        disk_addresses: See `kata.hypervisor.protocols.Started`.
        nic_addresses: See there.
        share_tag: See there.
        extra_memory_mib: See there.
    """

    __slots__ = (
        "_stderr",
        "child",
        "disk_addresses",
        "entries",
        "extra_memory_mib",
        "fds",
        "nic_addresses",
        "share_tag",
    )

    def __init__(
        self,
        child: children.Child,
        fds: dict[str, int],
        stderr_tail: children.StderrTail,
        entries: list[Entry],
        *,
        disk_addresses: Sequence[str],
        nic_addresses: Sequence[str],
        share_tag: str,
        extra_memory_mib: int = 0,
    ) -> None:
        self.child = child
        self.fds = fds
        self.entries = entries
        self.disk_addresses = disk_addresses
        self.nic_addresses = nic_addresses
        self.share_tag = share_tag
        self.extra_memory_mib = extra_memory_mib
        self._stderr = stderr_tail

    @property
    def channel(self) -> Channel:
        """How the agent is reached."""
        raise NotImplementedError

    def explain(self, status: int) -> KataError:
        """The error for a monitor that ended with this exit status."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Process id of the monitor."""
        return self.child.pid

    @property
    def pidfd(self) -> int:
        """Becomes readable when the monitor ends."""
        return self.child.pidfd

    @property
    def stderr(self) -> sysio.Fd:
        """Readable when the monitor has said something (`read_stderr`); closed after its end was read."""
        return self._stderr.reader

    def detach_fd(self, name: str) -> int:
        """Hand over our end of a channel.

        Raises:
            HypervisorError: There is none of that name, or it was handed over before.
        """
        if name not in self.fds:
            raise HypervisorError(f"the machine's {name} channel is in use already")
        return self.fds.pop(name)

    def take_console(self) -> sysio.Fd | None:
        """Our end of the console; see `kata.hypervisor.protocols.Started.take_console`."""
        return sysio.Fd(self.detach_fd("console")) if "console" in self.fds else None

    def status(self, wait_s: float = 0.0) -> int | None:
        """The monitor's exit status, waited for at most `wait_s` seconds; None while it runs."""
        return self.child.wait(wait_s) if wait_s > 0 else self.child.poll()

    def kill(self) -> None:
        """End the monitor by force. Idempotent."""
        self.child.kill()

    def read_stderr(self) -> bytes:
        """Take in what the monitor has written to standard error; see `kata.children.StderrTail`."""
        return self._stderr.read()

    def stderr_text(self) -> str:
        """What the monitor said, bounded, with control characters escaped."""
        return self._stderr.text()

    def failure(self) -> KataError | None:
        """Why the monitor is no longer there, or None while it is (or after an orderly end)."""
        status = self.child.poll()
        if status is None or status == 0:
            return None
        return self.explain(status)

    def close(self) -> None:
        """Close what nobody took. The monitor itself is not touched."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        self._stderr.close()
        if self.child.poll() is not None:
            self.child.close()


def open_files(kernel: str, initrd: str, disks: Sequence[Disk | None]) -> dict[str, int]:
    """Open for a monitor what is the sandbox's. It may lie where only we may go.

    Args:
        kernel: Path of the guest's kernel.
        initrd: Path of its initial ramdisk.
        disks: The disks by slot.

    Returns:
        Descriptors: ``kernel``, ``initrd``, ``disk0`` and so on.

    Raises:
        GuestAssetError: The kernel or initrd cannot be read, or is empty.
        HypervisorError: A disk image cannot be used.
    """
    found: dict[str, int] = {}
    try:
        for what, path in (("kernel", kernel), ("initrd", initrd)):
            try:
                found[what] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                empty = not os.pread(found[what], 1, 0)
            except OSError as error:
                raise GuestAssetError(
                    f"cannot read the guest's {what} {path}: {error.strerror}", "kata guest build"
                ) from error
            if empty:
                raise GuestAssetError(f"the guest's {what} {path} is empty", "kata guest build")
        found |= open_disks(disks)
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise
    return found


def open_disks(disks: Sequence[Disk | None]) -> dict[str, int]:
    """Open the disks alone; see `open_files`.

    Raises:
        HypervisorError: A disk image cannot be used.
    """
    found: dict[str, int] = {}
    try:
        for index, disk in enumerate(disks):
            if disk is not None:
                found[f"disk{index}"] = open_disk(disk)
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise
    return found


def open_disk(disk: Disk) -> int:
    """Open a disk's image as the guest may use it.

    Raises:
        HypervisorError: It cannot be used.
    """
    try:
        return os.open(disk.path, (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"cannot use the disk image {disk.path}: {error.strerror}") from error


def available_memory() -> str:
    """How much memory the host has, as the end of a sentence; empty when it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return f"; {int(line.split()[1]) // 1024} MiB are available"
    except OSError:
        pass
    return ""
