"""Files of the host in the guest: what has to hold whichever way they get there. Imported by the lanes' tests.

The fixture ``kata`` shares files in the way that its KATA_SHARED_FS says.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Kata
from waiting import until

from kata.hypervisor import virtiofsd

SHARES = ("virtio-9p", "virtio-fs", "virtio-fs, Rust")
"""Each way to the files of the host: QEMU's 9p server, virtio-fs by the host's virtiofsd, and by the one in Rust where
the host's is not that."""


def sharing(kata: Kata, share: str, directory: Path) -> Kata:
    """A kata that shares in one of these ways; its configuration lies in a directory."""
    one = copy.copy(kata)
    one.env = {**kata.env, "KATA_SHARED_FS": share.partition(",")[0]}
    if share != SHARES[0] and virtiofsd.find() is None:
        pytest.skip("needs virtiofsd (apt-get install virtiofsd)")
    if share == SHARES[2]:
        program = ROOT / "build/programs/usr/bin/virtiofsd"
        if virtiofsd.find() != virtiofsd.C_PROGRAM:
            pytest.skip("this machine's own virtiofsd is the one in Rust, which is tried already")
        if not program.exists():
            pytest.skip("needs virtiofsd in Rust (tools/setup test builds it)")
        configuration = directory / "rust.toml"
        configuration.write_text(f'[hypervisor.qemu]\nvirtio_fs_daemon = "{program}"\n')
        one.env["KATA_CONF_FILE"] = str(configuration)
    return one


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
        until(lambda: (tmp_path / "out").read_text() == "up\n", "the program says that it is up")

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
        until(lambda: kata.ok("logs", names[0]).count("\n") == 3, "three lines in the log")
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


def _tool(directory: Path) -> str:
    """Build ``share_tool.c`` in a directory; returns its name there."""
    path = directory / "tool"
    subprocess.run(
        ["gcc", "-O1", "-static", "-o", path, Path(__file__).parent / "share_tool.c"],
        check=True,
        timeout=600,
    )
    return path.name


RIGHT = {
    "unlinked": "ftruncate, fchmod, fchown, futimens, mmap, fstat, 131072 600 12 2.3",
    "mapped": "seen sent synced",
    "nodes": "fifo, socket, connect,",
    "modern": "fallocate, punch, O_TMPFILE, exchange, noreplace, capability, ACL, nanoseconds,",
    "lock": "flock, fcntl, OFD,",
    "held inside": "no flock (EAGAIN), no fcntl (EAGAIN), no OFD (EAGAIN),",
    "held by another": "no flock (EAGAIN), no fcntl (EAGAIN), no OFD (EAGAIN),",
    "watch": "watching told, local",
    "umask": "750 640",
    "list": "denied granted",
}
"""What `test_what_files_can_do` sees on a local file system of Linux, alone or with a second container."""
_LOCKS = {"held by another": "flock, fcntl, OFD,"}  # locks are kept by each guest's kernel
_WATCH = {
    "watch": "watching not told, fuse"
}  # no file server tells of what others do; who sees "fuse" polls
_NO_TMPFILE_NO_ACL = {
    # Neither server has O_TMPFILE. Volumes are sub-mounts of the share, and Linux has no lists in those of FUSE.
    "modern": RIGHT["modern"]
    .replace("O_TMPFILE", "no O_TMPFILE (EOPNOTSUPP)")
    .replace("ACL", "no ACL (EOPNOTSUPP)"),
    "list": "denied denied",
}
OTHERWISE: dict[str, dict[str, str]] = {
    "virtio-fs": {**_LOCKS, **_WATCH, **_NO_TMPFILE_NO_ACL},
    "virtio-9p": {
        # QEMU names the file for each of these, and there is no name. Shared writable mappings need a cache.
        "unlinked": "no ftruncate (ENOENT), no fchmod (ENOENT), no fchown (ENOENT), no futimens (ENOENT),"
        " no mmap (EINVAL), fstat, 0 644 0 0.0",
        "mapped": "EINVAL",
        # QEMU 7.2 takes what it has made for a special file, which it must not open.
        "nodes": "no fifo (ENXIO), no socket (ENXIO), no connect (ENOENT),",
        # The protocol has none of these, and times of whole seconds.
        "modern": "no fallocate (EOPNOTSUPP), no punch (EOPNOTSUPP), no O_TMPFILE (EOPNOTSUPP), no exchange (EINVAL),"
        " noreplace, no capability (EOPNOTSUPP), no ACL (EOPNOTSUPP), no nanoseconds (ERANGE),",
        # Linux asks for a flock over 9p as for one of fcntl's, so that the two are one.
        "lock": "flock, no fcntl (EAGAIN), no OFD (EAGAIN),",
        "held by another": "flock, no fcntl (EAGAIN), no OFD (EAGAIN),",
        "watch": "watching not told, local",  # statfs is answered with the host's file system
        "list": "denied denied",
    },
}
"""What the shares show instead, each with the reason (docs/clients.md has it for people)."""


