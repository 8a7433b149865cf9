"""Machines of any hypervisor behind the seam (`kata.hypervisor.base`), for the tests that all of them have to pass."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import struct
import subprocess
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_monitor
from agent_support import STATE, mount, spec, storages
from waiting import PATIENCE

from kata import journal_undo, sysio
from kata.agent import clock
from kata.agent.client import AgentClient
from kata.guest import manifest
from kata.hypervisor import accel, registry
from kata.hypervisor.base import Attachments, Capabilities, Disk, MachineShape, Nic
from kata.images.resolve import resolve
from kata.journal import Journal
from kata.proto import agent_pb
from kata.ttrpc.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.protocols import Machine, Monitor

MIB = 1 << 20
CLOCK_NS = 10_000_000
"""How wrong the guest's clock may be after a pause."""
MONITORS: dict[str, Callable[[], Monitor]] = {
    **{name: (lambda name=name: registry.find(name)) for name in registry.names()},  # type: ignore[misc]
    scripted_monitor.NAME: lambda: scripted_monitor.MONITOR,
}
"""Those that the product has, each by its registry entry; and that of the tests."""
MACHINES = {"qemu:pc": {"machine": "pc"}, "qemu:microvm": {"machine": "microvm"}}
"""Machine types beside a monitor's usual one, each as a monitor of its own: its options, by what the tests call it."""


class Foreign:
    """A machine that another monitor has started."""


