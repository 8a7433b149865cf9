"""A running Firecracker, as the engine sees it (`kata.hypervisor.protocols.Machine`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

from kata.errors import HypervisorError, UnsupportedError
from kata.hypervisor import root, rust_vmm
from kata.hypervisor.access import rights_to
from kata.hypervisor.base import Ended
from kata.hypervisor.firecracker import config
from kata.hypervisor.firecracker.counters import Counters
from kata.hypervisor.http_api import ApiClient, Refused
from kata.hypervisor.running import Running
from kata.hypervisor.settle import MIB, inflate, number, plug
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from kata.hypervisor.base import Disk, Nic
    from kata.hypervisor.firecracker.process import FirecrackerProcess
    from kata.journal import Journal

START_S = 30.0
"""For the monitor's API to be there, and to say that its machine runs."""
_RETRY_S = 0.003
_SAVE_S, _SAVE_MIB_PER_S = 30.0, 20.0
"""A slower disk is no disk to save machines to."""
_FLUSH_S = 2.0
"""For what it has counted to arrive, once it says that it has written it."""


class Firecracker(Running):
    """Takes over a Firecracker that `kata.hypervisor.firecracker.process.spawn` started.

    Args:
        process: The process; its descriptors are this object's from here on.
        journal: The one it was started with.
        console_path: File of the console's ring; empty keeps it in memory only.
    """

    def __init__(self, process: FirecrackerProcess, journal: Journal, console_path: str = "") -> None:
        super().__init__(process, journal, console_path)
        self._shape = process.shape
        self._root = process.root
        self._access = process.access
        self._taps = process.taps
        self._slots = process.slots
        self._disks: list[Disk | None] = list(process.slots.disks)
        self._disk_lock = asyncio.Lock()
        self._has_swapped = False
        self._saved = process.saved
        self._unusable: HypervisorError | None = None
        """Why the saved machine could not be loaded."""
        self._vsock_seen = process.vsock_seen
        self._empty_disk = process.empty_disk
        self._api_path = process.api_path
        self._counters = Counters()
        self._metrics: Fd | None = Fd(process.detach_fd("metrics"))
        self._flushed = asyncio.Event()
        self._loop.add_reader(self._metrics, self._read_metrics)
        self._version = ""
        self._api: asyncio.Task[ApiClient] = self._loop.create_task(self._connect())
        # Who needs it learns of its failure; nobody needing it is no reason for a warning.
        self._api.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def version(self) -> str:
        """What it says of itself; empty before it was asked."""
        return self._version

    async def confined(self) -> None:
        """Return when it has lost what only its start needed: the host's files.

        Raises:
            KataError: It is gone, or they could not be taken away.
        """
        await self._client()

    def close(self) -> None:
        """After the end: close descriptors, remove sockets and taps."""
        if not self._api.done():
            self._api.cancel()
        elif not self._api.cancelled() and self._api.exception() is None:
            self._api.result().close()
        self._close_metrics()
        super().close()
        self._taps.remove()

    # ---- pausing, memory, devices ----

    async def pause(self) -> None:
        """Stop the virtual CPUs."""
        await self.call("PATCH", "vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let the virtual CPUs run again."""
        await self.call("PATCH", "vm", {"state": "Resumed"})

    async def save(self, directory: str) -> None:
        """Save the paused machine.

        Args:
            directory: An existing directory, in which nothing was saved before.

        Raises:
            UnsupportedError: It was given a disk while it ran, which it would look for by a name that is gone.
            HypervisorError: It is not paused, something was saved there before, or there is no room. What was written
                is removed.
        """
        from kata.hypervisor import saved

        saved.check(directory, config.SAVED_FILES)
        async with self._disk_lock:
            if self._has_swapped:
                raise UnsupportedError(
                    "a machine that was given a disk while it ran cannot be saved by Firecracker"
                )
            await self._client()
            try:
                with saved.receiving(directory, config.SAVED_FILES, self._access, self._root) as name:
                    await self._snapshot(name)
                await asyncio.to_thread(saved.write_shape, directory, self._shape)
            except BaseException:
                saved.forget(directory, config.SAVED_FILES)
                raise

    async def _snapshot(self, directory: str) -> None:
        state, memory = (f"{directory}/{name}" for name in config.SAVED_FILES)
        request = {"snapshot_path": state, "mem_file_path": memory}
        mib = max(self._shape.memory_mib, self._shape.max_memory_mib)
        timeout_s = _SAVE_S + mib / _SAVE_MIB_PER_S
        # What differs from nothing, which leaves holes in the file, is found by mincore(2): that passes over what was
        # swapped out, and takes what is in the page cache for a file's memory.
        kinds = ("Full",) if self._saved or _has_swap() else ("Diff", "Full")
        for kind in kinds:
            try:
                await self.call(
                    "PUT", "snapshot/create", {"snapshot_type": kind, **request}, timeout_s=timeout_s
                )
                return
            except Refused as error:
                if kind == kinds[-1]:
                    raise HypervisorError(
                        f"cannot save the machine: {error.words}", "Is it paused?"
                    ) from error

    async def set_memory(self, plugged_mib: int) -> int:
        """Set how much memory (MiB) the guest has in addition to what the machine was started with, by virtio-mem.

        Returns:
            MiB that are plugged in now: more than asked for where the guest does not release all of them.

        Raises:
            HypervisorError: The machine cannot grow that far, or the guest does not plug in all of it. Nothing is
                changed then.
        """
        most = max(self._shape.max_memory_mib - self._shape.memory_mib, 0)
        if not most and plugged_mib:
            raise HypervisorError("the virtual machine was started with all the memory that it can have")
        if plugged_mib > most:
            raise HypervisorError(f"the virtual machine cannot have {plugged_mib} MiB plugged into it")
        if not most:
            return 0

        async def plugged() -> int:
            return number(await self.call("GET", "hotplug/memory"), "plugged_size_mib") * MIB

        async def request(size: int) -> None:
            await self.call("PATCH", "hotplug/memory", {"requested_size_mib": size // MIB})

        return await plug(plugged, request, plugged_mib)

    async def set_balloon(self, mib: int) -> int:
        """Set how much (MiB) of its memory the guest gives back.

        Returns:
            MiB that it has given back: fewer than asked for where it cannot spare them.

        Raises:
            HypervisorError: The machine has no balloon, Firecracker refused, or the guest does not take back what it
                had given.
        """
        if not self._shape.reclaim:
            raise HypervisorError("the virtual machine was started without a balloon")

        async def returned() -> int:
            return number(await self.call("GET", "balloon/statistics"), "actual_mib") * MIB

        async def request(size: int) -> None:
            await self.call("PATCH", "balloon", {"amount_mib": size // MIB})

        return await inflate(returned, request, mib)

    async def attach_disk(self, disk: Disk) -> str:
        """Put an image behind an empty disk slot of the right type; returns its PCI path.

        Raises:
            HypervisorError: No slot of that type is empty, or Firecracker cannot use the image.
        """
        async with self._disk_lock:
            free = (
                index
                for index, taken in enumerate(self._disks)
                if taken is None and self._slots.readonly[index] == disk.readonly
            )
            index = next(free, None)
            if index is None:
                kind = "read-only" if disk.readonly else "writable"
                raise HypervisorError(
                    f"the virtual machine has no free slot for another {kind} disk",
                    "Give the container fewer volumes that are disks.",
                )
            try:
                await self._swap(index, disk.path, rights_to(disk))
            except Refused as error:
                raise HypervisorError(
                    f"cannot give the virtual machine {disk.path}: {error.words}"
                ) from error
            self._disks[index] = disk
            return self._slots.disk_addresses[index]

    async def detach_disk(self, address: str) -> None:
        """Empty the slot at this address; the guest must have let go of the disk.

        Raises:
            HypervisorError: There is no disk there.
        """
        async with self._disk_lock:
            known = (
                index
                for index, disk in enumerate(self._disks)
                if disk is not None and self._slots.disk_addresses[index] == address
            )
            index = next(known, None)
            if index is None:
                raise HypervisorError(f"there is no disk at PCI path {address}")
            await self._swap(index, self._empty_disk, 0)
            self._disks[index] = None

    async def attach_nic(self, index: int, nic: Nic) -> NoReturn:
        """Not offered: the guest would not be told of it.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("Firecracker cannot give a running machine a network interface")

    # ---- what can be learnt ----

    async def counters(self) -> dict[str, dict[str, int]]:
        """What it has counted since its start; see `kata.hypervisor.protocols.Machine.counters`.

        Raises:
            HypervisorError: It did not answer.
        """
        self._flushed.clear()
        await self.call("PUT", "actions", {"action_type": "FlushMetrics"})
        with contextlib.suppress(TimeoutError):  # what was there before is true as well
            async with asyncio.timeout(_FLUSH_S):
                await self._flushed.wait()
        return self._counters.values()

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Ask the API; see `kata.hypervisor.http_api.ApiClient.call`. If the monitor is gone, the error says why."""
        client = await self._client()
        try:
            return await client.call(method, path, body, **options)
        except HypervisorError:
            if client.is_lost:
                await asyncio.wait([self._ended], timeout=1.0)
                if self._ended.done():
                    raise self.failure(f"running {method} /{path}") from None
            raise

    # ---- inside ----

    def _read_metrics(self) -> None:
        if self._metrics is None:
            return
        try:
            data = os.read(self._metrics.raw, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close_metrics()
        elif self._counters.feed(data):
            self._flushed.set()

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._loop.remove_reader(self._metrics)
            self._metrics.close()
            self._metrics = None

    async def _swap(self, index: int, image: str, rights: int) -> None:
        await self._client()
        self._has_swapped = True
        with self._access.shown(self._root, root.disk(index), image, rights) as path:
            await self.call(
                "PATCH", f"drives/disk{index}", {"drive_id": f"disk{index}", "path_on_host": path}
            )

    async def _client(self) -> ApiClient:
        # One that is gone is not waited for: its API will not be there any more.
        either: tuple[asyncio.Future[Any], ...] = (self._api, self._ended)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._api.done():
            raise self.failure("connecting to Firecracker")
        try:
            return self._api.result()
        except HypervisorError:
            await asyncio.wait([self._ended], timeout=1.0)  # its exit status explains more
            if self._ended.done():
                raise self.failure("connecting to Firecracker") from None
            raise

    async def _connect(self) -> ApiClient:
        """Connect to the API, wait for the machine, and take the host's files away from the monitor."""
        try:
            async with asyncio.timeout(START_S):
                client = ApiClient(await self._reach(), "Firecracker")
                try:
                    await self._settle(client)
                except BaseException:
                    client.close()
                    raise
                return client
        except TimeoutError:
            raise HypervisorError(f"Firecracker did not build its machine within {START_S:g} s") from None

    async def _reach(self) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                await self._loop.sock_connect(sock, self._api_path)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
            except OSError as error:
                sock.close()
                raise HypervisorError(f"cannot reach Firecracker's API: {error.strerror}") from error
            except BaseException:
                sock.close()
                raise
            else:
                os.unlink(self._api_path)  # nobody else is to find it
                return sock
            await asyncio.sleep(_RETRY_S)

    async def _load(self, client: ApiClient) -> None:
        """Load the machine that was saved, and let it go on with its disks and the present time."""
        state, memory = (rust_vmm.file(fd) for fd in config.SAVED_FDS)
        request = {
            "snapshot_path": state,
            "mem_backend": {"backend_path": memory, "backend_type": "File"},
            # Together with it: between the two, a connection to its vsock would be lost and all after it.
            "resume_vm": True,
            # Otherwise the guest's clock would go on where it was.
            "clock_realtime": True,
            "network_overrides": [
                {"iface_id": f"nic{index}", "host_dev_name": name}
                for index, name in self._taps.names.items()
            ],
            "vsock_override": {"uds_path": self._vsock_seen},
        }
        try:
            await client.call("PUT", "snapshot/load", request, timeout_s=START_S)
            # The guest knows a slot as it was when the machine was saved: this tells it how large its disk is.
            for index, disk in enumerate(self._disks):
                if disk is not None:
                    name, image = f"disk{index}", rust_vmm.file(config.FIRST_DISK_FD + index)
                    body = {"drive_id": name, "path_on_host": image}
                    await client.call("PATCH", f"drives/{name}", body, timeout_s=START_S)
        except Refused as error:
            self._unusable = HypervisorError(f"cannot use what was saved in {self._saved}: {error.words}")
            self._process.child.kill()  # it has no machine, and nobody waits for one
            raise self._unusable from error

    async def _settle(self, client: ApiClient) -> None:
        if self._saved:
            await self._load(client)
        while True:
            about = await client.call("GET", "", timeout_s=START_S)
            if isinstance(about, dict):
                self._version = str(about.get("vmm_version", ""))[:40]
                if about.get("state") in ("Running", "Paused"):
                    break
            await asyncio.sleep(_RETRY_S)
        self._access.revoke()
        if self._root:
            await asyncio.to_thread(root.enter, self._root, self.pid)

    async def _end_in_order(self, grace_s: float) -> None:
        # The first process of a PID namespace gets signals that it handles alone: this one it does, and TERM not.
        self._process.child.send_signal(signal.SIGHUP)
        await asyncio.wait([self._ended], timeout=grace_s)

    def _explain_end(self, status: int) -> Ended:
        if self._unusable is not None and not self._stopping:
            return Ended(status, "crashed", self._unusable)
        return super()._explain_end(status)

    def _guest_did(self) -> Ended | None:
        # There is one way for it to end its machine, which may mean either; and nobody else ends one in order.
        self._guest_ended = self._guest_ended or "reboot"
        return super()._guest_did()


def _has_swap() -> bool:
    """Whether this host may have written memory to a swap area."""
    try:
        with open("/proc/swaps", encoding="utf-8") as file:
            return len(file.readlines()) > 1
    except OSError:
        return True