def test_what_files_can_do(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """The calls of databases, package managers and supervisors on files of a volume, as the host's kernel does them."""
    tool = f"/v/{_tool(tmp_path)}"
    kind = kata.env["KATA_SHARED_FS"]
    names = [f"files{number}-{kind}" for number in (1, 2)]
    seen: dict[str, str] = {}
    try:
        for name in names:
            kata.ok("run", "-d", "--name", name, "-v", f"{tmp_path}:/v", busybox_image, "sleep", "1000")

        def inside(script: str, *options: str, side: int = 0) -> str:
            return " ".join(kata.ok("exec", *options, names[side], "sh", "-c", script).split())

        for what in ("unlinked", "mapped", "lock"):
            seen[what] = inside(f"{tool} {what} /v/{what}")
        if kind == "virtio-9p":
            seen["unlinked"] = seen["unlinked"].rpartition(" ")[0] + " 0.0"  # the time at which it was made
        for what in ("nodes", "modern"):
            (tmp_path / what).mkdir()
            seen[what] = inside(f"{tool} {what} /v/{what}")
        if kind == "virtio-fs":
            assert (tmp_path / "nodes/a-fifo").is_fifo()
            assert (tmp_path / "nodes/a-socket").is_socket()
            assert os.getxattr(tmp_path / "modern/one", "security.capability")
            assert (tmp_path / "modern/one").stat().st_mtime_ns == 1000000007

        inside(
            f"{tool} hold /v/held > /v/holding 2>&1 < /dev/null & until grep -q , /v/holding; do sleep 0.1; done"
        )
        seen["held inside"] = inside(f"{tool} lock /v/held")
        seen["held by another"] = inside(f"{tool} lock /v/held", side=1)
        on_host = subprocess.run(
            [tmp_path / "tool", "lock", tmp_path / "held"], capture_output=True, check=True
        )
        assert _short(on_host.stdout.decode()) == RIGHT["lock"]

        # More at a time than an emulated machine has bounce pages for: requests wait, and nothing gets mixed up.
        data = [os.urandom(1 << 20) for _ in range(8)]
        for number, content in enumerate(data):
            (tmp_path / f"in{number}").write_bytes(content)
        inside("for n in 0 1 2 3 4 5 6 7; do dd if=/v/in$n of=/v/out$n bs=1M 2>/dev/null & done; wait")
        assert [(tmp_path / f"out{number}").read_bytes() for number in range(8)] == data

        (tmp_path / "watched").mkdir()
        watching = kata.start("exec", names[0], tool, "watch", "/v/watched")
        assert watching.stdout is not None
        first = watching.stdout.readline().decode().strip()
        (tmp_path / "watched/new").write_text("")
        seen["watch"] = f"{first} {watching.communicate(timeout=120)[0].decode().strip()}"

        seen["umask"] = inside("umask 027; mkdir /v/m; touch /v/m/f; stat -c %a /v/m /v/m/f")
        # What only a list allows: user 99 is given the right to read by the host.
        listed = tmp_path / "listed"
        listed.write_text("x")
        listed.chmod(0o600)
        attempt = "cat /v/listed >/dev/null 2>&1 && echo granted || echo denied"
        before = inside(attempt, "-u", "99:99")
        _allow(listed, 99)
        time.sleep(STALE_S)
        seen["list"] = f"{before} {inside(attempt, '-u', '99:99')}"
    finally:
        for name in names:
            kata.call("rm", "-f", name)
    seen = {what: _short(said) for what, said in seen.items()}
    expected = {**RIGHT, **OTHERWISE[kind]}
    assert seen == expected, {what: said for what, said in seen.items() if said != expected[what]}


def _short(said: str) -> str:
    """The tool's words with the names of errors in place of their sentences."""
    names = ("EAGAIN", "EINVAL", "ENOENT", "ENXIO", "EOPNOTSUPP", "ERANGE")
    for name in names:
        said = said.replace(os.strerror(getattr(errno, name)), name)
    return " ".join(said.split())


def _allow(path: Path, user: int) -> None:
    """Let a user read a file, by an access control list (acl(5)) in the form of its extended attribute."""
    nobody = 0xFFFFFFFF
    entries = ((1, 6, nobody), (2, 4, user), (4, 0, nobody), (16, 4, nobody), (32, 0, nobody))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", value)


def test_a_killed_file_server_is_told(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    if kata.env["KATA_SHARED_FS"] != "virtio-fs":
        return  # the hypervisor serves the files
    running = kata.start(
        *("run", "--rm", "--name", "served", "-v", f"{tmp_path}:/d", busybox_image),
        *("sh", "-c", "echo up; while :; do ls /d; sleep 0.1; done"),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == b"up\n"
    machine = int(json.loads(kata.ok("inspect", "served"))[0]["state"]["pid"])
    engine = Path(f"/proc/{machine}/stat").read_text().rpartition(") ")[2].split()[1]
    children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    (server,) = (pid for pid in children if "virtiofsd" in Path(f"/proc/{pid}/comm").read_text())
    os.kill(int(server), signal.SIGKILL)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 137
    assert b"virtiofsd" in stderr
    assert b"killed by signal 9" in stderr
    assert kata.sandboxes() == [] or "served" not in kata.ok("ps", "-a")


# ---- programs that change ----

PAGES = 32
"""Of one of the programs below; ``share_tool.c`` knows it."""
PROGRAMS, TURNS = 100, 4
"""Enough to fill a small guest's memory several times over."""


def test_a_program_that_was_replaced_is_not_run(kata: Kata, busybox_image: str, tmp_path: Path) -> None:
    """A guest executes what is in its pages now, however it came there.

    A translator of code that is not told of a write goes on with what it has translated before. In a small guest,
    pages that have held one program hold the next one soon; each page of these has code that tells whose it is. (Where
    virtiofsd writes into such pages itself, without bounce pages, one in four ran wrongly with QEMU 7.2.)
    """
    tool = f"/v/{_tool(tmp_path)}"
    kind = kata.env["KATA_SHARED_FS"]
    name = f"programs-{kind}"
    # QEMU's own server tells the translator.
    count, turns = (PROGRAMS, TURNS) if kind == "virtio-fs" else (5, 2)

    def replace(more: int) -> None:
        for number in range(count):
            new = tmp_path / "new"
            new.write_bytes(_program((number + more) % 251 + 1))
            new.chmod(0o755)
            new.rename(tmp_path / "programs" / str(number))

    (tmp_path / "programs").mkdir()
    try:
        for turn in range(turns):
            replace(turn * count)
            time.sleep(STALE_S)  # names are kept for that long
            if not turn:
                kata.ok(
                    *("run", "-d", "--name", name, "-m", "64m", "-v", f"{tmp_path}:/v", busybox_image),
                    *("sleep", "1000"),
                )
            said = kata.ok("exec", name, tool, "programs", "/v/programs", str(count), str(turn * count))
            assert said == f"0 of {count} wrong\n"
    finally:
        kata.call("rm", "-f", name)
        shutil.rmtree(tmp_path / "programs")


def _program(constant: int) -> bytes:
    """A static program for x86-64: each of its pages adds a constant to what it ends with."""
    size, start = PAGES * 4096, 256
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x400000 + start, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 4096)
    image = bytearray(size)
    image[: len(header) + len(segment)] = header + segment
    for page in range(PAGES):
        code = b"\x31\xff" if page == 0 else b""  # xor edi, edi
        code += b"\x6b\xff\x03\x81\xc7" + struct.pack("<I", constant)  # edi = edi * 3 + constant
        if page < PAGES - 1:
            code += b"\xe9" + struct.pack("<i", 4096 - len(code) - 5)  # go on in the next page
        else:
            code += b"\xb8\x3c\0\0\0\x0f\x05"  # exit(edi)
        image[page * 4096 + start : page * 4096 + start + len(code)] = code
    return bytes(image)
