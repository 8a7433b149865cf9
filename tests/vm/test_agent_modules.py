"""The agent's modules in a machine of their own: its unit tests again, and those of ``agent/tests/guest.rs``.

The unit tests run on any Linux; here they are PID 1's children on the guest's kernel, with all controllers of
cgroup v2. The others need devices at known addresses, given below, and break a host's clock and memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import waiting

from kata.guest.cpio import Archive

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 4 * waiting.PATIENCE
BUSYBOX = Path("/usr/bin/busybox")
END = "==== all done"
# Two programs are compiled first, which takes minutes where nothing is cached and others are at work.
pytestmark = pytest.mark.timeout(3600)

INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /tmp /run
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
busybox mount -t tmpfs run /run
busybox --install -s /bin
# What the tests say goes here, what the kernel says stays on the console.
exec </dev/null >/dev/ttyS0 2>&1
if [ -f /etc/modules ]; then while read -r module; do insmod "$module"; done </etc/modules; fi
ip link set lo up
mount -t cgroup2 cgroup /sys/fs/cgroup
for name in guest unit; do
    echo "==== $name"
    "/tests/$name" --test-threads=1
    echo "==== $name: $?"
done
echo "==== all done"
poweroff -f
"""


def _build(directory: Path) -> dict[str, bytes]:
    """The test programs, static and without symbols, by name."""
    script = f"""
        root={ROOT}
        . "$root/tools/rust-env"
        rust_usable && cargo_in_agent test --locked --no-run --lib --test guest --message-format=json
    """
    done = subprocess.run(
        ["bash", "-c", script], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    programs = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["profile"]["test"]:
            name = "guest" if message["target"]["name"] == "guest" else "unit"
            subprocess.run(["strip", "-o", directory / name, message["executable"]], check=True)
            programs[name] = (directory / name).read_bytes()
    assert set(programs) == {"guest", "unit"}
    return programs


def _initrd(guest: Path, programs: dict[str, bytes]) -> bytes:
    """The guest's own initrd, for its kernel's modules, with the tests in place of the agent."""
    archive = Archive()
    archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    archive.file("init", INIT.encode(), 0o755)
    # Tests look at a file with this name that is none of theirs.
    archive.file("etc/hostname", b"guest\n")
    for name, program in programs.items():
        archive.file(f"tests/{name}", program, 0o755)
    first = guest.read_bytes()
    # The kernel reads one archive after the other; a later /init replaces an earlier one.
    return first + bytes(-len(first) % 512) + archive.finish()


def _disk(directory: Path, name: str) -> Path:
    """An ext4 image with one file that holds its name."""
    tree = directory / f"{name}.d"
    tree.mkdir()
    (tree / "name").write_text(name + "\n")
    image = directory / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    assert mke2fs, "mke2fs is missing (Debian: e2fsprogs)"
    # DAX wants blocks as large as pages.
    subprocess.run([mke2fs, "-q", "-t", "ext4", "-b", "4096", "-d", tree, image], check=True)
    return image


def _qemu(directory: Path, kernel: Path, initrd: Path) -> list[str]:
    """The machine: a disk, a NIC and a share on the root bus, a disk behind a bridge, persistent memory."""
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu, "QEMU is missing (Debian: qemu-system-x86)"
    root, behind, pmem = (_disk(directory, name) for name in ("root-bus", "behind-bridge", "pmem"))
    share = directory / "share"
    share.mkdir()
    (share / "name").write_text("share\n")
    blk = "virtio-blk-pci,disable-legacy=on"
    return [
        qemu,
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-M", "q35", "-smp", "2"),
        *("-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,-erms", "-m", "1G,slots=2,maxmem=4G"),
        *("-bios", "qboot.rom", "-kernel", str(kernel), "-initrd", str(initrd), "-serial", "stdio"),
        *("-append", "console=ttyS0 loglevel=1 panic=-1 mitigations=off agent.hotplug_timeout=1"),
        *("-drive", f"if=none,id=a,format=raw,readonly=on,file={root}", "-device", f"{blk},addr=5,drive=a"),
        *("-device", "pci-bridge,id=bridge,addr=0x10,chassis_nr=1,shpc=off"),
        *("-drive", f"if=none,id=b,format=raw,file={behind}"),
        *("-device", f"{blk},bus=bridge,addr=3,drive=b,serial=behind-bridge"),
        *("-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,addr=9,netdev=n,romfile="),
        *("-fsdev", f"local,id=share,path={share},security_model=none"),
        *("-device", "virtio-9p-pci,addr=4,fsdev=share,mount_tag=kataShared"),
        *("-object", f"memory-backend-file,id=p,share=on,mem-path={pmem},size=32M"),
        *("-device", "virtio-pmem-pci,addr=0xc,memdev=p"),
    ]


@pytest.fixture(scope="module")
def output(run_directory: Path, guest_assets: Path) -> str:
    """All that the machine has said."""
    directory = Path(tempfile.mkdtemp(prefix="modules", dir=run_directory))
    manifest = json.loads((guest_assets / "guest.json").read_text())
    initrd = directory / "initrd"
    initrd.write_bytes(_initrd(guest_assets / manifest["initrd"]["path"], _build(directory)))
    command = _qemu(directory, guest_assets / manifest["kernel"]["path"], initrd)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as machine:
        try:
            said, _ = machine.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            machine.kill()
            said, _ = machine.communicate()
    text = said.decode(errors="replace").replace("\r", "")
    assert END in text, f"the machine did not come to the end:\n{text}"
    return text


@pytest.mark.parametrize("program", ["guest", "unit"])
def test_in_a_machine_of_its_own(output: str, program: str) -> None:
    part = output.split(f"==== {program}\n")[1].split(f"==== {program}: ")[0]
    results = re.findall(r"^test .* \.\.\. .*?\b(ok|FAILED)$", part, re.M | re.S)
    assert results, part
    assert f"==== {program}: 0\n" in output, part
