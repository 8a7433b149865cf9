"""`kata pull` over a slow link, from Debian's docker-registry: what is shown, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_support import Blobs, image, layer, member
from registry_support import DockerRegistry
from terminal_support import KATA, Terminal

from kata.images import store

RATE = 1 << 20
SIZES = (100 * 10240, 200 * 10240, 300 * 10240)
"""Of the layers: a tar file is a multiple of 10240 bytes."""

WHOLE = f"{sum(SIZES) / (1 << 20):.1f} MiB in {len(SIZES)} layers"


class SlowLink:
    """A port on loopback behind which another one is, some bytes a second away.

    Args:
        target: ``HOST:PORT``.

    Attributes:
        host: Its own ``HOST:PORT``.
        rate: Bytes a second towards the client, of all connections together.
        carried: How many bytes have gone there.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self.rate = RATE
        self.carried = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                host, _, port = self._target.partition(":")
                far = socket.create_connection((host, int(port)))
                for source, sink, is_slow in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._carry, args=(source, sink, is_slow), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if is_slow:
                    with self._lock:
                        self.carried += len(data)
                        time.sleep(len(data) / self.rate)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def stop(self) -> None:
        """Take no more connections."""
        self._server.close()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SlowLink]:
    """A link to a registry with ``app:1``."""
    registry = DockerRegistry(tmp_path / "registry")
    try:
        blobs = Blobs()
        layers = [layer(member(f"file{size}", content=os.urandom(size - 10240))) for size in SIZES]
        registry.push("app", "1", blobs, image(blobs, layers), [])
        slow = SlowLink(registry.host)
        try:
            yield slow
        finally:
            slow.stop()
    finally:
        registry.stop()


@contextlib.contextmanager
def _pulling(link: SlowLink, tmp_path: Path) -> Iterator[Terminal]:
    state = {
        "KATA_STATE_DIR": str(tmp_path / "state"),
        "KATA_RUN_DIR": str(tmp_path / "run"),
        "NO_COLOR": "1",
    }
    terminal = Terminal([*KATA, "pull", f"{link.host}/app:1"], state)
    try:
        yield terminal
    finally:
        terminal.close()


def _kept(tmp_path: Path) -> int:
    pulls = tmp_path / "state/images/pulls"
    return sum(path.stat().st_size for path in pulls.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_an_interrupted_pull_over_a_slow_link_goes_on(
    link: SlowLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    with _pulling(link, tmp_path) as terminal:
        # The bar of the whole has the size of the image, and each layer that is under way has its own.
        shown = terminal.wait_for("of 3 layers", "/5.9 MiB", "/2.9 MiB")
        assert "pulling" in shown
        terminal.wait(lambda: _kept(tmp_path) > RATE)
        if how == "Ctrl-C":
            terminal.type("\x03")
            assert os.waitstatus_to_exitcode(terminal.end()) == 130
            assert f"of {WHOLE} have arrived; the next attempt goes on from there" in terminal.text()
        else:
            os.kill(terminal.pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(terminal.end()) == -signal.SIGKILL
    kept = _kept(tmp_path)
    assert store.list_images() == []
    assert not list((tmp_path / "state/images/rootfs").glob("*.erofs"))

    link.rate, before = 1 << 40, link.carried
    with _pulling(link, tmp_path) as terminal:
        assert os.waitstatus_to_exitcode(terminal.end()) == 0
    carried = link.carried - before
    assert sum(SIZES) - kept <= carried < sum(SIZES) - kept + (64 << 10)
    [made] = store.list_images()
    assert made.names == [f"{link.host}/app:1"]
    assert not (tmp_path / "state/images/pulls").exists()


def test_a_line_about_the_whole_stays(link: SlowLink, tmp_path: Path) -> None:
    link.rate = 4 * RATE
    with _pulling(link, tmp_path) as terminal:
        assert os.waitstatus_to_exitcode(terminal.end()) == 0
        lines = [line for line in terminal.text().splitlines() if line]
    assert lines[0] == f"{link.host}/app:1: {WHOLE}"
    assert lines[1].startswith("sha256:")
    assert len(lines) == 2
