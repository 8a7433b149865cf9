"""Engine, hypervisor and helper in the host's cgroups: limited, told when a limit killed, gone at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Kata
from waiting import until

from kata import sysio
from kata.hypervisor import registry
from kata.resources import host_cgroup, sizing

FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.5; done"
ALL = {"memory", "cpu", "pids"}

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or {name for one in host_cgroup.hierarchies() for name in one.controllers} != ALL,
    reason="needs root, and mounted cgroups with memory, cpu and pids",
)


def sandbox_of(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", name))[0]
    assert "sandbox" in found, found
    return dict(found["sandbox"])


def members(path: str) -> set[int]:
    return {int(line) for line in Path(path, "cgroup.procs").read_text().split()}


@pytest.fixture(scope="module")
def box(shared_kata: Kata, busybox_image: str) -> Iterator[str]:
    shared_kata.ok("run", "-d", "--name", "limited", "-m", "128m", busybox_image, "sh", "-c", FOREVER)
    try:
        yield "limited"
    finally:
        shared_kata.ok("rm", "-f", "limited")


def test_all_of_a_sandbox_is_in_its_limits(shared_kata: Kata, box: str) -> None:
    found = sandbox_of(shared_kata, box)
    paths = found["host_cgroups"]
    assert set(paths) == ALL
    limits = host_cgroup.Limits(
        sizing.host_memory(found["memory_mib"], registry.find().host_overhead_mib(found["accelerator"])),
        sizing.host_cpus(found["vcpus"]),
    )
    engine, hypervisor = found["engine_pid"], found["hypervisor_pid"]
    children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    [helper] = [int(pid) for pid in children if "passt" in Path(f"/proc/{pid}/comm").read_text()]
    for hierarchy in host_cgroup.hierarchies():
        for controller in hierarchy.controllers:
            path = paths[controller]
            assert path == f"{hierarchy.top}/kata/{found['id']}"
            for file, content in limits.files(hierarchy.version, controller):
                assert Path(path, file).read_text().strip() == content
            assert {engine, hypervisor} <= members(path)
            # Under version 2 the helper has a cgroup below, which the limits reach as well.
            below = [directory for directory, _, _ in os.walk(path) if helper in members(directory)]
            assert len(below) == 1


def test_a_guest_that_fills_its_memory_stays_below(shared_kata: Kata, box: str) -> None:
    script = (
        "dd if=/dev/zero of=/dev/shm/full bs=1M count=60; dd if=/dev/zero of=/big bs=1M count=100; echo here"
    )
    assert (
        shared_kata.ok("exec", box, "sh", "-c", f"{script} 2>/dev/null; rm /big /dev/shm/full") == "here\n"
    )
    path = Path(sandbox_of(shared_kata, box)["host_cgroups"]["memory"])
    events = (path / "memory.events") if (path / "memory.events").exists() else path / "memory.oom_control"
    words = events.read_text().split()
    assert words[words.index("oom_kill") + 1] == "0"


def test_a_machine_that_the_limit_killed_says_so(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("run", "-d", "--name", "one", "--network", "none", busybox_image, "sh", "-c", FOREVER)
    found = sandbox_of(kata_env, "one")
    path = Path(found["host_cgroups"]["memory"])
    v2 = (path / "memory.max").exists()
    now = int((path / ("memory.current" if v2 else "memory.usage_in_bytes")).read_text())
    (path / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(now + (16 << 20)))
    kata_env.call("exec", "one", "dd", "if=/dev/zero", "of=/dev/shm/more", "bs=1M", "count=600")
    assert kata_env.ok("wait", "one").strip() == "137"
    state = json.loads((kata_env.container_dir("one") / "state.json").read_text())
    assert f"reached the limit on memory of its cgroup {path}" in state["error"]
    until(lambda: not path.exists(), "the cgroup is gone")
    kata_env.ok("rm", "one")


def test_an_orderly_end_leaves_no_cgroup(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("run", "-d", "--name", "one", "--network", "none", busybox_image, "sh", "-c", FOREVER)
    paths = sandbox_of(kata_env, "one")["host_cgroups"]
    engine = kata_env.engine_pid("one")
    kata_env.ok("stop", "one")
    until(lambda: sysio.proc_starttime(engine) is None, "the engine is gone")
    assert [path for path in paths.values() if os.path.exists(path)] == []


def test_the_cgroups_of_an_engine_that_was_killed_are_collected(kata_env: Kata, busybox_image: str) -> None:
    kata_env.ok("run", "-d", "--name", "one", "--network", "none", busybox_image, "sh", "-c", FOREVER)
    paths = sandbox_of(kata_env, "one")["host_cgroups"]
    engine = kata_env.engine_pid("one")
    os.kill(engine, signal.SIGKILL)
    until(lambda: sysio.proc_starttime(engine) is None, "the engine is gone")
    kata_env.ok("gc")
    assert [path for path in paths.values() if os.path.exists(path)] == []
    kata_env.ok("rm", "-f", "one")


def test_the_declared_overhead_covers_what_is_measured(guest_assets: Path) -> None:
    """`bench/overhead.py` on one idle machine: engine, hypervisor and helpers beside the guest's memory."""
    program = [sys.executable, "-I", str(ROOT / "bench/overhead.py"), "--json", "--idle", "--mib", "192"]
    environment = {**os.environ, "KATA_GUEST_DIR": str(guest_assets)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)
    idle = found["idle"]
    assert 0 < idle["guest"] <= 192 * 1.2
    assert idle["qemu"] > 20
    assert 5 < idle["engine"] < 40
    # What is left is for the translated code of a guest that works, and for page cache.
    assert idle["in all"] < 0.6 * idle["allowed"], found
