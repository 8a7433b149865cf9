"""`kata cp` on the host's side; `tests/vm/test_cli_cp.py` has the rest."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kata.cli import copy
from kata.errors import GuestProtocolError, UsageError
from kata.proto import agentext_pb


def test_a_further_name_costs_nothing_where_it_cannot_be(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.write_text("first")
    (tmp_path / "old").write_text("old")
    assert copy._linked(str(first), str(tmp_path / "old"))
    assert copy._linked(str(first), str(tmp_path / "old")), "a name that it has already"
    assert (tmp_path / "old").stat().st_ino == first.stat().st_ino
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("needs a /dev/shm on another file system than /tmp")
        kept = Path(elsewhere, "kept")
        kept.write_text("precious")
        assert not copy._linked(str(first), str(kept))
        assert kept.read_text() == "precious"
        assert os.listdir(elsewhere) == ["kept"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(IsADirectoryError):
        copy._linked(str(first), str(tmp_path / "full"))
    assert sorted(os.listdir(tmp_path)) == ["first", "full", "old"]


def pieces(*content: bytes, error: Exception | None = None) -> Any:
    yield from content
    if error:
        raise error


@pytest.mark.parametrize("kind", ["link", "fifo", "file", "nothing"])
def test_a_file_takes_the_place_of_what_is_no_file_when_it_is_whole(tmp_path: Path, kind: str) -> None:
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    if kind == "link":
        place.symlink_to("elsewhere")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "file":
        place.write_text("old")
    if kind in ("link", "fifo"):
        before = os.lstat(place)
        with pytest.raises(GuestProtocolError):
            copy._write_file(str(place), pieces(b"half", error=GuestProtocolError("cut short")))
        assert os.lstat(place).st_ino == before.st_ino
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "place"]
    copy._write_file(str(place), pieces(b"ne", b"w"))
    assert stat.S_ISREG(os.lstat(place).st_mode)
    assert place.read_bytes() == b"new"
    assert elsewhere.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "place"]


def test_devices_and_the_like_are_not_written_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("/dev/null", "/dev/tty", str(tmp_path / "link"), str(tmp_path / "fifo")):
        with pytest.raises(UsageError, match="neither a file nor a directory"):
            copy._refuse_device(name)
    for usual in (str(tmp_path), str(tmp_path / "new"), __file__):
        copy._refuse_device(usual)


class Engine:
    """An agent's files, as the names that were made and removed; it has room for one piece."""

    def __init__(self, *, room: bool) -> None:
        self.names = {b"/link": stat.S_IFLNK | 0o777}
        self.room = room

    def call(self, service: str, method: str, request: Any, kind: Any) -> Any:
        if method == "Stat":
            if request.path not in self.names:
                from kata.errors import NotFoundError

                raise NotFoundError("nothing")
            return agentext_pb.FileInfo(mode=self.names[request.path])
        if method == "Write":
            if request.offset and not self.room:
                raise GuestProtocolError("no space left")
            self.names[request.path] = stat.S_IFREG | 0o600
        elif method == "Link":
            self.names[request.path] = self.names[request.target]
        else:
            assert method == "Remove"
            del self.names[request.path]
        return kind()


@pytest.mark.parametrize("room", [True, False])
def test_a_link_in_the_container_stays_until_the_file_is_whole(room: bool) -> None:
    engine = Engine(room=room)
    container: Any = type("Container", (), {"id": "c", "name": "c"})()
    guest = copy._Guest(engine, container, [])  # type: ignore[arg-type]
    content = io.BytesIO(bytes(copy._PIECE + 1))
    if room:
        guest.write("/link", content, mode=0o600)
    else:
        with pytest.raises(GuestProtocolError):
            guest.write("/link", content, mode=0o600)
    assert list(engine.names) == [b"/link"]
    assert stat.S_ISREG(engine.names[b"/link"]) == room


class MountedFiles:
    """An agent's files where /run/x is a symbolic link into a tmpfs at /dev/shm, and everything exists."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def call(self, service: str, method: str, request: Any, kind: Any) -> Any:
        if method == "Stat":
            path = request.path
            in_memory = path.startswith((b"/dev/shm", b"/run/x"))
            return agentext_pb.FileInfo(mode=stat.S_IFDIR | 0o755, device=2 if in_memory else 1)
        assert method in ("Mkdir", "Write")
        self.made.append(request.path)
        return kind()


def test_nothing_is_written_where_it_would_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a tmpfs of a container that does not run: its machine ends with the copy."""
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "config.json").write_text(
        '{"mounts": [{"destination": "/dev/shm", "type": "tmpfs"}, {"destination": "/proc", "type": "proc"}]}'
    )
    container: Any = type("Container", (), {"id": "c", "name": "c", "directory": str(tmp_path)})()
    files: Any = MountedFiles()
    mounts = copy._tmpfs_mounts(container)
    assert mounts == ["/dev/shm"]
    guest = copy._Guest(files, container, mounts)
    for place in ("/dev/shm/", "/run/x/y/", "/etc/"):
        copy._in(guest, str(tmp_path / "tree"), place, owners=False, follow=False)
    assert files.made == [b"/etc/tree", b"/etc/tree/below"]
    assert guest.left_out == 2
    assert "/run/x/y/tree is not copied: /dev/shm is a tmpfs" in capsys.readouterr().err
    with_all = copy._Guest(files, container, [])  # it runs
    copy._in(with_all, str(tmp_path / "tree"), "/dev/shm", owners=False, follow=False)
    assert files.made[2:] == [b"/dev/shm/tree", b"/dev/shm/tree/below"]
