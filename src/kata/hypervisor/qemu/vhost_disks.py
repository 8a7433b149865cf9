"""Disks of a running machine that other processes serve by vhost-user-blk.

Each is in a PCI Express port of its own. QEMU is given the connection to its server: it cannot reach the host's sockets
by their names any more.

Sources: QEMU's ``docs/interop/vhost-user.rst`` and ``qapi/char.json`` (chardev-add).
"""

from __future__ import annotations

import asyncio
import os
import socket

from kata import sysio
from kata.errors import HypervisorError
from kata.hypervisor.qemu import command, slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kata.hypervisor.base import Disk
    from kata.hypervisor.qemu.settings import VMSettings

    class Monitor(Protocol):
        """What is needed of a running QEMU (`kata.hypervisor.qemu.machine.Qemu`)."""

        settings: VMSettings

        def on_event(self, callback: Callable[[str, dict[str, Any]], None]) -> None:
            """Deliver events."""

        async def command(
            self, name: str, arguments: dict[str, Any] | None = None, fd: int | None = None
        ) -> Any:
            """Run a QMP command."""


UNPLUG_S = 10.0
"""How long a guest may take to let go of a disk."""


class ServedDisks:
    """Those of one machine.

    Args:
        machine: The machine.
    """

    __slots__ = ("_changed", "_disks", "_gone", "_machine")

    def __init__(self, machine: Monitor) -> None:
        self._machine = machine
        self._disks: list[Disk | None] = [None] * len(slots.VHOST_USER_DISKS)
        self._gone: set[str] = set()
        self._changed = asyncio.Event()
        machine.on_event(self._event)

    async def attach(self, disk: Disk) -> str:
        """Plug a disk in; returns its PCI path.

        Raises:
            HypervisorError: No port is free, nobody answers, or QEMU refused.
        """
        settings = self._machine.settings
        # One that goes on from where it was saved has a copy of its memory that no other process sees.
        if not settings.shared_memory or settings.incoming is not None:
            raise HypervisorError(
                f"cannot give the virtual machine {disk.path}: its memory is not shared with servers of disks"
            )
        index = next((i for i, taken in enumerate(self._disks) if taken is None), None)
        if index is None:
            raise HypervisorError(
                f"the virtual machine has no free slot for another vhost-user disk: there are {len(self._disks)}",
                "Give the container fewer of them.",
            )
        name = f"server{index}"
        backend, device = command.vhost_user_disk(index, name)
        connection = await asyncio.to_thread(connect, disk.path)
        try:
            await self._machine.command("getfd", {"fdname": name}, fd=connection.fileno())
        finally:
            connection.close()
        try:
            try:
                await self._machine.command("chardev-add", backend)
            except BaseException:
                await self._machine.command("closefd", {"fdname": name})
                raise
            try:
                await self._machine.command("device_add", device)
            except BaseException:
                await self._machine.command("chardev-remove", {"id": backend["id"]})
                raise
        except HypervisorError as error:
            raise HypervisorError(f"cannot give the virtual machine {disk.path}: {error.message}") from error
        self._disks[index] = disk
        return slots.vhost_user_path(index)

    async def detach(self, address: str) -> None:
        """Take a disk out.

        Raises:
            HypervisorError: There is none at this address, or the guest did not let go of it.
        """
        known = (i for i, disk in enumerate(self._disks) if disk and slots.vhost_user_path(i) == address)
        index = next(known, None)
        if index is None:
            raise HypervisorError(f"there is no disk at PCI path {address}")
        backend, device = command.vhost_user_disk(index, "")
        self._gone.discard(device["id"])
        await self._machine.command("device_del", {"id": device["id"]})
        try:
            async with asyncio.timeout(UNPLUG_S):
                while device["id"] not in self._gone:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise HypervisorError(
                f"the guest did not let go of the disk at PCI path {address} within {UNPLUG_S:g} s"
            ) from None
        await self._machine.command("chardev-remove", {"id": backend["id"]})
        self._disks[index] = None

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "DEVICE_DELETED":
            self._gone.add(str(data.get("device", "")))
            self._changed.set()


def connect(path: str) -> socket.socket:
    """A connection to the server of a disk. Blocks, but not for long.

    Raises:
        HypervisorError: There is none.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(5)
        with sysio.SocketName(path) as name:
            connection.connect(name)
        connection.setblocking(True)
    except OSError as error:
        connection.close()
        why = os.strerror(error.errno) if error.errno else "it does not answer"
        raise HypervisorError(
            f"cannot reach the server of the disk {path}: {why}", "Start what serves it first."
        ) from error
    return connection
