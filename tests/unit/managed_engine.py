"""An engine with its management socket, over a double of the agent."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_double import Engine

from kata import paths
from kata.engine.services.management_socket import ManagementSocket


def head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode("latin-1")


class Managed:
    """An engine with its management socket."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.engine = Engine(directory, self._prepare, **settings)
        self.path = os.path.join(self.engine.run_dir, paths.MANAGEMENT_SOCKET)

    def _prepare(self, engine: Engine) -> None:
        self.socket = ManagementSocket(engine.sandbox)
        self.socket.listen()

    def curl(self, target: str, *arguments: str, data: bytes | None = None) -> tuple[int, str, bytes]:
        """Ask with curl: status, content type, body."""
        command = ["curl", "-sS", "--max-time", "20", "--unix-socket", self.path, "-o", "-"]
        command += ["-w", "\\n%{http_code} %{content_type}", *arguments, f"http://sandbox{target}"]
        done = subprocess.run(command, input=data or b"", capture_output=True, check=True)
        body, _, words = done.stdout.rpartition(b"\n")
        status, _, kind = words.decode().partition(" ")
        return int(status), kind, body

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.path)
        return sock

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def settle(self) -> None:
        """Wait until there is no connection any more."""
        deadline = time.monotonic() + 10
        while self.socket._management and self.socket._management.server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.engine.do(lambda: None)  # a transport is closed a moment after its task

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.socket.close(), self.engine.loop).result(10)
        self.engine.stop()


@pytest.fixture(name="make")
def make_fixture(tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    """Makes engines with settings of the test's; they are stopped at its end."""
    made: list[Managed] = []

    def build(**settings: Any) -> Managed:
        made.append(Managed(tmp_path, **settings))
        return made[-1]

    yield build
    for one in made:
        one.stop()


@pytest.fixture(name="managed")
def managed_fixture(make: Callable[..., Managed]) -> Managed:
    """One with the settings as they are."""
    return make()


def create_with_volume(engine: Engine) -> None:
    """Make the container c1, with a volume whose source is /dev/null."""
    bundle = engine.bundle("sleep")
    path = engine.container_dir / "config.json"
    config = json.loads(path.read_text())
    config["mounts"].append(
        {"type": "bind", "source": "/dev/null", "destination": "/v", "options": ["bind"]}
    )
    path.write_text(json.dumps(config))
    with engine.client() as client:
        client.create("c1", bundle)
