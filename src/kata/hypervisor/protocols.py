"""The seam between the engine and a hypervisor: what each has to offer, for its whole life.

A `Monitor` starts a machine before asyncio is loaded (`Monitor.start`), and takes it over afterwards (`Monitor.adopt`).
The engine asks for `Capabilities` before anything is made, and never for a name; monitors are found by name in
`kata.hypervisor.registry`. Types only: nothing imports this at run time.
"""

from __future__ import annotations

from typing import Any, Protocol

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kata.errors import KataError
    from kata.hypervisor.base import (
        Attachments,
        Capabilities,
        Check,
        Disk,
        DiskError,
        Ended,
        MachineShape,
        Nic,
    )
    from kata.hypervisor.channel import Channel
    from kata.journal import Journal
    from kata.sysio import Fd


class Started(Protocol):
    """A machine that boots, as far as it can be known without an event loop.

    Attributes:
        disk_addresses: Guest addresses of the shape's disk slots, in their order.
        nic_addresses: Guest addresses of its network interfaces, in their order.
        share_tag: Mount tag of the share in the guest; empty without one.
        extra_memory_mib: Memory that the monitor gave the guest beside the shape's, since its devices take it.
    """

    disk_addresses: Sequence[str]
    nic_addresses: Sequence[str]
    share_tag: str
    extra_memory_mib: int

    @property
    def pid(self) -> int:
        """Process id of the monitor on the host."""

    @property
    def channel(self) -> Channel:
        """How its agent is reached."""

    def complete(self) -> None:
        """Wait for what the start has begun beside. Idempotent; without it, taking the machine over does so.

        Raises:
            HypervisorError: It failed.
            SavedMachineError: What was saved is of no use.
        """

    def give_agent(self, words: bytes) -> bool:
        """Write the first bytes of the agent's connection, before anybody takes its channel. Returns false, and has
        written nothing, where that is not there before the guest listens."""

    def take_console(self) -> Fd | None:
        """The host's end of the guest's console, which is the caller's; None when there is none, or it was taken.
        One that nobody reads stops the guest when it is full."""

    def failure(self) -> KataError | None:
        """Why the monitor is no longer there; None while it is, and after an orderly end."""

    def status(self, wait_s: float = 0.0) -> int | None:
        """Exit status of the monitor, waited for at most `wait_s` seconds; None while it runs."""

    def kill(self) -> None:
        """End the monitor by force. Idempotent."""

    def close(self) -> None:
        """Give back the descriptors and files that nobody took. The monitor itself is not touched."""


class Machine(Protocol):
    """A machine inside the event loop. Methods raise `HypervisorError` unless they document another error.

    Attributes:
        extra_memory_mib: See `Started`.
    """

    extra_memory_mib: int

    @property
    def pid(self) -> int:
        """Process id of the monitor on the host."""

    @property
    def version(self) -> str:
        """The monitor's version, as it says itself (``7.2.22``); empty as long as it has not."""

    @property
    def channel(self) -> Channel:
        """How its agent is reached."""

    async def wait(self) -> Ended:
        """Wait for the end of the machine. May be awaited by several, and again."""

    async def stop(self, grace_s: float = 0.0) -> Ended:
        """End the machine: in order within the grace period (seconds), otherwise by force. Idempotent."""

    async def confined(self) -> None:
        """Return when the monitor has dropped the privileges that only its start needed. No container is created
        before that."""

    async def pause(self) -> None:
        """Stop the virtual CPUs. A container is paused by its guest, without this.

        Raises:
            UnsupportedError: `Capabilities.pause` is not there.
        """

    async def resume(self) -> None:
        """Let the virtual CPUs run again. The guest's clock may have stood still: `kata.agent.clock.align` sets it.

        Raises:
            UnsupportedError: `Capabilities.pause` is not there.
        """

    async def save(self, directory: str) -> None:
        """Save the paused machine into a directory, so that it can be restored.

        Raises:
            UnsupportedError: `Capabilities.snapshot` is not there.
        """

    async def set_memory(self, plugged_mib: int) -> int:
        """Set how much memory the guest has in addition to what the machine was started with.

        Args:
            plugged_mib: A multiple of `MEMORY_STEP_MIB`.

        Returns:
            MiB that are plugged in now: more than asked for where the guest does not release them.
        """

    async def set_balloon(self, mib: int) -> int:
        """Set how much of its memory (MiB) the guest gives back to the host. Returns the MiB it has given back."""

    async def attach_disk(self, disk: Disk) -> str:
        """Give the running machine a disk; returns its address in the guest."""

    async def fill_disks(self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str) -> None:
        """Make a machine that waited that of a sandbox: its disks are in the slots that were made for them, which are
        empty, and its files are in the sandbox's directory.

        Args:
            disks: By slot, as in `Attachments.disks`.
            run_dir: The sandbox's directory.
            sandbox_id: Its id.

        Raises:
            UnsupportedError: `Capabilities.waits` is not there.
        """

    async def insert_nic(self) -> tuple[int, str]:
        """Connect the interface of a machine that waited without a network.

        Returns:
            The network helper's end of its wire, which is the caller's, and the interface's address.

        Raises:
            UnsupportedError: `Capabilities.waits` is not there.
        """

    def move_console(self, path: str) -> None:
        """Have the file of the console's ring there from now on, on the same file system."""

    async def detach_disk(self, address: str) -> None:
        """Take the disk at this address away; the guest must have let go of it."""

    async def attach_nic(self, index: int, nic: Nic) -> str:
        """Give the running machine a network interface; returns its address in the guest, which sees it a moment
        later.

        Args:
            index: Which of the machine's interfaces it is, from 0, with those that it was started with.
            nic: The interface; its descriptor stays the caller's.
        """

    def console_tail(self, limit: int = 4096) -> str:
        """The end of the guest's console output: at most `limit` bytes, escaped and bounded."""

    async def processors(self) -> list[str]:
        """Where the guest's processors stand, a line each, for the report of a guest that does not answer. Empty if
        the monitor cannot tell.

        Raises:
            HypervisorError: It does not answer, or it is gone.
        """

    async def metrics(self) -> dict[str, int]:
        """Figures of the monitor's process: ``rss_bytes``, ``cpu_ns`` (user and system), ``threads``; and, if it can
        tell, ``guest_resident_bytes``: how much of the guest's memory takes memory of the host, or did some seconds
        ago. Empty after its end.
        """

    async def counters(self) -> dict[str, dict[str, int]]:
        """What the monitor itself has counted: by device (or other part of it), by name. Empty where it counts
        nothing."""

    def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
        """Be told when the host fails to read or write what is behind one of the guest's disks. The guest is told
        that its request failed, and not why.
        """

    def on_traffic(self, callback: Callable[[str, bytes], None] | None) -> None:
        """For the log of whoever looks for a fault: have what is said delivered from now on, or no longer (None).

        Args:
            callback: Is given ``event`` and an event of the monitor's as JSON, or ``console`` and bytes that the
                guest has written to its console. Both may be the guest's: neither bounded nor escaped.
        """

    def close(self) -> None:
        """Give back what is left of descriptors and files once the machine has ended."""


