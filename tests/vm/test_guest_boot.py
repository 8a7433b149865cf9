"""Guests really boot: both kernels, what they offer to containers, and what they were built from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

from kata.guest import initrd, manifest, packages, recipe
from kata.guest.cpio import Archive

BUSYBOX = "/usr/bin/busybox"

REPORT = """#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
if [ -f /etc/modules ]; then
    while read -r module; do busybox insmod "$module" || echo "failed: $module"; done </etc/modules
fi
busybox mkdir /cg && busybox mount -t cgroup2 cgroup2 /cg
echo "release $(busybox uname -r)"
echo "controllers $(busybox cat /cg/cgroup.controllers)"
echo "filesystems $(busybox awk '{print $NF}' /proc/filesystems | busybox tr '\\n' ' ')"
echo "namespaces $(busybox ls /proc/self/ns | busybox tr '\\n' ' ')"
echo "seccomp $(busybox cat /proc/sys/kernel/seccomp/actions_avail)"
echo "disks $(busybox ls /sys/block | busybox tr '\\n' ' ')"
echo "nics $(busybox ls /sys/class/net | busybox tr '\\n' ' ')"
echo "ports $(busybox cat /sys/class/virtio-ports/*/name | busybox tr '\\n' ' ')"
busybox sleep 1 && echo "slept yes"
echo "kernel $(busybox dmesg | busybox grep -cE 'Oops|BUG:|Call Trace|WARNING:')"
busybox poweroff -f
"""

DEVICES = [
    *("-device", "virtio-serial-pci,id=serial", "-chardev", "null,id=agent"),
    *("-device", "virtserialport,bus=serial.0,chardev=agent,name=agent.channel.0"),
    *("-blockdev", "driver=null-co,node-name=d0,read-zeroes=on", "-device", "virtio-blk-pci,drive=d0"),
    *("-nic", "user,model=virtio-net-pci,restrict=on"),
]


def boot(kernel: str, image: bytes, work: Path, *arguments: str, cmdline: str = "") -> str:
    """Boot until the machine powers itself off; what its console said."""
    ramdisk, console = work / "initrd", work / "console"
    ramdisk.write_bytes(image)
    command = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    command += [
        "-M",
        "q35",
        "-accel",
        "tcg,tb-size=128",
        "-cpu",
        "max,-erms",
        "-m",
        "512",
        "-bios",
        "qboot.rom",
    ]
    command += ["-kernel", kernel, "-initrd", str(ramdisk), "-serial", f"file:{console}"]
    # On a busy host an emulated timer looks broken to a kernel that checks it, which then panics.
    command += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check {cmdline}".strip(), *arguments]
    subprocess.run(command, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    return console.read_text(errors="replace")


def report(
    kernel: str, work: Path, *arguments: str, below: bytes = b"", cmdline: str = ""
) -> dict[str, list[str]]:
    """What a guest says of itself, by the first word of each line."""
    archive = Archive()
    for directory in ("dev", "proc", "sys"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", Path(BUSYBOX).read_bytes(), 0o755)
    archive.file("init", REPORT.encode(), 0o755)
    said = boot(kernel, below + archive.finish(), work, *DEVICES, *arguments, cmdline=cmdline)
    found = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert "failed:" not in found, said
    assert "slept" in found, said
    return found


def check(found: dict[str, list[str]], *, filesystems: str) -> None:
    """What any guest must offer."""
    assert {"cpu", "cpuset", "memory", "pids", "io", "hugetlb"} <= set(found["controllers"])
    assert set(filesystems.split()) <= set(found["filesystems"])
    assert {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} <= set(found["namespaces"])
    assert {"kill_process", "errno", "log", "allow"} <= set(found["seccomp"])
    assert "vda" in found["disks"]
    assert "eth0" in found["nics"]
    assert found["ports"] == ["agent.channel.0"]
    assert found["kernel"] == ["0"]


@pytest.fixture(scope="module")
def small(guest_assets: Path) -> manifest.Guest:
    guest = manifest.load(str(guest_assets))
    if guest.kernel_kind != "small":
        pytest.skip("needs a guest with the small kernel (tools/setup test builds it)")
    return guest


def test_the_manifest_tells_the_truth(guest_assets: Path) -> None:
    guest = manifest.load(str(guest_assets))
    for path, facts in ((guest.kernel, guest.content["kernel"]), (guest.initrd, guest.content["initrd"])):
        content = Path(path).read_bytes()
        assert len(content) == facts["size"]
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]


def test_a_static_program_is_all_that_a_guest_needs(guest_assets: Path, tmp_path: Path) -> None:
    source = tmp_path / "init.c"
    source.write_text(
        """
        static long call(long n, long a, long b, long c)
        {
            long r;
            __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
            return r;
        }
        void _start(void)
        {
            call(1, 1, (long)"hello from init\\n", 16);
            call(169, 0xfee1dead, 0x28121969, 0x4321fedc);
            for (;;);
        }
        """
    )
    program = tmp_path / "init"
    flags = ["-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector"]
    subprocess.run(["gcc", *flags, "-o", program, source], check=True)
    initrd.check_agent(program.read_bytes(), "init")
    said = boot(manifest.load(str(guest_assets)).kernel, initrd.build(program.read_bytes(), []), tmp_path)
    assert "hello from init" in said, said


def test_the_small_kernel_offers_what_containers_need(small: manifest.Guest, tmp_path: Path) -> None:
    found = report(small.kernel, tmp_path)
    assert found["release"] == [small.kernel_version]
    check(found, filesystems="9p virtiofs erofs overlay ext4 xfs tmpfs fuse hugetlbfs mqueue devpts cgroup2")


@pytest.mark.parametrize("processors", [1, 2])
def test_it_boots_with_what_the_engine_tells_emulated_guests(
    small: manifest.Guest, tmp_path: Path, processors: int
) -> None:
    told = "noreplace-smp mitigations=off rcupdate.rcu_expedited=1 tsc=reliable"
    if processors == 1:
        told += " nolapic_timer"
    found = report(small.kernel, tmp_path, "-smp", str(processors), cmdline=told)
    check(found, filesystems="9p erofs overlay")


def test_the_small_kernels_initrd_is_small(small: manifest.Guest) -> None:
    facts = small.content["initrd"]
    assert facts["modules"] == []
    assert facts["size"] <= 1_300_000


def test_the_kernel_was_built_as_configured(small: manifest.Guest) -> None:
    image = Path(small.kernel).read_bytes()
    start = image.index(b"IKCFG_ST") + 8  # the kernel carries its configuration for /proc/config.gz
    configuration = zlib.decompressobj(31).decompress(image[start:]).decode()
    major, minor = (int(number) for number in small.kernel_version.split(".")[:2])
    rules = recipe.applicable(recipe.parse(recipe.read(recipe.CONFIGURATION)), (major, minor))
    assert [str(rule) for rule in recipe.broken(rules, configuration)] == []
    gone = configuration.replace("CONFIG_EROFS_FS_XATTR=y", "# CONFIG_EROFS_FS_XATTR is not set")
    assert [str(rule) for rule in recipe.broken(rules, gone)] == ["CONFIG_EROFS_FS_XATTR=y"]


def build(directory: Path, kernel: str) -> dict[str, Any]:
    """Run `kata guest build` into a directory; its manifest."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "kata"
    done = subprocess.run(
        [tool, "guest", "build", "--kernel", kernel, "--json"],
        env={**os.environ, "KATA_GUEST_DIR": str(directory)},
        stdout=subprocess.PIPE,
        check=True,
    )
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_a_packaged_kernel_offers_it_with_its_modules(tmp_path: Path) -> None:
    if not packages.have_apt():
        pytest.skip("needs apt: the packages are Debian's")
    content = build(tmp_path / "guest", "distro")
    guest = manifest.load(str(tmp_path / "guest"))
    assert content["kernel"]["boot"] == "pvh"
    # Some are built into some packaged kernels; what the guest offers in the end is asked below.
    assert {"erofs", "overlay", "9p"} <= set(content["initrd"]["modules"])
    # The archive with our init follows the guest's own: the kernel unpacks one after the other.
    found = report(guest.kernel, tmp_path, below=Path(guest.initrd).read_bytes())
    assert found["release"] == [guest.kernel_version]
    check(found, filesystems="9p virtiofs erofs overlay ext4 tmpfs fuse cgroup2")
    assert build(tmp_path / "guest", "distro") == content


def test_a_compressed_archive_is_understood_too(small: manifest.Guest, tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("dev")
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", Path(BUSYBOX).read_bytes(), 0o755)
    archive.file("init", b"#!/bin/busybox sh\necho unpacked\nbusybox poweroff -f\n", 0o755)
    packed = subprocess.run(
        ["lz4", "-l", "-c"], input=archive.finish(), capture_output=True, check=True
    ).stdout
    assert "unpacked" in boot(small.kernel, packed, tmp_path)
