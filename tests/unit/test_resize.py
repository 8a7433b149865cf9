"""The size of a running machine: when it grows, when it shrinks, and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kata.cli import explain
from kata.engine.lifecycle.resize import (
    FEATURE,
    MachineResizer,
    Size,
    balloon_mib,
    merged,
    slack_mib,
    spare_in_guest_mib,
)
from kata.errors import HypervisorError, KataError, ResourceExhaustedError, UnsupportedError
from kata.hypervisor import registry
from kata.hypervisor.base import Capabilities
from kata.hypervisor.qemu import resize
from kata.resources import sizing
from kata.settings import SizeSettings

MIB = 1 << 20


class Machine:
    """Agent, hypervisor and sandbox in one: records what it was told."""

    def __init__(self, **size: Any) -> None:
        self.first = SizeSettings(
            **{
                "vcpus": 1,
                "memory_mib": 512,
                "max_vcpus": 4,
                "max_memory_mib": 4096,
                "asked_by": "the container's limits",
                **size,
            }
        )
        self.settings = SimpleNamespace(machine=SimpleNamespace(size=self.first))
        self.features = {FEATURE}
        self.vm = self
        self.machine = self
        self.cgroup = None
        self.extra_memory_mib = 0
        self.capabilities = registry.find().capabilities("tcg", {})
        self.host_overhead_mib = registry.find().host_overhead_mib("kvm")
        self.is_lost = False
        self.told: list[tuple[str, Any]] = []
        self.logged: list[str] = []
        self.fail: set[str] = set()
        self.plugged = self.returned = self.stuck = 0
        self.spare = 1 << 20
        self.resizer = MachineResizer(*(cast(Any, one) for one in (self.settings, self, self)))

    async def ready(self) -> Machine:
        return self

    def log(self, text: str) -> None:
        self.logged.append(text)

    async def set_memory(self, mib: int) -> int:
        if "memory" in self.fail:
            raise HypervisorError("no memory")
        self.told.append(("memory", mib))
        self.plugged = max(mib, self.stuck)
        return self.plugged

    async def set_balloon(self, mib: int) -> int:
        if "balloon" in self.fail:
            raise HypervisorError("no balloon")
        self.told.append(("balloon", mib))
        self.returned = min(mib, self.spare)
        return self.returned

    async def memory_total(self) -> int:
        """The kernel keeps 60 MiB, of whatever the machine has."""
        return (int(self.first.memory_mib) + self.plugged - self.returned - 60) * MIB

    async def set_processors(self, count: int) -> None:
        if "cpus" in self.fail:
            raise HypervisorError("no processor")
        self.told.append(("cpus", count))

    async def apply(self, limits: dict[str, Any]) -> None:
        if "apply" in self.fail:
            raise KataError("the guest refused")
        self.told.append(("limits", limits))

    async def update(self, name: str, after: dict[str, Any]) -> None:
        await self.resizer.update(name, after, lambda: self.apply(after))


def limits(cpus: float | None = None, mib: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if cpus is not None:
        found["cpu"] = {"quota": int(cpus * 100_000), "period": 100_000}
    if mib is not None:
        found["memory"] = {"limit": mib * MIB}
    return found


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def plugged(mib: int, first: int = 512) -> int:
    more = sizing.memory_of(mib * MIB, "small") - first
    return more + more % 2


def given(mib: int) -> int:
    """What a guest with 512 MiB gives back for containers with such limits: its kernel keeps 60."""
    return ((512 - 60) * MIB - sizing.total_of(mib * MIB, "small")) // MIB


def test_nothing_is_done_for_what_fits() -> None:
    machine = Machine()
    run(machine.resizer.admit("c", limits(0.5, 64)))
    run(machine.resizer.admit("d", {}))
    assert machine.told == []


def test_a_pods_containers_add_up_and_nothing_shrinks_when_they_come() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(0.7, 600)))
    run(machine.resizer.admit("b", limits(0.7, 600)))
    assert machine.told == [("memory", plugged(600)), ("memory", plugged(1200)), ("cpus", 2)]
    machine.resizer.remove_container("a")
    run(machine.resizer.admit("c", limits(0.1, 10)))
    assert machine.told[3:] == []
    assert (machine.resizer.vcpus, machine.resizer.memory_mib) == (2, 512 + plugged(1200))


def test_what_the_cri_said_of_the_pod_counts_and_follows_updates() -> None:
    source = f"{sizing.OF_SANDBOX} (containerd)"
    machine = Machine(vcpus=2, asked_by=source, asked_cpus=2.0, asked_memory=450 * MIB)
    run(machine.resizer.admit("a", limits(1, 220)))
    run(machine.resizer.admit("b", limits(1, 220)))
    assert machine.told == []
    run(machine.update("a", limits(2, 1000)))
    assert machine.told == [("memory", plugged(1230)), ("cpus", 3), ("limits", limits(2, 1000))]
    run(machine.update("a", limits(1, 220)))
    assert machine.told[3:] == [("limits", limits(1, 220)), ("memory", 0), ("cpus", 2)]


def test_an_update_that_cannot_be_changes_nothing() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 400)))
    with pytest.raises(UnsupportedError, match="5 CPUs are needed, and this virtual machine can have 4"):
        run(machine.update("a", limits(5)))
    with pytest.raises(ResourceExhaustedError, match="can have 4096 MiB"):
        run(machine.update("a", limits(1, 8000)))
    machine.features.clear()
    with pytest.raises(UnsupportedError, match="agent in the guest cannot"):
        run(machine.update("a", limits(2, 400)))
    assert machine.told == []
    assert machine.resizer.describe()["containers"]["a"] == {"cpus": 1.0, "memory": 400 * MIB}


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("memory", []),
        ("cpus", [("memory", plugged(1000)), ("memory", 0)]),
        ("apply", [("memory", plugged(1000)), ("cpus", 2), ("memory", 0), ("cpus", 1)]),
    ],
)
def test_a_failure_on_the_way_up_is_taken_back(fails: str, told: list[tuple[str, Any]]) -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 400)))
    machine.fail = {fails}
    with pytest.raises(KataError):
        run(machine.update("a", limits(2, 1000)))
    assert machine.told == told
    assert (machine.resizer.vcpus, machine.resizer.plugged_mib) == (1, 0)


def test_below_its_first_size_the_guest_gives_memory_back() -> None:
    machine = Machine()
    run(machine.resizer.admit("pause", {}, is_sandbox=True))
    run(machine.resizer.admit("a", limits(1, 400)))
    run(machine.update("a", limits(1, 200)))
    assert machine.told == [("limits", limits(1, 200)), ("balloon", given(200))]
    assert machine.resizer.memory_mib == 512 - given(200)
    machine.told.clear()
    run(machine.update("a", limits(1, 250)))
    assert machine.told == [("balloon", given(250)), ("limits", limits(1, 250))]
    run(machine.update("a", limits(1, 1000)))
    assert machine.told[2:] == [("balloon", 0), ("memory", plugged(1000)), ("limits", limits(1, 1000))]
    run(machine.update("a", limits(1, 30)))
    assert machine.told[5:] == [("limits", limits(1, 30)), ("memory", 0), ("balloon", 512 - 60 - 128)]
    assert machine.logged == []


def test_what_the_machine_has_besides_is_not_given_back() -> None:
    machine = Machine()
    machine.extra_memory_mib = 14
    run(machine.resizer.admit("a", limits(1, 400)))
    run(machine.update("a", limits(1, 200)))
    assert machine.told == [("limits", limits(1, 200)), ("balloon", given(200) - 14)]


def test_a_machine_whose_hypervisor_cannot_grow_it_keeps_its_size() -> None:
    machine = Machine()
    machine.capabilities = Capabilities(disk_slots=1)
    run(machine.resizer.admit("a", limits(3, 1000)))
    assert "which keeps its size" in machine.logged[0]
    with pytest.raises(UnsupportedError, match="this virtual machine can have 1"):
        run(machine.update("a", limits(4, 1000)))
    # Nor does its guest give memory back.
    run(machine.update("a", limits(1, 100)))
    assert [name for name, _ in machine.told] == ["limits"]


@pytest.mark.parametrize(
    ("spare", "has", "first", "wanted"),
    [
        (100, 512, 512, 100),
        (500, 512, 512, 512 - sizing.SHRUNK_MIB),  # the guest keeps so much, whatever it says
        (900, 2048, 512, 511),  # plugged memory is not given back this way
        (0, 512, 512, 0),
    ],
)
def test_what_goes_into_a_balloon(spare: int, has: int, first: int, wanted: int) -> None:
    assert balloon_mib(spare, has, first) == wanted


def test_what_a_guest_can_spare_is_by_its_own_figures() -> None:
    target = Size(1, 300, 200 * MIB)
    assert spare_in_guest_mib(target, 450 * MIB, 0) == 250
    assert spare_in_guest_mib(target, 250 * MIB, 200) == 250
    assert spare_in_guest_mib(target, 100 * MIB, 0) == 0
    assert slack_mib(target) == 12
    assert len({target, Size(1, 300, 200 * MIB), Size(1, 300)}) == 2


def test_who_has_no_limit_may_be_using_what_the_machine_has() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 400)))
    run(machine.resizer.admit("b", {}))
    run(machine.update("a", limits(1, 200)))
    assert machine.told == [("limits", limits(1, 200))]
    machine.resizer.remove_container("b")
    run(machine.update("a", limits(1, 200)))
    assert machine.told[1:] == [("limits", limits(1, 200)), ("balloon", given(200))]
    run(machine.resizer.admit("b", {}))
    assert machine.told[3:] == [("balloon", 0)]


def test_who_has_no_limit_counts_beside_those_who_have() -> None:
    pod: dict[str, Any] = {"asked_by": f"{sizing.OF_SANDBOX} (containerd)", "asked_memory": 64 * MIB}
    machine = Machine(memory_mib=101, default_memory_mib=2048, **pod)
    run(machine.resizer.admit("pause", {}, is_sandbox=True))
    run(machine.resizer.admit("proxy", limits(mib=64)))
    assert machine.told == [], "one that stands for its pod is not worth a limit"
    run(machine.resizer.admit("main", {}))
    assert machine.resizer.memory_mib >= sizing.memory_of(64 * MIB, "small") + 2048
    assert machine.resizer.describe()["unlimited"] == ["main"]
    run(machine.resizer.admit("other", {}))
    assert len(machine.told) == 1, "those without share it"

    machine = Machine(memory_mib=102, max_memory_mib=1000, default_memory_mib=2048, **pod)
    run(machine.resizer.admit("proxy", limits(mib=64)))
    run(machine.resizer.admit("main", {}))
    assert machine.resizer.memory_mib == 1000, "as far as there is room, which is no error"


def test_sets_of_processors_are_one_and_never_more_than_there_may_be() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", {"cpu": {"cpus": "0,1"}}))
    run(machine.resizer.admit("b", {"cpu": {"cpus": "1-2"}}))
    assert machine.resizer.vcpus == 3
    run(machine.resizer.admit("c", {"cpu": {"cpus": "0-63"}}))
    assert machine.resizer.vcpus == 4


def test_what_the_guest_does_not_give_back_is_told() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 400)))
    machine.spare = 100
    run(machine.update("a", limits(1, 200)))
    assert machine.logged == [
        f"the guest has not given back {given(200) - 100} MiB of memory; the limits hold in it"
    ]
    assert (machine.resizer.memory_mib, machine.resizer.returned_mib) == (412, 100)
    machine.spare = 1000
    run(machine.update("a", limits(1, 200)))
    assert machine.resizer.memory_mib == 512 - given(200)
    assert len(machine.logged) == 1
    machine.fail = {"balloon"}
    run(machine.update("a", limits(1, 150)))
    assert "stays larger than what is asked for: no balloon" in machine.logged[1]
    assert machine.resizer.describe()["memory"] == 150 * MIB


def test_what_is_plugged_and_stuck_goes_into_the_balloon() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 1000)))
    machine.stuck = 300
    machine.told.clear()
    run(machine.update("a", limits(1, 600)))
    more = 512 + 300 - sizing.memory_of(600 * MIB, "small")
    assert machine.told == [("limits", limits(1, 600)), ("memory", plugged(600)), ("balloon", more)]
    run(machine.update("a", limits(1, 300)))
    assert machine.told[3:] == [
        ("limits", limits(1, 300)),
        ("memory", 0),
        ("balloon", given(300) + 300),
    ]
    assert machine.logged == []


def test_a_guest_that_lies_about_its_memory_does_not_lose_all_of_it() -> None:
    machine = Machine()
    run(machine.resizer.admit("a", limits(1, 400)))
    machine.plugged = 1 << 20
    run(machine.update("a", limits(1, 200)))
    assert machine.told[1:] == [("balloon", 512 - 128)]


@pytest.mark.parametrize(
    ("plugged_in", "in_balloon"), [(1 << 40, 0), (-(1 << 40), 0), (0, -(1 << 40)), (0, 1 << 40)]
)
def test_a_monitor_that_lies_about_its_size_raises_no_limit(plugged_in: int, in_balloon: int) -> None:
    """What is the machine's on the host follows from it, and the monitor may have been taken over."""

    class Liar(Machine):
        async def set_memory(self, mib: int) -> int:
            return plugged_in or await super().set_memory(mib)

        async def set_balloon(self, mib: int) -> int:
            return in_balloon or await super().set_balloon(mib)

    machine = Liar()
    run(machine.resizer.admit("a", limits(1, 600)))
    assert 512 <= machine.resizer.memory_mib <= 512 + plugged(600)
    run(machine.update("a", limits(1, 200)))
    assert 0 < machine.resizer.memory_mib <= 512 + plugged(600)


