"""A volume on a disk of its own: filled from the image, an overlay's upper layer, kept over a stop, gone with `rm`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from conftest import Kata

MIB = 1 << 20
FILLED = """
stat -c '%a' /tmp /root
cat /etc/passwd | head -c 4; echo
stat -c '%a %U' /etc/shadow
grep -c ' /tmp ext4 rw,relatime,discard ' /proc/mounts
[ $(df -m /etc | awk 'END { print $2 }') -lt 64 ]
if echo > /locked/x; then exit 1; fi
rm /etc/shadow
"""
OVERLAY = """
cd /tmp
mkdir lower upper work merged
echo below > lower/file; echo below > lower/gone; mkdir lower/dir
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
rm merged/gone; mv merged/dir merged/moved; mknod merged/node c 1 3; echo above >> merged/file
cat upper/file
stat -c '%F %t,%T' upper/gone
echo > merged/node
umount merged
"""


def blocks(image: Path) -> int:
    return image.stat().st_blocks * 512


def debugfs(*arguments: str) -> str:
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    done = subprocess.run(
        ["debugfs", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def shrinks(image: Path, below: int) -> bool:
    deadline = time.monotonic() + 60
    while blocks(image) > below:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_volume_on_a_disk(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    kata = shared_kata
    kata.ok(
        *("run", "-d", "--name", "vols", "--privileged", "-v", "/tmp", "-v", "/root"),
        *("--mount", "type=volume,dst=/etc,volume-opt=size=64m", "--mount", "dst=/locked,ro"),
        *(busybox_image, "sleep", "1000"),
    )
    directory = Path(json.loads(kata.ok("inspect", "vols"))[0]["directory"])
    try:
        said = kata.ok("exec", "vols", "sh", "-ec", FILLED)
        assert said.splitlines() == ["1777", "700", "root", "640 root", "1"]
        # What a dockerd needs for its overlay2.
        said = kata.ok("exec", "vols", "sh", "-ec", OVERLAY)
        assert said.splitlines() == ["below", "above", "character special file 0,0"]

        # What is deleted inside frees the host's disk.
        image = directory / "volume-0.img"
        before = blocks(image)
        kata.ok("exec", "vols", "sh", "-ec", "dd if=/dev/zero of=/tmp/big bs=1M count=20 2>&-; sync")
        assert blocks(image) - before >= 20 * MIB
        kata.ok("exec", "vols", "sh", "-ec", "rm /tmp/big; sync")
        assert shrinks(image, before + 2 * MIB)

        (tmp_path / "in").write_text("from outside\n")
        kata.ok("cp", str(tmp_path / "in"), "vols:/tmp/in")
        assert kata.ok("exec", "vols", "cat", "/tmp/in") == "from outside\n"
        [found] = json.loads(kata.ok("inspect", "vols"))
        assert [(one["destination"], one["size"]) for one in found["disk_volumes"]] == [
            ("/tmp", 10 << 30),
            ("/root", 10 << 30),
            ("/etc", 64 * MIB),
            ("/locked", 10 << 30),
        ]
        kata.ok("stop", "-t", "0", "vols")

        # Also without its processes, and filled once only.
        kata.ok("cp", "vols:/tmp/in", str(tmp_path / "out"))
        assert (tmp_path / "out").read_text() == "from outside\n"
        kata.ok("start", "vols")
        said = kata.ok("exec", "vols", "sh", "-c", "cat /tmp/upper/file; ls /etc/shadow 2>&1; ls /root /tmp")
        assert said.split("\n", 2)[:2] == ["below", "above"]
        assert "/etc/shadow: No such file" in said
        assert "lost+found" not in said

        # What cannot be read any more is not taken for missing, and filled again.
        kata.ok("stop", "-t", "0", "vols")
        damaged = directory / "volume-1.img"
        debugfs("-w", "-R", "clri /data", str(damaged))
        done = kata.call("start", "vols")
        assert done.returncode == 125
        assert "read the volume of /root: " in done.stderr.decode()
        assert "data.new" not in debugfs("-R", "ls /", str(damaged))
    finally:
        kata.ok("rm", "-f", "-v", "vols")
    assert not os.path.exists(directory)


def test_a_volume_with_a_name(shared_kata: Kata, busybox_image: str) -> None:
    """Filled from the image, it outlives its container; one machine at a time has it."""
    kata = shared_kata
    kata.ok("volume", "create", "-o", "size=64m", "--label", "kind=test", "named")
    try:
        kata.ok(
            "run",
            "--rm",
            "-v",
            "named:/etc",
            busybox_image,
            "sh",
            "-c",
            "echo mine > /etc/mine; rm /etc/shadow",
        )
        kata.ok(
            "run",
            "-d",
            "--name",
            "has",
            "--mount",
            "type=volume,src=named,dst=/v",
            busybox_image,
            "sleep",
            "99",
        )
        said = kata.ok(
            "exec", "has", "sh", "-c", "cat /v/mine; head -c 4 /v/passwd; ls /v/shadow 2>/dev/null | wc -l"
        )
        assert said.split() == ["mine", "root0"]
        done = kata.call("run", "--rm", "-v", "named:/v", busybox_image, "true")
        assert done.returncode == 125
        assert b"the volume named is mounted by the container has" in done.stderr
        assert kata.call("volume", "rm", "named").returncode == 1
        assert kata.ok(
            "inspect", "-f", "{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}}{{end}}", "has"
        ) == ("volume named /v\n")
        assert kata.ok("ps", "-q", "--filter", "volume=named").strip()
    finally:
        kata.call("rm", "-f", "has")
        kata.ok("volume", "rm", "named")
    assert kata.ok("volume", "ls", "-q") == ""
