"""`kata cp` into and out of containers."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cli_support import FOREVER, container, status, vm_pid
from conftest import Kata
from waiting import until


def _copy_every_kind(kata: Kata, here: Path, there: str) -> None:
    """Into the container and out again, as files and as a tar stream: nothing is lost in silence."""
    source = here / "source"
    source.mkdir(parents=True)
    (source / "a").write_text("data")
    os.link(source / "a", source / "b")
    os.symlink("a", source / "c")
    os.mkfifo(source / "fifo", 0o640)
    if os.geteuid() == 0:
        os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (source / "null").chmod(0o666)
    kata.ok("cp", "-a", str(source), f"copies:{there}")
    if os.geteuid() != 0:  # who makes no devices on the host
        kata.ok("exec", "copies", "mknod", "-m", "666", f"{there}/null", "c", "1", "3")
    script = f"cd {there}; stat -c '%n %F %h %a' *; stat -c %t:%T null; ls -i a b | awk '{{print $1}}' | uniq | wc -l"
    lines = kata.ok("exec", "copies", "sh", "-c", script).splitlines()
    assert "a regular file 2 644" in lines
    assert "fifo fifo 1 640" in lines
    assert "null character special file 1 666" in lines
    assert lines[-2:] == ["1:3", "1"]
    out = kata.call("cp", f"copies:{there}", str(here / "out"))
    assert out.returncode == 1
    assert b"null is not copied: it is a device" in out.stderr
    assert (here / "out" / "a").stat().st_ino == (here / "out" / "b").stat().st_ino
    assert stat.S_ISFIFO((here / "out" / "fifo").stat().st_mode)
    assert not (here / "out" / "null").exists()
    stream = kata.call("cp", f"copies:{there}", "-").stdout
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        members = {member.name.rpartition("/")[2]: member for member in tar}
    assert [members[name].type for name in ("a", "b", "c", "fifo", "null")] == [
        tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
    ]  # fmt: skip
    # Back in: the archive names no directory for the last of its files, and ends with what nobody knows.
    extra = io.BytesIO()
    with tarfile.open(fileobj=extra, mode="w") as tar:
        for name, kind, target in (("n/x", tarfile.REGTYPE, ""), ("n/y", tarfile.LNKTYPE, "n/x")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    kata.ok("cp", "-", f"copies:{there}", stdin=extra.getvalue())
    again = kata.call("cp", "-", f"copies:{there}", stdin=stream)
    assert (again.returncode, again.stderr) == (0, b"")
    shutil.rmtree(here / "out")
    assert kata.call("cp", f"copies:{there}", str(here / "out")).returncode == 1
    names = here / "out"
    for one, other in (("n/x", "n/y"), ("a", "b"), (f"{there[5:]}/a", f"{there[5:]}/b")):
        assert (names / one).stat().st_ino == (names / other).stat().st_ino
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "socket"))
        left = kata.call("cp", str(here / "socket"), f"copies:{there}/socket")
    assert left.returncode == 1
    assert b"socket is not copied" in left.stderr
    everything = kata.call("cp", "copies:/", "-")
    assert (everything.returncode, everything.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(everything.stdout)) as tar:
        found = set(tar.getnames())
    assert {"./proc", "./sys", "./etc/passwd", f".{there}/b"} <= found
    assert not [name for name in found if name.startswith(("./proc/", "./sys/"))], (
        "the kernel's are left out"
    )


def _copy_links_across_mounts(kata: Kata, here: Path) -> None:
    """A name that a file cannot have costs nothing that was there; what has the content is copied."""
    kata.ok("exec", "copies", "sh", "-c", "echo precious > /dev/shm/kept")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, kind, target in (
            ("tmp/first", tarfile.REGTYPE, ""),
            ("dev/shm/kept", tarfile.LNKTYPE, "tmp/first"),
            ("tmp/last", tarfile.LNKTYPE, "tmp/first"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    done = kata.call("cp", "-", "copies:/", stdin=archive.getvalue())
    assert done.returncode == 1
    assert b"dev/shm/kept is not copied: it cannot be a link to tmp/first" in done.stderr
    script = "cat /dev/shm/kept; stat -c %h /tmp/last; ls -A /dev/shm"
    assert kata.ok("exec", "copies", "sh", "-c", script).split() == ["precious", "2", "kept"]
    tree = here / "tree"
    for directory in ("tmp", "dev/shm"):
        (tree / directory).mkdir(parents=True)
    (tree / "dev/shm/kept").write_text("new")
    os.link(tree / "dev/shm/kept", tree / "tmp/same")
    kata.ok("cp", f"{tree}/.", "copies:/")
    assert kata.ok("exec", "copies", "cat", "/dev/shm/kept", "/tmp/same") == "newnew"


def test_cp_in_and_out_running_and_stopped(shared_kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "big").write_bytes(os.urandom(3 << 20))
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "link").symlink_to("below/big")
    with container(shared_kata, busybox_image, "copies"):
        for run in ("running", "stopped"):
            if run == "stopped":
                shared_kata.ok("stop", "copies")
            shared_kata.ok("cp", str(tree), f"copies:/in-{run}")
            back = tmp_path / f"back-{run}"
            shared_kata.ok("cp", f"copies:/in-{run}", str(back))
            assert (back / "below" / "big").read_bytes() == (tree / "below" / "big").read_bytes()
            assert os.readlink(back / "link") == "below/big"
            assert (back / "script").stat().st_mode & 0o777 == 0o755
            single = tmp_path / f"single-{run}"
            shared_kata.ok("cp", "copies:/etc/passwd", str(single))
            assert single.read_text().startswith("root:")
            archive = shared_kata.call("cp", f"copies:/in-{run}/below", "-").stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                assert tar.getnames() == ["below", "below/big"]
            if run == "running":
                _copy_every_kind(shared_kata, tmp_path / "kinds", "/tmp/kinds")
                _copy_links_across_mounts(shared_kata, tmp_path / "links")
            else:
                lost = shared_kata.call("cp", str(tree / "script"), "copies:/dev/shm/script")
                assert (lost.returncode, b"/dev/shm is a tmpfs" in lost.stderr) == (1, True)
            missing = shared_kata.call("cp", "copies:/nothing", str(tmp_path))
            assert missing.returncode == 125
            assert b"/nothing does not exist" in missing.stderr
        assert status(shared_kata, "copies") == "exited"
        shared_kata.ok("start", "copies")
        assert shared_kata.ok("exec", "copies", "stat", "-c", "%a", "/in-stopped/script") == "755\n"
        # What was copied outlives its machine, also one that dies the moment that the command has ended.
        shared_kata.ok("cp", str(tree), "copies:/kept")
        shared_kata.ok("cp", "-", "copies:/kept", stdin=_tar({"more": b"from a stream"}))
        os.kill(vm_pid(shared_kata, "copies"), signal.SIGKILL)
        until(lambda: status(shared_kata, "copies") == "exited", "the container has ended")
        shared_kata.ok("start", "copies")
        said = shared_kata.ok("exec", "copies", "cat", "/kept/script", "/kept/more")
        assert said == "#!/bin/sh\nfrom a stream"


def test_a_copy_is_not_disturbed(shared_kata: Kata, busybox_image: str) -> None:
    def copying() -> Any:
        process = shared_kata.start("cp", "-", "open:/", stdin=subprocess.PIPE)
        until(lambda: identity in shared_kata.sandboxes(), "the copy's sandbox")
        return process

    identity = shared_kata.ok("create", "--name", "open", busybox_image, "sh", "-c", FOREVER).strip()
    try:
        copy = copying()
        with ThreadPoolExecutor(2) as threads:
            start = threads.submit(shared_kata.call, "start", "open")
            removal = threads.submit(shared_kata.call, "rm", "open").result()
        for done, code in ((start.result(), 125), (removal, 1)):
            assert done.returncode == code
            assert b"container open is open for a copy (kata cp)" in done.stderr
        _, said = copy.communicate(_tar({"one": b"1"}), timeout=60)
        assert copy.returncode == 0, said
        # A shorter one is waited for, and of several starts at once one is the start.
        copy = copying()
        with ThreadPoolExecutor(3) as threads:
            starts = [threads.submit(shared_kata.call, "start", "open") for _ in range(2)]
            time.sleep(1)
            assert copy.communicate(_tar({"two": b"2"}), timeout=60) == (b"", b"")
            for one in starts:
                assert one.result().returncode == 0, one.result().stderr
        assert shared_kata.ok("exec", "open", "cat", "/one", "/two") == "12"
        shared_kata.ok("stop", "open")
        copy = copying()
        shared_kata.ok("rm", "-f", "open")
        _, said = copy.communicate(_tar({"three": b"3"}), timeout=60)
        assert b"the copy was cut short" in said
        assert copy.returncode == 137
    finally:
        shared_kata.ok("rm", "-f", "open")


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def test_cp_does_not_follow_a_containers_links_out(
    shared_kata: Kata, busybox_image: str, tmp_path: Path
) -> None:
    script = "mkdir /trap; ln -s /etc/shadow /trap/link; ln -s ../../../../../.. /trap/up; " + FOREVER
    with container(shared_kata, busybox_image, "trap", script):
        until(
            lambda: shared_kata.call("exec", "trap", "test", "-L", "/trap/up").returncode == 0, "the links"
        )
        shared_kata.ok("cp", "trap:/trap", str(tmp_path / "trap"))
        assert (tmp_path / "trap" / "link").is_symlink()
        secret = tmp_path / "file"
        secret.write_text("mine")
        # "up" leads to the container's own root, whatever lies above the sandbox.
        shared_kata.ok("cp", str(secret), "trap:/trap/up/landed")
        assert shared_kata.ok("exec", "trap", "cat", "/landed") == "mine"
        assert not Path("/landed").exists()
