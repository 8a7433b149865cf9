"""What each hypervisor is left with under KVM, read from its running process: the table in docs/reference.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import Kata
from hypervisor_support import with_hypervisor
from test_confinement import NO_CAPABILITIES, capabilities, descriptors, namespaces, status

from kata import confinement, sysio

NAMES = {"qemu": [], "cloud-hypervisor": ["disks", "state"], "firecracker": ["disks", "state"]}
"""What is in the root directory of each."""
OWN_NAMESPACES = {"cgroup", "ipc", "mnt", "pid", "uts"}
UNNAMED = ("anon_inode:", "socket:", "pipe:", "/memfd:", "/dev/null", "/null")
DEVICES = ("/kvm", "/vhost-vsock", "/vhost-net", "/net/tun", "/urandom")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_what_a_hypervisor_is_left_with(
    name: str, kvm_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    kata = with_hypervisor(kvm_kata, name, tmp_path)
    kata.ok("run", "-d", "--name", "held", "--network", "none", busybox_image, "sleep", "600")
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
        assert {kind for kind in its if its[kind] != ours[kind]} == OWN_NAMESPACES
        assert its["mnt"] != namespaces(os.getpid())["mnt"]
        assert status(pid)["NSpid"].split()[-1] == "1"
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
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
        assert {one.target for one in sysio.mounts(pid)} <= {"/", "/dev"} | {
            f"/{one}" for one in NAMES[name]
        }
    finally:
        kata.ok("rm", "-f", "held")
