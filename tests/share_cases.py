"""Files of the host in the guest: what has to hold whichever way they get there. Imported by the lanes' tests.

The fixture ``kata`` shares files in the way that its KATA_SHARED_FS says.
"""

from __future__ import annotations

import subprocess
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
    # QEMU's 9p server makes a fifo, and then fails to set its mode.
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
