"""The share of a sandbox, in mount namespaces of the tests' own. Needs root."""

from __future__ import annotations

import errno
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from apart import in_mounts

from kata import journal_undo, mount_table, sysio
from kata.engine.hostns import Namespaces
from kata.engine.lifecycle import volumes
from kata.engine.lifecycle.volumes import Share
from kata.errors import UnsupportedError, UsageError
from kata.journal import Journal

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def in_child(work: Callable[[], None]) -> None:
    """Run *work* in a child process with a mount namespace of its own; its exception fails the test."""

    def apart() -> None:
        volumes.own_namespace()
        work()

    in_mounts(apart)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path / "r"), "sandbox", {})


def share_of(journal: Journal) -> Share:
    share = Share(os.path.dirname(journal.path), journal)
    share.prepare()
    return share


def options(path: str) -> set[str]:
    found = mount_table.mount_at(path)
    assert found is not None
    return set(found.options.split(","))


def mounts_below(directory: Path) -> list[str]:
    """The mounts of this namespace that have something to do with a directory; others' come and go meanwhile."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]


def test_what_the_guest_sees(journal: Journal, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("content")

    def work() -> None:
        share = share_of(journal)
        rw = share.add(str(data), "c-rw", readonly=False)
        ro = share.add(str(data), "c-ro", readonly=True)
        one = share.add(str(data / "file"), "c-one", readonly=True)
        Path(share.path, rw, "new").write_text("x")
        assert (data / "new").exists()
        for name in (ro, one, ""):
            target = Path(share.path, name) if name == one else Path(share.path, name, "x")
            with pytest.raises(OSError, match="Read-only"):
                target.write_text("x")
        for name in (rw, ro, one):
            assert {"nosuid", "nodev"} <= options(os.path.join(share.path, name))
        assert Path(share.path, one).read_text() == "content"
        # Nothing that the guest could write into lies where the engine makes its names.
        with pytest.raises(OSError, match="Read-only"):
            os.symlink("/", os.path.join(share.path, "evil"))
        assert mounts_below(tmp_path)

    in_child(work)
    assert mounts_below(tmp_path) == []
    assert not journal_undo.undo(journal)
    assert os.listdir(tmp_path / "r") == []
    assert (data / "file").exists()


@pytest.mark.parametrize("has_mount_setattr", [True, False], ids=["now", "before Linux 5.12"])
def test_mounts_below_a_volume_are_as_restricted(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_mount_setattr: bool
) -> None:
    def missing(target: str, attributes: int, *, recursive: bool) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented", target)

    if not has_mount_setattr:
        monkeypatch.setattr(sysio, "mount_setattr", missing)

    def work() -> None:
        below = tmp_path / "data" / "below"
        below.mkdir(parents=True)
        sysio.mount("tmpfs", str(below), "tmpfs", volumes.OPTION_FLAGS["noatime"], "")
        share = share_of(journal)
        name = share.add(str(tmp_path / "data"), "c-v", readonly=True)
        assert {"ro", "nosuid", "nodev", "noatime"} <= options(os.path.join(share.path, name, "below"))
        top = share.add(str(tmp_path / "data"), "c-top", readonly=True, whole=False)
        assert {"ro", "nosuid", "nodev"} <= options(os.path.join(share.path, top))
        assert {"rw", "nosuid", "nodev", "noatime"} <= options(os.path.join(share.path, top, "below"))
        # What is mounted later on the host's side does not appear.
        late = tmp_path / "data" / "late"
        late.mkdir()
        sysio.mount("tmpfs", str(late), "tmpfs", 0, "")
        assert mount_table.mount_at(os.path.join(share.path, name, "late")) is None

    in_child(work)
    assert not journal_undo.undo(journal)


def test_undo_by_the_engine_itself_unmounts_and_keeps_the_data(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")

    def work() -> None:
        share = share_of(journal)
        share.add(str(tmp_path / "data"), "c-v", readonly=False)
        assert journal_undo.undo(journal) == []

    in_child(work)
    assert (tmp_path / "data" / "precious").exists()
    assert not os.path.exists(os.path.dirname(journal.path))


def test_remove_takes_one_back(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def work() -> None:
        share = share_of(journal)
        share.add(str(tmp_path / "data"), "c-v", readonly=False)
        share.add_file("c-hosts", b"127.0.0.1 localhost\n")
        assert Path(share.path, "c-hosts").read_text().startswith("127")
        share.remove("c-v")
        share.remove("c-hosts")
        share.remove("never there")
        assert os.listdir(share.path) == []

    in_child(work)
    assert not journal_undo.undo(journal)


def test_what_cannot_be_shared_is_named(journal: Journal, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.mkfifo(tmp_path / "fifo")

    def work() -> None:
        share = share_of(journal)
        for source, error, word in (
            ("/dev/null", UnsupportedError, "device"),
            (path, UnsupportedError, "socket"),
            (str(tmp_path / "fifo"), UnsupportedError, "fifo"),
            ("/nonexistent/x", UsageError, "No such file"),
        ):
            with pytest.raises(error, match=word):
                share.add(source, "c-x", readonly=False)
        assert os.listdir(share.path) == []

    in_child(work)
    listener.close()
    assert not journal_undo.undo(journal)


def test_the_hosts_later_mounts_appear_where_they_are_wanted(journal: Journal, tmp_path: Path) -> None:
    """As with a host whose mounts are private: only a look from its own mount namespace shows what is there."""
    data = tmp_path / "data"
    (data / "below").mkdir(parents=True)
    (data / "late").mkdir()

    def work() -> None:
        sysio.mount(str(data), str(data), None, sysio.MS_BIND)
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
        host = Namespaces()
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if child:
            # The host: it mounts something after the engine has started, and again when that has looked.
            os.read(ready[0], 1)
            sysio.mount(None, str(data), None, sysio.MS_SHARED)
            sysio.mount("tmpfs", str(data / "below"), "tmpfs", 0, "")
            (data / "below/file").write_text("below")
            os.write(go[1], b"1")
            os.read(ready[0], 1)
            sysio.mount("tmpfs", str(data / "late"), "tmpfs", 0, "")
            os.write(go[1], b"2")
            _, status = os.waitpid(child, 0)
            assert status == 0, "see the child's words"
            return
        try:
            volumes.own_namespace()
            share = share_of(journal)
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            assert not (data / "below/file").exists()
            first, second, missing = host.open_trees([str(data), str(data), str(data / "nothing")])
            assert isinstance(first, int)
            assert isinstance(second, int)
            assert isinstance(missing, FileNotFoundError)
            follows = share.add(str(data), "follows", readonly=False, tree=first, follows=True)
            apart = share.add(str(data), "apart", readonly=True, tree=second, whole=False)
            assert share.identify([follows, apart, "neither"]) == {follows, apart}
            os.write(ready[1], b"2")
            os.read(go[0], 1)
            for name in (follows, apart):
                assert Path(share.path, name, "below/file").read_text() == "below"
            assert (
                mount_table.mount_at(os.path.join(os.path.realpath(share.path), follows, "late")) is not None
            )
            assert mount_table.mount_at(os.path.join(os.path.realpath(share.path), apart, "late")) is None
            assert "ro" in options(os.path.join(share.path, apart))
            assert "ro" not in options(os.path.join(share.path, apart, "below"))
            for name in (follows, apart):
                share.remove(name)
            assert os.listdir(share.path) == []
            assert (data / "below").is_dir()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    in_child(work)
    assert not journal_undo.undo(journal)