class Monitor(Protocol):
    """A hypervisor, as this host has it. One object for all machines; it holds nothing of any.

    Attributes:
        name: Its name in settings and in the configuration (``[hypervisor.NAME]``).
        title: Its name in sentences.
        accelerators: Those that it can use: ``kvm``, ``tcg`` (software emulation).
    """

    name: str
    title: str
    accelerators: tuple[str, ...]

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        """What its machines can do on this host.

        Args:
            accel: The accelerator.
            options: Its own options, as returned by `options`.
            bounces: The guest's kernel lets a file server's device use bounce pages.
        """

    def options(self, configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
        """Read what is its own in the configuration.

        Args:
            configuration: Value by key of its table (those that a user has set).
            origin: Says where a key was set, for errors.

        Returns:
            Options for `capabilities` and `MachineShape.options`: JSON values; empty without any.

        Raises:
            ConfigError: A value makes no sense.
        """

    def host_overhead_mib(self, accel: str) -> int:
        """What running a machine takes on the host beside the guest's memory, in MiB: the monitor, the engine, the
        network helper, and some page cache of its disks to work with."""

    def start(self, shape: MachineShape, attachments: Attachments, journal: Journal) -> Started:
        """Start a machine. It is booting when this returns. Usable before asyncio is imported.

        Args:
            shape: What it is.
            attachments: What it is connected to. The descriptors in it are the monitor's from here on, also on
                failure.
            journal: The sandbox's.

        Raises:
            HostError: The monitor, or something that it needs of the host, is missing.
            GuestAssetError: The kernel or initrd is missing.
            HypervisorError: A disk image is missing, or the process could not be started.
        """

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> Machine:
        """Take over what `start` or `restore` of the same monitor returned. Once, and inside the event loop.

        Args:
            started: The machine, which is the result's from here on.
            journal: The one it was started with.
            console_path: File for what the guest says on its console; empty keeps it in memory only.

        Raises:
            TypeError: Another monitor has started it.
        """

    def restore(
        self, directory: str, attachments: Attachments, journal: Journal, shape: MachineShape | None = None
    ) -> Started:
        """Start a machine from what `Machine.save` has left: it goes on where it was, and so may its clock
        (`kata.agent.clock.align`). Usable before asyncio is imported. `kata.hypervisor.base.MonitorBase` has it for
        monitors that cannot.

        Args:
            directory: What it was saved into.
            attachments: As for `start`; of the same kinds as the saved machine's.
            journal: The sandbox's.
            shape: The saved machine's, where it is known; None to read it there.

        Raises:
            UnsupportedError: `Capabilities.snapshot` is not there.
            SavedMachineError: What was saved is of no use. If that was found out at once, the attachments are not
                closed, and good for a `start`.
            HypervisorError: The process could not be started.
        """

    def program(self, options: Mapping[str, Any]) -> str:
        """Path of the program that would be started; empty when it is not installed. Nothing is run.

        Args:
            options: As returned by `options`.
        """

    def version(self, options: Mapping[str, Any]) -> str:
        """The version of that program, in its own words; empty when it is not installed.

        Args:
            options: As returned by `options`.
        """

    def checks(self, options: Mapping[str, Any]) -> list[Check]:
        """What `kata doctor` has to say of it.

        Args:
            options: As returned by `options`.
        """

    def arguments(self, run_dir: str) -> list[tuple[str, str]]:
        """What the monitor of a sandbox was started with, for a report of a bug.

        Args:
            run_dir: The sandbox's directory.

        Returns:
            Its arguments, each with what it is: ``plain``, ``parameters`` (of the guest's kernel), or ``unknown``: not
            known to be harmless. Empty where they were not written down.

        Raises:
            OSError: They cannot be read.
        """
