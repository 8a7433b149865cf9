"""QEMU with KVM and the host's processor: what the guest sees, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import minivm
import pytest

from kata import journal_undo
from kata.errors import HypervisorError
from kata.guest import manifest
from kata.hypervisor.qemu.process import QemuProcess


class Machine:
    """A guest with two processors and a shell, up."""

    def __init__(self, process: QemuProcess, shell: minivm.Shell) -> None:
        self.process = process
        self.shell = shell


@contextlib.contextmanager
def machine(base: Path, guest_assets: Path, **changes: object) -> Iterator[Machine]:
    guest = manifest.load(str(guest_assets))
    journal = minivm.sandbox_dir(base)
    initrd = minivm.build_initrd(base / "initrd", Path(guest.initrd))
    vm = minivm.settings(journal, kernel=guest.kernel, initrd=str(initrd), accel="kvm", **changes)
    process, shell = minivm.start(vm, journal)
    try:
        shell.wait()
        yield Machine(process, shell)
    finally:
        shell.close()
        assert journal_undo.undo(journal, 30) == []
        assert process.child.wait(30) is not None
        process.close()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, guest_assets: Path) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("kvm"), guest_assets, vcpus=2) as made:
        yield made


def processors(text: str) -> list[dict[str, str]]:
    """The blocks of a /proc/cpuinfo."""
    blocks = text.strip().split("\n\n")
    return [
        {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in block.splitlines())
        }
        for block in blocks
    ]


def test_guest_runs_under_kvm(guest: Machine) -> None:
    assert "kvm-clock" in guest.shell.ok(
        "cat /sys/devices/system/clocksource/clocksource0/available_clocksource"
    )
    tree = Path(f"/proc/{guest.process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"kvm" in tree
    # KVM's guests are threads of their hypervisor with a descriptor each.
    opened = {
        os.readlink(f"/proc/{guest.process.pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{guest.process.pid}/fd")
    }
    # (QEMU 10 also has one for the figures of each.)
    assert sum("kvm-vcpu:" in name for name in opened) == 2


def test_guest_has_the_hosts_processor(guest: Machine) -> None:
    seen = processors(guest.shell.ok("cat /proc/cpuinfo"))
    host = processors(Path("/proc/cpuinfo").read_text())[0]
    assert len(seen) == 2
    for one in seen:
        for fact in ("vendor_id", "cpu family", "model", "model name"):
            assert one[fact] == host[fact], fact
        flags = one["flags"].split()
        assert "hypervisor" in flags
        # What programs choose their code by: a guest that lacks it is slower than the host for no reason. (Not
        # AVX: emulated AMD-V does not tell KVM when a guest enables it, and so the guest's kernel does without.)
        for flag in ("aes", "bmi2", "popcnt", "rdrand", "sse4_2"):
            assert (flag in flags) == (flag in host["flags"].split()), flag


def test_all_processors_work(guest: Machine) -> None:
    assert guest.shell.ok("cat /sys/devices/system/cpu/online") == "0-1"
    for cpu in ("1", "2"):
        assert (
            guest.shell.ok(f"taskset {cpu} sh -c 'i=0; while [ $i -lt 500 ]; do i=$((i+1)); done; echo $i'")
            == "500"
        )


@pytest.mark.long
def test_killed_hypervisor_is_explained(tmp_path: Path, guest_assets: Path) -> None:
    with machine(tmp_path, guest_assets) as made:
        os.kill(made.process.pid, signal.SIGKILL)
        assert made.process.child.wait(30) == -signal.SIGKILL
        failure = made.process.failure()
        assert isinstance(failure, HypervisorError)
        assert "signal 9" in failure.message
