"""Files that are replaced as a whole, whatever the disk does meanwhile."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kata import sysio

SMALL_FILES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from kata import sysio
# A write takes a part, and only the next one fails. Not in the tests' own process: its output may be a file as well.
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    sysio.replace_file(sys.argv[2], bytes(5001))
except OSError as error:
    print(error.errno)
    sys.exit()
print("written")
"""


def test_the_memory_of_a_process_that_was_not_killed_is_not_released() -> None:
    with sysio.Fd(os.pidfd_open(os.getpid())) as mine, pytest.raises(OSError, match="Errno") as caught:
        sysio.process_mrelease(mine.raw)
    if caught.value.errno == errno.ENOSYS:
        pytest.skip("Linux before 5.15 has no process_mrelease")
    assert caught.value.errno == errno.EINVAL


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"old")
    source = str(Path(sysio.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SMALL_FILES, source, str(path)], capture_output=True, check=True
    )
    assert int(done.stdout) == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_a_file_that_cannot_take_the_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        sysio.replace_file(str(tmp_path / "directory"), b"x")
    with pytest.raises(FileNotFoundError):
        sysio.replace_file(str(tmp_path / "none/record"), b"x")
    assert os.listdir(tmp_path) == ["directory"]


def test_mode_and_owner_are_those_asked_for_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "record"
    before = os.umask(0o077)
    try:
        sysio.replace_file(str(path), b"x")
        assert path.stat().st_mode & 0o7777 == 0o600
        sysio.replace_file(str(path), b"y", mode=0o2754, owner=(12, 34), fsync=True)
    finally:
        os.umask(before)
    status = path.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2754, 12, 34)
    assert path.read_bytes() == b"y"


def test_readers_see_one_content_or_another_and_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "record"
    contents = {bytes((letter,)) * 9000 for letter in b"abcd"}
    sysio.replace_file(str(path), min(contents))

    def write(content: bytes) -> None:
        for _ in range(50):
            sysio.replace_file(str(path), content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["record"]


def test_what_fits_is_written_over_a_file_and_what_does_not_is_not(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert not sysio.overwrite_file(str(path), b"{}"), "there is none"
    path.write_bytes(b'{"a": "long"}')
    assert sysio.overwrite_file(str(path), b'{"b": 1}')
    assert path.read_bytes() == b'{"b": 1}     '
    assert not sysio.overwrite_file(str(path), bytes(14))
    assert path.read_bytes() == b'{"b": 1}     '


def test_a_reader_sees_no_half_of_what_is_written_over(tmp_path: Path) -> None:
    path, size = str(tmp_path / "file"), 1 << 18
    sysio.replace_file(path, b"a" * size)
    child = os.fork()
    if child == 0:
        try:
            for letter in itertools.cycle(b"ab"):
                sysio.overwrite_file(path, bytes([letter]) * size)
        finally:
            os._exit(0)
    try:
        seen = set()
        for _ in range(200):
            content = sysio.read_file(path)
            assert len(content) == size
            assert content in (b"a" * size, b"b" * size), "a mixture"
            seen.add(content[:1])
            time.sleep(0.001)
        assert seen == {b"a", b"b"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_whoever_was_stopped_with_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    sysio.replace_file(path, b"12")
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sysio.read_file(path) == b"12"
        assert sysio.overwrite_file(path, b"34")
    assert sysio.read_file(path) == b"34"


def test_a_socket_may_have_a_longer_path_than_its_name(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    path = str(directory / "socket")
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(OSError, match="too long"):
            listener.bind(path)
        with sysio.SocketName(path) as name:
            listener.bind(name)
            listener.listen(1)
            client.connect(name)
    assert os.path.exists(path)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError), sysio.SocketName(f"{directory}/none/socket"):
        pass


def test_a_sparse_file_takes_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 256)
        file.truncate(1 << 30)
        file.flush()
        os.fsync(file.fileno())
    told = subprocess.run(["du", "--block-size=1", path], capture_output=True, text=True, check=True).stdout
    assert sysio.disk_bytes(path.stat()) == int(told.split()[0]) < 1 << 20
