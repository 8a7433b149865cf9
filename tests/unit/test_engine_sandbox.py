"""The engine's sandbox, containers and both services, against a double of the agent.

What only a double can do is here: lying answers, a machine that dies in the middle of a call, silence. What a
real guest does is in tests/vm.
"""

from __future__ import annotations

import asyncio
import errno
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
from kata.engine.containers import records, spec
from kata.engine.containers.records import read_json
from kata.engine.lifecycle import boot, guest_setup
from kata.engine.lifecycle.machine_runtime import MachineRuntime
from kata.engine.lifecycle.sandbox import Sandbox
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.services import sandbox_service, task_service
from kata.engine.standard_streams import streams
from kata.errors import (
    AgentError,
    AlreadyExistsError,
    CommandNotExecutableError,
    CommandNotFoundError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
    UsageError,
    VMLostError,
)
from kata.hypervisor.base import DiskError
from kata.journal import Journal
from kata.oci import spec as oci
from kata.proto import agent_pb, sandbox_pb, task_pb
from kata.settings import PodSettings
from kata.ttrpc.server import Server
from kata.ttrpc.status import DEADLINE_EXCEEDED, NOT_FOUND, UNIMPLEMENTED, TtrpcError
from kata.ttrpc.sync_client import connect


class DoubledRuntime(MachineRuntime):
    """A machine that is a double."""

    agent_double: AgentDouble

    def _take_over(self) -> Any:
        self.machine_double = MachineDouble(self.agent_double)
        return self.machine_double


class DoubledSandbox(Sandbox):
    """A sandbox whose machine is a double."""

    runtime: DoubledRuntime

    def _make_runtime(self, machine: boot.Machine) -> MachineRuntime:
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
        machine = boot.Machine()
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


# ---- the life of a container ----


def test_a_container_runs_and_everything_is_told(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    pipes = fifos(tmp_path, "stdout", "stderr")
    with engine.client() as client:
        pid = client.create(
            "c1", engine.bundle("say", "out", "err"), stdout=pipes["stdout"], stderr=pipes["stderr"]
        )
        assert pid == MachineDouble.pid
        assert client.state("c1").status == 1
        assert client.start("c1") == pid
        assert client.wait("c1") == 0
        assert drain(pipes["stdout_fd"]) == b"out"
        assert drain(pipes["stderr_fd"]) == b"err"
        assert client.state("c1").status == 3
        state = engine.state
        assert (state["status"], state["exit_code"], state["error"]) == ("stopped", 0, "")
        assert state["started_at"] < state["finished_at"]
        assert client.delete("c1") == 0
        with pytest.raises(NotFoundError):
            client.state("c1")
    log = [json.loads(line) for line in (engine.container_dir / "log").read_text().splitlines()]
    assert {(one["stream"], one["log"]) for one in log} == {("stdout", "out"), ("stderr", "err")}
    assert engine.topics() == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert "RemoveContainer" in engine.double.calls


def test_the_guest_is_told_what_it_has_to_know(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "0"))
        asked = engine.double.calls
        assert {"Check", "CreateSandbox", "SetGuestDateTime", "ReseedRandomDev", "CopyFile"} <= set(asked)
        assert asked.index("Check") < asked.index("CreateSandbox") < asked.index("CreateContainer")
        request = engine.double.requests["CreateContainer"]
        assert {m.destination: m.source for m in request.OCI.Mounts}["/etc/hosts"].endswith("/c1-hosts")
        assert len(engine.double.requests["ReseedRandomDev"].data) >= 32
        names = {one.name for one in client.timings()}
        assert {"hypervisor process", "kernel", "agent", "root file system"} <= names


def test_exit_codes_and_repeated_waits(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "42"))
        client.start("c1")
        assert [client.wait("c1") for _ in range(3)] == [42] * 3
        with pytest.raises(NotFoundError, match="process already finished"):
            client.kill("c1", 15)


@pytest.mark.parametrize(("pod", "missed"), [(False, True), (True, False)])
def test_an_engine_without_containers_that_is_asked_about_one(
    make: Callable[..., Engine], pod: bool, missed: bool
) -> None:
    """It was forgotten by its client, and ends; but a pod of the Sandbox API is one without containers, too."""
    engine = make(client={"ends_when_stale": True}, pod=PodSettings(config_path="") if pod else None)
    with pytest.raises(KataError, match="does not exist"):
        engine.sandbox.container("nobody")
    assert engine.sandbox.saw_stale_client is missed


