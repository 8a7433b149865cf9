"""How kata-monitor finds sandboxes: by the kernel's events, wherever they appear and however fast."""

from __future__ import annotations

import os
import select
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kata import inotify, sysio
from kata.monitor import discovery
from kata.monitor.discovery import Discovery

PATIENCE_S = 20.0


class Watching:
    """A `Discovery` whose events are read as an event loop would: when its descriptor is readable, never otherwise."""

    def __init__(self, *roots: Path) -> None:
        self.changes = 0
        self.discovery = Discovery([str(root) for root in roots], self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def ids(self) -> list[str]:
        return [one.id for one in self.discovery.sandboxes()]

    def until(self, what: Callable[[], bool]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < give_up, self.ids()
            if select.select([self.discovery], [], [], 0.1)[0]:
                self.discovery.read()

    def finds(self, *ids: str) -> None:
        self.until(lambda: self.ids() == list(ids))


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "run" / "sandboxes", tmp_path / "run" / "vc" / "sbs"


@pytest.fixture
def watching(roots: tuple[Path, Path]) -> Iterator[Watching]:
    one = Watching(*roots)
    yield one
    one.discovery.close()


def sandbox(root: Path, name: str, sandbox_id: str = "") -> Path:
    directory = root / name
    directory.mkdir(parents=True)
    if sandbox_id:
        (directory / "sandbox.json").write_text(f'{{"id": "{sandbox_id}"}}')
    with (
        socket.socket(socket.AF_UNIX) as one,
        sysio.SocketName(str(directory / "shim-monitor.sock")) as short,
    ):
        one.bind(short)
    return directory


def test_sandboxes_come_and_go(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, original = roots
    assert watching.ids() == []
    sandbox(ours, "web", "web")  # neither the place nor what is above it was there
    watching.finds("web")
    sandbox(original, "other")
    watching.finds("other", "web")
    (original / "empty").mkdir()
    sandbox(ours, "k8s.io.abc", "abc")
    watching.finds("abc", "other", "web")
    found = watching.discovery.find("k8s.io.abc")
    assert found is not None
    assert found is watching.discovery.find("abc")
    assert found.socket == str(ours / "k8s.io.abc/shim-monitor.sock")
    before = watching.changes
    (ours / "web/something-else").write_text("")
    time.sleep(0.05)
    watching.discovery.read()
    assert watching.changes == before, "a file that is none of ours"
    (ours / "k8s.io.abc/shim-monitor.sock").unlink()
    watching.finds("other", "web")
    shutil.rmtree(original.parent)
    watching.finds("web")
    shutil.rmtree(ours.parent)
    watching.finds()
    sandbox(ours, "again", "again")  # the places may go and come back as a whole
    sandbox(original, "later")
    watching.finds("again", "later")


def test_a_sandbox_that_is_in_two_places_counts_once(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, original = roots
    directory = sandbox(ours, "k8s.io.abc", "abc")
    watching.finds("abc")
    (original / "abc").mkdir(parents=True)
    os.link(directory / "shim-monitor.sock", original / "abc/shim-monitor.sock")
    sandbox(original, "xyz")
    watching.finds("abc", "xyz")
    # By a socket of its own there, or a link: the id says that it is the same.
    (original / "abc/shim-monitor.sock").unlink()
    (original / "abc/shim-monitor.sock").symlink_to(directory / "shim-monitor.sock")
    sandbox(original, "further")
    watching.finds("abc", "further", "xyz")
    found = watching.discovery.find("abc")
    assert found is not None
    assert found.key == "k8s.io.abc"


def test_two_sandboxes_may_have_the_same_id(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, _ = roots
    sandbox(ours, "moby.one", "one")
    sandbox(ours, "k8s.io.one", "one")
    watching.finds("moby.one", "one")


def test_a_sandbox_without_settings_yet_gets_its_id_later(
    roots: tuple[Path, Path], watching: Watching
) -> None:
    ours, _ = roots
    directory = sandbox(ours, "k8s.io.abc")
    watching.finds("k8s.io.abc")
    (directory / "sandbox.json").write_text("{")
    assert watching.ids() == ["k8s.io.abc"]
    (directory / "sandbox.json").write_text('{"id": "abc"}')
    assert watching.ids() == ["abc"]


def test_a_socket_in_place_of_another_is_noticed(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, _ = roots
    directory = sandbox(ours, "web", "web")
    watching.finds("web")
    shutil.rmtree(directory)
    sandbox(ours, "web", "worker")
    watching.finds("worker")


def test_what_is_no_sandbox_is_none(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, _ = roots
    ours.mkdir(parents=True)
    (ours / "file").write_text("")
    (ours / "link").symlink_to("/nowhere")
    (ours / "plain").mkdir()
    (ours / "plain/shim-monitor.sock").write_text("no socket")
    sandbox(ours, "web", "web")
    watching.finds("web")


def test_a_queue_that_ran_over_leads_to_a_look(roots: tuple[Path, Path], watching: Watching) -> None:
    ours, _ = roots
    sandbox(ours, "first", "first")
    watching.finds("first")
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [ours / f"noise{parity}" for parity in (0, 1)]
    for number in range(most + 100):  # two names in turn, or the kernel would make one event of them
        os.mkdir(names[number % 2])
        os.rmdir(names[number % 2])
    sandbox(ours, "second", "second")
    watching.finds("first", "second")
    sandbox(ours, "third", "third")  # and it is watched as before
    watching.finds("first", "second", "third")


def test_where_nothing_can_be_watched_a_question_is_a_look(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = roots

    def refuse(fd: int, path: str, mask: int) -> int:
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:  # fs.inotify.max_user_watches is the whole machine's
        patch.setattr(inotify, "add_watch", refuse)
        watching = Watching(*roots)
        try:
            assert watching.discovery.blind
            sandbox(ours, "web", "web")
            assert watching.ids() == ["web"]
        finally:
            patch.undo()
            assert watching.ids() == ["web"]
            assert not watching.discovery.blind
            watching.discovery.close()


def test_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", "/run/kata")
    assert discovery.places() == ["/run/kata/sandboxes", "/run/vc/sbs", "/run/kata"]
    monkeypatch.setenv("KATA_RUN_DIR", "/tmp/x")
    assert discovery.places() == ["/tmp/x/sandboxes", "/tmp/x/vc/sbs"]
