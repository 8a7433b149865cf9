"""What every hypervisor has to do behind the seam (`kata.hypervisor.base`): one suite for all of them.

It is run against QEMU, with real machines, and against a monitor that only the tests know (`scripted_monitor`), which
then serves a whole ``kata run`` with the real agent and no change in the product. What a monitor cannot do has to be
missing in its capabilities, and to be refused by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_monitor
from agent_support import STATE, mount, spec, storages
from conftest import Kata
from waiting import PATIENCE

from kata import journal_undo, sysio
from kata.agent import clock
from kata.agent.client import AgentClient
from kata.errors import AgentTimeoutError, GuestAssetError, HypervisorError, KataError, UnsupportedError
from kata.guest import manifest
from kata.hypervisor import accel, registry
from kata.hypervisor.base import Attachments, Capabilities, Disk, MachineShape, Nic
from kata.images.resolve import resolve
from kata.journal import Journal
from kata.proto import agent_pb, oci_pb, types_pb
from kata.ttrpc.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.protocols import Machine, Monitor

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

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
    params=[*sorted(MONITORS), *(pytest.param(name, marks=pytest.mark.long) for name in sorted(MACHINES))]
)
def lab(request: pytest.FixtureRequest, guest_assets: Path, busybox_image: str, run_directory: Path) -> Lab:
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


def image_with(directory: Path, text: str) -> Path:
    """An ext4 image with one file."""
    tree = directory / f"tree-{text}"
    tree.mkdir(parents=True)
    (tree / "file").write_text(text)
    image = directory / f"{text}.img"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-d", str(tree), str(image)], check=True)
    return image


# ---- the whole life of one machine ----


def test_a_machine_from_its_start_to_an_orderly_end(lab: Lab) -> None:  # noqa: C901, PLR0915
    can = lab.can()
    images = [image_with(lab.directory, text) for text in ("first", "second")]

    async def scenario() -> None:
        async with lab.machine(shared_memory=can.vhost_user_disks) as machine:
            async with agent_of(machine) as agent:
                await asyncio.wait_for(machine.confined(), PATIENCE)
                await disks(machine, agent)
                await served_disks(machine, agent)
                if not machine.channel.is_single:
                    async with agent_of(machine) as second:
                        await second.check(PATIENCE)
                await pausing(machine, agent)
                await memory(machine, agent)
                await interfaces(machine, agent)
                await saving(machine, agent)
            assert isinstance(machine.console_tail(), str)
            figures = await machine.metrics()
            assert all(isinstance(value, int) for value in figures.values())
            ended = await machine.stop(5.0)
            assert (ended.reason, ended.error) == ("stopped", None)
            assert await machine.stop() is ended
            assert await machine.wait() is ended
            assert not os.path.exists(f"/proc/{machine.pid}")

    async def disks(machine: Machine, agent: AgentClient) -> None:
        base = storages("box0", lab.disks[0])
        if not can.attach_disk:
            return
        with pytest.raises(KataError):
            await machine.attach_disk(Disk(str(lab.directory / "none.img"), readonly=False))
        with pytest.raises(HypervisorError):
            await machine.detach_disk("1f")
        # One after the other in the same place: the guest sees what is there now.
        for number, image in enumerate(images):
            name = f"box{number}"
            address = await machine.attach_disk(Disk(str(image), readonly=False))
            assert address
            data = agent_pb.Storage(
                driver="blk",
                source=address,
                fstype="ext4",
                options=["rw"],
                mount_point=f"{STATE}/{name}/data",
            )
            base = storages(name, lab.disks[0])
            script = "cat /data/file; echo changed >/data/new"
            assert await said_by(agent, name, script, [*base, data]) == image.stem
            await machine.detach_disk(address)
            with pytest.raises(HypervisorError):
                await machine.detach_disk(address)
            assert await asyncio.to_thread(content_of, image, "new") == b"changed\n"

    async def served_disks(machine: Machine, agent: AgentClient) -> None:
        """Those that another process serves; twice, so that what was taken out is gone."""
        if not can.vhost_user_disks or SERVER is None:
            return
        place = lab.directory / "served.sock"
        absent = Disk(str(place), readonly=False, vhost_user=True)
        with pytest.raises(HypervisorError):
            await machine.attach_disk(absent)
        for number, image in enumerate(images):
            name = f"served{number}"
            with served(image, place):
                address = await machine.attach_disk(absent)
                await changes(agent, name, address, image.stem)
                await machine.detach_disk(address)
            with pytest.raises(HypervisorError):
                await machine.detach_disk(address)
            assert content_of(image, "served") == b"changed\n"

    async def changes(agent: AgentClient, name: str, address: str, content: str) -> None:
        data = agent_pb.Storage(
            driver="blk", source=address, fstype="ext4", options=["rw"], mount_point=f"{STATE}/{name}/data"
        )
        script = "cat /data/file; echo changed >/data/served"
        said = await said_by(agent, name, script, [*storages(name, lab.disks[0]), data])
        assert said == content

    async def pausing(machine: Machine, agent: AgentClient) -> None:
        if not can.pause:
            for change in (machine.pause, machine.resume):
                with pytest.raises(UnsupportedError, match="paused"):
                    await change()
            await agent.check(PATIENCE)
            return
        await machine.pause()
        with pytest.raises(AgentTimeoutError):
            await agent.check(1.0)
        await machine.resume()
        await agent.check(PATIENCE)
        await right_clock(agent)

    async def saving(machine: Machine, agent: AgentClient) -> None:
        if not can.snapshot:
            before = set(os.listdir(lab.directory))
            with pytest.raises(UnsupportedError, match="saved"):
                await machine.save(str(lab.directory))
            assert set(os.listdir(lab.directory)) == before
            await agent.check(PATIENCE)

    async def memory(machine: Machine, agent: AgentClient) -> None:
        if can.grow_memory:
            before = await agent.memory_total()
            assert await machine.set_memory(128) == 128
            deadline = time.monotonic() + PATIENCE
            while (
                await agent.memory_total() - before <= 64 * MIB
            ):  # the guest's kernel uses it a moment later
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert await agent.memory_total() - before <= 128 * MIB
            assert 0 <= await machine.set_memory(0) <= 128
        else:
            with pytest.raises(UnsupportedError):
                await machine.set_memory(128)
        if can.balloon:
            assert 16 <= await machine.set_balloon(32) <= 32
            assert await machine.set_balloon(0) == 0
        else:
            with pytest.raises(UnsupportedError):
                await machine.set_balloon(32)

    async def interfaces(machine: Machine, agent: AgentClient) -> None:
        mac = "02:00:00:00:00:02"
        with tap("tap0") as fd:
            nic = Nic(mac, tap_fd=fd)
            if not can.hotplug_nics:
                with pytest.raises(UnsupportedError):
                    await machine.attach_nic(1, nic)
                return
            address = await machine.attach_nic(1, nic)
            assert fd.is_open  # it stays ours
        interface = types_pb.Interface(device="eth7", name="eth7", hwAddr=mac, devicePath=address, mtu=1500)
        await agent.update_interface(interface)

    lab.apart(scenario)


def test_machines_that_start_with_taps(lab: Lab) -> None:
    """Several interfaces have their places, their addresses and their links, and leave nothing in the namespace."""
    if "tap" not in lab.can().nic_backends:
        pytest.skip(f"{lab.monitor.title} knows no taps")

    async def scenario() -> None:
        macs = ["02:00:00:00:00:11", "02:00:00:00:00:12"]
        nics = [Nic(mac, tap_fd=tap(f"tap{index}")) for index, mac in enumerate(macs)]
        async with lab.machine(nics) as machine, agent_of(machine) as agent:
            assert not any(nic.tap_fd is not None and nic.tap_fd.is_open for nic in nics)
            for index, (mac, address) in enumerate(zip(macs, lab.nics, strict=True)):
                name = f"eth{index + 5}"
                interface = types_pb.Interface(
                    device=name,
                    name=name,
                    hwAddr=mac,
                    devicePath=address,
                    mtu=1400,
                    IPAddresses=[types_pb.IPAddress(address=f"10.77.{index}.2", mask="24")],
                )
                await agent.update_interface(interface)
                subprocess.run(
                    ["ip", "address", "add", f"10.77.{index}.1/24", "dev", f"tap{index}"], check=True
                )
                subprocess.run(["ip", "link", "set", f"tap{index}", "up"], check=True)
                await asyncio.wait_for(refused(f"10.77.{index}.2"), PATIENCE)
            if lab.monitor.name == "qemu" and lab.accel == "kvm" and os.path.exists("/dev/vhost-net"):
                names = [os.readlink(file) for file in Path(f"/proc/{machine.pid}/fd").iterdir()]
                assert sum(name.endswith("/vhost-net") for name in names) == 2
            there = Path("/proc/thread-self/net/dev").read_text()
            assert "tap0:" in there
            assert "tap1:" in there
        assert "tap" not in Path("/proc/thread-self/net/dev").read_text()

    lab.apart(scenario)


async def refused(address: str) -> None:
    """Return once a packet went there and the answer came back: that nobody listens (ICMP, port unreachable)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((address, 9))
        while True:
            try:
                sock.send(b"x")
                await asyncio.sleep(0.05)
                sock.recv(10)
            except BlockingIOError:
                continue
            except ConnectionRefusedError:
                return