def test_a_machine_that_did_not_start_is_lost_from_the_beginning(make: Callable[..., Engine]) -> None:
    def refuse(engine: Engine) -> None:
        engine.sandbox._start_error = KataError("no hypervisor here")

    engine = make(prepare=refuse, client={"ends_with_init": False})
    with engine.client() as client:
        with pytest.raises(KataError, match="no hypervisor here"):
            client.create("c1", engine.bundle("exit", "0"))
        facts = client.describe()
        assert (facts["state"], facts["error"]) == ("lost", "no hypervisor here")
        assert engine.sandbox.life.state is SandboxState.FAILED


def test_a_step_of_the_end_that_fails_does_not_keep_the_others_from_running(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("broken")

    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "3"))
        engine.do(lambda: setattr(engine.sandbox.machine_double, "close", broken))
        client.start("c1")
        assert client.wait("c1") == 3
        assert client.delete("c1") == 3
    assert not os.path.exists(engine.run_dir)
    assert "the end of the sandbox: stop_machine failed" in capsys.readouterr().err


def test_human_sandbox_ends_with_its_init_and_leaves_its_state(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "3"))
        client.start("c1")
        assert client.wait("c1") == 3
        assert client.delete("c1") == 3
    assert not os.path.exists(engine.run_dir)
    assert engine.state["exit_code"] == 3
    assert "RemoveContainer" in engine.double.calls
    assert engine.sandbox.machine_double.closed


def test_auto_remove_leaves_nothing_and_asks_the_guest_nothing(make: Callable[..., Engine]) -> None:
    engine = make(container={"auto_remove": True})
    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "0"))
        client.start("c1")
        assert client.wait("c1") == 0
        client.delete("c1")
    assert not os.path.exists(engine.run_dir)
    assert not engine.container_dir.exists()
    assert "RemoveContainer" not in engine.double.calls


@pytest.mark.parametrize(
    ("command", "error"), [("missing", CommandNotFoundError), ("forbidden", CommandNotExecutableError)]
)
def test_command_that_cannot_run_fails_the_create(
    engine: Engine, command: str, error: type[Exception]
) -> None:
    with engine.client() as client, pytest.raises(error, match=f'exec: "{command}"'):
        client.create("c1", engine.bundle(command))
    assert not os.path.exists(engine.run_dir)


def test_a_specification_that_is_too_large_for_a_request_says_which_part(engine: Engine) -> None:
    bundle = engine.bundle("sleep")
    path = engine.container_dir / "config.json"
    config = json.loads(path.read_text())
    config["process"]["env"] = ["BIG=" + "x" * (5 << 20)]
    path.write_text(json.dumps(config))
    with engine.client() as client, pytest.raises(KataError) as caught:
        client.create("c1", bundle)
    assert "container 'c1'" in str(caught.value)
    assert "environment 5242884 bytes" in str(caught.value)
    assert "--env-file" in caught.value.hint
    assert caught.value.grpc_code == 8
    assert "CreateContainer" not in engine.double.calls
    # Another shortage of the guest's is not blamed on it.
    other = AgentError("no huge pages", code=8)
    assert spec.explain_size(other, "x", {"process": {"env": ["A=1"]}}) is other


def test_errors_of_the_caller_are_named(engine: Engine, tmp_path: Path) -> None:
    with engine.client() as client:
        with pytest.raises(NotFoundError):
            client.start("c1")
        with pytest.raises(UsageError, match="cannot be an id"):
            client.create("../x", engine.bundle("exit", "0"))
        client.create("c1", engine.bundle("sleep"))
        with pytest.raises(AlreadyExistsError):
            client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        with pytest.raises(StateError, match="cannot start a running process"):
            client.start("c1")
        with pytest.raises(StateError, match="cannot delete a running process"):
            client.delete("c1")
        with pytest.raises(NotFoundError, match="does not exist"):
            client.kill("c1", 9, "no-such-exec")
        with pytest.raises(UsageError, match="not a signal"):
            client.kill("c1", 99)
        with pytest.raises(StateError, match="no terminal"):
            client.resize("c1", 1, 1)
        with pytest.raises(UnsupportedError):
            client._task("Checkpoint", task_pb.CheckpointTaskRequest(id="c1"), sandbox_pb.DescribeResponse)
        client.kill("c1", 9)
        assert client.wait("c1") == 137


