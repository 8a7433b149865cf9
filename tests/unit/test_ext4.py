"""Writable layers: sound ext4, sparse, made from a template, nothing left to do in the guest."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from kata.errors import HostError, ResourceExhaustedError, UsageError
from kata.storage import ext4

pytestmark = pytest.mark.skipif(
    not (shutil.which("mkfs.ext4") or os.path.exists("/usr/sbin/mkfs.ext4")),
    reason="needs mkfs.ext4 (apt-get install e2fsprogs)",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ext4"


def tool(*command: str) -> str:
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("size", [16 << 20, 100 << 20, 1 << 30, 10 << 30, (100 << 30) + 4097])
def test_sound_and_sparse(tmp_path: Path, cache: Path, size: int) -> None:
    for name in ("a", "b"):
        ext4.make_writable(str(tmp_path / name), size)
        made = tmp_path / name
        assert made.stat().st_size == size & ~4095
        assert made.stat().st_blocks * 512 < 4 << 20
        assert made.stat().st_mode & 0o777 == 0o600
        tool("e2fsck", "-fn", str(made))
    assert len(list(cache.iterdir())) == 1
    said = tool("dumpe2fs", str(tmp_path / "a"))
    groups = [line for line in said.splitlines() if re.match(r"Group \d", line)]
    assert groups
    # Otherwise the guest's kernel would begin by writing zeros over all inode tables.
    assert all("ITABLE_ZEROED" in line for line in groups)
    assert "has_journal" in said
    for name in ext4.OVERLAY_DIRECTORIES:
        kept = tool("debugfs", "-R", f"stat /{name}", str(tmp_path / "a"))
        assert "Type: directory    Mode:  0755" in kept
        assert re.search(r"User: +0 +Group: +0", kept)


@pytest.mark.parametrize("size", [16 << 20, 1 << 30, 10 << 30, 100 << 30])
@pytest.mark.parametrize("directories", [True, False])
def test_a_scratch_disk(tmp_path: Path, size: int, directories: bool) -> None:
    made = tmp_path / "a"
    ext4.make_writable(str(made), size, scratch=True, directories=directories)
    assert made.stat().st_blocks * 512 < 4 << 20
    tool("e2fsck", "-fn", str(made))
    said = tool("dumpe2fs", str(made))
    # Without a journal, who makes files again after a removal of many waits for a minute (findings/).
    assert "has_journal" in said
    assert re.search(r"Total journal size: +4(M|096k)", said)
    assert "metadata_csum" not in said
    groups = [line for line in said.splitlines() if re.match(r"Group \d", line)]
    assert all("ITABLE_ZEROED" in line for line in groups)
    assert ("fs" in tool("debugfs", "-R", "ls /", str(made)).split()) is directories


def test_options_of_the_host_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mke2fs.conf").write_text("[defaults]\n base_features = none\n")
    monkeypatch.setenv("MKE2FS_CONFIG", str(tmp_path / "mke2fs.conf"))
    ext4.make_writable(str(tmp_path / "a"), 64 << 20)
    assert "extent" in tool("dumpe2fs", "-h", str(tmp_path / "a"))


def test_the_kernel_mounts_it_and_writes_nothing_by_itself(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made, mounted = tmp_path / "a", tmp_path / "m"
    mounted.mkdir()
    ext4.make_writable(str(made), 10 << 30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(0x20000) == 0
            assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0
            done = subprocess.run(
                ["mount", "-o", "loop", made, mounted], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                (tmp_path / "why").write_text(done.stderr)
                status = 77
            else:
                (mounted / "file").write_bytes(b"x" * 10_000)
                assert [path.name for path in mounted.iterdir() if not path.is_dir()] == ["file"]
                subprocess.run(["umount", mounted], check=True)
                status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(result) == 77:
        pytest.skip(f"needs loop mounts: {(tmp_path / 'why').read_text().strip()[:100]}")
    assert os.waitstatus_to_exitcode(result) == 0
    assert made.stat().st_blocks * 512 < 4 << 20
    tool("e2fsck", "-fn", str(made))


@pytest.mark.parametrize("size", [0, 4096, (16 << 20) - 1, 17 << 40])
def test_sizes_out_of_range(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError) as caught:
        ext4.make_writable(str(tmp_path / "a"), size)
    assert caught.value.hint
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ext4.make_writable(str(tmp_path / "a"), 64 << 20)

    def full(fd: int, data: Any, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceExhaustedError) as caught:
        ext4.make_writable(str(tmp_path / "b"), 64 << 20)
    assert "kata gc" in caught.value.hint
    assert not (tmp_path / "b").exists()


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(HostError, match="File exists"):
        ext4.make_writable(str(tmp_path / "a"), 64 << 20)
    assert (tmp_path / "a").read_text() == "mine"


def test_mkfs_missing_or_failing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def without(command: list[str], **more: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "mkfs.ext4")

    monkeypatch.setattr(subprocess, "run", without)
    with pytest.raises(HostError, match="not installed") as caught:
        ext4.make_writable(str(tmp_path / "a"), 64 << 20)
    assert caught.value.hint == "apt-get install e2fsprogs"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: real(["sh", "-c", "echo odd; exit 5"], **more)
    )
    with pytest.raises(HostError, match="failed with status 5: odd"):
        ext4.make_writable(str(tmp_path / "a"), 64 << 20)
    assert not list(cache.iterdir())
    assert not (tmp_path / "a").exists()


def test_a_damaged_template_is_told(tmp_path: Path, cache: Path) -> None:
    ext4.make_writable(str(tmp_path / "a"), 64 << 20)
    [template] = cache.iterdir()
    os.truncate(template, 1000)
    with pytest.raises(HostError, match="is damaged") as caught:
        ext4.make_writable(str(tmp_path / "b"), 64 << 20)
    assert caught.value.hint == f"rm {template}"


SLOW_MKFS = """#!/bin/sh
echo $$ > {mark}
exec sleep 1000
"""


def test_what_a_killed_command_left_goes_with_the_next_or_with_gc(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "mkfs.ext4").write_text(SLOW_MKFS.format(mark=mark))
    (tmp_path / "mkfs.ext4").chmod(0o755)
    program = (
        f"import sys; sys.path.append({str(Path(ext4.__file__).parents[2])!r})\n"
        "from kata.storage import ext4\n"
        "import subprocess; run = subprocess.run\n"
        f"subprocess.run = lambda command, **more: run([{str(tmp_path / 'mkfs.ext4')!r}], **more)\n"
        f"ext4.make_writable({str(tmp_path / 'a')!r}, 64 << 20)\n"
    )
    for clear in (ext4.clear_leftovers, lambda: ext4.make_writable(str(tmp_path / "b"), 32 << 20)):
        mark.unlink(missing_ok=True)
        killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
        until(lambda: mark.exists() and mark.read_text().endswith("\n"), "mkfs runs")
        killed.kill()
        killed.wait()
        os.kill(int(mark.read_text()), signal.SIGKILL)
        assert len(list(cache.iterdir())) == 2
        clear()
        assert [one.name for one in cache.iterdir() if not one.name.endswith(".img")] == []
    assert ext4.clear_leftovers() == []


def test_templates_of_sizes_that_were_tried_once_do_not_gather(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ext4, "_MOST_TEMPLATES", 2)
    for number in range(4):
        ext4.make_writable(str(tmp_path / f"{number}"), (16 + number) << 20)
        oldest = min(cache.iterdir(), key=lambda one: one.stat().st_size)
        os.utime(oldest, (1, 1))
    assert len(list(cache.iterdir())) == 3, "those that are kept, and the new one"
    assert f"v3-{19 << 20}.img" in [one.name for one in cache.iterdir()]
