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

from kata.engine.factory import host_memory, pool, pool_counts, waiting
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
    monkeypatch.setattr(host_memory, "open", one.open, raising=False)
    return one


def test_what_has_to_be_available(host: Host) -> None:
    assert host_memory.shortage(1024) == ""
    assert host_memory.shortage(1025) == "1024 MiB are available, and 1025 have to be"


@pytest.mark.parametrize("content", [None, b"MemTotal: 9 kB\n", b"MemAvailable: much\n"])
def test_nothing_waits_where_memory_is_not_known(host: Host, content: bytes | None) -> None:
    host.files["/proc/meminfo"] = content
    assert host_memory.shortage(0) == "how much memory is available is not known"


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
    assert host_memory.shortage(0) == reason


@pytest.mark.parametrize(
    ("names", "cache"),
    [
        (("memory.max", "memory.current"), "inactive_file"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_a_cgroup_may_have_less_than_the_host(
    host: Host, tmp_path: Path, names: tuple[str, str], cache: str
) -> None:
    """Of both versions; what the kernel takes back first is available, and no limit is none."""
    limit, used = names
    (tmp_path / limit).write_text(f"{1000 << 20}\n")
    (tmp_path / used).write_text(f"{900 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\n{cache} {50 << 20}\n")
    within = [str(tmp_path)]
    assert host_memory.shortage(150, within) == ""
    said = f"150 MiB are available in {tmp_path}, and 151 have to be"
    assert host_memory.shortage(151, within) == said
    assert host_memory.shortage(151, [str(tmp_path / "other")]) == ""
    (tmp_path / used).write_text(f"{2000 << 20}\n")
    assert host_memory.shortage(1, within).startswith("0 MiB are available in")
    (tmp_path / limit).write_text("max\n")
    assert host_memory.shortage(151, within) == ""


def test_the_cgroups_of_this_process() -> None:
    """From its own to the topmost that can be seen, each a directory; none where memory is in no hierarchy."""
    found = host_memory.cgroups()
    assert found == sorted(found, key=len, reverse=True)
    assert all(os.path.isdir(one) for one in found)
    assert all(one.startswith(f"{found[-1]}") for one in found)


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
    one = waiting.Keeper(template, nothing, nothing, lambda: host_memory.shortage(512), "")
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
        assert keeper.why == pool_counts.MEMORY

    try:
        asyncio.run(run())
    finally:
        keeper.around.release()
        assert keeper._listener is not None
        keeper._listener.close()
