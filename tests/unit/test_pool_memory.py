"""The warm pool and the host's memory: when a machine may wait, and that one that waits goes when memory gets short."""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.factory import pool, waiting
from kata.engine.factory import template as templates

CALM = b"some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


class Host:
    """What the kernel says of memory; None where it has no such file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | None] = {"/proc/pressure/memory": CALM}
        self.has_available(1024)

    def has_available(self, mib: int) -> None:
        self.files["/proc/meminfo"] = b"MemTotal: 9 kB\nMemAvailable: %d kB\n" % (mib << 10)

    def open(self, path: Any, *arguments: Any, **named: Any) -> Any:
        if path not in self.files:
            return builtins.open(path, *arguments, **named)
        content = self.files[path]
        if content is None:
            raise FileNotFoundError(path)
        return io.BytesIO(content)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    one = Host()
    monkeypatch.setattr(waiting, "open", one.open, raising=False)
    return one


def test_what_has_to_be_available(host: Host) -> None:
    assert waiting.is_short_of_memory(1024) == ""
    assert waiting.is_short_of_memory(1025) == "1024 MiB are available, and 1025 have to be"


@pytest.mark.parametrize("content", [None, b"MemTotal: 9 kB\n", b"MemAvailable: much\n"])
def test_nothing_waits_where_memory_is_not_known(host: Host, content: bytes | None) -> None:
    host.files["/proc/meminfo"] = content
    assert waiting.is_short_of_memory(0) == "how much memory is available is not known"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, ""),
        (b"", ""),
        (b"some avg10=20.00 avg60=0.00 avg300=0.00 total=0\n", ""),
        (b"some avg10=20.01 avg60=0.00 avg300=0.00 total=0\n", "memory is short (some avg10=20.01)"),
    ],
)
def test_nothing_waits_under_pressure(host: Host, content: bytes | None, reason: str) -> None:
    host.files["/proc/pressure/memory"] = content
    assert waiting.is_short_of_memory(0) == reason


class Vm:
    async def wait(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def keeper(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> waiting.Keeper:
    """One whose template is there, and that listens."""
    monkeypatch.setattr(waiting, "LOOK_S", 0.01)
    monkeypatch.setattr(templates, "key_of", lambda *_: "key")
    (tmp_path / templates.WHOLE).touch()
    template: Any = SimpleNamespace(path=str(tmp_path), key="key")
    nothing: Any = None
    one = waiting.Keeper(template, nothing, nothing, 512, "")
    one._place = str(tmp_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    listener.bind(os.path.join(tmp_path, pool.SOCKET_NAME))
    listener.listen(1)
    one._listener = listener
    return one


async def wait_of(keeper: waiting.Keeper, seconds: float) -> Any:
    vm: Any = Vm()
    with ThreadPoolExecutor(1) as threads:
        return await asyncio.wait_for(keeper._wait(vm, threads), seconds)


def test_one_that_waits_goes_when_memory_gets_short(keeper: waiting.Keeper, host: Host) -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):  # it goes on waiting as long as there is memory
            await wait_of(keeper, 0.2)
        host.has_available(511)
        assert await wait_of(keeper, 10) is None

    try:
        asyncio.run(run())
    finally:
        keeper.around.release()
        assert keeper._listener is not None
        keeper._listener.close()
