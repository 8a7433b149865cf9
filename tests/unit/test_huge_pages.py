"""Memory of guests in huge pages: what is checked before a machine is started, and what the monitors are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kata.errors import ResourceExhaustedError, UnsupportedError
from kata.hypervisor import huge_pages
from kata.hypervisor.base import Attachments, MachineShape
from kata.hypervisor.cloud_hypervisor import command as ch_command
from kata.hypervisor.firecracker import config as fc_config
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu.settings import VMSettings


def test_what_is_free_is_known_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "free_hugepages").write_text("100\n")
    (tmp_path / "resv_hugepages").write_text("37\n")
    huge_pages.check(126, str(tmp_path))
    with pytest.raises(
        ResourceExhaustedError, match="needs 64 huge pages of 2 MiB, and the host has 63 free"
    ) as caught:
        huge_pages.check(127, str(tmp_path))
    assert "1 are missing" in caught.value.hint
    with pytest.raises(UnsupportedError, match="this host has no huge pages"):
        huge_pages.check(2, str(tmp_path / "none"))
    assert (huge_pages.whole(1), huge_pages.whole(2), huge_pages.whole(255)) == (2, 2, 256)


def test_what_each_monitor_is_told() -> None:
    shape = MachineShape(
        kernel="/k", initrd="/i", memory_mib=256, max_memory_mib=512, huge_pages=True, ksm=True
    )
    attachments = Attachments(sandbox_id="x", run_dir="/run/x")
    fds = dict.fromkeys(("api", "events", "kernel", "initrd"), 3)
    argv = ch_command.build("/ch", shape, attachments, "/run/x/v", fds)
    assert "hugepages=on,hugepage_size=2M,mergeable=on" in argv[argv.index("--memory") + 1]
    slots = fc_config.Slots(shape, attachments)
    document = fc_config.build(shape, attachments, slots, vsock="/run/x/v", taps={})
    assert document["machine-config"]["huge_pages"] == "2M"
    vm = VMSettings(
        name="x",
        run_dir="/",
        kernel="/k",
        initrd="/i",
        binary="/q",
        memory_mib=256,
        max_memory_mib=512,
        huge_pages=True,
    )
    argv = qemu_command.build(vm, qemu_command.Fds(3, 4, 5, kernel=6, initrd=7, disks={}))
    objects = [argv[index + 1] for index, word in enumerate(argv) if word == "-object"]
    assert sum("memfd,share=on,hugetlb=on,hugetlbsize=2M" in one for one in objects) == 2
    assert any("virtio-mem-pci" in word and "prealloc=on" in word for word in argv)
    assert any(word.startswith("q35") and "memory-backend=ram" in word for word in argv)
