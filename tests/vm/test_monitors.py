"""What every hypervisor has to do behind the seam (`kata.hypervisor.base`): one suite for all of them.

It is run against QEMU, with real machines, and against a monitor that only the tests know (`scripted_monitor`). What a
monitor cannot do has to be missing in its capabilities, and to be refused by name. Machines that are saved and go on
have `test_monitors_saved`; what a monitor from outside serves then is in `test_monitor_outside`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from agent_support import STATE, spec, storages
from hypervisor_lab import (  # noqa: F401 - a fixture
    MIB,
    SERVER,
    Lab,
    agent_of,
    content_of,
    image_with,
    lab_fixture,
    right_clock,
    said_by,
    served,
    tap,
)
from waiting import PATIENCE

from kata.agent.client import AgentClient
from kata.errors import AgentTimeoutError, GuestAssetError, HypervisorError, KataError, UnsupportedError
from kata.hypervisor.base import Disk, Nic
from kata.proto import agent_pb, oci_pb, types_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.protocols import Machine

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

# ---- the whole life of one machine ----


def test_a_machine_from_its_start_to_an_orderly_end(lab: Lab) -> None:  # noqa: C901, PLR0915
    can = lab.can()
    images = [image_with(lab.directory, text) for text in ("first", "second")]
    large = image_with(lab.directory, "large", 70 << 10)

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
        # Of one that is read-only, the guest may not be told how large it is; it has all of it.
        address = await machine.attach_disk(Disk(str(large), readonly=True))
        data = agent_pb.Storage(
            driver="blk", source=address, fstype="ext4", options=["ro"], mount_point=f"{STATE}/large/data"
        )
        assert (
            await said_by(agent, "large", "cat /data/file", [*storages("large", lab.disks[0]), data])
            == "large"
        )
        await machine.detach_disk(address)

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
