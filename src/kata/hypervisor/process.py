"""The process of a monitor: what all of them have, whatever it is that they run (`kata.hypervisor.protocols.Started`).

Usable before asyncio is imported: the machine boots while the rest of the engine loads.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from kata import children, confinement, sysio
from kata.errors import GuestAssetError, HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from kata.errors import KataError
    from kata.hypervisor.base import Disk
    from kata.hypervisor.channel import Channel
    from kata.journal import Entry, Journal


class Launch:
    """What is under way while a monitor is started. Used as a context: when that fails, all of it is taken back, and
    what the monitor inherits is closed here in any case.

    Args:
        title: The monitor's name in sentences.
        journal: The sandbox's.

    Attributes:
        ours: Our end of each channel by its name; ``console`` is the guest's console.
        theirs: The descriptors that the monitor inherits, by name.
        entries: Of the journal, each with the ``path`` of a file that goes with the machine.
        stderr: What the monitor says on standard error.
        stdout: Descriptor of its standard output: its standard error, unless the guest's console goes there.
    """

    __slots__ = ("_journal", "_title", "entries", "ours", "stderr", "stdout", "theirs")

    def __init__(self, title: str, journal: Journal) -> None:
        self._title = title
        self._journal = journal
        self.ours: dict[str, int] = {}
        self.theirs: dict[str, int] = {}
        self.entries: list[Entry] = []
        self.stderr = children.StderrTail()
        self.stdout = self.stderr.write_fd

    def __enter__(self) -> Launch:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        self.stderr.started()
        for fd in self.theirs.values():
            os.close(fd)
        if kind is None:
            return
        self.stderr.close()
        for fd in self.ours.values():
            os.close(fd)
        for entry in self.entries:
            self._journal.mark_gone(entry)

    def channel(self, name: str) -> None:
        """Make a channel of this name."""
        self.ours[name], self.theirs[name] = children.socketpair()

    def socket(self, path: str) -> None:
        """Write down that a socket is made there, which goes with the machine."""
        self.entries.append(self._journal.begin("socket", path=path))

    def spawn(self, argv: Sequence[str], role: str, **options: Any) -> children.Child:
        """Execute the monitor.

        Args:
            argv: The argument vector.
            role: See `kata.children.spawn`.
            options: Further ones of `kata.children.spawn`.

        Raises:
            HypervisorError: It cannot be executed.
        """
        try:
            return children.spawn(
                argv,
                self._journal,
                role,
                stdout=self.stdout,
                stderr=self.stderr.write_fd,
                namespaces=confinement.NAMESPACES,
                **options,
            )
        except OSError as error:
            raise HypervisorError(
                f"cannot start {self._title}: {error.strerror}", "Run `kata doctor` to check this host."
            ) from error


class MonitorProcess(ABC):
    """A monitor that was started, and our ends of its channels.

    The descriptors are this object's until somebody takes them (`detach_fd`); `close` closes the rest.

    No `children.SupervisedChild`, which the helpers of a sandbox are: that watches its program itself, and its end is
    a sentence. This one is started before there is an event loop and watched by `kata.hypervisor.running.Running` from
    then on, which waits for its last words on several channels, and its end is an error that depends on what it said
    and how it was set up.

    Args:
        child: The process.
        launch: What it was started with: our ends of the channels, its standard error, and the files that go with it.
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
        launch: Launch,
        *,
        disk_addresses: Sequence[str],
        nic_addresses: Sequence[str],
        share_tag: str,
        extra_memory_mib: int = 0,
    ) -> None:
        self.child = child
        self.fds = launch.ours
        self.entries = launch.entries
        self.disk_addresses = disk_addresses
        self.nic_addresses = nic_addresses
        self.share_tag = share_tag
        self.extra_memory_mib = extra_memory_mib
        self._stderr = launch.stderr

    @property
    @abstractmethod
    def channel(self) -> Channel:
        """How the agent is reached."""

    @abstractmethod
    def explain(self, status: int) -> KataError:
        """The error for a monitor that ended with this exit status."""

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

    def complete(self) -> None:  # noqa: B027 -- one that may be left as it is
        """See `kata.hypervisor.protocols.Started.complete`: most monitors begin nothing beside."""

    def give_agent(self, words: bytes) -> bool:
        """See `kata.hypervisor.protocols.Started.give_agent`: of most monitors it is not there."""
        return False

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


NO_MEMORY = (
    "the host cannot give the virtual machine its {memory} MiB of memory{available}",
    "Ask for less with -m, or free memory on the host.",
)
"""Sentence and hint for a monitor that gets no memory."""


def explained(
    title: str,
    status: int,
    last: str,
    known: Iterable[tuple[str, type[KataError], str, str]],
    said: str,
    values: Mapping[str, object],
) -> KataError:
    """The error for a monitor that ended.

    Args:
        title: Its name in sentences.
        status: Its exit status.
        last: The sentence that says why, as it said it; may be empty.
        known: What it may say (lower case), the class of the error, and sentence and hint to say instead; the first
            that is found counts.
        said: Where that is looked for.
        values: What is put into the sentence: ``memory`` (MiB), ``kernel``, ``initrd``; ``available`` is added.
    """
    low = said.lower()
    for pattern, kind, sentence, hint in known:
        if pattern in low:
            text = sentence.format(available=available_memory(), **values)
            return kind(f"{text} ({title}: {last})", hint)
    hint = "Run `kata doctor` to check this host."
    if status == -9:
        hint = "If nobody killed it, the host was out of memory: see its kernel log (dmesg)."
    return HypervisorError(f"{title} {children.ending(status)}" + (f": {last}" if last else ""), hint)