def tap(name: str) -> sysio.Fd:
    """A tap device in this network namespace."""
    import fcntl

    fd = sysio.Fd(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    fcntl.ioctl(
        fd.raw, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002)
    )  # TUNSETIFF: tap, vnet header
    return fd


# ---- ends that nobody wanted ----


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in tree(int(child)))]


def test_a_monitor_that_dies_ends_everything_at_once(lab: Lab) -> None:
    async def scenario() -> None:
        async with lab.machine() as machine, agent_of(machine) as agent:
            waiting = asyncio.create_task(machine.wait())
            os.kill(machine.pid, signal.SIGKILL)
            ended = await asyncio.wait_for(waiting, 10)
            assert (ended.status, ended.reason) == (-signal.SIGKILL, "crashed")
            assert ended.error is not None
            assert "killed by signal 9" in ended.error.message
            with pytest.raises(KataError):
                await agent.check(10)
            assert await machine.metrics() == {}
            assert (await machine.stop()).reason == "crashed"

    lab.apart(scenario)


def test_a_monitor_that_hangs_is_ended_all_the_same(lab: Lab) -> None:
    async def scenario() -> None:
        async with lab.machine() as machine, agent_of(machine) as agent:
            for pid in tree(machine.pid):
                os.kill(pid, signal.SIGSTOP)
            with pytest.raises(AgentTimeoutError):
                await agent.check(1.0)
            began = time.monotonic()
            ended = await asyncio.wait_for(machine.stop(0.5), 10)
            assert (ended.reason, ended.error) == ("stopped", None)
            assert time.monotonic() - began < 8

    lab.apart(scenario)


