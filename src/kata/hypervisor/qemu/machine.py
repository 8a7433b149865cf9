"""A running QEMU, as the engine sees it (`kata.hypervisor.protocols.Machine`)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket

from kata import sysio
from kata.errors import HostError, HypervisorError, KataError, UnsupportedError, VMLostError
from kata.hypervisor.base import DiskError, Ended
from kata.hypervisor.console import ConsoleRing
from kata.hypervisor.qemu import arguments, slots
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu import root as qemu_root
from kata.hypervisor.qemu.process import explain
from kata.hypervisor.qemu.qmp import QmpClient

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.hypervisor.base import Disk, Nic
    from kata.hypervisor.channel import Channel
    from kata.hypervisor.qemu.figures import Figures
    from kata.hypervisor.qemu.process import QemuProcess
    from kata.hypervisor.qemu.settings import VMSettings
    from kata.journal import Journal

_GUEST_DID = {"guest-shutdown": "poweroff", "guest-reset": "reboot"}
"""What the guest did, by the reason in QEMU's last event (``ShutdownCause`` in QEMU's ``qapi/run-state.json``)."""
_NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_PANIC = "Kernel panic - not syncing"


class Qemu:
    """Takes over a QEMU that `kata.hypervisor.qemu.process.spawn` started. Make it inside the event loop.

    Args:
        process: The process; its descriptors are this object's from here on.
        journal: The one it was started with.
        console_path: File of the console's ring; empty keeps it in memory only.
    """

    def __init__(self, process: QemuProcess, journal: Journal, console_path: str = "") -> None:
        self.settings: VMSettings = process.settings
        self.extra_memory_mib = process.extra_memory_mib
        self.console = ConsoleRing(console_path)
        self._traffic: Callable[[str, bytes], None] | None = None
        self._process = process
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._stopping = False
        self._callbacks: list[Callable[[str, dict[str, Any]], None]] = []
        self._disk_callbacks: list[Callable[[DiskError], None]] = []
        self._shutdown_reason = ""
        self._console = process.take_console()
        self._figures: Figures | None = None
        self._disk_generation = 0
        self._disk_lock = asyncio.Lock()
        self._disks: list[Disk | None] = list(self.settings.disks)
        self._nodes = [f"file{index}" for index in range(len(self.settings.disks))]
        self._fdsets: dict[str, int] = {
            f"file{index}": index for index, disk in enumerate(self.settings.disks) if disk
        }
        self._nic_free = self.settings.nic is not None and not self.settings.nic.backend
        if self._console is not None:
            os.set_blocking(self._console.raw, False)
            self._loop.add_reader(self._console, self._read_console)
        if process.stderr.is_open:
            self._loop.add_reader(process.stderr, self._read_stderr)
        self._loop.add_reader(process.pidfd, self._on_exit)
        self._finishing: asyncio.Task[None] | None = None
        self._qmp: asyncio.Task[QmpClient] = self._loop.create_task(self._connect(process.detach_fd("qmp")))
        # Who needs the connection learns of its failure; nobody needing it is no reason for a warning.
        self._qmp.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def pid(self) -> int:
        """Process id of QEMU on the host."""
        return self._process.pid

    @property
    def version(self) -> str:
        """What QEMU's greeting said; empty before it."""
        if not self._qmp.done() or self._qmp.cancelled() or self._qmp.exception() is not None:
            return ""
        return ".".join(map(str, self._qmp.result().version))

    @property
    def channel(self) -> Channel:
        """How the agent is reached."""
        return self._process.channel

    async def confined(self) -> None:
        """Return when QEMU has lost what only its start needed: the host's files. Then the guest may become hostile.

        Raises:
            KataError: QEMU is gone, or it could not be taken away.
        """
        await self._qmp_client()

    def on_event(self, callback: Callable[[str, dict[str, Any]], None]) -> None:
        """Have QMP events delivered from now on."""
        self._callbacks.append(callback)

    def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
        """Be told when the host fails to read or write what is behind one of the guest's disks."""
        self._disk_callbacks.append(callback)

    def on_traffic(self, callback: Callable[[str, bytes], None] | None) -> None:
        """See `kata.hypervisor.protocols.Machine.on_traffic`."""
        self._traffic = callback

    # ---- life and death ----

    async def wait(self) -> Ended:
        """Wait until QEMU has ended and been reaped."""
        return await asyncio.shield(self._ended)

    @property
    def ended(self) -> Ended | None:
        """How it ended, or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def stop(self, grace_s: float = 0.0) -> Ended:
        """End QEMU: with TERM (it writes its disks' caches back) within the grace period, otherwise with KILL.

        The guest is not asked; what matters in it has been written back by its agent before.
        """
        self._stopping = True
        if not self._ended.done() and grace_s > 0:
            self._process.child.send_signal(sysio.SIGTERM)
            await asyncio.wait([self._ended], timeout=grace_s)
        self._process.child.kill()
        return await self.wait()

    def close(self) -> None:
        """After the end: close descriptors, remove the socket of an unconnected network interface."""
        if not self._qmp.done():
            self._qmp.cancel()
        elif not self._qmp.cancelled() and self._qmp.exception() is None:
            self._qmp.result().close()
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
        """The error for a call that failed because QEMU is gone.

        Args:
            doing: What was being done, as a clause: ``"waiting for the agent"``.
        """
        ended = self.ended
        if ended is not None and ended.error is not None:
            return ended.error
        return VMLostError(f"the virtual machine ended while {doing}", "See `kata logs` for its output.")

    # ---- pausing, memory, devices ----

    async def pause(self) -> None:
        """Stop the virtual CPUs."""
        await self.command("stop")

    async def resume(self) -> None:
        """Let the virtual CPUs run again."""
        await self.command("cont")

    async def save(self, directory: str) -> None:
        """Not offered.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("QEMU's machines cannot be saved here")

    async def set_memory(self, plugged_mib: int) -> int:
        """Set how much memory (MiB) the guest has in addition to what the machine was started with.

        Raises:
            HypervisorError: See `kata.hypervisor.qemu.resize.set_memory`.
        """
        from kata.hypervisor.qemu import resize

        if self.settings.max_memory_mib == self.settings.memory_mib:
            raise HypervisorError("the virtual machine was started with all the memory that it can have")
        return await resize.set_memory(self, plugged_mib)

    async def set_balloon(self, mib: int) -> int:
        """Set how much (MiB) of the memory that the machine was started with the guest gives back.

        Raises:
            HypervisorError: See `kata.hypervisor.qemu.resize.set_balloon`.
        """
        from kata.hypervisor.qemu import resize

        return await resize.set_balloon(self, self.settings.memory_mib, mib)

    async def attach_disk(self, disk: Disk) -> str:
        """Fill an empty disk slot of the right type; returns its PCI path.

        The guest sees a writable disk's size change to the image's; a read-only one keeps the placeholder's
        size, and reads beyond the image fail.

        Raises:
            HypervisorError: No slot of that type is empty, or QEMU cannot use the image.
        """
        async with self._disk_lock:
            index = self._empty_slot(disk.readonly)
            name = self._new_node(index)
            fdset = await self._add_fd(disk)
            try:
                node = qemu_command.file_node(name, disk, f"/dev/fdset/{fdset}")
                await self._swap_backing_node(index, node, disk.readonly, disk.path)
            except BaseException:
                await self.command("remove-fd", {"fdset-id": fdset})
                raise
            self._fdsets[name] = fdset
            if not disk.readonly:
                # Resizing to the size it has already is how QEMU is told to tell the guest.
                await self.command(
                    "block_resize", {"node-name": f"slot{index}", "size": await _size(disk.path)}
                )
            self._disks[index] = disk
            return slots.disk_path(index)

    async def detach_disk(self, address: str) -> None:
        """Put the placeholder back; the image can then be used elsewhere.

        Raises:
            HypervisorError: There is no disk at this address, or the slot's type was changed at start.
        """
        async with self._disk_lock:
            index = next((i for i in range(len(self._disks)) if slots.disk_path(i) == address), -1)
            disk = self._disks[index] if index >= 0 else None
            if disk is None:
                raise HypervisorError(f"there is no disk at PCI path {address}")
            await self._swap_backing_node(
                index,
                qemu_command.placeholder_node(self._new_node(index), disk.readonly),
                disk.readonly,
                "an empty disk",
            )
            self._disks[index] = None

    async def insert_nic(self) -> tuple[int, str]:
        """Bring the spare network interface to life.

        Returns:
            The network helper's end of its wire (for ``passt --fd``; the caller owns it), and the PCI path.

        Raises:
            HypervisorError: There is no spare interface, or it was used.
        """
        if not self._nic_free:
            raise HypervisorError("the virtual machine has no free network interface")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._qmp_client()  # QEMU listens before it greets
            await self._loop.sock_connect(sock, qemu_command.nic_socket(self.settings.run_dir))
        except OSError as error:
            sock.close()
            raise HypervisorError(f"cannot connect the network interface: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        sock.setblocking(True)
        self._nic_free = False
        await self.command("set_link", {"name": "nic0", "up": True})
        return sock.detach(), slots.nic_path()

    async def attach_nic(self, index: int, nic: Nic) -> str:
        """Give the running machine a network interface in one of its ports; returns its PCI path.

        Raises:
            HypervisorError: It is not connected to a tap, or QEMU refused.
        """
        if nic.tap_fd is None:
            raise HypervisorError("a network interface of a running machine has to be connected to a tap")
        name = f"tap{index}"
        backend, device = qemu_command.hotplug_nic(index, nic.mac, name)
        await self.command("getfd", {"fdname": name}, fd=nic.tap_fd.raw)
        await self.command("netdev_add", backend)  # the descriptor is the backend's now
        try:
            await self.command("device_add", device)
        except BaseException:
            await self.command("netdev_del", {"id": backend["id"]})
            raise
        return slots.hotplug_nic_path(index)

    # ---- what can be learnt ----

    def console_tail(self, limit: int = 4096) -> str:
        """The last of what the guest's console said, escaped and bounded."""
        return self.console.tail(limit)

    async def metrics(self) -> dict[str, int]:
        """See `kata.hypervisor.protocols.Machine.metrics`."""
        from kata.hypervisor.qemu import figures

        if self._figures is None:
            self._figures = figures.Figures(self.pid)
        return await asyncio.to_thread(self._figures.look)

    async def command(
        self, name: str, arguments: dict[str, Any] | None = None, fd: int | None = None
    ) -> Any:
        """Run a QMP command, with a descriptor if it takes one; if QEMU is gone, the error says why."""
        client = await self._qmp_client()
        try:
            return await client.execute(name, arguments, fd=fd)
        except HypervisorError:
            if not client.connected:
                await asyncio.wait([self._ended], timeout=1.0)  # its exit status explains more
                if self._ended.done():
                    raise self.failure(f"running {name}") from None
            raise

    # ---- inside ----

    async def _connect(self, fd: int) -> QmpClient:
        client = await QmpClient.connect(fd, self._event)
        try:
            await asyncio.to_thread(self._settle)
            if self._nic_free:
                # An unconnected interface has its link down; QEMU has no option for that.
                await client.execute("set_link", {"name": "nic0", "up": False})
        except BaseException:
            client.close()
            raise
        return client

    def _settle(self) -> None:
        """Take the host's files away from QEMU, and put its arguments aside, which are long and name some.

        It answers, so it has built its machine: it has opened all that it opens by name, and read its arguments.
        """
        settings = self.settings
        if settings.root:
            qemu_root.enter(settings.root, self.pid, settings.share_dir)
        if settings.title:
            # The program first: ps cuts lines off where COLUMNS is set, as in a daemon that was started by hand.
            title = f"{os.path.basename(settings.binary)} ({settings.title})"
            try:
                words = sysio.set_command_line(self.pid, title)
                with open(os.path.join(settings.run_dir, arguments.NAME), "wb") as file:
                    file.write(words)
            except OSError:
                pass  # where no process may trace another they stay as they are

    async def _qmp_client(self) -> QmpClient:
        try:
            return await asyncio.shield(self._qmp)
        except (HypervisorError, HostError):
            await asyncio.wait([self._ended], timeout=1.0)
            if self._ended.done():
                raise self.failure("connecting to QEMU") from None
            raise

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "BLOCK_IO_ERROR":
            self._disk_failed(data)
        if self._traffic is not None:
            self._traffic("event", json.dumps({"event": name, "data": data}).encode())
        for callback in self._callbacks:
            callback(name, data)

    def _disk_failed(self, data: dict[str, Any]) -> None:
        # The device holds on to the node of its slot, whatever file is behind that.
        number = str(data.get("node-name", "")).removeprefix("slot")
        disk = self._disks[int(number)] if number.isdecimal() and int(number) < len(self._disks) else None
        reason = str(data.get("reason", ""))[:200]
        error = DiskError(
            disk.path if disk is not None else "",
            writes=data.get("operation") == "write",
            # QEMU says `nospace` only of a machine that it stops for that.
            full=bool(data.get("nospace")) or reason in _NO_SPACE,
            reason=reason,
        )
        for callback in self._disk_callbacks:
            callback(error)

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
            if self._console is not None and not _readable(self._console.raw):
                break
        self._finishing = self._loop.create_task(self._finish(status))

    async def _finish(self, status: int) -> None:
        # Its last event says who ended the machine and may be unread; the connection's end comes after it.
        if self._qmp.done() and not self._qmp.cancelled() and self._qmp.exception() is None:
            await asyncio.wait([self._qmp.result().lost], timeout=1.0)
        if not self._ended.done():
            self._ended.set_result(self._explain_end(status))

    def _explain_end(self, status: int) -> Ended:
        if self._stopping:
            return Ended(status, "stopped", None)
        if status != 0:
            error = explain(status, self._process.stderr_text(), self.settings)
            if status < 0:
                error = VMLostError(f"the virtual machine ended: {error.message}", error.hint)
            return Ended(status, "crashed", error)
        panic = [line for line in self.console.tail(65536, 2000).splitlines() if _PANIC in line]
        if panic or self._shutdown_reason == "guest-panic":
            what = panic[-1].partition(_PANIC)[2].strip(" :") if panic else "no reason given"
            return Ended(
                status,
                "panic",
                VMLostError(
                    f"the guest's kernel panicked: {what}",
                    "Is the memory (-m) enough, and the guest whole (kata guest info)?",
                ),
            )
        reason = _GUEST_DID.get(self._shutdown_reason)
        if reason is not None:
            return Ended(
                status, reason, VMLostError(f"the virtual machine was switched off from inside ({reason})")
            )
        # SIGTERM is an order to it, which it carries out without an error.
        by = {"host-signal": "by a signal to QEMU", "": "and QEMU did not say why"}.get(
            self._shutdown_reason, f"and QEMU says: {self._shutdown_reason}"
        )
        return Ended(status, "ended", VMLostError(f"the virtual machine was ended {by}"))

    def _new_node(self, index: int) -> str:
        self._disk_generation += 1
        return f"file{index}-{self._disk_generation}"

    def _empty_slot(self, readonly: bool) -> int:
        for index, disk in enumerate(self._disks):
            was_empty = self.settings.disks[index]
            typed = slots.PLACEHOLDER_READONLY[index] if was_empty is None else was_empty.readonly
            if disk is None and typed == readonly:
                return index
        kind = "read-only" if readonly else "writable"
        raise HypervisorError(
            f"the virtual machine has no free slot for another {kind} disk",
            "Give the container fewer volumes that are disks.",
        )

    async def _swap_backing_node(self, index: int, node: dict[str, Any], readonly: bool, what: str) -> None:
        """Put another file under the node that a slot's device holds on to."""
        name = str(node["node-name"])
        try:
            await self.command("blockdev-add", node)
        except HypervisorError as error:
            raise HypervisorError(f"cannot give the virtual machine {what}: {error.message}") from error
        try:
            await self.command(
                "blockdev-reopen", {"options": [qemu_command.slot_node(index, name, readonly)]}
            )
        except HypervisorError as error:
            await self.command("blockdev-del", {"node-name": name})
            raise HypervisorError(f"cannot give the virtual machine {what}: {error.message}") from error
        old, self._nodes[index] = self._nodes[index], name
        await self.command("blockdev-del", {"node-name": old})
        if old in self._fdsets:
            await self.command("remove-fd", {"fdset-id": self._fdsets.pop(old)})

    async def _add_fd(self, disk: Disk) -> int:
        """Open an image for QEMU, which cannot reach the host's files by their names any more.

        Returns:
            The number of the set of descriptors that QEMU keeps it in.
        """
        flags = (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC
        try:
            fd = await asyncio.to_thread(os.open, disk.path, flags)
        except OSError as error:
            raise HypervisorError(
                f"cannot give the virtual machine {disk.path}: {error.strerror}"
            ) from error
        try:
            return int((await self.command("add-fd", fd=fd))["fdset-id"])
        finally:
            os.close(fd)


async def _size(path: str) -> int:
    def measure() -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)

    return await asyncio.to_thread(measure)


def _readable(fd: int) -> bool:
    return sysio.pidfd_wait(fd, 0)
