"""The interface between the engine and a hypervisor.

The engine asks for capabilities, never for a name. `Hypervisor` is the type it uses; `kata.hypervisor.qemu`
implements it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kata.errors import KataError
    from kata.hypervisor.settings import Disk, VMSettings

    class Hypervisor(Protocol):
        """One virtual machine that was started. Methods raise `HypervisorError` unless they say else."""

        settings: VMSettings
        capabilities: Capabilities

        @property
        def pid(self) -> int:
            """Process id of the monitor on the host."""

        async def wait(self) -> Ended:
            """Wait for the end of the machine. May be awaited by several, and again."""

        async def stop(self, grace_s: float = 0.0) -> Ended:
            """End the machine: orderly within the grace period, else by force. Idempotent."""

        async def pause(self) -> None:
            """Stop the virtual CPUs."""

        async def resume(self) -> None:
            """Let the virtual CPUs run again."""

        async def set_memory(self, plugged_mib: int) -> int:
            """Have so much memory in the guest beside what the machine was started with. Returns how much there is:
            more, where the guest does not give it back."""

        async def set_balloon(self, mib: int) -> int:
            """Have the guest give so much of its memory back. Returns how much it did."""

        async def insert_disk(self, disk: Disk) -> str:
            """Give the running machine a disk; returns its PCI path in the guest."""

        async def remove_disk(self, address: str) -> None:
            """Take the disk at this PCI path away; the guest must have let go of it."""

        async def insert_nic(self) -> tuple[int, str]:
            """Bring the spare network interface to life.

            Returns:
                The network helper's end of its wire (a stream of length-prefixed frames; the caller owns
                it), and the interface's PCI path in the guest.
            """

        async def plug_nic(self, index: int, mac: str, tap_fd: int) -> None:
            """Give the running machine one of its late network interfaces, which counts from 0 with all others; the
            descriptor stays the caller's. The guest sees it soon after (`kata.hypervisor.qemu.slots.late_nic_path`).
            """

        @property
        def agent_cid(self) -> int | None:
            """Context id under which the agent listens on vsock; None when it is on its serial channel."""

        def take_agent_fd(self) -> int:
            """Descriptor of the host's end of the agent's serial channel; the caller owns it."""

        def close(self) -> None:
            """Give back what is left of descriptors and files once the machine has ended."""

        def console_tail(self, limit: int = 4096) -> str:
            """The last of what the guest's console said, escaped and bounded."""

        async def metrics(self) -> dict[str, int]:
            """Figures of the monitor's process: see `kata.hypervisor.qemu.machine.Qemu.metrics`."""

        def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
            """Be told when the host fails to read or write what is behind one of the guest's disks. The guest is told
            that its request failed, and not why.
            """

        async def confined(self) -> None:
            """Return when the monitor has lost what only its start needed; no container before."""

        def on_event(self, callback: Callable[[str, dict[str, Any]], None]) -> None:
            """Have events of the monitor (in its own words) delivered from now on."""


class Capabilities:
    """What a hypervisor, as set up on this host, can do.

    Args:
        disk_slots: Number of disks that can be present at once.
        insert_disk: A disk can be given to a running machine.
        insert_nic: A network interface can be connected in a running machine.
        share: A host directory can be offered to the guest.
        vsock: The agent can be reached over AF_VSOCK.
        pause: The machine can be paused.
        hardware: The guest's code runs on the processor itself, not in software emulation.
    """

    __slots__ = ("disk_slots", "hardware", "insert_disk", "insert_nic", "pause", "share", "vsock")

    def __init__(
        self,
        *,
        disk_slots: int,
        insert_disk: bool,
        insert_nic: bool,
        share: bool,
        vsock: bool,
        pause: bool,
        hardware: bool,
    ) -> None:
        self.disk_slots = disk_slots
        self.insert_disk = insert_disk
        self.insert_nic = insert_nic
        self.share = share
        self.vsock = vsock
        self.pause = pause
        self.hardware = hardware


class DiskError:
    """A request of the guest's that the host could not carry out.

    Args:
        path: The file or device behind the disk; empty if that is not known.
        writes: Whether the guest was writing.
        full: Whether the host's file system has no room.
        reason: The host's words.
    """

    __slots__ = ("full", "path", "reason", "writes")

    def __init__(self, path: str, *, writes: bool, full: bool, reason: str) -> None:
        self.path = path
        self.writes = writes
        self.full = full
        self.reason = reason


class Ended:
    """How a machine ended.

    Args:
        status: Exit status of the monitor; minus the signal when one ended it.
        reason: One word: ``"stopped"`` (we did it), ``"poweroff"``, ``"reboot"``, ``"panic"`` (the guest did
            it), ``"crashed"`` (the monitor died), ``"ended"`` (in order, but not by us or the guest).
        error: A sentence with a hint, when it was not meant to end; else None.
    """

    __slots__ = ("error", "reason", "status")

    def __init__(self, status: int, reason: str, error: KataError | None) -> None:
        self.status = status
        self.reason = reason
        self.error = error
