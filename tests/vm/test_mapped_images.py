"""Images that guests map from the host's page cache (`kata.hypervisor.mapped`), with the real QEMU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from waiting import until

LOOK = """
mkdir /disk /again
mknod /device b $(tr : ' ' < /sys/block/pmem0/dev)
mount -t erofs -o ro /device /again
grep ' /again ' /proc/mounts
dd if=/dev/urandom of=/device bs=4096 seek=1 count=300 conv=notrunc,fsync 2>/dev/null
md5sum < /bin/busybox
"""
"""What a privileged container finds: its image is mounted already, so a second mount of it has the first one's options.
And it tries to write to it, and
to have that reach the host."""
READ = "cat /bin/busybox | md5sum; sleep 1000"
BUSYBOX = hashlib.md5(Path("/usr/bin/busybox").read_bytes()).hexdigest()


@pytest.fixture
def mapping(kata_env: Kata, tmp_path: Path) -> Iterator[Kata]:
    """A kata that is told to map images, and to go on from templates."""
    file = tmp_path / "configuration.toml"
    file.write_text('[hypervisor.qemu]\nblock_device_driver = "virtio-pmem"\n')
    kata_env.env |= {"KATA_CONF_FILE": str(file), "KATA_TEMPLATES": "on"}
    yield kata_env
    until(lambda: not list((kata_env.state_dir / "templates").glob(".making-*")), "the template's end")


def run(kata: Kata, *arguments: str) -> tuple[list[str], str]:
    """What a container says, and how its machine started."""
    done = kata.call("run", "--rm", "--timings", "--network", "none", *arguments)
    assert done.returncode == 0, done.stderr.decode()
    start = next(line for line in done.stderr.decode().splitlines() if "start:" in line)
    return done.stdout.decode().splitlines(), start.strip()


def image(kata: Kata) -> Path:
    """The file of the only image."""
    (found,) = kata.state_dir.rglob("*.erofs")
    return found


def mapped(pid: int, file: Path) -> dict[str, int]:
    """The figures of smaps (proc(5)), in KiB, of a process's mapping of a file."""
    lines = iter(Path(f"/proc/{pid}/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(file.name):
            assert line.split()[1] == "r--s", line  # shared, and not to be written to
            fields = (next(lines).split() for _ in range(14))
            return {name.rstrip(":"): int(size) for name, size, unit in fields if unit == "kB"}
    raise AssertionError(f"{pid} does not map {file}")


def vmm_of(kata: Kata, name: str, file: Path) -> int:
    """The process of a container's machine: the one below its engine that maps the image."""
    engine = kata.engine_pid(name)
    for task in Path(f"/proc/{engine}/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if file.name in Path(f"/proc/{pid}/maps").read_text():
                return pid
    raise AssertionError(f"no process below {engine} maps {file}")


def test_a_guest_maps_its_image_and_cannot_change_it(mapping: Kata, busybox_image: str) -> None:
    said, start = run(mapping, "--privileged", busybox_image, "sh", "-c", LOOK)
    assert start == "start: cold: there is no template for it yet"
    assert "dax=always" in said[0].split()[3].split(",")
    assert said[1].split()[0] == BUSYBOX
    file = image(mapping)
    assert file.stat().st_size == 128 << 20
    before = hashlib.sha256(file.read_bytes()).digest()
    assert json.loads(mapping.ok("images", "--json"))[0]["size"] < 8 << 20

    until(lambda: json.loads(mapping.ok("factory", "status", "--json"))["templates"], "a template")
    said, start = run(mapping, "--privileged", busybox_image, "sh", "-c", LOOK)
    assert start == "start: template"
    assert "dax=always" in said[0].split()[3].split(",")
    assert said[1].split()[0] == BUSYBOX
    assert hashlib.sha256(file.read_bytes()).digest() == before

    # Two machines that go on from the template have the same pages of the host, and neither has any of its own.
    for name in ("one", "two"):
        mapping.ok("run", "-d", "--name", name, "--network", "none", busybox_image, "sh", "-c", READ)
        until(lambda: BUSYBOX in mapping.ok("logs", name), "it has read")  # noqa: B023
    for name in ("one", "two"):
        sizes = mapped(vmm_of(mapping, name, file), file)
        assert sizes["Rss"] > 500
        assert sizes["Pss"] < 0.7 * sizes["Rss"]
        assert sizes["Private_Dirty"] == sizes["Anonymous"] == 0
    mapping.ok("rm", "-f", "one", "two")


def test_a_machine_without_the_device_says_so(mapping: Kata, busybox_image: str) -> None:
    file = Path(mapping.env["KATA_CONF_FILE"])
    file.write_text(file.read_text() + 'machine_type = "microvm"\n')
    mapping.env["KATA_TEMPLATES"] = "use"
    said, start = run(mapping, busybox_image, "sh", "-c", "ls /sys/block; md5sum < /bin/busybox")
    assert start.endswith("; the image is a disk: this machine of QEMU has no virtio-pmem")
    assert "pmem0" not in said
    assert said[-1].split()[0] == BUSYBOX
