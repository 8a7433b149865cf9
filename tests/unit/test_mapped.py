"""Images that guests map (`kata.hypervisor.mapped`): which, of what size, and what QEMU and the guest are told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from kata.engine.containers import rootfs
from kata.engine.factory import pool
from kata.errors import UnsupportedError
from kata.hypervisor import mapped
from kata.hypervisor.base import Disk, MachineShape
from kata.hypervisor.qemu import command, saving
from kata.hypervisor.qemu.settings import VMSettings
from kata.settings import RootfsSettings
from kata.storage import erofs_format, whole_file

SHAPE = MachineShape(kernel="/k", initrd="/i", mapped_mib=512)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    path = tmp_path / "image.erofs"
    path.touch(0o400)
    return path


def sized(path: Path, size: int) -> Path:
    os.truncate(path, size)
    os.utime(path, ns=(1, 2))
    return path


@pytest.mark.parametrize(
    ("size", "mib"), [(4096, 128), (128 << 20, 128), ((128 << 20) + 1, 512), (3 << 30, 8192)]
)
def test_an_image_goes_into_the_next_size_and_stays_there(image: Path, size: int, mib: int) -> None:
    sized(image, size)
    for _ in range(2):
        assert mapped.prepare(str(image), 4096) == (mib, "")
        status = image.stat()
        assert (status.st_size, status.st_mode & 0o777, status.st_mtime_ns) == (mib << 20, 0o404, 2)


@pytest.mark.parametrize(
    ("size", "memory_mib", "mode", "reason"),
    [
        ((8 << 30) + 1, 65536, 0o700, "its image is larger than 8192 MiB"),
        (
            1 << 30,
            511,
            0o700,
            "the memory map of its image takes 32 MiB, more than a 16th of the machine's memory",
        ),
        (4096, 2048, 0o711, "others can reach "),
    ],
)
def test_others_are_disks_and_left_as_they_are(
    image: Path, size: int, memory_mib: int, mode: int, reason: str
) -> None:
    sized(image, size).parent.chmod(mode)
    mib, said = mapped.prepare(str(image), memory_mib)
    assert mib == 0
    assert said.startswith(reason)
    assert image.stat().st_size == size
    assert image.stat().st_mode & 0o777 == 0o400


def test_one_that_is_gone_is_left_to_who_opens_it(tmp_path: Path) -> None:
    assert mapped.prepare(str(tmp_path / "x"), 2048) == (
        0,
        "its image cannot be made ready: No such file or directory",
    )


def test_an_image_that_is_longer_is_whole_and_a_shorter_one_is_not(image: Path) -> None:
    image.chmod(0o600)
    block = bytearray(erofs_format.BLOCK)
    block[1024:1152] = erofs_format.superblock(inodes=1, blocks=3, uuid=bytes(16))
    image.write_bytes(block)
    sized(image, 128 << 20)
    assert whole_file.is_whole(str(image))
    assert whole_file.size_of(str(image)) == 3 * erofs_format.BLOCK
    sized(image, 2 * erofs_format.BLOCK)
    assert not whole_file.is_whole(str(image))
    assert not image.exists()


def settings(**changes: Any) -> VMSettings:
    vm = VMSettings(name="n", run_dir="/r", kernel="/k", initrd="/i", binary="/q", **changes)
    vm.shape = SHAPE
    return vm


def words(vm: VMSettings) -> tuple[list[str], list[str]]:
    """QEMU's arguments, and those that are about the image."""
    fds = command.Fds(10, 11, None, kernel=13, initrd=14, disks={0: 20, 1: 21})
    argv = command.build(vm, fds)
    return argv, [word for word in argv if "image" in word or word.startswith("size=")]


def test_qemu_has_it_where_the_first_disk_would_be() -> None:
    """By a file that it cannot write to, beyond where a guest without ACPI puts the registers of devices."""
    vm = settings(memory_mib=256, disks=[Disk("/i", True), Disk("/rw", False)])
    argv, found = words(vm)
    assert command.has_small_acpi(vm)
    most = 256 * 2 + 1024 + 16384 + 512
    assert found == [
        f"size=256M,maxmem={most}M",
        "memory-backend-file,id=image,mem-path=/proc/self/fd/20,size=512M,share=on,readonly=on",
        f"virtio-pmem-pci,id=disk0,memdev=image,memaddr={(4 + 1 + 16) << 30:#x},addr=05.0,romfile=",
    ]
    text = " ".join(argv)
    assert "slot0" not in text
    assert "fd=20,set=0" not in text
    assert "fd=21,set=1" in text


def test_a_machine_that_grows_has_it_behind_its_memory() -> None:
    _, found = words(settings(memory_mib=256, max_memory_mib=512, max_vcpus=2))
    assert found[0] == "size=256M,maxmem=1024M"
    assert found[-1] == "virtio-pmem-pci,id=disk0,memdev=image,addr=05.0,romfile="


def test_the_guest_mounts_it_with_dax() -> None:
    root = RootfsSettings(kind="erofs", lower_slot=0, upper_slot=1)
    first, second, _ = rootfs.storages("c", root, ["05", "06"], mapped=True)
    assert (first.driver, first.source, first.fstype) == ("pmem", "05", "erofs")
    assert first.options == ["ro", "dax=always"]
    assert second.driver == "blk"


def test_a_machine_with_it_is_saved_as_a_template_only(tmp_path: Path) -> None:
    machine: Any = type("Machine", (), {"settings": settings()})()
    with pytest.raises(UnsupportedError, match="virtio-pmem"):
        asyncio.run(saving.save(machine, str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_no_machine_waits_for_an_image_to_map() -> None:
    hypervisor = type("Hypervisor", (), {"map_images": True})()
    machine = type("Machine", (), {"hypervisor": hypervisor})()
    sandbox: Any = type(
        "Sandbox", (), {"machine": machine, "pod": None, "host_devices": (), "image_path": lambda self: "/i"}
    )()
    assert pool.why_not(sandbox) == "its image is mapped, which a machine does from its start"