class Lab:
    """One monitor, a guest for it, and a process of its own in which machines run.

    Args:
        monitor: The monitor.
        guest: The guest's files.
        rootfs: An erofs image with busybox.
        directory: For everything.
        options: The monitor's own.
    """

    def __init__(
        self,
        monitor: Monitor,
        guest: manifest.Guest,
        rootfs: str,
        directory: Path,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.monitor = monitor
        self.guest = guest
        self.rootfs = rootfs
        self.directory = directory
        self.options = options or {}
        self.accel = accel.choose().accel

    def can(self) -> Capabilities:
        return self.monitor.capabilities(self.accel, self.options)

    def shape(self, **changes: Any) -> MachineShape:
        can = self.can()
        values = {
            "kernel": self.guest.kernel,
            "initrd": self.guest.initrd,
            "parameters": "quiet panic=-1",
            "accel": self.accel,
            "memory_mib": 256,
            "max_memory_mib": 512 if can.grow_memory else 0,
            "disks": ("readonly", "spare", "spare", "spare"),
            "nics": min(can.nics, 1),
            "hotplug_nics": int(can.hotplug_nics),
            **changes,
            "options": {**self.options, **changes.get("options", {})},
        }
        return MachineShape(**values)

    def apart(self, scenario: Callable[[], Awaitable[None]]) -> None:
        """Run *scenario* in a process with namespaces of its own, which holds nothing more afterwards than before."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            said = ""
            try:
                os.close(read)
                sysio.unshare(sysio.CLONE_NEWNS | sysio.CLONE_NEWNET)
                sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
                asyncio.run(asyncio.wait_for(scenario(), 3 * PATIENCE))
            except BaseException:
                said = traceback.format_exc()
            os.write(write, said.encode()[-60000:])
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            said = file.read().decode()
        os.waitpid(child, 0)
        if said:
            pytest.fail(said, pytrace=False)

    @contextlib.asynccontextmanager
    async def machine(
        self,
        nics: list[Nic] | None = None,
        *,
        saved: str = "",
        saves_into: str = "",
        name: str = "",
        **changes: Any,
    ) -> AsyncIterator[Machine]:
        """A machine that was started and taken over; what is left of it afterwards fails the test.

        Args:
            nics: Its network interfaces; otherwise it has those of its shape, which lead nowhere.
            saved: Where it was saved, of one that goes on.
            saves_into: Where it will be saved.
            name: Of its directory.
            changes: Of its shape.
        """
        if nics is not None:
            changes["nics"] = len(nics)
        journal = Journal.create_dir(
            str(self.directory / "sandboxes"), name or f"m{os.getpid()}", {"test": "monitor"}
        )
        run_dir = os.path.dirname(journal.path)
        before = descriptors()
        shape = self.shape(**changes)
        attachments = Attachments(
            sandbox_id="contract",
            run_dir=run_dir,
            disks=[Disk(self.rootfs, readonly=True)],
            nics=[Nic("02:00:00:00:00:01")] * shape.nics if nics is None else nics,
            saves_into=saves_into,
        )
        machine = None
        try:
            if saved:
                started = self.monitor.restore(saved, attachments, journal)
            else:
                started = self.monitor.start(shape, attachments, journal)
            assert started.pid > 0
            assert len(started.disk_addresses) >= 1
            assert len(set(started.disk_addresses)) == len(started.disk_addresses)
            assert len(started.nic_addresses) == shape.nics
            if "path" not in changes.get("options", {}):  # a program that is no monitor may have ended
                assert started.status() is None
            with pytest.raises(TypeError):
                self.monitor.adopt(Foreign(), journal)  # type: ignore[arg-type]
            machine = self.monitor.adopt(started, journal, os.path.join(run_dir, "console.log"))
            assert machine.pid == started.pid
            self.disks = list(started.disk_addresses)
            self.nics = list(started.nic_addresses)
            yield machine
        finally:
            if machine is not None:
                await machine.stop()
                machine.close()
            assert journal_undo.undo(journal, 10) == []
            assert name or descriptors() - before == set()
            assert not os.path.exists(run_dir)


def descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    # The loop's own, made when it first needs them.
    return {one for one in found if "eventpoll" not in one and "pidfd" not in one}


SERVER = shutil.which("qemu-storage-daemon")


@contextlib.contextmanager
def served(image: Path, place: Path) -> Iterator[None]:
    """An image that a process of its own serves by vhost-user-blk, as long as the context lasts."""
    assert SERVER is not None
    node = {"driver": "file", "node-name": "image", "filename": str(image)}
    export = {"type": "vhost-user-blk", "id": "it", "node-name": "image", "writable": True}
    export["addr"] = {"type": "unix", "path": str(place)}
    command = [SERVER, "--blockdev", json.dumps(node), "--export", json.dumps(export)]
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + PATIENCE
            while not place.exists():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
        finally:
            server.terminate()
            server.wait()
            place.unlink(missing_ok=True)


def content_of(image: Path, name: str) -> bytes:
    command = ["/sbin/debugfs", "-R", f"cat {name}", str(image)]
    return subprocess.run(command, capture_output=True, check=False).stdout


def require(monitor: Monitor) -> None:
    """Skip where this machine cannot run a monitor, and say what is missing."""
    missing = [f"{check.text}. {check.hint}" for check in monitor.checks({}) if not check.ok]
    if missing:
        pytest.skip("; ".join(missing))
    if accel.choose().accel not in monitor.accelerators:
        pytest.skip(f"{monitor.title} needs KVM: tests/kvm runs this there")


# The lane with KVM has little time where that is a lab: it has QEMU's other machines with `make test-kvm` alone.
@pytest.fixture(
    name="lab",
    params=[*sorted(MONITORS), *(pytest.param(name, marks=pytest.mark.long) for name in sorted(MACHINES))],
)
def lab_fixture(
    request: pytest.FixtureRequest, guest_assets: Path, busybox_image: str, run_directory: Path
) -> Lab:
    name, _, machine = request.param.partition(":")
    directory = run_directory / f"mon-{name}{machine}-{os.urandom(2).hex()}"
    guest = manifest.load(str(guest_assets))
    monitor = MONITORS[name]()
    require(monitor)
    rootfs = resolve(busybox_image).rootfs_path
    return Lab(monitor, guest, rootfs, directory, MACHINES.get(request.param))


@contextlib.asynccontextmanager
async def agent_of(machine: Machine) -> AsyncIterator[AgentClient]:
    sock = await asyncio.wait_for(machine.channel.connect(), PATIENCE)
    agent = AgentClient(await Client.connect(sock))
    try:
        await agent.check(PATIENCE)
        await agent.negotiate_features()
        yield agent
    finally:
        agent.close()


async def right_clock(agent: AgentClient) -> None:
    """Put the guest's clock right after its machine stood still, and see that it is."""
    before = await clock.align(agent)
    now = [await clock.look(agent) for _ in range(10)]
    best = min(now, key=lambda one: one.error_ns)
    print(f"clock: {before.behind_ns / 1e6:.3f} ms behind after it (+- {before.error_ns / 1e6:.3f}),")
    print(f"{best.behind_ns / 1e6:.3f} ms when set (+- {best.error_ns / 1e6:.3f}), device: {best.by_device}")
    assert abs(best.behind_ns) - best.error_ns < CLOCK_NS


async def said_by(agent: AgentClient, name: str, script: str, disks: list[agent_pb.Storage]) -> str:
    """What a script says in a container whose root file system is on the first of *disks*."""
    data = (
        [mount("/data", "bind", f"{STATE}/{name}/data", "rbind")]
        if len(disks) > len(storages("", ""))
        else []
    )
    config = spec(name, "sh", "-c", script, mounts=data)
    request = agent_pb.CreateContainerRequest(container_id=name, OCI=config, storages=disks)
    await agent.create_container(request)
    await agent.start_container(name)
    status = await agent.wait(name, "")
    said = await agent.read(name, "", "stdout", MIB)
    errors = await agent.read(name, "", "stderr", MIB)
    await agent.remove_container(name)
    assert status == 0, errors
    return said.decode().strip()


def image_with(directory: Path, text: str, mib: int = 8) -> Path:
    """An ext4 image with one file, sparse."""
    tree = directory / f"tree-{text}"
    tree.mkdir(parents=True)
    (tree / "file").write_text(text)
    image = directory / f"{text}.img"
    with image.open("wb") as file:
        file.truncate(mib * MIB)
    few = ["-O", "^has_journal", "-N", "64"]  # or it would be large itself
    subprocess.run(["/sbin/mkfs.ext4", "-q", *few, "-d", str(tree), str(image)], check=True)
    return image


def tap(name: str) -> sysio.Fd:
    """A tap device in this network namespace."""
    import fcntl

    fd = sysio.Fd(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    fcntl.ioctl(
        fd.raw, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002)
    )  # TUNSETIFF: tap, vnet header
    return fd
