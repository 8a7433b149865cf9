"""A running QEMU, as the engine sees it (`kata.hypervisor.protocols.Machine`)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket

from kata import sysio
from kata.errors import HostError, HypervisorError, UnsupportedError, VMLostError
from kata.hypervisor import root as monitor_root
from kata.hypervisor.base import DiskError, Ended
from kata.hypervisor.qemu import arguments, slots
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu.qmp import QmpClient
from kata.hypervisor.running import Running, panicked, switched_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kata.hypervisor.base import Disk, Nic
    from kata.hypervisor.qemu.process import QemuProcess
    from kata.hypervisor.qemu.settings import VMSettings
    from kata.hypervisor.qemu.vhost_disks import ServedDisks
    from kata.journal import Journal

_GUEST_DID = {"guest-shutdown": "poweroff", "guest-reset": "reboot"}
"""What the guest did, by the reason in QEMU's last event (``ShutdownCause`` in QEMU's ``qapi/run-state.json``)."""
GO_ON_S, GO_ON_POLL_S = 30.0, 0.005
_NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class Qemu(Running):
    """Takes over a QEMU that `kata.hypervisor.qemu.process.spawn` started. Make it inside the event loop.

    Args:
        process: The process; its descriptors are this object's from here on.
        journal: The one it was started with.
        console_path: File of the console's ring; empty keeps it in memory only.
    """

    def __init__(self, process: QemuProcess, journal: Journal, console_path: str = "") -> None:
        super().__init__(process, journal, console_path)
        self.settings: VMSettings = process.settings
        self._told = process.told
        self._callbacks: list[Callable[[str, dict[str, Any]], None]] = []
        self._shutdown_reason = ""
        self._disk_generation = 0
        self._disk_lock = asyncio.Lock()
        self._served: ServedDisks | None = None
        self._disks: list[Disk | None] = list(self.settings.disks)
        self._nodes = [f"file{index}" for index in range(len(self.settings.disks))]
        self._fdsets: dict[str, int] = {
            f"file{index}": index
            for index, disk in enumerate(self.settings.disks)
            if disk and not self._maps(index)
        }
        self._nic_free = self.settings.nic is not None and not self.settings.nic.backend
        self._qmp: asyncio.Task[QmpClient] = self._loop.create_task(self._connect(process.detach_fd("qmp")))
        # Who needs the connection learns of its failure; nobody needing it is no reason for a warning.
        self._qmp.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def version(self) -> str:
        """What QEMU's greeting said; empty before it."""
        if not self._qmp.done() or self._qmp.cancelled() or self._qmp.exception() is not None:
            return ""
        return ".".join(map(str, self._qmp.result().version))

    async def confined(self) -> None:
        """Return when QEMU has lost what only its start needed: the host's files. Then the guest may become hostile.

        Raises:
            KataError: QEMU is gone, or it could not be taken away.
        """
        await self._qmp_client()

    def on_event(self, callback: Callable[[str, dict[str, Any]], None]) -> None:
        """Have QMP events delivered from now on."""
        self._callbacks.append(callback)

    def close(self) -> None:
        """After the end: close descriptors, remove the socket of an unconnected network interface."""
        if not self._qmp.done():
            self._qmp.cancel()
        elif not self._qmp.cancelled() and self._qmp.exception() is None:
            self._qmp.result().close()
        super().close()

    # ---- pausing, memory, devices ----

    async def pause(self) -> None:
        """Stop the virtual CPUs."""
        await self.command("stop")

    async def resume(self) -> None:
        """Let the virtual CPUs run again."""
        await self.command("cont")

    async def save(self, directory: str) -> None:
        """Save the paused machine; see `kata.hypervisor.qemu.saving.save`."""
        from kata.hypervisor.qemu import saving

        async with self._disk_lock:
            await saving.save(self, directory)

    async def set_memory(self, plugged_mib: int) -> int:
        """Set how much memory (MiB) the guest has in addition to what the machine was started with.

        Raises:
            UnsupportedError: A machine of this type has no memory that can grow.
            HypervisorError: See `kata.hypervisor.qemu.resize.set_memory`.
        """
        from kata.hypervisor.qemu import resize

        if self.settings.machine == slots.MICROVM:
            raise UnsupportedError("the memory of a microvm of QEMU's cannot grow")
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
        """Fill an empty disk slot of the right type; returns its address.

        The guest sees a writable disk's size change to the image's; a read-only one keeps the placeholder's
        size, and reads beyond the image fail.

        Raises:
            HypervisorError: No slot of that type is empty, or QEMU cannot use the image.
        """
        async with self._disk_lock:
            if disk.vhost_user:
                return await self._served_disks().attach(disk)
            index = self._empty_slot(disk.readonly)
            await self._insert(index, disk)
            return slots.disk_path(index, self.settings.machine)

    async def _insert(self, index: int, disk: Disk) -> None:
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
            await self.command("block_resize", {"node-name": f"slot{index}", "size": await _size(disk.path)})
        self._disks[index] = disk

    async def fill_disks(self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str) -> None:
        """See `kata.hypervisor.protocols.Machine.fill_disks`.

        Raises:
            HypervisorError: A slot is of another type, or QEMU cannot use an image.
        """
        async with self._disk_lock:
            for index, disk in enumerate(disks):
                if disk is None:
                    continue
                if self._disks[index] is not None or self.settings.is_readonly(index) != disk.readonly:
                    raise HypervisorError(f"the machine that waited has no slot {index} for {disk.path}")
                await self._insert(index, disk)
                self.settings.disks[index] = disk  # the slot has the type of what it was started with
        try:
            name = os.path.join(run_dir, arguments.NAME)
            os.rename(os.path.join(self.settings.run_dir, arguments.NAME), name)
        except OSError:
            pass  # it was not put aside
        if self.settings.title:
            self.settings.title = f"kata: machine of {sandbox_id}"
            try:
                program = os.path.basename(self.settings.binary)
                await asyncio.to_thread(
                    sysio.set_command_line, self.pid, f"{program} ({self.settings.title})"
                )
            except OSError:
                pass

    async def detach_disk(self, address: str) -> None:
        """Put the placeholder back; the image can then be used elsewhere.

        Raises:
            HypervisorError: There is no disk at this address, or the slot's type was changed at start.
        """
        async with self._disk_lock:
            if self._served is not None and "/" in address:
                await self._served.detach(address)
                return
            machine = self.settings.machine
            index = next((i for i in range(len(self._disks)) if slots.disk_path(i, machine) == address), -1)
            disk = self._disks[index] if index >= 0 else None
            if disk is None:
                raise HypervisorError(f"there is no disk at {address}")
            if self._maps(index):
                raise HypervisorError(f"the image at {address} is mapped as long as the machine runs")
            await self._swap_backing_node(
                index,
                qemu_command.placeholder_node(self._new_node(index), disk.readonly),
                disk.readonly,
                "an empty disk",
            )
            self._disks[index] = None

    def _served_disks(self) -> ServedDisks:
        if self._served is None:
            from kata.hypervisor.qemu.vhost_disks import ServedDisks

            self._served = ServedDisks(self)
        return self._served

    async def insert_nic(self) -> tuple[int, str]:
        """Bring the spare network interface to life.

        Returns:
            The network helper's end of its wire (for ``passt --fd``; the caller owns it), and the address.

        Raises:
            HypervisorError: There is no spare interface, or it was used.
        """
        if not self._nic_free:
            raise HypervisorError("the virtual machine has no free network interface")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._qmp_client()  # QEMU listens before it greets
            with sysio.SocketName(qemu_command.nic_socket(self.settings.run_dir)) as name:
                await self._loop.sock_connect(sock, name)
            await self.command("set_link", {"name": "nic0", "up": True})
        except OSError as error:
            sock.close()
            raise HypervisorError(f"cannot connect the network interface: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        sock.setblocking(True)
        self._nic_free = False
        return sock.detach(), slots.nic_path(0, self.settings.machine)

    async def attach_nic(self, index: int, nic: Nic) -> str:
        """Give the running machine a network interface in one of its ports; returns its PCI path.

        Raises:
            UnsupportedError: A machine of this type has no ports.
            HypervisorError: It is not connected to a tap, or QEMU refused.
        """
        if "q35" not in self.settings.machine:
            raise UnsupportedError(
                f"a running machine of QEMU's type {self.settings.machine} cannot be given a network interface"
            )
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

    async def processors(self) -> list[str]:
        """See `kata.hypervisor.protocols.Machine.processors`; QMP has the registers as its monitor's text alone."""
        from kata.hypervisor.qemu import registers

        said = [
            await self.command("human-monitor-command", {"command-line": line})
            for line in ("info registers -a", "info lapic")
        ]
        return registers.lines(*map(str, said))

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
        client = await QmpClient.connect(fd, self._event, told=self._told)
        try:
            await asyncio.to_thread(self._settle)
            if self._told:
                await self._gone_on(client)
            if self._nic_free and not self._told:
                # An unconnected interface has its link down; QEMU has no option for that.
                await client.execute("set_link", {"name": "nic0", "up": False})
        except BaseException:
            client.close()
            raise
        return client

    async def _gone_on(self, client: QmpClient) -> None:
        """Return when a machine that was saved runs again; and have its guest see how large its disks are."""
        until = self._loop.time() + GO_ON_S
        while not (await client.execute("query-status")).get("running"):
            if self._loop.time() >= until:
                raise HypervisorError(f"the saved machine did not go on for {GO_ON_S:g} s")
            await asyncio.sleep(GO_ON_POLL_S)
        if self.settings.late_share:
            await client.execute("device_add", qemu_command.late_share())
        # Who saved it had interfaces that led nowhere.
        for index, nic in enumerate(self.settings.nics()):
            if nic.backend:
                await client.execute("set_link", {"name": f"nic{index}", "up": True})
        for index, disk in enumerate(self._disks):
            if disk is not None and not disk.readonly:
                size = {"node-name": f"slot{index}", "size": await _size(disk.path)}
                await client.execute("block_resize", size)

    def _settle(self) -> None:
        """Take the host's files away from QEMU, and put its arguments aside, which are long and name some.

        It answers, so it has built its machine: it has opened all that it opens by name, and read its arguments.
        """
        settings = self.settings
        if settings.root:
            monitor_root.enter(settings.root, self.pid, settings.share_dir)
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

    async def _last_words(self) -> None:
        # Its last event says who ended the machine and may be unread; the connection's end comes after it.
        if self._qmp.done() and not self._qmp.cancelled() and self._qmp.exception() is None:
            await asyncio.wait([self._qmp.result().lost], timeout=1.0)

    def _guest_did(self) -> Ended | None:
        if self._shutdown_reason == "guest-panic":
            return panicked(0)
        reason = _GUEST_DID.get(self._shutdown_reason)
        if reason is not None:
            return switched_off(0, reason)
        # SIGTERM is an order to it, which it carries out without an error.
        by = {"host-signal": "by a signal to QEMU", "": "and QEMU did not say why"}.get(
            self._shutdown_reason, f"and QEMU says: {self._shutdown_reason}"
        )
        return Ended(0, "ended", VMLostError(f"the virtual machine was ended {by}"))

    def _maps(self, index: int) -> bool:
        """Whether a slot has no disk, but an image that the guest maps."""
        return index == 0 and self.settings.mapped_mib > 0

    def _new_node(self, index: int) -> str:
        self._disk_generation += 1
        return f"file{index}-{self._disk_generation}"

    def _empty_slot(self, readonly: bool) -> int:
        for index, disk in enumerate(self._disks):
            was_empty = self.settings.disks[index]
            typed = slots.PLACEHOLDER_READONLY[index] if was_empty is None else was_empty.readonly
            if disk is None and typed == readonly and not self._maps(index):
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
