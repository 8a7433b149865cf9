"""The life of a container, and what is asked of its sandbox, against a double of the agent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_double import MachineDouble
from engine_double import Engine, drain, engine, fifos, make, process
from waiting import until

from kata.engine.containers import spec
from kata.engine.lifecycle.sandbox_state import SandboxState
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
)
from kata.proto import agent_pb, sandbox_pb, task_pb
from kata.settings import PodSettings
from kata.ttrpc.status import DEADLINE_EXCEEDED, NOT_FOUND, UNIMPLEMENTED, TtrpcError
from kata.ttrpc.sync_client import connect

__all__ = ["engine", "make"]


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
        names = {one.name for one in client.timings().timings}
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


def test_discard_ends_it_and_asks_the_guest_nothing(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.discard()
        assert client.wait("c1") == 137
    until(lambda: not os.path.exists(engine.run_dir), "the directory to go")
    assert engine.state["exit_code"] == 137
    assert not {"RemoveContainer", "SignalProcess"} & set(engine.double.calls)
    assert engine.sandbox.machine_double.closed


def test_discard_is_answered_when_the_container_is_gone_as_well(engine: Engine) -> None:
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        client.discard("named")
        assert not os.path.exists(engine.run_dir)
        assert not engine.container_dir.exists()
        assert client.wait("c1") == 137
    assert engine.sandbox.held
    engine.sandbox.free_space()
    assert not engine.sandbox.held


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
