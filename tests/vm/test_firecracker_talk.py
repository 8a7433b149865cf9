"""What is said between us and Firecracker, step by step, and what goes wrong there.

Against a program that answers as the real one was seen to answer (`scripted_firecracker`), on every machine. No step
here needs a guest that runs: those are in the suite of all hypervisors (tests/kvm/test_contract.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_firecracker
from hypervisor_lab import tap
from talk_support import Talk
from waiting import PATIENCE

from kata.errors import HypervisorError, KataError, UnsupportedError
from kata.hypervisor import http_api, registry, settle
from kata.hypervisor.base import Disk, Ended, Nic
from kata.hypervisor.firecracker import machine as fc_machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.firecracker.machine import Firecracker

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(300)]

MIB = 1 << 20
MONITOR = registry.find("firecracker")


@pytest.fixture
def scripted(run_directory: Path) -> Talk:
    return Talk(MONITOR, scripted_firecracker.__file__, run_directory / f"fc-{os.urandom(2).hex()}")


def interfaces() -> set[str]:
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines}


def test_every_step_as_it_was_seen(scripted: Talk) -> None:
    async def scenario() -> None:
        async with scripted.talk(nics=2) as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            assert machine.version == scripted_firecracker.VERSION
            # It has lost the host's files, and its taps are there by their names.
            assert sorted(os.listdir(f"/proc/{machine.pid}/root")) == ["disks", "state"]
            assert {"t0", "t1"} <= interfaces()
            await disks(machine)
            with tap("late") as fd, pytest.raises(UnsupportedError, match="a network interface"):
                await machine.attach_nic(2, Nic("02:00:00:00:00:22", tap_fd=fd))
            assert await machine.set_memory(128) == 128
            with pytest.raises(HypervisorError, match="300 MiB"):
                await machine.set_memory(300)
            assert await machine.set_balloon(32) == 32
            assert await machine.set_balloon(0) == 0
            assert await machine.set_memory(0) == 0
            # It says what was added; times are those of the last request.
            await machine.counters()
            counters = await machine.counters()
            assert counters["block"] == {"read_bytes": 8192}
            assert counters["latencies_us"] == {"pause_vm": 958}
            assert counters["patch_api_requests"] == {"drive_count": 4, "drive_fails": 0}
            await machine.pause()
            await machine.pause()
            await machine.resume()
            while "scripted" not in machine.console_tail():
                await asyncio.sleep(0.01)
            ended = await machine.stop(5.0)
            assert (ended.status, ended.reason, ended.error) == (156, "stopped", None)
        assert not {"t0", "t1"} & interfaces()

    async def disks(machine: Firecracker) -> None:
        with pytest.raises(KataError, match=r"none\.img"):
            await machine.attach_disk(Disk(str(scripted.directory / "none.img"), readonly=False))
        other = scripted.directory / "other.img"
        other.write_bytes(bytes(MIB))
        address = await machine.attach_disk(Disk(str(other), readonly=False))
        with pytest.raises(HypervisorError, match="no disk at PCI path 7f"):
            await machine.detach_disk("7f")
        await machine.detach_disk(address)
        with pytest.raises(HypervisorError, match=f"no disk at PCI path {address}"):
            await machine.detach_disk(address)
        readonly = await machine.attach_disk(Disk(str(other), readonly=True))
        assert readonly != address
        with pytest.raises(HypervisorError, match="no free slot for another read-only disk"):
            await machine.attach_disk(Disk(str(other), readonly=True))
        await machine.detach_disk(readonly)

    scripted.apart(scenario)


FAULTS = {
    "hang": "did not answer {} within 0.5 s",
    "nonsense": "answered {} with nonsense",
    "refuse": "It was ordered to refuse",
    "die": "ended with status 148: .*this is the end",
}
STEPS: dict[str, Callable[[Firecracker, Path], Any]] = {
    "GET ": lambda machine, _: machine.confined(),
    "PATCH drives/disk2": lambda machine, place: machine.attach_disk(
        Disk(str(place / "disk.img"), readonly=True)
    ),
    "PATCH drives/disk0": lambda machine, _: machine.detach_disk("02"),
    "GET hotplug/memory": lambda machine, _: machine.set_memory(128),
    "GET balloon/statistics": lambda machine, _: machine.set_balloon(16),
    "PATCH vm": lambda machine, _: machine.pause(),
    "PUT actions": lambda machine, _: machine.counters(),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_any_step_is_named_in_time_and_undone(scripted: Talk, kind: str) -> None:
    async def scenario() -> None:
        # Only what waits in vain has little time: a busy host is slow.
        http_api.TIMEOUT_S = 0.5 if kind == "hang" else PATIENCE
        for step, do in STEPS.items():
            part = step.partition(" ")[2].partition("/")[0] or "info"
            fc_machine.START_S = 0.5 if (part, kind) == ("info", "hang") else PATIENCE
            async with scripted.talk(f"scripted.fault={part}:{kind}") as machine:
                if part != "info":
                    await asyncio.wait_for(machine.confined(), PATIENCE)
                began = time.monotonic()
                said = FAULTS[kind].format(step)
                if (part, kind) == ("info", "hang"):
                    said = "did not (answer GET|build its machine) .*within 0.5 s"
                with pytest.raises(KataError, match=said):
                    await asyncio.wait_for(do(machine, scripted.directory), PATIENCE)
                assert time.monotonic() - began < 5
                assert (await machine.stop(1.0)).status is not None

    scripted.apart(scenario)


def test_how_a_machine_ends_is_told(scripted: Talk) -> None:
    async def after(parameters: str, do: Callable[[Firecracker], Any] | None = None) -> Ended:
        async with scripted.talk(parameters) as machine:
            await asyncio.wait_for(machine.confined(), PATIENCE)
            if do is not None:
                do(machine)
            else:
                with pytest.raises(KataError):
                    await machine.pause()
            return await asyncio.wait_for(machine.wait(), PATIENCE)

    async def scenario() -> None:
        fc_machine.START_S = 2 * PATIENCE  # nobody waits for the API of one that is gone
        ended = await after("scripted.end")
        assert (ended.status, ended.reason) == (0, "reboot")
        assert ended.error is not None
        assert "switched off from inside" in ended.error.message
        ended = await after("", lambda machine: os.kill(machine.pid, signal.SIGKILL))
        assert (ended.reason, ended.status) == ("crashed", -signal.SIGKILL)
        # Of one whose machine cannot be built, the sentence is told, and not its internal name.
        async with scripted.talk("scripted.fault=boot:refuse") as machine:
            with pytest.raises(HypervisorError) as refused:
                await asyncio.wait_for(machine.confined(), PATIENCE)
            assert (await machine.wait()).reason == "crashed"
        assert refused.value.message.endswith(
            "Failed to build MicroVM from Json: Configuration for VMM from one single json failed: It was ordered"
        )

    scripted.apart(scenario)


def test_a_guest_that_does_not_take_its_memory_is_told(scripted: Talk) -> None:
    async def scenario() -> None:
        settle.PATIENCE_S = 0.3
        async with scripted.talk("scripted.keeps") as machine:
            with pytest.raises(HypervisorError, match="did not take 64 of 128 MiB"):
                await asyncio.wait_for(machine.set_memory(128), PATIENCE)

    scripted.apart(scenario)


def test_the_scripted_one_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_FIRECRACKER", scripted_firecracker.__file__)
    assert MONITOR.version({}) == f"Firecracker v{scripted_firecracker.VERSION}"
    [check] = [one for one in MONITOR.checks({}) if one.name == "firecracker"]
    assert check.ok
