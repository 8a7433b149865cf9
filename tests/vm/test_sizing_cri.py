"""The size of machines under real clients: what was asked for, while they run, and what `kata explain` says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import containerd_support
import pytest
from conftest import Kata
from containerd_support import Containerd
from test_cri import Cri, clean, running

from kata.engine.client import EngineClient
from kata.errors import KataError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    with containerd_support.running(run_directory, guest_assets, busybox_image) as one:
        yield one
        containerd_support.clean(one)


def kata_of(daemon: Containerd, guest: Path) -> Kata:
    """A `kata` that looks at the daemon's sandboxes."""
    found = Kata(daemon.directory, guest)
    found.env |= {"KATA_RUN_DIR": daemon.env["KATA_RUN_DIR"], "KATA_STATE_DIR": daemon.env["KATA_STATE_DIR"]}
    return found


def explained(kata: Kata, name: str) -> dict[str, Any]:
    return dict(json.loads(kata.ok("explain", "--json", name))[0])


def guest_size(say: str) -> tuple[int, float]:
    """`nproc` and MemTotal in MiB, from the output of `LOOK`."""
    cpus, memory = say.split()[:2]
    return int(cpus), int(memory) / 1024


LOOK = ("sh", "-c", "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo")


def test_a_container_has_what_it_asks_for_and_follows_updates(
    daemon: Containerd, guest_assets: Path
) -> None:
    file = daemon.directory / "c.toml"
    file.write_text("[hypervisor.qemu]\ndefault_maxmemory = 2000\n")
    limits = ("--cpus", "0.5", "--memory-limit", str(300 * MIB), "--runtime-config-path", str(file))
    daemon.detached("z1", "sleep", "1000", options=limits)
    kata = kata_of(daemon, guest_assets)
    count = 0

    def look() -> tuple[int, float]:
        nonlocal count
        count += 1
        return guest_size(daemon.ok("task", "exec", "--exec-id", f"l{count}", "z1", *LOOK))

    cpus, memory = look()
    assert cpus == 1
    assert 300 <= memory <= 315
    found = explained(kata, "z1")
    assert found["asked"]["cpus"] == 0.5
    assert found["asked"]["memory_mib"] == 300
    first = found["memory_mib"]["now"]
    text = kata.ok("explain", "z1")
    assert "max(1, ceil(0.5)) = 1" in text
    assert f"now {first} MiB" in text
    with EngineClient(str(daemon.run_dir / "sandboxes/default.z1/engine.sock")) as engine:
        engine.update("z1", asking(150_000, 900))
    cpus, memory = look()
    assert cpus == 2
    assert 900 <= memory <= 945
    found = explained(kata, "z1")
    assert (found["cpus"]["now"], found["memory_mib"]["first"]) == (2, first)
    limit = Path(found["host"]["cgroups"]["memory"])
    written = next(
        limit / name for name in ("memory.max", "memory.limit_in_bytes") if (limit / name).exists()
    )
    assert abs(int(written.read_text()) - found["host"]["memory_mib"] * MIB) < MIB

    with EngineClient(str(daemon.run_dir / "sandboxes/default.z1/engine.sock")) as engine:
        with pytest.raises(KataError, match="this virtual machine can have"):
            engine.update("z1", asking(150_000, 4000))
        assert look() == (cpus, memory)
        engine.update("z1", asking(100_000, 300))
    cpus, memory = look()
    assert cpus == 1
    assert 300 <= memory <= 330
    assert explained(kata, "z1")["memory_mib"]["plugged"] <= first * 0.04
    daemon.remove("z1")


def asking(quota: int, mib: int) -> dict[str, Any]:
    """Resources as the runtime specification has them."""
    return {"cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": mib * MIB}}


@pytest.fixture(scope="module")
def cri(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Cri]:
    file = run_directory / "sizing.toml"
    file.write_text(
        "[hypervisor.qemu]\ndefault_memory = 256\nenable_annotations = ['default_vcpus', 'default_memory']\n"
    )
    options = f"""\
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata.options]
ConfigPath = "{file}"
"""
    with running(run_directory, guest_assets, busybox_image, second=False, more=options) as one:
        yield one
        clean(one)


def in_container(cri: Cri, container: str) -> tuple[int, float]:
    return guest_size(cri("exec", "-s", container, *LOOK))


def linux(quota: int, mib: int) -> dict[str, Any]:
    """Limits as the CRI has them."""
    return {
        "resources": {"cpu_period": 100_000, "cpu_quota": quota, "memory_limit_in_bytes": mib * MIB},
    }


def test_a_pod_grows_with_its_containers_and_with_updates(cri: Cri, guest_assets: Path) -> None:
    pod = cri.pod()
    kata = kata_of(cri.daemon, guest_assets)
    assert explained(kata, pod[0][:13])["memory_mib"]["now"] == 256
    one = cri.container(pod, "one", "sleep", "1000", linux=linux(70_000, 200))
    assert in_container(cri, one)[0] == 1
    two = cri.container(pod, "two", "sleep", "1000", linux=linux(70_000, 400))
    cpus, memory = in_container(cri, two)
    assert cpus == 2
    assert 600 <= memory <= 630
    assert in_container(cri, one)[0] == 2, "it is one machine"
    found = explained(kata, two[:13])
    assert sorted(
        one["memory"] // MIB for one in found["asked"]["containers"].values() if one["memory"]
    ) == [200, 400]
    cri("update", "--cpu-period", "100000", "--cpu-quota", "20000", "--memory", str(100 * MIB), two)
    cpus, memory = in_container(cri, two)
    assert cpus == 1
    assert 300 <= memory <= 330
    clean(cri)


def test_a_pods_own_figures_and_its_annotations(cri: Cri, guest_assets: Path) -> None:
    sized = cri.pod(**linux(150_000, 400))
    kata = kata_of(cri.daemon, guest_assets)
    asked = explained(kata, sized[0])["asked"]
    assert (asked["cpus"], asked["memory_mib"]) == (1.5, 400)
    assert asked["source"].startswith("the sandbox's annotations")
    box = cri.container(sized, "box", "sleep", "1000", linux=linux(150_000, 400))
    cpus, memory = in_container(cri, box)
    assert cpus == 2
    assert 400 <= memory <= 420
    clean(cri)
    prefix = "io.katacontainers.config.hypervisor"
    annotated = cri.pod({f"{prefix}.default_vcpus": "2", f"{prefix}.default_memory": "320"})
    box = cri.container(annotated, "box", "sleep", "1000")
    cpus, memory = in_container(cri, box)
    assert cpus == 2
    assert 290 <= memory <= 320
    clean(cri)
    with pytest.raises(AssertionError, match="machine_type is not allowed on this host: enable_annotations"):
        cri.pod({f"{prefix}.machine_type": "pc"})