@pytest.mark.parametrize("broken", ["not json", "[]", '{"process": {"args": 5}}'])
def test_broken_bundle_is_a_sentence(engine: Engine, broken: str) -> None:
    bundle = engine.bundle("x")
    (engine.container_dir / "config.json").write_text(broken)
    with engine.client() as client, pytest.raises(UsageError):
        client.create("c1", bundle)


def test_created_container_can_be_deleted_unstarted(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("exit", "0"))
        client.delete("c1")
        with pytest.raises(NotFoundError):
            client.state("c1")


# ---- execs ----


def process(*argv: str) -> dict[str, Any]:
    return {"args": list(argv), "cwd": "/", "env": [], "user": {"uid": 0, "gid": 0}}


def test_execs_run_beside_the_init(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        for number in range(20):
            name = f"e{number}"
            pipes = fifos(tmp_path, f"stdout{number}")
            client.exec("c1", name, process("flood", "300000"), stdout=pipes[f"stdout{number}"])
            assert client.state("c1", name).status == 1
            client.start("c1", name)
            data = drain(pipes[f"stdout{number}_fd"])
            assert client.wait("c1", name) == 0
            assert len(data) == 300_000
            assert client.delete("c1", name) == 0
        client.exec("c1", "bad", process("missing"))
        with pytest.raises(CommandNotFoundError):
            client.start("c1", "bad")
        assert client.wait("c1", "bad") == 127
        client.delete("c1", "bad")
        with pytest.raises(AlreadyExistsError):
            client.exec("c1", "c1", process("exit", "0"))
        with pytest.raises(UsageError):
            client.exec("c1", "odd", {"args": 7})
    topics = engine.topics()
    assert topics[:6] == [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exec-added",
    ]
    assert "/tasks/delete" not in topics  # as with runc: it is told of tasks, not of execs


def test_the_end_of_the_init_is_told_after_the_ends_of_its_execs(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        for name in ("e1", "e2"):
            client.exec("c1", name, process("sleep"))
            client.start("c1", name)
        client.kill("c1", 9)
        assert client.wait("c1") == 137
        assert client.wait("c1", "e1") == 137
    exits = [event.id for topic, event in engine.events if topic == "/tasks/exit"]
    assert sorted(exits[:2]) == ["e1", "e2"]
    assert exits[2] == "c1"


@pytest.mark.parametrize("ours", [True, False], ids=["our agent", "another agent"])
def test_kill_all_reaches_execs_and_kill_of_one_does_not(make: Callable[..., Engine], ours: bool) -> None:
    engine = make(client={"ends_with_init": False})

    async def unknown(method: str) -> None:
        if method == "Signal":
            raise TtrpcError(UNIMPLEMENTED, "unknown method")

    if not ours:
        engine.double.fault = unknown
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("sleep"))
        client.start("c1", "e")
        client.kill("c1", 10)
        client.kill("c1", 12, everything=True)
        assert engine.double.processes["c1", ""].signals == [10, 12]
        assert engine.double.processes["c1", "e"].signals == [12]
        client.kill("c1", 15, "e")
        assert client.wait("c1", "e") == 143


# ---- streams ----


def test_stdin_reaches_the_process_and_its_end_too(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdin", "stdout")
    data = os.urandom(5_000_000)
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=pipes["stdin"], stdout=pipes["stdout"])
        client.start("c1")
        writer = threading.Thread(target=Path(pipes["stdin"]).write_bytes, args=(data,))
        writer.start()
        assert drain(pipes["stdout_fd"]) == data
        assert client.wait("c1") == 0
        writer.join()


def test_no_stdin_is_an_empty_one(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"))
        client.start("c1")
        assert client.wait("c1") == 0


def test_a_vanished_reader_does_not_hurt(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("flood", "3000000"), stdout=pipes["stdout"])
        os.close(pipes["stdout_fd"])
        client.start("c1")
        assert client.wait("c1") == 0


def test_terminal_has_one_stream_and_a_size(engine: Engine, tmp_path: Path) -> None:
    pipes = fifos(tmp_path, "stdin", "stdout")
    with engine.client() as client:
        client.create(
            "c1", engine.bundle("cat"), terminal=True, stdin=pipes["stdin"], stdout=pipes["stdout"]
        )
        assert engine.double.requests["CreateContainer"].OCI.Process.Terminal
        client.start("c1")
        client.resize("c1", 24, 80)
        assert engine.double.processes["c1", ""].size == (24, 80)
        Path(pipes["stdin"]).write_bytes(b"hello")
        assert drain(pipes["stdout_fd"]) == b"hello"
        assert client.wait("c1") == 0
        assert "ReadStderr" not in engine.double.calls


def test_attach_takes_part(engine: Engine, tmp_path: Path) -> None:
    first = fifos(tmp_path, "stdin", "stdout")
    (tmp_path / "second").mkdir()
    second = fifos(tmp_path / "second", "stdin", "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=first["stdin"], stdout=first["stdout"])
        client.start("c1")
        keep = os.open(first["stdin"], os.O_WRONLY)
        client.attach("c1", stdin=second["stdin"], stdout=second["stdout"])
        Path(second["stdin"]).write_bytes(b"from the second")
        os.set_blocking(second["stdout_fd"], True)
        assert os.read(second["stdout_fd"], 100) == b"from the second"
        os.close(keep)
        assert drain(first["stdout_fd"]) == b"from the second"
        assert client.wait("c1") == 0
        os.close(second["stdout_fd"])


# ---- pause, statistics, memory ----


def test_pause_and_resume(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        with pytest.raises(StateError, match="cannot pause a created container"):
            client.pause("c1")
        client.start("c1")
        client.pause("c1")
        assert client.state("c1").status == 4
        assert engine.double.paused == {"c1"}
        with pytest.raises(StateError, match="cannot exec in a paused container"):
            client.exec("c1", "e", process("exit", "0"))
        client.resume("c1")
        assert client.state("c1").status == 2
        with pytest.raises(StateError):
            client.resume("c1")
    assert engine.topics()[2:4] == ["/tasks/paused", "/tasks/resumed"]


def test_small_services(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        wrapped = client.stats("c1")
        assert wrapped is not None
        assert wrapped.type_url.endswith("v1.Metrics")
        assert client.pids("c1") == [MachineDouble.pid]
        assert client.connect("c1").shim_pid == os.getpid()
        client.update("c1", {"memory": {"limit": 1 << 28}})
        assert engine.double.requests["UpdateContainer"].resources.Memory.Limit == 1 << 28
        # What the guest does not get of a change is told, once.
        for rate in (1, 2):
            slow = {"blockIO": {"throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": rate}]}}
            client.update("c1", slow)
            assert not engine.double.requests["UpdateContainer"].resources.BlockIO.ThrottleReadBpsDevice
        assert capfd.readouterr().err.count("limits of bytes read from the host's devices cannot be") == 1
        facts = client.describe()
        assert facts["containers"]["c1"]["state"] == "running"
        assert facts["agent"]["version"] == "double"


def test_calls_of_the_agents_protocol_are_passed_on(engine: Engine) -> None:
    def call(method: str, request: Any, timeout: float | None = 60) -> bytes:
        wrapped = sandbox_pb.AgentCallRequest(
            service="grpc.AgentService", method=method, payload=request.encode()
        )
        answer = sandbox_pb.AgentCallResponse
        return client.call("kata.sandbox.v1.Sandbox", "AgentCall", wrapped, answer, timeout=timeout).payload

    with engine.client() as other:
        other.create("c1", engine.bundle("sleep"))
        other.start("c1")
        with connect(engine.sock_path) as client:
            details = agent_pb.GuestDetailsResponse.decode(
                call("GetGuestDetails", agent_pb.GuestDetailsRequest())
            )
            assert details.agent_details is not None
            assert details.agent_details.version == "double"
            # The agent's own status comes through, and a call's end frees nobody but its caller.
            with pytest.raises(TtrpcError, match="no process x in c1") as caught:
                call("WaitProcess", agent_pb.WaitProcessRequest(container_id="c1", exec_id="x"))
            assert caught.value.code == NOT_FOUND
            with pytest.raises(TtrpcError) as caught:
                call("WaitProcess", agent_pb.WaitProcessRequest(container_id="c1"), timeout=0.2)
            assert caught.value.code == DEADLINE_EXCEEDED
            with pytest.raises(TtrpcError) as caught:
                call("NoSuchMethod", agent_pb.WaitProcessRequest())
            assert caught.value.code == UNIMPLEMENTED
        assert other.state("c1").status == 2


def test_out_of_memory_is_on_record(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.do(lambda: engine.double.oom.put_nowait("c1"))
        engine.do(lambda: engine.double.oom.put_nowait("no such container"))
        while "/tasks/oom" not in engine.topics():
            pass
        client.kill("c1", 9)
        assert client.wait("c1") == 137
    assert engine.state["oom_killed"] is True


# ---- faults ----


def test_machine_that_dies_ends_everything_as_137_with_its_reason(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.exec("c1", "e", process("sleep"))
        client.start("c1", "e")
        engine.do(engine.sandbox.machine_double.die)
        assert client.wait("c1") == 137
        assert client.wait("c1", "e") == 137
        assert "killed by signal 9" in client.describe()["error"]
        with pytest.raises(StateError):
            client.exec("c1", "f", process("sleep"))
        with pytest.raises(NotFoundError):
            client.stats("c1")
    assert "killed by signal 9" in engine.state["error"]
    assert engine.state["exit_code"] == 137


@pytest.mark.parametrize("method", ["Check", "CreateSandbox", "CreateContainer", "StartContainer"])
def test_machine_that_dies_during_a_call_fails_the_call(make: Callable[..., Engine], method: str) -> None:
    def prepare(engine: Engine) -> None:
        async def die(called: str) -> None:
            if called == method:
                engine.sandbox.machine_double.die()
                await asyncio.Event().wait()

        engine.double.fault = die

    engine = make(prepare=prepare)
    with engine.client() as client:
        bundle = engine.bundle("sleep")
        if method == "StartContainer":
            client.create("c1", bundle)
        call = client.start if method == "StartContainer" else lambda name: client.create(name, bundle)
        with pytest.raises(VMLostError, match="killed by signal 9"):
            call("c1")
        if method == "StartContainer":
            assert client.wait("c1") == 137


def test_silent_agent_at_boot_is_explained(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_setup, "READY_S", 0.3)
    engine = make(prepare=lambda one: one.double.serving.clear())
    with engine.client() as client, pytest.raises(AgentError) as caught:
        client.create("c1", engine.bundle("sleep"))
    text = caught.value.message
    for part in ("waiting for the agent", "still running", "/k", "/i", "console says hello"):
        assert part in text
    assert caught.value.hint


def test_agent_that_hangs_up_while_its_machine_lives(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.do(engine.sandbox.machine_double.drop)
        assert client.wait("c1") == 137
    assert engine.state["error"]


@pytest.mark.parametrize("lie", ["status", "length"])
def test_lying_agent_ends_the_sandbox(make: Callable[..., Engine], lie: str, tmp_path: Path) -> None:
    engine = make(client={"ends_with_init": False})
    pipes = fifos(tmp_path, "stdin")
    with engine.client() as client:
        client.create("c1", engine.bundle("cat"), stdin=pipes["stdin"])
        client.start("c1")
        if lie == "status":
            engine.do(lambda: engine.double.processes["c1", ""].end(4711))
        else:
            engine.do(lambda: setattr(engine.double, "WriteStdin", engine.double.CloseStdin))
            engine.do(lambda: engine.sandbox.machine_double.drop())
        assert client.wait("c1") == 137
        assert client.describe()["error"]


def test_exit_is_told_though_the_log_cannot_be_written(make: Callable[..., Engine]) -> None:
    engine = make(container={"log": {"path": "/dev/full", "max_bytes": 100, "files": 1}})
    with engine.client() as client:
        client.create("c1", engine.bundle("say", "out", "err"))
        client.start("c1")
        assert client.wait("c1") == 0


def test_exit_is_told_though_the_state_cannot_be_written(
    make: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.do(
            lambda: setattr(engine.sandbox.containers["c1"].record._file, "_path", "/nonexistent/state.json")
        )
        client.kill("c1", 9)
        assert client.wait("c1") == 137


@pytest.mark.parametrize("when", ["create", "start"])
def test_no_container_runs_whose_state_cannot_be_recorded(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with engine.client() as client:
        bundle = engine.bundle("sleep")
        if when == "create":
            monkeypatch.setattr(records, "write_json", full)
            with pytest.raises(KataError, match="cannot be recorded: No space left on device"):
                client.create("c1", bundle)
        else:
            client.create("c1", bundle)
            process = engine.double.processes["c1", ""]  # which the agent forgets with its container
            monkeypatch.setattr(records, "write_json", full)
            with pytest.raises(KataError, match="cannot be recorded: No space left on device") as caught:
                client.start("c1")
            assert "kata rmi" in caught.value.hint
            assert process.signals[0] == 9
    assert ("StartContainer" in engine.double.calls) == (when == "start")


def test_debug_at_run_time_shows_calls_the_monitor_and_the_guest(
    make: Callable[..., Engine], capfd: Any
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        assert " debug: " not in capfd.readouterr().err
        engine.do(lambda: engine.sandbox.tasks.set_level("debug"))
        machine = engine.sandbox.machine_double
        engine.do(lambda: machine.traffic("console", b"Linux \x1b[2J\nhalf"))
        engine.do(lambda: machine.traffic("event", b'{"event": "STOP"}'))
        client.start("c1")
        engine.do(lambda: engine.sandbox.tasks.set_level("info"))
        assert machine.traffic is None
        client.kill("c1", 9)
    said = capfd.readouterr().err
    debug = [line[21:] for line in said.splitlines() if " debug: " in line]
    assert r"debug: console: Linux \x1b[2J" in debug
    assert any('says {"event": "STOP"}' in line for line in debug)
    assert sum("the agent answered StartContainer" in line for line in debug) == 1
    assert not any("Kill" in line for line in debug)


def test_an_exit_is_told_once_although_it_cannot_be_recorded(
    make: Callable[..., Engine], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")

        async def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(type(engine.sandbox.containers["c1"].record), "write", broken)
        client.kill("c1", 9)
        assert client.wait("c1") == 137
    assert engine.topics().count("/tasks/exit") == 1
    assert capfd.readouterr().err.count("container.exited") == 1


def test_a_disk_of_the_hosts_that_fails_is_told(make: Callable[..., Engine], capfd: Any) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        fails = engine.sandbox.machine_double.disk_fails
        for _ in range(100):
            engine.do(lambda: fails(DiskError("/rw.img", writes=False, full=False, reason="I/O error")))
        assert client.describe()["disk_error"] == "/rw.img could not be read on the host: I/O error"
        for _ in range(100):
            engine.do(lambda: fails(DiskError("/rw.img", writes=True, full=True, reason="No space left")))
        engine.do(lambda: fails(DiskError("/rw.img", writes=True, full=False, reason="I/O error")))
        told = client.describe()
        assert told["disk_errors"] == 201
        assert told["disk_error"].startswith("the host's disk is full: /rw.img could not be written")
        client.kill("c1", 9)
        assert client.wait("c1") == 137
        assert engine.state["disk_error"] == told["disk_error"]
    assert capfd.readouterr().err.count("/rw.img") == 2


def test_a_stuck_reader_does_not_hold_the_exit(
    make: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.3)
    engine = make(client={"ends_with_init": False})
    pipes = fifos(tmp_path, "stdout")
    with engine.client() as client:
        client.create("c1", engine.bundle("flood", "3000000"), stdout=pipes["stdout"])
        client.start("c1")
        waiter: list[int] = []
        thread = threading.Thread(target=lambda: waiter.append(client.wait("c1")))
        thread.start()
        # The process itself is held up by the full pipe; kill it, and its exit comes although nobody reads.
        with engine.client() as second:
            while engine.sandbox.containers["c1"].init.streams.outputs[0].progress < 1 << 20:  # type: ignore[union-attr]
                pass
            second.kill("c1", 9)
        thread.join(10)
        assert waiter == [137]
        os.close(pipes["stdout_fd"])


def test_many_waits_and_reads_do_not_delay_a_call(make: Callable[..., Engine]) -> None:
    engine = make(client={"ends_with_init": False})
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        threads = [threading.Thread(target=client.wait, args=("c1",)) for _ in range(50)]
        for thread in threads:
            thread.start()
        assert client.state("c1").status == 2
        client.kill("c1", 9)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_engine_errors_have_a_code_and_words(engine: Engine) -> None:
    async def refuse(method: str) -> None:
        if method == "PauseContainer":
            raise KataError("the freezer is broken \x1b[31m")

    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        engine.double.fault = refuse
        with pytest.raises(AgentError, match=r"the freezer is broken \\x1b\[31m"):
            client.pause("c1")
        assert client.state("c1").status == 2