def test_a_program_that_talks_nonsense_is_named_and_quoted(lab: Lab) -> None:
    lab.directory.mkdir(exist_ok=True)
    program = lab.directory / "nonsense"
    program.write_text("#!/bin/sh\necho 'what am I doing here' >&2\nexit 3\n")
    program.chmod(0o755)

    async def scenario() -> None:
        async with lab.machine(options={"path": str(program)}) as machine:
            ended = await asyncio.wait_for(machine.wait(), PATIENCE)
            assert ended.reason == "crashed"
            assert ended.error is not None
            assert "status 3" in ended.error.message
            assert "what am I doing here" in ended.error.message
            with contextlib.suppress(KataError, TimeoutError):
                sock = await asyncio.wait_for(machine.channel.connect(), 0.5)
                sock.close()

    lab.apart(scenario)


def test_a_machine_uses_more_processors_and_fewer(lab: Lab) -> None:
    if not lab.can().spare_vcpus:
        pytest.skip(f"{lab.monitor.title} gives a machine the processors that it starts with")

    async def scenario() -> None:
        async with lab.machine(max_vcpus=2) as machine, agent_of(machine) as agent:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            request = agent_pb.CreateContainerRequest(
                container_id="cpus",
                OCI=spec("cpus", "sleep", "100000"),
                storages=storages("cpus", lab.disks[0]),
            )
            await agent.create_container(request)
            await agent.start_container("cpus")
            for step, count in enumerate((1, 2, 1)):
                await agent.set_processors(count)
                process = oci_pb.Process(
                    Args=["grep", "-c", "^processor", "/proc/cpuinfo"], Cwd="/", Env=["PATH=/bin"]
                )
                await agent.exec_process("cpus", f"look{step}", process)
                await agent.wait("cpus", f"look{step}")
                assert await agent.read("cpus", f"look{step}", "stdout", 100) == b"%d\n" % count

    lab.apart(scenario)