def test_a_machine_that_keeps_its_size() -> None:
    machine = Machine(max_vcpus=0, max_memory_mib=0)
    run(machine.resizer.admit("a", limits(2, 1000)))
    assert "asks for more than its machine has" in machine.logged[0]
    with pytest.raises(UnsupportedError):
        run(machine.update("a", limits(3, 100)))
    assert machine.told == []


def test_a_change_is_laid_over_what_was() -> None:
    before = {"cpu": {"quota": 1, "period": 2}, "memory": {"limit": 5}}
    after = merged(before, {"cpu": {"quota": 7, "shares": None}, "pids": {"limit": 3}})
    assert after == {"cpu": {"quota": 7, "period": 2}, "memory": {"limit": 5}, "pids": {"limit": 3}}
    assert before["cpu"] == {"quota": 1, "period": 2}


class Device:
    """A virtio-mem or a balloon whose guest does as it is told, as far as it can.

    Args:
        size: What is plugged, or returned.
        least, most: As far as the guest goes.
    """

    FIRST = 1024

    def __init__(self, size: int, least: int = 0, most: int = 1 << 20) -> None:
        self.size = self.requested = size * MIB
        self.least = least * MIB
        self.most = most * MIB

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        if name == "query-balloon":
            return {"actual": self.FIRST * MIB - self._step()}
        assert arguments is not None
        if name == "qom-set":
            if arguments["value"] > 4096 * MIB:
                raise HypervisorError("QEMU refused qom-set: exceeds the memory backend")
            self.requested = arguments["value"]
            return {}
        if name == "balloon":
            self.requested = self.FIRST * MIB - arguments["value"]
            return {}
        return self._step()

    def _step(self) -> int:
        wanted = min(max(self.requested, self.least), self.most)
        self.size += max(-64 * MIB, min(64 * MIB, wanted - self.size))
        return self.size


