"""The list of a container's disks is that of the machine, also when the call that attaches one is cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.containers.attached_disks import AttachedDisks
from kata.engine.containers.snapshot_root import LayerDisks
from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.engine.tasks import Tasks
from kata.journal import Journal


class Slow:
    """A machine that takes its time with a disk."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.disks: list[str] = []
        life = Lifecycle("s1")
        life.enter(SandboxState.BOOTING)
        self.runtime: Any = SimpleNamespace(
            vm=self,
            machine=SimpleNamespace(capabilities=None, cgroup=None),
            race_vm_exit=life.race_vm_exit,
            is_lost=False,
        )

    async def attach_disk(self, _disk: object) -> str:
        self.begun.set()
        await self.go_on.wait()
        self.disks.append("02/03")
        return "02/03"

    async def detach_disk(self, address: str) -> None:
        self.disks.remove(address)


def test_a_cancelled_insertion_leaves_no_disk_behind(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.touch()

    async def run() -> None:
        slow = Slow()
        disks = AttachedDisks(slow.runtime, Tasks("s1"))
        inserting = asyncio.create_task(disks.insert(str(image), readonly=False))
        await slow.begun.wait()
        inserting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await inserting
        removing = asyncio.create_task(disks.remove_all())
        await asyncio.sleep(0)
        slow.go_on.set()
        await removing
        await asyncio.sleep(0.05)
        assert slow.disks == []

    asyncio.run(run())


def test_layers_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    """The image's disk is taken out again, and the next container gets one."""
    image = tmp_path / "layers.erofs"
    image.touch()

    async def run() -> None:
        slow = Slow()
        layers = LayerDisks(slow.runtime, Tasks("s1"), Journal.create(str(tmp_path / "journal"), {}))
        taking = asyncio.create_task(layers.take(str(image)))
        await slow.begun.wait()
        taking.cancel()
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert slow.disks == []
        assert await layers.take(str(image)) == "02/03"
        await layers.give_back(str(image))
        assert slow.disks == []

    asyncio.run(run())