def test_a_saved_machine_goes_on_where_it_was(lab: Lab) -> None:
    if not lab.can().snapshot:
        pytest.skip(f"{lab.monitor.title} cannot save a machine")
    place = lab.directory / "saved"
    place.mkdir(parents=True)

    async def scenario() -> None:
        async with lab.machine() as machine, agent_of(machine) as agent:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            await agent.create_container(
                agent_pb.CreateContainerRequest(
                    container_id="kept",
                    OCI=spec("kept", "sleep", "100000"),
                    storages=storages("kept", lab.disks[0]),
                )
            )
            await agent.start_container("kept")
            with pytest.raises(KataError, match="no directory"):
                await machine.save(str(lab.directory / "none"))
            with pytest.raises(HypervisorError):
                await machine.save(str(place))  # it runs
            assert os.listdir(place) == []
            await machine.pause()
            await machine.save(str(place))
            with pytest.raises(HypervisorError, match="already"):
                await machine.save(str(place))
            await machine.resume()
            # Connections may have ended with it (Firecracker's do); the guest has not.
            if machine.channel.is_single:
                await agent.check(PATIENCE)
            else:
                async with agent_of(machine) as another:
                    await another.check(PATIENCE)
        for _ in range(2):  # what was saved can be used again
            async with lab.machine(saved=str(place)) as machine, agent_of(machine) as agent:
                await asyncio.wait_for(machine.confined(), PATIENCE)
                await right_clock(agent)
                process = oci_pb.Process(
                    Args=["sh", "-c", "cat /proc/1/comm; exit 3"], Cwd="/", Env=["PATH=/bin"]
                )
                await agent.exec_process("kept", "again", process)
                assert await agent.wait("kept", "again") == 3
                assert await agent.read("kept", "again", "stdout", 100) == b"sleep\n"
                await machine.pause()
                await machine.resume()
                await agent.check(PATIENCE)
        # What is not all there, or had other devices, is refused by name.
        rootfs, lab.rootfs = lab.rootfs, "/no/such/image"
        with pytest.raises(HypervisorError, match="/no/such/image"):
            async with lab.machine(saved=str(place)):
                pass
        lab.rootfs = rootfs
        max(place.iterdir(), key=lambda file: file.stat().st_size).unlink()
        with pytest.raises(HypervisorError, match="saved in"):
            async with lab.machine(saved=str(place)) as machine:
                await machine.confined()
        (place / "machine.json").unlink()
        with pytest.raises(HypervisorError, match="no machine was saved in"):
            async with lab.machine(saved=str(place)):
                pass

    lab.apart(scenario)


def test_clones_share_what_was_saved_and_cannot_change_it(lab: Lab) -> None:
    """Two at once go on from one machine that was started to be saved, whose agent nobody is connected to."""
    if not lab.can().clones:
        pytest.skip(f"machines of {lab.monitor.title} are not cloned")
    place = lab.directory / "template"
    place.mkdir(parents=True)

    def content() -> dict[str, str]:
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in place.iterdir()
            if file.name != "machine.json"
        }

    def writable(machine: Machine) -> list[str]:
        """Files of what was saved that the monitor could write."""
        found = []
        for number in os.listdir(f"/proc/{machine.pid}/fd"):
            info = Path(f"/proc/{machine.pid}/fdinfo/{number}").read_text()
            flags = int(info.partition("flags:")[2].split()[0], 8)
            path = os.readlink(f"/proc/{machine.pid}/fd/{number}")
            if path.startswith(str(place)) and flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(path)
        maps = Path(f"/proc/{machine.pid}/maps").read_text().splitlines()
        return found + [line for line in maps if str(place) in line and "s" in line.split()[1]]

    async def clone(number: int) -> str:
        lab_name = f"clone{number}"
        async with lab.machine(saved=str(place), name=lab_name) as machine, agent_of(machine) as agent:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            await agent.reseed(os.urandom(512))
            script = (
                "head -c 60000000 /dev/zero >/much; rm /much; cat /proc/sys/kernel/random/boot_id;"
                " head -c 8 /dev/urandom | md5sum"
            )
            said = await said_by(agent, lab_name, script, storages(lab_name, lab.disks[0]))
            assert writable(machine) == []
            assert not re.search("[Ff]ailed|error", machine.console_tail())
            return said

    async def scenario() -> None:
        async with lab.machine(saves_into=str(place)) as machine:
            async with agent_of(machine):
                await asyncio.wait_for(machine.confined(), PATIENCE)
            await asyncio.sleep(0.3)
            await machine.pause()
            await machine.save(str(place))
        before = content()
        assert before
        said = await asyncio.gather(clone(1), clone(2))
        assert len({*said[0].splitlines(), *said[1].splitlines()}) == 4, said
        assert content() == before

    lab.apart(scenario)


