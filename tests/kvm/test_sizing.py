"""A running machine's memory under KVM: virtio-mem above what it was started with, its balloon below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import Kata

from kata.engine.client import EngineClient
from kata.hypervisor.qemu import queues
from kata.resources import sizing

MIB = 1 << 20


def test_memory_follows_the_limit_both_ways(kvm_kata: Kata, busybox_image: str) -> None:
    alone = ("--network", "none")
    kvm_kata.ok("run", "-d", "--name", "sized", "-m", "256m", *alone, busybox_image, "sleep", "100000")
    found: dict[str, Any] = json.loads(kvm_kata.ok("inspect", "sized"))[0]
    leaf = Path(found["sandbox"]["host_cgroups"]["memory"])
    with EngineClient(str(kvm_kata.run_dir / "sandboxes" / found["id"] / "engine.sock")) as engine:

        def become(mib: int) -> tuple[int, int]:
            """Have this limit; what the engine says was returned and plugged, in MiB."""
            engine.update(found["id"], {"memory": {"limit": mib * MIB, "swap": mib * MIB}})
            size = engine.describe()["sizing"]
            machine = (
                size["first_memory_mib"] + size["plugged_mib"] - size["returned_mib"] + size["besides_mib"]
            )
            assert int((leaf / "memory.max").read_text()) == (machine + 256 + machine // 32) * MIB
            total = kvm_kata.ok("exec", "sized", "awk", "/MemTotal/ {print int($2 / 1024)}", "/proc/meminfo")
            assert (
                mib
                <= int(total)
                <= (sizing.total_of(mib * MIB, "small") // MIB) * 1.05 + queues.LONG_QUEUES_MIB
            )
            return size["returned_mib"], size["plugged_mib"]

        returned, plugged = become(160)
        assert returned > 64
        assert plugged == 0
        returned, plugged = become(500)
        assert returned == 0
        assert plugged > 200
    kvm_kata.ok("rm", "-f", "sized")
