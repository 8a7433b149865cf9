"""Root file systems of overlay snapshots as disks: what is seen in the guest, and what is on the host afterwards."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from containerd_support import IMAGE, RUNTIME, Containerd, clean_fixture, daemon_fixture  # noqa: F401 - fixtures
from waiting import until

from kata import sysio

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BLOCK = ("--annotation", "io.katacontainers.config.runtime.rootfs_upper_layer=block")
DISK = ".kata-writable-layer.img"
WORK = r"""
set -e
echo new >/etc/new; chmod 4751 /etc/new; chown 70000:123 /etc/new
rm /etc/passwd
rm -r /root; mkdir -m 700 /root; echo mine >/root/mine
echo more >>/etc/group
ln -s ../../etc/shadow /link; ln /etc/new /hard
mknod /null c 1 3; mkfifo -m 620 /pipe
touch -d @1000000001 /etc/new
dd if=/dev/zero of=/large bs=64k count=40 2>/dev/null; echo end >>/large
mkdir -p /many; i=0; while [ $i -lt 300 ]; do echo $i >/many/$i; i=$((i+1)); done
dd if=/dev/zero of=/hole bs=1 count=1 seek=100000000 2>/dev/null
awk '$2 == "/" {print $1, $3}' /proc/mounts
"""


def upper_of(daemon: Containerd, name: str) -> Path:
    """The upper directory of a container's snapshot."""
    words = daemon.ok("snapshot", "mounts", "/nowhere", name)
    return Path(words.partition("upperdir=")[2].partition(",")[0].split()[0])


def log_of(daemon: Containerd, name: str) -> str:
    return (daemon.run_dir / "sandboxes" / f"default.{name}" / "engine.log").read_text()


def digest(top: Path) -> dict[str, tuple[object, ...]]:
    """What an overlay shows, without the times that both sides choose by themselves."""
    found: dict[str, tuple[object, ...]] = {}
    for place, directories, files in os.walk(top):
        for name in directories + files:
            path = Path(place, name)
            about = path.lstat()
            content: object = about.st_rdev
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(about.st_mode):
                content = path.read_bytes()
            key = str(path.relative_to(top))
            found[key] = (about.st_mode, about.st_uid, about.st_gid, about.st_nlink, content)
    return found


def test_what_a_container_has_written_is_in_its_snapshot(daemon: Containerd, tmp_path: Path) -> None:
    """The same script with runc and with kata leaves the same, as an overlay shows it."""
    if shutil.which("runc") is None:
        pytest.skip("needs runc")
    daemon.ok("run", "--runtime", "io.containerd.runc.v2", IMAGE, "model", "sh", "-c", WORK)
    said = daemon.ok("run", "--runtime", RUNTIME, *BLOCK, IMAGE, "ours", "sh", "-c", WORK)
    assert said.split() == ["overlay", "overlay"]
    seen = {}
    for name in ("model", "ours"):
        point = tmp_path / name
        point.mkdir()
        subprocess.run(
            ["/bin/sh", "-c", daemon.ok("snapshot", "mounts", str(point), name)], check=True, timeout=60
        )
        try:
            seen[name] = digest(point)
            assert os.lstat(point / "etc/new").st_mtime_ns == 1_000_000_001 * 10**9
            assert os.stat(point / "hole").st_blocks < 1000
        finally:
            sysio.umount2(str(point))
    assert seen["ours"] == seen["model"]
    assert "etc/passwd" not in seen["ours"]
    assert seen["ours"]["root/mine"][4] == b"mine\n"
    upper = upper_of(daemon, "ours")
    assert not (upper / DISK).exists()
    whiteout = os.lstat(upper / "etc/passwd")
    assert (stat.S_ISCHR(whiteout.st_mode), whiteout.st_rdev) == (True, 0)
    assert os.getxattr(upper / "root", "trusted.overlay.opaque") == b"y"
    [image] = (daemon.directory / "s/layers").glob("*.erofs")
    inode = image.stat().st_ino

    # The next one finds the image. What it takes is seen while it runs; and it can be killed.
    daemon.detached(
        "second", "sh", "-c", "dd if=/dev/urandom of=/data bs=1M count=30; sleep 1000", options=BLOCK
    )
    upper = upper_of(daemon, "second")
    until(lambda: (upper / DISK).stat().st_blocks * 512 > 30 << 20, "its disk has grown")
    assert os.listdir(upper) == [DISK]
    assert image.stat().st_ino == inode
    daemon.ok("task", "kill", "-s", "KILL", "second")
    until(lambda: daemon.tasks()["second"][1] == "STOPPED", "the task is stopped")
    assert (upper / "data").stat().st_size == 30 << 20  # before its end is told
    daemon.ctr("task", "rm", "second")
    assert os.listdir(upper) == ["data"]

    # One that has been written to before goes on with what is there, live.
    assert daemon.ctr("task", "start", "-d", "second").returncode == 0
    assert "something has been written to it before" in log_of(daemon, "second")
    daemon.ok("task", "exec", "--exec-id", "e1", "second", "sh", "-c", "echo 1 >/seen-at-once")
    assert (upper / "seen-at-once").read_text() == "1\n"


def test_what_cannot_be_carried_back(daemon: Containerd) -> None:
    """A full disk in the guest is the container's; a machine that dies takes along what was written."""
    small = (*BLOCK, "--annotation", "io.katacontainers.config.runtime.rootfs_upper_layer_size=16")
    done = daemon.ctr("run", "--runtime", RUNTIME, *small, IMAGE, "full", "sh", "-c",
                      "dd if=/dev/zero of=/data bs=1M count=30; ls -s /data; df -k / | tail -n1")  # fmt: skip
    assert b"No space left on device" in done.stderr
    assert 4 << 20 < (upper_of(daemon, "full") / "data").stat().st_size < 16 << 20

    pid = daemon.detached("dies", "sh", "-c", "echo 1 >/data; sleep 1000", options=BLOCK)
    upper = upper_of(daemon, "dies")
    assert os.listdir(upper) == [DISK]
    os.kill(pid, 9)
    until(lambda: daemon.tasks()["dies"][1] == "STOPPED", "the task is stopped")
    assert "what it has written is lost" in log_of(daemon, "dies")
    daemon.ctr("task", "rm", "dies")
    assert os.listdir(upper) == []

    # So does an engine: whoever clears up after it leaves an empty directory.
    daemon.detached("engine", "sh", "-c", "echo 1 >/data; sleep 1000", options=BLOCK)
    upper = upper_of(daemon, "engine")
    os.kill(daemon.engine_pid("default.engine"), 9)
    until(lambda: daemon.has_no_sandbox("default.engine"), "containerd has cleared up", daemon.diagnosis)
    assert os.listdir(upper) == []


def test_the_image_goes_with_its_layers(daemon: Containerd) -> None:
    assert daemon.run("first", "true", options=BLOCK).returncode == 0
    assert list((daemon.directory / "s/layers").glob("*.erofs"))
    daemon.kata("gc")
    assert list((daemon.directory / "s/layers").glob("*.erofs"))
    daemon.ok("image", "rm", "--sync", IMAGE)
    try:
        daemon.kata("gc")
        assert os.listdir(daemon.directory / "s/layers") == []
    finally:
        daemon.ok(
            "image", "import", "--base-name", IMAGE.partition(":")[0], str(daemon.directory / "image.tar")
        )
