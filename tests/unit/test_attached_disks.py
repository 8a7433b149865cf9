"""The list of a container's disks is that of the machine, also when the call that attaches one is cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.containers.attached_disks import AttachedDisks
from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState


def test_a_cancelled_insertion_leaves_no_disk_behind(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.touch()

    async def run() -> None:
        life = Lifecycle("s1")
        life.enter(SandboxState.BOOTING)
        begun, go_on = asyncio.Event(), asyncio.Event()
        in_machine: list[str] = []

        async def attach_disk(_disk: object) -> str:
            begun.set()
            await go_on.wait()
            in_machine.append("02/03")
            return "02/03"

        async def detach_disk(address: str) -> None:
            in_machine.remove(address)

        async def run_blocking(work: Any, *arguments: Any) -> Any:
            return work(*arguments)

        runtime: Any = SimpleNamespace(
            vm=SimpleNamespace(attach_disk=attach_disk, detach_disk=detach_disk),
            machine=SimpleNamespace(capabilities=None, cgroup=None),
            race_vm_exit=life.race_vm_exit,
            is_lost=False,
        )
        tasks: Any = SimpleNamespace(run_blocking=run_blocking)
        disks = AttachedDisks(runtime, tasks)
        inserting = asyncio.create_task(disks.insert(str(image), readonly=False))
        await begun.wait()
        inserting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await inserting
        removing = asyncio.create_task(disks.remove_all())
        await asyncio.sleep(0)
        go_on.set()
        await removing
        await asyncio.sleep(0.05)
        assert in_machine == []

    asyncio.run(run())
