"""Guests whose memory is in huge pages, with each hypervisor that is here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from hypervisor_support import with_hypervisor

from kata.hypervisor import registry

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
MIB = 1 << 20
RETURNED = "kata_shim_guest_memory_returned_bytes "


@pytest.fixture
def pool() -> Iterator[None]:
    """600 MiB of huge pages of this machine, or as many as it has room for."""
    if os.geteuid() != 0 or not POOL.exists():
        pytest.skip("needs root, and a kernel with huge pages")
    before = POOL.read_text()
    POOL.write_text("300")
    try:
        if int(POOL.read_text()) < 300:
            pytest.skip("this machine has no room for 300 huge pages")
        yield
    finally:
        POOL.write_text(before)


@pytest.mark.parametrize("name", registry.names())
def test_a_guest_in_huge_pages(
    name: str, kvm_kata: Kata, pool: None, busybox_image: str, tmp_path: Path
) -> None:
    kata = with_hypervisor(kvm_kata, name, tmp_path, "enable_hugepages = true")
    run = ("run", "--network", "none")
    more = kata.call(*run, "--rm", "-m", "2g", busybox_image, "true")
    assert more.returncode == 125
    assert b"huge pages of 2 MiB, and the host has 300 free" in more.stderr
    kata.ok(*run, "-d", "--name", "huge", "-m", "256m", busybox_image, "sleep", "1000")
    try:
        free = int((POOL.parent / "free_hugepages").read_text())
        assert free < 300
        # What the guest has given back, or has not touched, is told from its huge pages.
        found = [line for line in kata.ok("metrics", "huge").splitlines() if line.startswith(RETURNED)]
        assert bool(found) == (name != "firecracker")  # which marks no memory as its guest's
        assert all(0 < float(line.split()[-1]) < 512 * MIB for line in found)
        assert kata.ok("exec", "huge", "sh", "-c", "echo in; cat /proc/1/comm") == "in\nsleep\n"
    finally:
        kata.ok("rm", "-f", "huge")
    assert int((POOL.parent / "free_hugepages").read_text()) == 300
