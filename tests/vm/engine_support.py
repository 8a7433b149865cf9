"""Engines with real virtual machines, driven through the two services as a client would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sandbox_support
from waiting import PATIENCE, alive, until, until_gone

from kata.engine.client import EngineClient
from kata.engine.containers.records import read_json
from kata.engine.launch import Engine, launch
from kata.guest import manifest
from kata.hypervisor import accel
from kata.images.resolve import resolve
from kata.journal import Journal
from kata.journal_undo import reconcile
from kata.oci import spec as oci
from kata.settings import DiskSettings
from kata.storage import ext4


class Streams:
    """The fifos of one process; what comes out of them is collected by threads."""

    def __init__(self, directory: Path, *, stdin: bool = False, terminal: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=directory, prefix="io"))
        self.paths: dict[str, str] = {"terminal": terminal}  # type: ignore[dict-item]
        self.output: dict[str, bytearray] = {}
        self._threads: list[threading.Thread] = []
        if stdin:
            self.paths["stdin"] = self._make("stdin")
        for name in ("stdout",) if terminal else ("stdout", "stderr"):
            path = self.paths[name] = self._make(name)
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(fd, True)
            self.output[name] = bytearray()
            self._fds = [*getattr(self, "_fds", []), (name, fd)]

    def _make(self, name: str) -> str:
        path = str(self.directory / name)
        os.mkfifo(path)
        return path

    def collect(self) -> None:
        """Begin to read; the engine has its ends open by now, so that an end of file is one."""
        for name, fd in self._fds:
            thread = threading.Thread(target=self._read, args=(name, fd))
            thread.start()
            self._threads.append(thread)

    def _read(self, name: str, fd: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as file:
            while data := file.read(1 << 20):
                self.output[name] += data

    def join(self) -> None:
        """Wait for the ends of the outputs."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "an output never ended"

    @property
    def stdout(self) -> bytes:
        return bytes(self.output["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self.output["stderr"])


class Box:
    """One sandbox: launched at once, its container made by `create`.

    Args:
        directory: A short path for run and state directories.
        guest_dir: The built guest.
        image: An image reference.
        changes: Over the settings.
    """

    def __init__(self, directory: Path, guest_dir: Path, image: str, **changes: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=directory, prefix="b"))
        self.run_dir = self.directory / "r"
        self.image = resolve(image)
        self.id = f"t{os.urandom(6).hex()}"
        containers = self.directory / "s" / "containers"
        journal = Journal.create_dir(str(containers), self.id, {"client": "test"})
        journal.retain("")
        journal.close()
        self.container_dir = containers / self.id
        guest = manifest.load(str(guest_dir))
        disk = self.container_dir / "rw.img"
        ext4.make_writable(str(disk), 256 << 20)
        self.settings = sandbox_support.sandbox(
            self.id,
            str(self.container_dir),
            accel=accel.choose().accel,
            kernel=guest.kernel,
            initrd=guest.initrd,
        )
        self.settings.disks = [
            DiskSettings(path=self.image.rootfs_path, readonly=True, serial="lower"),
            DiskSettings(path=str(disk), readonly=False, serial="upper"),
        ]
        sandbox_support.change(self.settings, **changes)
        self.engine: Engine = launch(self.settings, str(self.run_dir))
        self.client = EngineClient(self.engine.sock_path)

    def create(self, *argv: str, streams: Streams | None = None, **request: Any) -> None:
        """Write the bundle and make the container."""
        wanted = oci.Request("box")
        wanted.command = list(argv)
        for key, value in request.items():
            setattr(wanted, key, value)
        if streams is not None:
            wanted.terminal = bool(streams.paths["terminal"])
        config = oci.build(wanted, self.image.config)
        (self.container_dir / "config.json").write_text(json.dumps(config))
        self.client.create(self.id, str(self.container_dir), **(streams.paths if streams else {}))  # type: ignore[arg-type]
        if streams is not None:
            streams.collect()

    def run(self, *argv: str, **request: Any) -> tuple[int, Streams]:
        """Create, start and wait; the sandbox is gone afterwards."""
        streams = self.streams()
        self.create(*argv, streams=streams, **request)
        self.client.start(self.id)
        status = self.client.wait(self.id)
        streams.join()
        self.client.delete(self.id)
        return status, streams

    def streams(self, **options: bool) -> Streams:
        return Streams(self.directory, **options)

    def begin_exec(self, name: str, *argv: str, streams: Streams | None = None, **process: Any) -> None:
        """Add a process and start it."""
        spec = {
            "args": list(argv),
            "cwd": "/",
            "env": [f"PATH={oci.DEFAULT_PATH}"],
            "user": {"uid": 0, "gid": 0},
            **process,
        }
        self.client.exec(self.id, name, spec, **(streams.paths if streams else {}))  # type: ignore[arg-type]
        if streams is not None:
            streams.collect()
        self.client.start(self.id, name)

    def exec(self, name: str, *argv: str, **process: Any) -> tuple[int, Streams]:
        """Run a further process to its end."""
        streams = self.streams()
        self.begin_exec(name, *argv, streams=streams, **process)
        status = self.client.wait(self.id, name)
        streams.join()
        self.client.delete(self.id, name)
        return status, streams

    @property
    def state(self) -> dict[str, Any]:
        return read_json(str(self.container_dir / "state.json"))

    @property
    def sandbox_dir(self) -> Path:
        return Path(self.engine.run_dir)

    def hypervisor_pid(self) -> int:
        return int(self.client.describe()["hypervisor_pid"])

    def wait_gone(self) -> None:
        """Wait until engine and run directory are no more."""
        until(lambda: not (self.sandbox_dir.exists() or alive(self.engine.pid)), self.log_text)

    def log_text(self) -> str:
        """The engine's log while it is there."""
        try:
            return (self.sandbox_dir / "engine.log").read_text()
        except FileNotFoundError:
            return "(no engine.log)"

    def reconcile(self) -> list[str]:
        """What `kata gc` would do; the failures."""
        return list(reconcile(str(self.run_dir), str(self.directory / "s")).failures)

    def close(self) -> None:
        """End the sandbox whatever its state, and remove its directories. Safe to call twice."""
        if not self.directory.exists():
            return
        self.client.close()
        self.engine.release()
        if alive(self.engine.pid):
            os.kill(self.engine.pid, signal.SIGTERM)
            until_gone(self.engine.pid)
        assert not self.reconcile()
        shutil.rmtree(self.directory)


def descendants(pid: int) -> list[int]:
    """Children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.fixture
def make(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Callable[..., Box]]:
    """Makes sandboxes, which are closed after the test."""
    boxes: list[Box] = []

    def build(**changes: Any) -> Box:
        boxes.append(Box(run_directory, guest_assets, busybox_image, **changes))
        return boxes[-1]

    yield build
    for box in boxes:
        box.close()
