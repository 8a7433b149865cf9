"""What is said between us and Cloud Hypervisor, step by step, and what goes wrong there.

Against a program that answers as the real one was seen to answer (`scripted_cloud_hypervisor`), on every machine; and
against the real one where it is installed and KVM opens. No step here needs a guest that runs: those are in the suite
of all hypervisors (tests/kvm/test_contract.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_cloud_hypervisor
from hypervisor_lab import tap
from talk_support import Talk
from waiting import PATIENCE

from kata.errors import HypervisorError, KataError, UnsupportedError
from kata.guest import manifest
from kata.hypervisor import http_api, registry
from kata.hypervisor.base import Disk, Ended, Nic
from kata.hypervisor.cloud_hypervisor import machine as ch_machine
from kata.hypervisor.cloud_hypervisor.monitor import CloudHypervisorMonitor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.cloud_hypervisor.machine import CloudHypervisor

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(300)]

MIB = 1 << 20
MONITOR = registry.find("cloud-hypervisor")


@pytest.fixture
def scripted(run_directory: Path) -> Talk:
    return Talk(MONITOR, scripted_cloud_hypervisor.__file__, run_directory / f"ch-{os.urandom(2).hex()}")


def test_every_step_as_it_was_seen(scripted: Talk) -> None:  # noqa: PLR0915
    place = scripted.directory / "saved"
    place.mkdir()

    async def scenario() -> None:
        async with scripted.talk(nics=2) as machine:
            heard: list[bytes] = []
            machine.on_traffic(lambda kind, data: heard.append(data) if kind == "event" else None)
            await asyncio.wait_for(machine.confined(), PATIENCE)
            assert machine.version == "54.0.0"
            # It has lost the host's files.
            assert os.listdir(f"/proc/{machine.pid}/root") == ["disks", "state"]
            await disks(machine)
            with tap("late") as fd:
                assert await machine.attach_nic(2, Nic("02:00:00:00:00:22", tap_fd=fd)) == "1a"
                with pytest.raises(HypervisorError, match="Identifier nic2 is not unique"):
                    await machine.attach_nic(2, Nic("02:00:00:00:00:22", tap_fd=fd))
            assert await machine.set_memory(128) == 128
            with pytest.raises(HypervisorError, match="300 MiB"):
                await machine.set_memory(300)
            assert await machine.set_balloon(32) == 32
            assert await machine.set_balloon(0) == 0
            assert await machine.set_memory(0) == 0
            # Latencies of what there was none of are left out.
            counters = await machine.counters()
            assert counters["disk0"] == {
                "read_bytes": 0,
                "read_ops": 0,
                "write_bytes": 4096,
                "write_ops": 1,
                "write_latency_min": 5,
                "write_latency_max": 9,
                "write_latency_avg": 7,
            }
            assert counters["nic0"]["tx_frames"] == 2
            with pytest.raises(HypervisorError, match="while VM is running"):
                await machine.save(str(place))
            await machine.pause()
            with pytest.raises(HypervisorError, match=r"InvalidStateTransition\(Paused, Paused\)"):
                await machine.pause()
            await machine.save(str(place))
            await machine.resume()
            assert b"scripted" in (await until_said(machine)).encode()
            ended = await machine.stop(5.0)
            assert (ended.status, ended.reason, ended.error) == (0, "stopped", None)
            assert b'"resumed"' in b"".join(heard)
        assert sorted(os.listdir(place)) == ["config.json", "machine.json", "memory-ranges", "state.json"]
        with pytest.raises(HypervisorError, match="has a nic2, and it was given none"):
            async with scripted.talk(nics=2, saved=str(place)):
                pass
        # A disk that it had not is plugged in as it goes on.
        async with scripted.talk(nics=3, saved=str(place), disks=2) as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            assert await machine.attach_disk(Disk(str(scripted.directory / "other.img"), True)) == "0c"
        async with scripted.talk(nics=3, saved=str(place)) as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            await machine.pause()
            await machine.resume()
        (place / "state.json").write_text("")
        async with scripted.talk(nics=3, saved=str(place)) as machine:
            with pytest.raises(KataError, match="Error restoring VM: Cannot restore VM: cannot read state"):
                await asyncio.wait_for(machine.confined(), PATIENCE)
            assert (await machine.wait()).reason == "crashed"
        (place / "config.json").write_text("[" * 100000)
        with pytest.raises(HypervisorError, match="does not describe a machine"):
            async with scripted.talk(nics=3, saved=str(place)):
                pass

    async def disks(machine: CloudHypervisor) -> None:
        with pytest.raises(KataError, match="/none"):
            await machine.attach_disk(Disk(str(scripted.directory / "none.img"), readonly=False))
        other = scripted.directory / "other.img"
        other.write_bytes(bytes(MIB))
        address = await machine.attach_disk(Disk(str(other), readonly=False))
        assert address == "0b"
        await machine.detach_disk(address)
        with pytest.raises(HypervisorError, match="no disk at PCI path 0b"):
            await machine.detach_disk(address)
        assert await machine.attach_disk(Disk(str(other), readonly=True)) == "0b"
        await machine.detach_disk("0b")

    scripted.apart(scenario)


def test_the_real_one_says_the_same(run_directory: Path, guest_assets: Path) -> None:
    """Where it is installed, and KVM opens, be it one that cannot run a guest."""
    program = CloudHypervisorMonitor.PROGRAM.find()
    if not program:
        pytest.skip(f"Cloud Hypervisor is not installed. {CloudHypervisorMonitor.PROGRAM.install}")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    real = Talk(
        MONITOR, program, run_directory / f"ch-{os.urandom(2).hex()}", manifest.load(str(guest_assets))
    )

    async def scenario() -> None:
        async with real.talk(nics=1) as machine:
            heard: list[bytes] = []
            machine.on_traffic(lambda kind, data: heard.append(data) if kind == "event" else None)
            await asyncio.wait_for(machine.confined(), PATIENCE)
            assert machine.version
            assert os.listdir(f"/proc/{machine.pid}/root") == ["disks", "state"]
            with pytest.raises(KataError, match="/none"):
                await machine.attach_disk(Disk(str(real.directory / "none.img"), readonly=False))
            other = real.directory / "other.img"
            other.write_bytes(bytes(MIB))
            assert await machine.attach_disk(Disk(str(other), readonly=False)) == "0b"
            with tap("late") as fd:
                assert await machine.attach_nic(1, Nic("02:00:00:00:00:22", tap_fd=fd)) == "19"
                with pytest.raises(HypervisorError, match="Identifier nic1 is not unique"):
                    await machine.attach_nic(1, Nic("02:00:00:00:00:22", tap_fd=fd))
            counters = await machine.counters()
            assert {"disk0", "disk1", "nic0", "nic1"} <= set(counters)
            assert "write_bytes" in counters["disk1"]
            assert not [name for name in counters["disk1"] if "latency" in name]
            with pytest.raises(HypervisorError, match="while VM is running"):
                await machine.save(str(real.directory))
            await machine.pause()
            with pytest.raises(HypervisorError, match=r"InvalidStateTransition\(Paused, Paused\)"):
                await machine.pause()
            await machine.resume()
            ended = await machine.stop(5.0)
            assert (ended.status, ended.reason, ended.error) == (0, "stopped", None)
            assert b'"resumed"' in b"".join(heard)

    real.apart(scenario)


async def until_said(machine: CloudHypervisor) -> str:
    deadline = time.monotonic() + PATIENCE
    while not machine.console_tail():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return machine.console_tail()


FAULTS = {
    "hang": "did not answer {} within 0.5 s",
    "nonsense": "answered {} with nonsense",
    "refuse": "It was ordered to refuse",
    "die": "ended with status 134: .*this is the end",
}
STEPS: dict[str, Callable[[CloudHypervisor, Path], Any]] = {
    "GET vm.info": lambda machine, _: machine.confined(),
    "PUT vm.add-disk": lambda machine, place: machine.attach_disk(
        Disk(str(place / "disk.img"), readonly=True)
    ),
    "PUT vm.remove-device": lambda machine, _: machine.detach_disk("0a"),
    "PUT vm.resize": lambda machine, _: machine.set_memory(128),
    "PUT vm.pause": lambda machine, _: machine.pause(),
    "GET vm.counters": lambda machine, _: machine.counters(),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_any_step_is_named_in_time_and_undone(scripted: Talk, kind: str) -> None:
    async def scenario() -> None:
        # Only what waits in vain has little time: a busy host is slow.
        http_api.TIMEOUT_S = 0.5 if kind == "hang" else PATIENCE
        for step, do in STEPS.items():
            call = step.partition(" ")[2]
            ch_machine.START_S = 0.5 if (call, kind) == ("vm.info", "hang") else PATIENCE
            async with scripted.talk(f"scripted.fault={call}:{kind}") as machine:
                if call != "vm.info":
                    await asyncio.wait_for(machine.confined(), PATIENCE)
                began = time.monotonic()
                with pytest.raises(KataError, match=FAULTS[kind].format(step)):
                    await asyncio.wait_for(do(machine, scripted.directory), PATIENCE)
                assert time.monotonic() - began < 5
                if kind == "hang":  # an answer that comes late is not taken for another's
                    with pytest.raises(
                        KataError, match=r"not connected any more|did not answer GET vm\.info"
                    ):
                        await machine.resume()
                assert (await machine.stop(1.0)).status is not None

    scripted.apart(scenario)


def test_how_a_machine_ends_is_told(scripted: Talk) -> None:
    async def after(parameters: str, do: Callable[[CloudHypervisor], Any] | None = None) -> Ended:
        async with scripted.talk(parameters) as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            if do is not None:
                do(machine)
            else:
                with pytest.raises(KataError):
                    await machine.pause()
            return await asyncio.wait_for(machine.wait(), PATIENCE)

    async def scenario() -> None:
        for how in ("poweroff", "reboot"):
            ended = await after(f"scripted.end={how}")
            assert ended.reason == how
            assert ended.error is not None
            assert f"switched off from inside ({how})" in ended.error.message
        ended = await after("", lambda machine: os.kill(machine.pid, signal.SIGKILL))
        assert (ended.reason, ended.status) == ("crashed", -signal.SIGKILL)

    scripted.apart(scenario)


def test_a_guest_that_keeps_a_device_is_told(scripted: Talk) -> None:
    async def scenario() -> None:
        ch_machine.UNPLUG_S = 0.3
        async with scripted.talk("scripted.keeps") as machine:
            with pytest.raises(HypervisorError, match="did not let go of disk0 within"):
                await machine.detach_disk("0a")
            with pytest.raises(HypervisorError, match="/no/such is no directory"):
                await machine.save("/no/such")

    scripted.apart(scenario)


def test_a_machine_with_a_share_is_not_saved(scripted: Talk) -> None:
    async def scenario() -> None:
        async with scripted.talk() as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            machine._share = object()
            with pytest.raises(UnsupportedError, match="cannot be saved"):
                await machine.save(str(scripted.directory))
            machine._share = None

    scripted.apart(scenario)


def test_the_scripted_one_is_asked_for_its_version(scripted: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_CLOUD_HYPERVISOR", scripted.program)
    assert MONITOR.version({}) == "cloud-hypervisor v54.0.0"
    [check] = [one for one in MONITOR.checks({}) if one.name == "cloud-hypervisor"]
    assert check.ok
    assert json.dumps(MONITOR.capabilities("kvm", {}).to_plain())
