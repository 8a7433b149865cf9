"""A running Cloud Hypervisor, as the engine sees it (`kata.hypervisor.protocols.Machine`)."""

from __future__ import annotations

import asyncio
import json
import socket

from kata.errors import HypervisorError, UnsupportedError
from kata.hypervisor import root
from kata.hypervisor.access import rights_to
from kata.hypervisor.cloud_hypervisor import command, slots
from kata.hypervisor.http_api import ApiClient, Refused
from kata.hypervisor.running import Running
from kata.hypervisor.settle import MIB, inflate, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.hypervisor.base import Disk, Nic
    from kata.hypervisor.cloud_hypervisor.process import CloudHypervisorProcess
    from kata.journal import Journal

START_S = 30.0
"""For the monitor's first answer, which comes when its machine is built."""
UNPLUG_S = 5.0
"""For a guest to let go of a device; one that does not keeps it."""
_MAX_EVENT = 64 << 10
_NEVER = (1 << 64) - 1
"""What it says of latencies before the first operation,"""
_AVERAGED = 20000
"""or, of their average, a fraction of that (seen: a ten-thousandth)."""
_SAVE_S = 60.0
_SAVE_MIB_PER_S = 20
"""A slower disk is no disk to save machines to."""


class CloudHypervisor(Running):
    """Takes over a Cloud Hypervisor that `kata.hypervisor.cloud_hypervisor.process.spawn` started.

    Args:
        process: The process; its descriptors are this object's from here on.
        journal: The one it was started with.
        console_path: File of the console's ring; empty keeps it in memory only.
    """

    def __init__(self, process: CloudHypervisorProcess, journal: Journal, console_path: str = "") -> None:
        super().__init__(process, journal, console_path)
        self._shape = process.shape
        self._root = process.root
        self._access = process.access
        self._share = process.attachments.share_server
        self._late = process.late
        self._version = ""
        self._device_lock = asyncio.Lock()
        self._disks: list[Disk | None] = [*process.attachments.disks]
        self._disks += [None] * (len(slots.DISKS) - len(self._disks))
        self._removed: set[str] = set()
        self._device_removed = asyncio.Event()
        api = socket.socket(fileno=process.detach_fd("api"))
        api.setblocking(False)
        self._api = ApiClient(api, "Cloud Hypervisor", "/api/v1/")
        self._events = socket.socket(fileno=process.detach_fd("events"))
        self._events.setblocking(False)
        self._heard = ""
        self._silent = self._loop.create_future()
        self._loop.add_reader(self._events, self._read_events)
        self._settled: asyncio.Task[None] = self._loop.create_task(self._settle())
        # Who needs it learns of its failure; nobody needing it is no reason for a warning.
        self._settled.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def version(self) -> str:
        """What it answered to ``vmm.ping``; empty before."""
        return self._version

    async def confined(self) -> None:
        """Return when it has lost what only its start needed: the host's files.

        Raises:
            KataError: It is gone, or they could not be taken away.
        """
        try:
            await asyncio.shield(self._settled)
        except HypervisorError:
            await asyncio.wait([self._ended], timeout=1.0)  # its exit status explains more
            if self._ended.done():
                raise self.failure("connecting to Cloud Hypervisor") from None
            raise

    def close(self) -> None:
        """After the end: close descriptors, and remove the vsock's socket."""
        self._settled.cancel()
        self._api.close()
        self._close_events()
        super().close()

    # ---- pausing, memory, devices ----

    async def pause(self) -> None:
        """Stop the virtual CPUs."""
        await self.call("PUT", "vm.pause")

    async def resume(self) -> None:
        """Let the virtual CPUs run again."""
        await self.call("PUT", "vm.resume")

    async def save(self, directory: str) -> None:
        """Save the paused machine.

        Args:
            directory: An existing directory, in which nothing was saved before.

        Raises:
            UnsupportedError: It has a share, whose server cannot be saved.
            HypervisorError: It is not paused, something was saved there before, or there is no room. What was written
                is removed.
        """
        from kata.hypervisor import saved
        from kata.hypervisor.cloud_hypervisor.saved import FILES

        if self._share is not None:
            raise UnsupportedError(
                "a machine with files of the host in it cannot be saved: their server keeps what it knows of them"
            )
        saved.check(directory, FILES)
        async with self._device_lock:
            await self.confined()
            try:
                with saved.receiving(directory, FILES, self._access, self._root) as name:
                    await self._snapshot(name)
                await asyncio.to_thread(saved.write_shape, directory, self._shape)
            except BaseException:
                saved.forget(directory, FILES)
                raise

    async def _snapshot(self, directory: str) -> None:
        timeout_s = _SAVE_S + self._shape.max_memory_mib / _SAVE_MIB_PER_S
        timeout_s += self._shape.memory_mib / _SAVE_MIB_PER_S
        try:
            await self.call(
                "PUT", "vm.snapshot", {"destination_url": f"file://{directory}"}, timeout_s=timeout_s
            )
        except Refused as error:
            raise HypervisorError(f"cannot save the machine: {error.words}", "Is it paused?") from error

    async def set_memory(self, plugged_mib: int) -> int:
        """Set how much memory (MiB) the guest has in addition to what the machine was started with, by virtio-mem.

        Cloud Hypervisor does not say what its guest has taken, only what it was asked to take.

        Raises:
            HypervisorError: The machine cannot grow that far.
        """
        shape = self._shape
        if plugged_mib and shape.max_memory_mib <= shape.memory_mib:
            raise HypervisorError("the virtual machine was started with all the memory that it can have")
        if plugged_mib > max(shape.max_memory_mib - shape.memory_mib, 0):
            raise HypervisorError(f"the virtual machine cannot have {plugged_mib} MiB plugged into it")
        if shape.max_memory_mib > shape.memory_mib:
            await self.call("PUT", "vm.resize", {"desired_ram": (shape.memory_mib + plugged_mib) * MIB})
        return plugged_mib

    async def set_balloon(self, mib: int) -> int:
        """Set how much (MiB) of its memory the guest gives back.

        Raises:
            HypervisorError: The machine has no balloon, Cloud Hypervisor refused, or the guest does not take back what
                it had given.
        """
        if not self._shape.reclaim:
            raise HypervisorError("the virtual machine was started without a balloon")
        total = await self._memory_without_balloon()

        async def returned() -> int:
            return total - number(await self.call("GET", "vm.info"), "memory_actual_size")

        async def request(size: int) -> None:
            await self.call("PUT", "vm.resize", {"desired_balloon": size})

        return await inflate(returned, request, mib)

    async def _memory_without_balloon(self) -> int:
        info = await self.call("GET", "vm.info")
        size = number(info, "config", "memory", "size")
        memory = info["config"]["memory"]
        return size + (number(memory, "hotplugged_size") if memory.get("hotplugged_size") else 0)

    async def attach_disk(self, disk: Disk) -> str:
        """Plug a disk into an empty slot; returns its PCI path.

        Raises:
            HypervisorError: No slot is empty, or Cloud Hypervisor cannot use the image.
        """
        async with self._device_lock:
            await self.confined()
            index = next((i for i, taken in enumerate(self._disks) if taken is None), None)
            if index is None:
                raise HypervisorError(
                    "the virtual machine has no free slot for another disk",
                    "Give the container fewer volumes that are disks.",
                )
            try:
                with self._access.shown(self._root, root.disk(index), disk.path, rights_to(disk)) as path:
                    await self.call("PUT", "vm.add-disk", command.disk_config(index, disk, path))
            except Refused as error:
                raise HypervisorError(
                    f"cannot give the virtual machine {disk.path}: {error.words}"
                ) from error
            self._disks[index] = disk
            return slots.path(slots.DISKS[index])

    async def detach_disk(self, address: str) -> None:
        """Unplug the disk at this address, which the guest is asked to let go of.

        Raises:
            HypervisorError: There is none, or the guest did not let go of it.
        """
        async with self._device_lock:
            known = (
                i for i, disk in enumerate(self._disks) if disk and slots.path(slots.DISKS[i]) == address
            )
            index = next(known, None)
            if index is None:
                raise HypervisorError(f"there is no disk at PCI path {address}")
            await self._unplug(f"disk{index}")
            self._disks[index] = None

    async def attach_nic(self, index: int, nic: Nic) -> str:
        """Plug in a network interface; returns its PCI path.

        Raises:
            HypervisorError: It is not connected to a tap, or Cloud Hypervisor refused.
        """
        if nic.tap_fd is None:
            raise HypervisorError("a network interface of a running machine has to be connected to a tap")
        async with self._device_lock:
            config = command.nic_config(index, nic)
            config.pop("fds")  # those that are sent with the request
            await self.call("PUT", "vm.add-net", config, fds=[nic.tap_fd.raw])
        return slots.path(slots.NICS[index])

    async def counters(self) -> dict[str, dict[str, int]]:
        """See `kata.hypervisor.protocols.Machine.counters`: ``disk0`` and so on, ``nic0`` and so on."""
        answer = await self.call("GET", "vm.counters")
        found = {}
        for name, values in answer.items() if isinstance(answer, dict) else ():
            kind = name.rstrip("0123456789")
            if kind in ("disk", "nic") and isinstance(values, dict):
                found[name] = {
                    item: value
                    for item, value in values.items()
                    if isinstance(value, int) and value < _NEVER // _AVERAGED
                }
        return found

    async def _unplug(self, name: str) -> None:
        self._removed.discard(name)
        await self.call("PUT", "vm.remove-device", {"id": name})
        try:
            async with asyncio.timeout(UNPLUG_S):
                while name not in self._removed:
                    self._device_removed.clear()
                    await self._device_removed.wait()
        except TimeoutError:
            raise HypervisorError(f"the guest did not let go of {name} within {UNPLUG_S:g} s") from None

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Ask the API; see `kata.hypervisor.http_api.ApiClient.call`. If the monitor is gone, the error says why."""
        await self.confined()
        try:
            return await self._api.call(method, path, body, **options)
        except HypervisorError:
            if self._api.is_lost:
                await asyncio.wait([self._ended], timeout=1.0)
                if self._ended.done():
                    raise self.failure(f"running {path}") from None
            raise

    # ---- inside ----

    async def _settle(self) -> None:
        """Take the host's files away from it. It answers, and has started its machine: it has opened all of them."""
        ping = await self._api.call("GET", "vmm.ping", timeout_s=START_S)
        self._version = str(ping.get("version", ""))[:40] if isinstance(ping, dict) else ""
        state = ""
        deadline = self._loop.time() + START_S
        # The API answers before the machine is there, if only for milliseconds.
        while state != "Running":
            try:
                info = await self._api.call("GET", "vm.info", timeout_s=START_S)
                state = str(info.get("state")) if isinstance(info, dict) else ""
            except Refused as error:
                if error.status != 404:
                    raise
            if state != "Running":
                if self._loop.time() >= deadline:
                    raise HypervisorError(
                        f"Cloud Hypervisor did not start its machine within {START_S:g} s",
                        "Look at `kata logs`.",
                    )
                await asyncio.sleep(0.005)
        for path, body in self._late:
            try:
                await self._api.call("PUT", path, body, timeout_s=START_S)
            except Refused as error:
                raise HypervisorError(
                    f"cannot give the virtual machine its {body['id']}: {error.words}"
                ) from error
        if self._share is not None:
            self._share.hide()
        self._access.revoke()
        if self._root:
            await asyncio.to_thread(root.enter, self._root, self.pid)

    def _read_events(self) -> None:
        try:
            data = self._events.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close_events()
            return
        if self._traffic is not None:
            self._traffic("event", data)
        self._heard += data.decode("utf-8", "replace")
        decoder = json.JSONDecoder()
        while text := self._heard.lstrip():
            try:
                event, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                # The rest is yet to come; of what is no event there is never an end.
                self._heard = text if len(text) <= _MAX_EVENT else ""
                return
            self._heard = text[end:]
            if isinstance(event, dict):
                self._event(str(event.get("source")), str(event.get("event")), event.get("properties"))
        self._heard = ""

    def _event(self, source: str, name: str, properties: object) -> None:
        if source == "vm" and name == "device-removed" and isinstance(properties, dict):
            if len(self._removed) < 256:
                self._removed.add(str(properties.get("id")))
            self._device_removed.set()
        elif source == "vm" and name == "rebooting":
            # It would start the guest again, which is somebody else's then.
            self._guest_ended = "reboot"
            self._process.child.kill()
        elif source == "vm" and name == "shutdown" and not self._guest_ended:
            self._guest_ended = "poweroff"

    def _close_events(self) -> None:
        if self._events.fileno() >= 0:
            self._loop.remove_reader(self._events)
            self._events.close()
        if not self._silent.done():
            self._silent.set_result(None)

    async def _last_words(self) -> None:
        await asyncio.wait([self._silent], timeout=1.0)
