"""A running machine, as far as it is the same for all monitors (`kata.hypervisor.protocols.Machine`)."""

from __future__ import annotations

import asyncio
import os

from kata import sysio
from kata.errors import UnsupportedError, VMLostError
from kata.hypervisor.base import Ended
from kata.hypervisor.console import ConsoleRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.errors import KataError
    from kata.hypervisor.base import Disk, DiskError
    from kata.hypervisor.channel import Channel
    from kata.hypervisor.figures import Figures
    from kata.hypervisor.process import MonitorProcess
    from kata.journal import Journal

_PANIC = "Kernel panic - not syncing"


class Running:
    """Watches a monitor's process: its console, its standard error, and its end. Make it inside the event loop.

    Args:
        process: The process; its descriptors are this object's from here on.
        journal: The one it was started with.
        console_path: File of the console's ring; empty keeps it in memory only.
    """

    def __init__(self, process: MonitorProcess, journal: Journal, console_path: str = "") -> None:
        self.extra_memory_mib = process.extra_memory_mib
        self.console = ConsoleRing(console_path)
        self._traffic: Callable[[str, bytes], None] | None = None
        self._process = process
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._stopping = False
        self._releasing = False
        self._disk_callbacks: list[Callable[[DiskError], None]] = []
        self._console = process.take_console()
        self._figures: Figures | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._guest_ended = ""
        """How the guest ended the machine, as `switched_off` has it, once the monitor has said so."""
        if self._console is not None:
            os.set_blocking(self._console.raw, False)
            self._loop.add_reader(self._console, self._read_console)
        if process.stderr.is_open:
            self._loop.add_reader(process.stderr, self._read_stderr)
        self._loop.add_reader(process.pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        """Process id of the monitor on the host."""
        return self._process.pid

    @property
    def channel(self) -> Channel:
        """How the agent is reached."""
        return self._process.channel

    def move_console(self, path: str) -> None:
        """See `kata.hypervisor.protocols.Machine.move_console`."""
        self.console.move(path)

    def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
        """See `kata.hypervisor.protocols.Machine.on_disk_error`."""
        self._disk_callbacks.append(callback)

    def on_traffic(self, callback: Callable[[str, bytes], None] | None) -> None:
        """See `kata.hypervisor.protocols.Machine.on_traffic`."""
        self._traffic = callback

    async def fill_disks(self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str) -> None:
        """See `kata.hypervisor.protocols.Machine.fill_disks`: it cannot."""
        raise UnsupportedError("machines of this hypervisor do not wait for sandboxes")

    async def insert_nic(self) -> tuple[int, str]:
        """See `kata.hypervisor.protocols.Machine.insert_nic`: it cannot."""
        raise UnsupportedError("machines of this hypervisor do not wait for sandboxes")

    # ---- life and death ----

    async def wait(self) -> Ended:
        """Wait until the monitor has ended and been reaped."""
        return await asyncio.shield(self._ended)

    @property
    def ended(self) -> Ended | None:
        """How it ended, or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def stop(self, grace_s: float = 0.0) -> Ended:
        """End the monitor: in order within the grace period (seconds), otherwise with KILL.

        The guest is not asked; what matters in it has been written back by its agent before.
        """
        self._stopping = True
        if not self._ended.done() and grace_s > 0:
            await self._end_in_order(grace_s)
        self._process.child.kill()
        if not (self._releasing or self._ended.done()):
            # Most of its end is the freeing of its memory, which two can do in less time than one.
            self._releasing = True
            self._loop.run_in_executor(None, _release_memory, sysio.Fd(os.dup(self._process.pidfd)))
        return await self.wait()

    def close(self) -> None:
        """After the end: close descriptors, and remove the files that went with the machine."""
        if self._process.stderr.is_open:
            self._loop.remove_reader(self._process.stderr)
        if not self._process.child.is_closed:
            self._loop.remove_reader(self._process.pidfd)
        self._close_console()
        self._process.close()
        self.console.close()
        for entry in self._process.entries:
            try:
                os.unlink(entry.params["path"])
            except FileNotFoundError:
                pass
            self._journal.mark_gone(entry)
        self._process.entries.clear()

    def failure(self, doing: str) -> KataError:
        """The error for a call that failed because the monitor is gone.

        Args:
            doing: What was being done, as a clause: ``"waiting for the agent"``.
        """
        ended = self.ended
        if ended is not None and ended.error is not None:
            return ended.error
        return VMLostError(f"the virtual machine ended while {doing}", "See `kata logs` for its output.")

    # ---- what can be learnt ----

    def console_tail(self, limit: int = 4096) -> str:
        """The last of what the guest's console said, escaped and bounded."""
        return self.console.tail(limit)

    async def processors(self) -> list[str]:
        """See `kata.hypervisor.protocols.Machine.processors`; none, unless a monitor knows better."""
        return []

    async def metrics(self) -> dict[str, int]:
        """See `kata.hypervisor.protocols.Machine.metrics`."""
        from kata.hypervisor import figures

        if self._figures is None:
            self._figures = figures.Figures(self.pid)
        return await asyncio.to_thread(self._figures.look)

    async def counters(self) -> dict[str, dict[str, int]]:
        """See `kata.hypervisor.protocols.Machine.counters`: none."""
        return {}

    # ---- of the monitors ----

    async def _end_in_order(self, grace_s: float) -> None:
        """Have the monitor end by itself, within so many seconds: here with TERM."""
        self._process.child.send_signal(sysio.SIGTERM)
        await asyncio.wait([self._ended], timeout=grace_s)

    async def _last_words(self) -> None:
        """Return when what the monitor said last has been read, once its process has ended; bounded."""

    def _guest_did(self) -> Ended | None:
        """How the machine ended, by what its monitor has said; None where it has said nothing."""
        return switched_off(0, self._guest_ended) if self._guest_ended else None

    # ---- inside ----

    def _read_console(self) -> None:
        if self._console is None:
            return
        try:
            data = os.read(self._console.raw, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.console.feed(data)
            if self._traffic is not None:
                self._traffic("console", data)
            return
        self._close_console()

    def _close_console(self) -> None:
        if self._console is not None:
            self._loop.remove_reader(self._console)
            self._console.close()
            self._console = None

    def _read_stderr(self) -> None:
        fd = self._process.stderr.raw
        self._process.read_stderr()
        if not self._process.stderr.is_open:
            self._loop.remove_reader(fd)

    def _on_exit(self) -> None:
        status = self._process.child.poll()
        if status is None:
            return
        self._loop.remove_reader(self._process.pidfd)
        # What it said last is still in the sockets; and its last event may be, too.
        while self._console is not None:
            self._read_console()
            if self._console is not None and not sysio.pidfd_wait(self._console.raw, 0):
                break
        self._finishing = self._loop.create_task(self._finish(status))

    async def _finish(self, status: int) -> None:
        await self._last_words()
        if not self._ended.done():
            self._ended.set_result(self._explain_end(status))

    def _explain_end(self, status: int) -> Ended:
        if self._stopping:
            return Ended(status, "stopped", None)
        if status != 0 and not self._guest_ended:
            error = self._process.explain(status)
            if status < 0:
                error = VMLostError(f"the virtual machine ended: {error.message}", error.hint)
            return Ended(status, "crashed", error)
        panic = [line for line in self.console.tail(65536, 2000).splitlines() if _PANIC in line]
        if panic:
            return panicked(status, panic[-1].partition(_PANIC)[2].strip(" :"))
        return self._guest_did() or Ended(
            status, "ended", VMLostError("the virtual machine was ended, and its monitor did not say why")
        )


def _release_memory(pidfd: sysio.Fd) -> None:
    with pidfd:
        try:
            sysio.process_mrelease(pidfd.raw)
        except OSError:
            pass  # it has ended already, or this kernel cannot do that


def panicked(status: int, what: str = "") -> Ended:
    """The end of a machine whose guest's kernel panicked.

    Args:
        status: The monitor's exit status.
        what: The kernel's reason; empty when it gave none.
    """
    return Ended(
        status,
        "panic",
        VMLostError(
            f"the guest's kernel panicked: {what or 'no reason given'}",
            "Is the memory (-m) enough, and the guest whole (kata guest info)?",
        ),
    )


def switched_off(status: int, how: str) -> Ended:
    """The end of a machine that its guest ended: ``poweroff`` or ``reboot``."""
    return Ended(status, how, VMLostError(f"the virtual machine was switched off from inside ({how})"))