def test_a_monitor_that_saves_nothing_restores_nothing(lab: Lab) -> None:
    """By name, and what it was given for it is closed."""
    if lab.can().snapshot:
        pytest.skip(f"{lab.monitor.title} can save and restore a machine")
    reading, writing = os.pipe()
    os.close(writing)
    tap = sysio.Fd(reading)
    attachments = Attachments(sandbox_id="x", run_dir="/", nics=[Nic("02:00:00:00:00:01", tap_fd=tap)])
    made: Any = None  # no journal: nothing may be made
    with pytest.raises(UnsupportedError, match=f"^{lab.monitor.title} cannot restore .*/no/such") as refused:
        lab.monitor.restore("/no/such", attachments, made)
    assert refused.value.hint
    assert not tap.is_open


def test_what_cannot_start_leaves_nothing(lab: Lab) -> None:
    async def scenario() -> None:
        for changes in ({"kernel": "/no/such/kernel"}, {"initrd": "/no/such/initrd"}):
            with pytest.raises(GuestAssetError, match="/no/such"):
                async with lab.machine(None, **changes):
                    pass
        lab.rootfs = "/no/such/image"
        with pytest.raises(HypervisorError, match="/no/such/image"):
            async with lab.machine():
                pass

    lab.apart(scenario)


# ---- the proof: a monitor that the product does not know ----


class ScriptedKata(Kata):
    """kata with the scripted monitor offered."""

    def command(self, *arguments: str) -> list[str]:
        return ["/usr/bin/python3", "-I", "-S", scripted_monitor.__file__, *arguments]


@pytest.fixture
def scripted(run_directory: Path, guest_assets: Path) -> Any:
    kata = ScriptedKata(run_directory / f"scr{os.urandom(2).hex()}", guest_assets)
    kata.directory.mkdir()
    file = kata.directory / "configuration.toml"
    file.write_text(f"[runtime]\nhypervisor_name = '{scripted_monitor.NAME}'\n")
    kata.env["KATA_CONF_FILE"] = str(file)
    yield kata
    left = kata.clear()
    shutil.rmtree(kata.directory)
    assert not left


def test_a_monitor_from_outside_serves_kata_run(scripted: ScriptedKata, busybox_image: str) -> None:
    run = ("run", "--network", "none")
    assert scripted.ok(*run, "--rm", busybox_image, "echo", "from a scripted machine").strip() == (
        "from a scripted machine"
    )
    done = scripted.call(*run, "--rm", "-i", busybox_image, "sh", "-c", "cat; exit 7", stdin=b"through")
    assert (done.returncode, done.stdout) == (7, b"through")
    scripted.ok(*run, "-d", "--name", "box", busybox_image, "sleep", "1000")
    assert scripted.ok("exec", "box", "cat", "/proc/1/comm").strip() == "sleep"
    [shown] = json.loads(scripted.ok("inspect", "box"))
    found = shown["sandbox"]
    assert found["agent_channel"] == "unix"
    assert found["hypervisor"]["name"] == scripted_monitor.NAME
    assert found["hypervisor"]["capabilities"] == {
        **scripted_monitor.MONITOR.capabilities("tcg", {}).to_plain(),
        "shares": [],
        "pause": False,
    }
    scripted.ok("rm", "-f", "box")
    assert scripted.sandboxes() == []
    # What it cannot do is said by name, before anything is made.
    refused = scripted.call("run", "--rm", busybox_image, "true")
    assert refused.returncode == 125
    assert b"The scripted monitor cannot connect a machine to a network of the mode 'user'" in refused.stderr
    refused = scripted.call(*run, "--rm", "-v", f"{scripted.directory}:/v", busybox_image, "true")
    assert f"cannot mount {scripted.directory} writable".encode() in refused.stderr
    assert scripted.sandboxes() == []
    bare = scripted.directory / "bare"
    bare.mkdir()
    refused = scripted.call(*run, "--rm", f"rootfs:{bare}", "true")
    assert f"the root file system {bare} is a directory".encode() in refused.stderr
    # What is small and read-only is copied, and a person is told so once.
    (bare / "key").write_text("copied\n")
    shown = scripted.ok(*run, "--rm", "-v", f"{bare}:/v:ro", busybox_image, "cat", "/v/key")
    assert shown == "copied\n"
    # And without this program there is no such hypervisor.
    plain = subprocess.run(
        Kata.command(scripted, *run, "--rm", busybox_image, "true"),
        env=scripted.env,
        capture_output=True,
        check=False,
    )
    assert plain.returncode == 125
    assert b"there is no hypervisor 'scripted' here" in plain.stderr


def test_the_monitor_of_the_tests_is_the_interpreters_own() -> None:
    """It runs as kata does: isolated, and without site-packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", scripted_monitor.__file__, "version", "--json"],
        capture_output=True,
        check=True,
    )
    assert b'"kata"' in done.stdout
