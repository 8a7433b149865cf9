"""What each hypervisor and its helpers are left with under KVM, read from the running processes: the table in
docs/reference.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from hypervisor_support import with_hypervisor
from test_confinement import (
    FILE_SERVER_CAPABILITIES,
    NO_CAPABILITIES,
    OWN_NAMESPACES,
    capabilities,
    descriptors,
    family,
    in_their_cgroups,
    namespaces,
    no_core_dump,
    status,
)
from waiting import until

from kata import confinement, mount_table
from kata.hypervisor import virtiofsd

NAMES = {"qemu": [], "cloud-hypervisor": ["disks", "state"], "firecracker": ["disks", "state"]}
"""What is in the root directory of each."""
HELPERS = {"qemu": {"passt", "virtiofsd"}, "cloud-hypervisor": {"virtiofsd"}, "firecracker": set()}
OF_ITS_OWN = OWN_NAMESPACES["qemu-system-x86"]
UNNAMED = ("anon_inode:", "socket:", "pipe:", "/memfd:", "/dev/null", "/null")
DEVICES = ("/kvm", "/vhost-vsock", "/vhost-net", "/net/tun", "/urandom")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_a_hypervisor_is_left_with(
    name: str, kvm_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    if HELPERS[name] and virtiofsd.find() is None:
        pytest.skip("needs virtiofsd (apt-get install virtiofsd)")
    kata = with_hypervisor(kvm_kata, name, tmp_path, 'shared_fs = "virtio-fs"' if HELPERS[name] else "")
    options = ["-v", f"{tmp_path}:/v"] if HELPERS[name] else []
    options += ["-p", "8293:80"] if "passt" in HELPERS[name] else ["--network", "none"]
    kata.ok("run", "-d", "--name", "held", "-m", "128m", *options, busybox_image, "sleep", "600")
    try:
        engine = kata.engine_pid("held")
        [found] = json.loads(kata.ok("inspect", "held"))
        pid = found["state"]["pid"]
        own = confinement.FIRST_USER + confinement.USERS_PER_SANDBOX * engine
        assert status(pid)["Uid"].split() == status(pid)["Gid"].split() == [str(own)] * 4
        assert capabilities(pid) == NO_CAPABILITIES
        filters = []
        for task in os.listdir(f"/proc/{pid}/task"):
            told = status(int(task))
            assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2"), told["Name"]
            filters.append(int(told["Seccomp_filters"]))
            assert int(told["CapBnd"], 16) == 0, told["Name"]
        # Ours is in every thread, beneath those that it gives its threads itself.
        assert min(filters) >= 1
        assert max(filters) >= 2
        its, ours = namespaces(pid), namespaces(engine)
        assert {kind for kind in its if its[kind] != ours[kind]} == OF_ITS_OWN
        assert its["mnt"] != namespaces(os.getpid())["mnt"]
        assert status(pid)["NSpid"].split()[-1] == "1"
        limits = Path(f"/proc/{pid}/limits").read_text()
        no_core_dump(pid)
        assert re.search(r"Max open files +1024 +1024 ", limits)
        assert re.search(r"Max processes +1024 +1024 ", limits)

        # Of the host's files it has those that the sandbox is made of, and it finds no other.
        assert sorted(os.listdir(f"/proc/{pid}/root")) == NAMES[name]
        state = os.fspath(kata.container_dir("held"))
        directory = os.fspath(kata.run_dir / "sandboxes" / found["id"])
        for target in set(descriptors(pid).values()):
            its_own = target.startswith((state, directory)) or target.endswith(".erofs")
            its_own = its_own or os.path.basename(target).startswith(("vmlinux-", "initrd-"))
            assert its_own or target.startswith(UNNAMED) or target.endswith(DEVICES), target
        assert {one.target for one in mount_table.mounts(pid)} <= {"/", "/dev"} | {
            f"/{one}" for one in NAMES[name]
        }

        its_helpers_are_left_with(name, pid, engine, found["sandbox"])
        says_that_it_was_killed_at_its_limit(kata, Path(found["sandbox"]["host_cgroups"]["memory"]))
    finally:
        kata.ok("rm", "-f", "held")


def its_helpers_are_left_with(name: str, pid: int, engine: int, sandbox: dict[str, Any]) -> None:
    processes = family(engine)
    assert processes.pop(os.path.basename(os.readlink(f"/proc/{pid}/exe"))[:15]) == pid
    assert processes.keys() == HELPERS[name]
    in_their_cgroups(sandbox, (engine, pid, *processes.values()))
    ours = namespaces(engine)
    for helper, its_pid in processes.items():
        told, its = status(its_pid), namespaces(its_pid)
        assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2"), helper
        assert int(told["Seccomp_filters"]) >= 2, helper
        assert {kind for kind in its if its[kind] != ours[kind]} == OWN_NAMESPACES[helper], helper
        no_core_dump(its_pid)
        if helper == "virtiofsd":
            wanted = sum(1 << number for number in FILE_SERVER_CAPABILITIES)
            assert capabilities(its_pid)["CapPrm"] == capabilities(its_pid)["CapEff"] == wanted
            assert told["Uid"].split() == ["0"] * 4
        else:
            assert capabilities(its_pid) | {"CapBnd": 0} == NO_CAPABILITIES
            assert told["Uid"].split() == ["65534"] * 4


def says_that_it_was_killed_at_its_limit(kata: Kata, memory: Path) -> None:
    """By the kernel; memory: its cgroup."""
    now = int((memory / "memory.current").read_text())
    (memory / "memory.max").write_text(str(now + (8 << 20)))
    kata.call("exec", "held", "dd", "if=/dev/zero", "of=/dev/shm/more", "bs=1M", "count=100")
    assert kata.ok("wait", "held").strip() == "137"
    state = json.loads((kata.container_dir("held") / "state.json").read_text())
    assert f"reached the limit on memory of its cgroup {memory}" in state["error"]
    until(lambda: not memory.exists(), "the cgroup is gone")
