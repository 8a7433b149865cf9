"""A user who is let into a file's access control list for a while: what is there meanwhile, and afterwards."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
from pathlib import Path

import pytest

from kata import acl, confinement, journal_undo
from kata.errors import HypervisorError
from kata.hypervisor.access import Access, File, for_monitor
from kata.journal import Journal

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USER, OTHER = 54321, 54322


@pytest.fixture(autouse=True)
def run_directory_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_text("content")
    path.chmod(0o640)
    os.chown(path, 7, 8)
    return path


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path), "box", {})


def may(user: int, path: Path, flags: int) -> bool:
    """Whether a user can open our descriptor of a file once more."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable: its own /proc is its own
            os.close(os.open(f"/proc/self/fd/{fd}", flags))
            code = 0
        finally:
            os._exit(code)
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def has_list(path: Path) -> bool:
    return "system.posix_acl_access" in os.listxattr(path)


def test_a_user_may_open_a_file_for_a_while(disk: Path, journal: Journal) -> None:
    before = disk.stat()
    access, second = Access(journal, USER), Access(journal, OTHER)
    with open(disk, "rb") as file:
        assert not may(USER, disk, os.O_RDONLY)
        access.grant(str(disk), file.fileno(), acl.READ | acl.WRITE)
        second.grant(str(disk), file.fileno(), acl.READ)
    assert may(USER, disk, os.O_RDWR)
    assert may(OTHER, disk, os.O_RDONLY)
    assert not may(OTHER, disk, os.O_RDWR)
    assert not may(7 + USER, disk, os.O_RDONLY)
    access.revoke()
    assert not may(USER, disk, os.O_RDONLY)
    assert may(OTHER, disk, os.O_RDONLY)
    second.revoke()
    second.revoke()
    after = disk.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert not has_list(disk)
    assert journal_undo.undo(journal) == []


def test_the_list_that_a_file_has_stays(disk: Path, journal: Journal) -> None:
    # Somebody else is in it, and the mask lets nobody write.
    with open(disk, "rb") as file:
        acl.add(file.fileno(), 99, acl.READ)
        before = os.getxattr(disk, "system.posix_acl_access")
        access = Access(journal, USER)
        access.grant(str(disk), file.fileno(), acl.READ)
        with pytest.raises(PermissionError, match="mask"):
            Access(journal, OTHER).grant(str(disk), file.fileno(), acl.READ | acl.WRITE)
    access.revoke()
    assert os.getxattr(disk, "system.posix_acl_access") == before
    assert stat.S_IMODE(disk.stat().st_mode) == 0o640


def test_the_journal_takes_back_what_a_dead_engine_granted(disk: Path, journal: Journal) -> None:
    with open(disk, "rb") as file:
        Access(journal, USER).grant(str(disk), file.fileno(), acl.READ)
    assert has_list(disk)
    assert journal_undo.undo(journal) == []
    assert not has_list(disk)


def test_another_file_of_that_name_is_left_alone(disk: Path, journal: Journal) -> None:
    access = Access(journal, USER)
    with open(disk, "rb") as file:
        access.grant(str(disk), file.fileno(), acl.READ)
    disk.rename(disk.with_name("moved"))
    disk.write_text("another")
    with open(disk, "rb") as file:
        acl.add(file.fileno(), USER, acl.READ)
    access.revoke()
    assert has_list(disk)


def test_what_everybody_may_read_is_not_touched(disk: Path, journal: Journal) -> None:
    disk.chmod(0o644)
    with open(disk, "rb") as file:
        Access(journal, USER).grant(str(disk), file.fileno(), acl.READ)
    assert not has_list(disk)
    assert [entry.kind for entry in journal.entries] == []


def test_a_file_system_without_lists_leaves_a_monitor_root(disk: Path, journal: Journal) -> None:
    entry = Path("/proc/sys/kernel/cad_pid")  # of root alone, and nothing there has a list
    with open(disk, "rb") as first, open(entry, "rb") as second:
        opened = {"disk": first.fileno(), "other": second.fileno()}
        files = [File("disk", str(disk)), File("other", str(entry))]
        assert for_monitor("/usr/bin/env", files[:1], opened, journal).user == confinement.user_of(0)
        assert for_monitor("/usr/bin/env", files, opened, journal).user == 0
    with pytest.raises(HypervisorError, match=r"hypervisor's user open .*cad_pid") as refused:
        Access(journal, USER).shown("", "", str(entry), acl.READ).__enter__()
    assert "KATA_FIRST_USER=0" in refused.value.hint
    with Access(journal, USER).shown("", "", str(disk), acl.READ) as name:
        assert (name, may(USER, disk, os.O_RDONLY)) == (str(disk), True)
    assert not may(USER, disk, os.O_RDONLY)


def test_other_programs_read_the_list_as_we_do(disk: Path, journal: Journal) -> None:
    if not os.access("/usr/bin/getfacl", os.X_OK):
        pytest.skip("getfacl is not installed: apt-get install acl")
    with open(disk, "rb") as file:
        Access(journal, USER).grant(str(disk), file.fileno(), acl.READ | acl.WRITE)
    shown = subprocess.run(
        ["/usr/bin/getfacl", "-nc", str(disk)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert shown == [
        "user::rw-",
        f"user:{USER}:rw-",
        "group::r--",
        "mask::rw-",
        "other::---",
    ]