def test_memory_comes_and_goes_in_steps() -> None:
    device = Device(0)
    assert asyncio.run(resize.set_memory(device, 512, 0.2)) == 512
    assert asyncio.run(resize.set_memory(device, 128, 0.2)) == 128
    assert device.size == 128 * MIB


def test_memory_that_does_not_come_is_not_asked_for_any_more() -> None:
    device = Device(128, most=300)
    with pytest.raises(HypervisorError, match="did not take 212 of 384 MiB"):
        asyncio.run(resize.set_memory(device, 512, 0.2))
    assert device.requested == 128 * MIB
    with pytest.raises(HypervisorError, match="cannot have 8192 MiB plugged"):
        asyncio.run(resize.set_memory(device, 8192, 0.2))


def test_what_does_not_come_back_stays() -> None:
    device = Device(512, least=300)
    assert asyncio.run(resize.set_memory(device, 128, 0.2)) == 300
    assert device.requested == 300 * MIB


def test_the_balloon_takes_and_returns() -> None:
    device = Device(0, most=700)
    assert asyncio.run(resize.set_balloon(device, Device.FIRST, 500, 0.2)) == 500
    assert asyncio.run(resize.set_balloon(device, Device.FIRST, 900, 0.2)) == 700
    assert device.requested == 700 * MIB
    assert asyncio.run(resize.set_balloon(device, Device.FIRST, 0, 0.2)) == 0
    stuck = Device(600, least=100)
    with pytest.raises(HypervisorError, match="did not take back 100 MiB"):
        asyncio.run(resize.set_balloon(stuck, Device.FIRST, 0, 0.2))
    assert stuck.requested == 600 * MIB


def test_the_explanation_has_the_numbers() -> None:
    machine = Machine()
    run(machine.resizer.admit("abcdef", limits(1.5, 1000)))
    facts = {
        "id": "p",
        "client": "containerd",
        "accelerator": "kvm",
        "vcpus": machine.resizer.vcpus,
        "memory_mib": machine.resizer.memory_mib,
        "sizing": machine.resizer.describe(),
        "host_cgroups": {"memory": "/x/kata/p"},
        "hypervisor_usage": {"rss_bytes": 100 * MIB},
    }
    found = explain.explain(facts)
    now = machine.resizer.memory_mib
    assert found["cpus"] == {"now": 2, "first": 1, "most": 4}
    assert found["host"]["memory_mib"] == now + 256 + now // 32
    text = "\n".join(explain._lines(found))
    assert "max(1, ceil(1.5)) = 2" in text
    assert f"max(64, (1000 + 39 + 21) / (1 - 0.0176)) = {sizing.memory_of(1000 * MIB, 'small')} MiB" in text
    assert f"now {now} MiB: 512 at the start, {plugged(1000)} plugged, 0 given back" in text
    assert "until the next update" not in text
    assert "/x/kata/p" in text
