"""What other users put in the way of this one's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from kata import given_paths, paths
from kata.cli import copy
from kata.engine.containers import copies
from kata.errors import HostError, JournalError, UnsupportedError
from kata.journal import Journal

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
OTHER = 1_800_000_009
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which gives files to another user")


def _append(path: Path | str, text: str) -> None:
    fd = given_paths.open_written(str(path), _APPEND, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _link(path: Path, target: Path | str, owner: int) -> None:
    path.symlink_to(target)
    os.chown(path, owner, owner, follow_symlinks=False)


def test_files_are_made_and_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b/../b")
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a/b/log", "a/./b//log", "link/log", "absolute/b/log", "a/../a/b/log"):
        _append(path, "x")
    assert (tmp_path / "a/b/log").read_text() == "xxxxx"
    for path in ("none/log", "a", "/"):
        with pytest.raises(OSError, match=r"No such file|directory"):
            _append(path, "x")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        _append("round", "x")


@needs_root
@pytest.mark.parametrize("place", ["log", "directory/log"])
def test_another_users_link_is_not_followed(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "log").write_text("kept")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    if "/" in place:
        _link(theirs / "directory", secret, OTHER)
    else:
        _link(theirs / "log", secret / "log", OTHER)
    with pytest.raises(OSError, match="Too many levels"):
        _append(theirs / place, "x")
    assert (secret / "log").read_text() == "kept"


def test_what_the_kernel_links_is_no_path() -> None:
    code = (
        f"import os, sys; sys.path.append({str(Path(given_paths.__file__).parents[1])!r})\n"
        "from kata import given_paths\n"
        "os.write(given_paths.open_written('/dev/stderr', os.O_WRONLY, 0), b'said')"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True)
    assert done.stderr == b"said"


def test_a_fifo_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is no file"):
        given_paths.read(str(tmp_path / "fifo"), 10)
    with pytest.raises(OSError, match="No such device or address"):
        _append(tmp_path / "fifo", "x")
    (tmp_path / "file").write_text("content")
    assert given_paths.read(str(tmp_path / "file"), 4) == b"cont"


@needs_root
def test_directories_of_another_user_are_refused(tmp_path: Path) -> None:
    paths.check_own(str(tmp_path), str(tmp_path / "none"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    with pytest.raises(HostError, match=f"belongs to user {OTHER}"):
        paths.check_own(str(tmp_path), str(theirs))
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(HostError, match=f"belongs to user {OTHER}"):
        paths.check_own(str(tmp_path / "link"))
    theirs.chmod(0o777)
    os.chown(theirs, 0, 0)
    with pytest.raises(HostError, match="is open to all users"):
        paths.check_own(str(theirs))


@needs_root
@pytest.mark.parametrize(
    "how", [lambda path: os.chown(path, OTHER, OTHER), lambda path: os.chmod(path, 0o622)]
)
def test_a_journal_that_others_may_have_written_is_not_obeyed(
    tmp_path: Path, how: Callable[[str], None]
) -> None:
    journal = Journal.create(str(tmp_path / "journal"), {})
    journal.close()
    Journal.open(journal.path).close()
    how(journal.path)
    for open_one in (Journal.open, Journal.attach):
        with pytest.raises(JournalError, match="is not this user's alone"):
            open_one(journal.path)


@pytest.fixture
def swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which, once it was looked at, links are in the place of a directory and of a file: to those that
    are beside it.
    """
    volume = tmp_path / "volume"
    (volume / "directory").mkdir(parents=True)
    (volume / "file").write_text("harmless")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "inner").write_text("secret")
    really, scan = os.open, os.scandir

    def swap(name: object) -> None:
        path = volume / os.path.basename(str(name))
        if path.name in ("directory", "file") and not path.is_symlink():
            path.rename(tmp_path / f"former {path.name}")
            path.symlink_to(secret / "inner" if path.name == "file" else secret)

    def opened(path: object, *arguments: int, **more: int) -> int:
        swap(path)
        return really(path, *arguments, **more)  # type: ignore[arg-type]

    def scanned(path: object) -> object:
        swap(path)
        return scan(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "scandir", scanned)
    return volume


@pytest.mark.parametrize("gone", ["directory", "file"])
def test_what_is_copied_into_a_machine_is_what_was_looked_at(swapped: Path, gone: str) -> None:
    former = swapped / gone
    former.rmdir() if former.is_dir() else former.unlink()
    with pytest.raises(UnsupportedError, match="cannot copy"):
        copies.gather(str(swapped), "/in", "/x", readonly=True)


class Guest:
    """What `kata cp` asks of a container."""

    def __init__(self) -> None:
        self.outside: dict[tuple[int, int], str] = {}
        self.written: list[bytes] = []

    def is_kept(self, path: str) -> bool:
        return True

    def mkdir(self, path: str, **_more: int) -> None:
        pass

    def write(self, path: str, file: BinaryIO, **_more: int) -> None:
        self.written.append(file.read())


@pytest.mark.parametrize("gone", ["directory", "file"])
def test_what_is_copied_into_a_container_is_what_was_looked_at(swapped: Path, gone: str) -> None:
    former = swapped / gone
    former.rmdir() if former.is_dir() else former.unlink()
    guest = Guest()
    with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
        copy._in_entry(guest, str(swapped), os.stat(swapped), "/in", owners=True)  # type: ignore[arg-type]
    assert guest.written == []
