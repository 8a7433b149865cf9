"""Files of the host in the guest: what has to hold whichever way they get there. Imported by the lanes' tests.

The fixture ``kata`` shares files in the way that its KATA_SHARED_FS says.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Kata


def test_volumes(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    data, fixed, single = tmp_path / "data", tmp_path / "fixed", tmp_path / "single"
    data.mkdir()
    fixed.mkdir()
    single.write_text("one file\n")
    (fixed / "there").write_text("from the host\n")
    shown = kata.ok(
        "run", "--rm", "-v", f"{data}:/data", "-v", f"{fixed}:/fixed:ro", "-v", f"{single}:/etc/single:ro",
        busybox_image, "sh", "-c",
        "cat /fixed/there /etc/single; touch /fixed/x 2>&1 | grep -c Read-only; echo from the guest > /data/made;"
        "sed -n 's/.* \\/data \\([^ ]*\\) .*/\\1/p' /proc/mounts",
    )  # fmt: skip
    kind = kata.env["KATA_SHARED_FS"].replace("virtio-9p", "9p").replace("-", "")
    assert shown == f"from the host\none file\n1\n{kind}\n"
    assert (data / "made").read_text() == "from the guest\n"
    assert not (fixed / "x").exists()


def test_the_owner_of_a_guest_gains_nothing_by_it(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """The host itself keeps a read-only volume read-only, and the rest of the share as well."""
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    shown = kata.ok(
        "run", "--rm", "--privileged", "-v", f"{fixed}:/fixed:ro", busybox_image, "sh", "-c",
        "mount -o remount,rw /fixed; touch /fixed/x 2>&1; mkdir /m;"
        "mount -t virtiofs kataShared /m 2>/dev/null || mount -t 9p -o trans=virtio,version=9p2000.L kataShared /m"
        " || mount --bind /fixed /m; touch /m/x 2>&1; ls -A /m",
    )  # fmt: skip
    assert shown.count("Read-only file system") == 2, shown
    assert list(fixed.iterdir()) == []


def test_files_behave_as_files(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    shown = kata.ok(
        "run", "--rm", "-v", f"{tmp_path}:/d", busybox_image, "sh", "-c",
        "cd /d; echo kept > open; exec 3<open; rm open; cat <&3;"  # removed and still open
        "echo 1 > a; ln a b; echo 2 >> b; cat a; stat -c %h b;"
        "ln -s /nowhere link; readlink link; mv a c; ls;"
        "chown 12:34 c; chmod 4711 c; stat -c '%u %g %a' c; truncate -s 5000000 big; stat -c %s big",
    )  # fmt: skip
    expected = ["kept", "1", "2", "2", "/nowhere", "b", "c", "link", "12 34 4711", "5000000"]
    assert shown.splitlines() == expected
    # QEMU 7.2's 9p server makes a fifo or a socket, and then refuses to set its mode (its own check of special files).
    if kata.env["KATA_SHARED_FS"] == "virtio-fs":
        assert kata.ok("run", "--rm", "-v", f"{tmp_path}:/d", busybox_image, "mkfifo", "/d/fifo") == ""
        assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "c").stat().st_uid == 12


def test_files_of_two_file_systems_stay_apart(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        for directory in (one, two):
            (directory / "file").write_text(directory.name)
        assert (one / "file").stat().st_ino == (two / "file").stat().st_ino
        shown = kata.ok(
            "run", "--rm", "-v", f"{tmp_path}:/d", busybox_image,
            *("sh", "-c", "cat /d/one/file /d/two/file; echo; stat -c '%d %i' /d/*/file"),
        )  # fmt: skip
        text, *identities = shown.splitlines()
        assert text == "onetwo"
        assert len(set(identities)) == 2, identities
    finally:
        for directory in (one, two):
            subprocess.run(["umount", directory], check=True)


STALE_S = 1.5
"""How long virtio-fs may show attributes that the host has changed: virtiofsd has the guest keep them for a second."""
LACKS_9P = {
    "a name that the host has removed can be made again",
    "the host grants a right",
    "the host takes a right back",
}
"""What a share by 9p cannot do (docs/clients.md)."""


def test_several_sides_see_one_file_system(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """The host and a second container change what a container has open, mounted or read; and see what it writes."""
    seen: dict[str, bool] = {}
    (tmp_path / "conf").write_text("old\n")
    (tmp_path / "log").write_text("one\n")
    (tmp_path / "held").write_text("a")
    tmp_path.chmod(0o755)
    names = [f"side{number}-{kata.env['KATA_SHARED_FS']}" for number in (1, 2)]
    volumes = ("-v", f"{tmp_path}:/v", "-v", f"{tmp_path}/conf:/conf:ro")
    holds = "cat /conf > /dev/null; exec 3</v/held 4>/v/out; tail -f /v/log & echo up >&4; sleep 1000"
    try:
        kata.ok("run", "-d", "--name", names[0], *volumes, busybox_image, "sh", "-c", holds)
        kata.ok("run", "-d", "--name", names[1], *volumes, busybox_image, "sleep", "1000")
        _until(lambda: (tmp_path / "out").read_text() == "up\n")

        def inside(script: str, *options: str, side: int = 0) -> str:
            done = kata.call("exec", *options, names[side], "sh", "-c", script)
            return (
                done.stdout.decode().strip() if done.returncode == 0 else f"failed: {done.stderr.decode()}"
            )

        (tmp_path / "conf").write_text("newer\n")
        with open(tmp_path / "log", "a") as log:
            log.write("two\n")
        inside("echo three >> /v/log", side=1)
        (tmp_path / "held").unlink()
        time.sleep(STALE_S)
        seen["a file that is mounted by itself shows what the host writes"] = inside("cat /conf") == "newer"
        _until(lambda: kata.ok("logs", names[0]).count("\n") == 3)
        seen["an open log shows what host and container append"] = (
            kata.ok("logs", names[0]) == "one\ntwo\nthree\n"
        )
        again = inside("echo b > /v/held && cat /v/held")
        seen["a name that the host has removed can be made again"] = again == "b"

        tmp_path.chmod(0o777)
        time.sleep(STALE_S)
        seen["the host grants a right"] = inside("touch /v/granted && echo yes", "-u", "1000") == "yes"
        tmp_path.chmod(0o700)
        time.sleep(STALE_S)
        revoked = inside("cat /v/log", "-u", "1000")
        seen["the host takes a right back"] = "Permission denied" in revoked
        tmp_path.chmod(0o755)

        append = "i=0; exec 5>>/v/both; while [ $i -lt 100 ]; do echo line >&5; i=$((i+1)); done"
        appending = [kata.start("exec", name, "sh", "-c", append) for name in names]
        for process in appending:
            process.communicate(timeout=120)
        seen["two containers append to one file"] = len((tmp_path / "both").read_text().splitlines()) == 200

        inside("exec 6>/v/late; echo written >&6; sleep 1000 &")
        seen["what a container writes is there at once"] = (tmp_path / "late").read_text() == "written\n"
    finally:
        for name in names:
            kata.call("rm", "-f", name)
    lacks = LACKS_9P if kata.env["KATA_SHARED_FS"] == "virtio-9p" else set()
    wrong = {what for what, right in seen.items() if not right}
    assert wrong == lacks, sorted(wrong)


def _until(condition: Callable[[], bool]) -> None:
    """Wait for what a busy machine may take a while for; what follows tells whether it has come."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
