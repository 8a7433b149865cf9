"""An engine in a thread of the test, whose machine and agent are doubles.

What only a double can do is tried with it: lying answers, a machine that dies in the middle of a call, silence. What a
real guest does is in tests/vm.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sandbox_support
from agent_double import AgentDouble, MachineDouble

from kata.engine.client import EngineClient
from kata.engine.containers.records import read_json
from kata.engine.lifecycle.booted_machine import BootedMachine
from kata.engine.lifecycle.machine_runtime import MachineRuntime
from kata.engine.lifecycle.sandbox import Sandbox
from kata.engine.services import sandbox_service, task_service
from kata.journal import Journal
from kata.oci import spec as oci
from kata.proto import sandbox_pb, task_pb
from kata.ttrpc.server import Server


class DoubledRuntime(MachineRuntime):
    """A machine that is a double."""

    agent_double: AgentDouble

    def _take_over(self) -> Any:
        self.machine_double = MachineDouble(self.agent_double)
        return self.machine_double


class DoubledSandbox(Sandbox):
    """A sandbox whose machine is a double."""

    runtime: DoubledRuntime

    def _make_runtime(self, machine: BootedMachine) -> MachineRuntime:
        return DoubledRuntime(
            *(self.id, self.run_dir, self.journal, machine, self.tasks),
            on_oom=self._out_of_memory,
            on_disk_error=self._disk_failed,
        )

    @property
    def machine_double(self) -> MachineDouble:
        return self.runtime.machine_double


class Engine:
    """An engine in a thread of its own, and what a test wants to look at."""

    def __init__(
        self, directory: Path, prepare: Callable[[Engine], None] | None = None, **settings: Any
    ) -> None:
        self.directory = directory
        self.prepare = prepare
        self.agent = AgentDouble
        self.events: list[tuple[str, Any]] = []
        self.id = "c1"
        self.journal = Journal.create_dir(str(directory / "r"), self.id, {})
        self.run_dir = os.path.dirname(self.journal.path)
        self.container_dir = directory / "c"
        Journal.create_dir(str(directory), "c", {}).close()
        self.settings = sandbox_support.sandbox(
            self.id, str(self.container_dir), accel="tcg", kernel="/k", initrd="/i"
        )
        sandbox_support.change(self.settings, machine={"size": {"memory_mib": 2048}})
        sandbox_support.change(self.settings, **settings)
        self.sock_path = str(directory / "sock")
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.double = AgentDouble()
        machine = BootedMachine()
        machine.started_ns = 1
        machine.started = SimpleNamespace(
            disk_addresses=["05", "06"], nic_addresses=["09"], share_tag="", extra_memory_mib=0
        )
        self.sandbox = DoubledSandbox(
            self.settings,
            self.run_dir,
            self.journal,
            machine,
            None,
            lambda topic, e: self.events.append((topic, e)),
        )
        self.sandbox.runtime.agent_double = self.double
        if self.prepare is not None:
            self.prepare(self)
        self.sandbox.start(0, 0)
        services = {
            task_service.SERVICE: (
                task_pb.SERVICES[task_service.SERVICE],
                task_service.TaskService(self.sandbox),
            ),
            sandbox_service.SERVICE: (
                sandbox_pb.SERVICES[sandbox_service.SERVICE],
                sandbox_service.SandboxService(self.sandbox),
            ),
        }
        self.bugs: list[BaseException] = []
        server = Server(services, on_error=lambda context, error: self.bugs.append(error))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.sock_path)
        listener.listen()
        await server.start(listener)
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await server.shutdown(1.0)
        self.sandbox.end()
        await self.sandbox.ended.wait()
        await self.sandbox.machine_double.server.shutdown(0.1)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert not self.bugs

    def do(self, work: Callable[[], Any]) -> Any:
        """Run something in the engine's loop."""
        done: list[Any] = []
        event = threading.Event()

        def call() -> None:
            done.append(work())
            event.set()

        self.loop.call_soon_threadsafe(call)
        assert event.wait(10)
        return done[0]

    def client(self) -> EngineClient:
        return EngineClient(self.sock_path)

    def bundle(self, *argv: str) -> str:
        request = oci.Request("host")
        request.command = list(argv)
        path = self.container_dir / "config.json"
        path.write_text(json.dumps(oci.build(request, {})))
        return str(self.container_dir)

    @property
    def state(self) -> dict[str, Any]:
        return read_json(str(self.container_dir / "state.json"))

    def topics(self) -> list[str]:
        return [topic for topic, _ in self.events]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[Engine] = []

    def build(**settings: Any) -> Engine:
        made.append(Engine(tmp_path, **settings))
        return made[-1]

    yield build
    for engine in made:
        engine.stop()


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def fifos(directory: Path, *names: str) -> dict[str, Any]:
    """Fifos, the readers of outputs open."""
    made: dict[str, Any] = {}
    for name in names:
        path = str(directory / name)
        os.mkfifo(path)
        made[name] = path
        if name.startswith("std") and not name.startswith("stdin"):
            made[f"{name}_fd"] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return made


def drain(fd: int) -> bytes:
    os.set_blocking(fd, True)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def process(*argv: str) -> dict[str, Any]:
    return {"args": list(argv), "cwd": "/", "env": [], "user": {"uid": 0, "gid": 0}}
