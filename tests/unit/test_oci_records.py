"""What the OCI command line keeps of a container, and what it makes of its callers' words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kata import sysio
from kata.cli.args import Arguments
from kata.errors import AlreadyExistsError, KataError, NotFoundError, UsageError
from kata.oci_runtime import container_commands, containers, creation, observation, records
from kata.oci_runtime.global_options import GlobalOptions
from kata.oci_runtime.records import Record
from kata.proto.cgroups_v1_pb import MemoryOomControl, Metrics


def made(root: Path, container_id: str = "c1") -> Record:
    record = Record(str(root), container_id)
    record.reserve()
    return record


def parsed(name: str, *argv: str) -> Arguments:
    return container_commands.COMMANDS[name].parse(argv)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = made(tmp_path / "root")
    record.bundle, record.pid, record.annotations = "/bundle", 17, {"a": "b"}
    record.write()

    found = records.require(str(tmp_path / "root"), "c1")

    assert (found.bundle, found.pid, found.annotations) == ("/bundle", 17, {"a": "b"})
    assert found.created == record.created
    found_by_pid = records.of_pid(str(tmp_path / "root"), 17)
    assert found_by_pid is not None
    assert found_by_pid.id == "c1"
    assert records.of_pid(str(tmp_path / "root"), 18) is None
    assert os.stat(found.directory).st_mode & 0o777 == 0o700


def test_an_id_is_taken_once(tmp_path: Path) -> None:
    made(tmp_path)

    with pytest.raises(AlreadyExistsError, match="container with id exists: c1"):
        made(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../c1", "a/b", "x" * 129, "a\nb"])
def test_no_name_leads_out_of_the_root(tmp_path: Path, name: str) -> None:
    made(tmp_path / "root")

    assert records.find(str(tmp_path / "root" / "c1"), name) is None
    with pytest.raises(NotFoundError, match="does not exist"):
        records.require(str(tmp_path / "root"), name)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x", "sandbox": 3, "annotations": []}'])
def test_a_record_that_makes_no_sense_can_still_be_removed(tmp_path: Path, content: str) -> None:
    record = made(tmp_path)
    Path(record.directory, "state.json").write_text(content)

    found = records.require(str(tmp_path), "c1")
    assert (found.pid, found.sandbox, found.annotations) == (0, "", {})
    containers.delete(str(tmp_path), found, force=True)

    assert records.every(str(tmp_path)) == []


def test_only_the_process_that_was_recorded_is_killed(tmp_path: Path) -> None:
    record = made(tmp_path)
    record.pid, record.started = os.getpid(), (sysio.proc_starttime(os.getpid()) or 0) + 1

    record.kill()  # another process has that number by now: this one


def test_a_container_without_an_engine_has_stopped(tmp_path: Path) -> None:
    record = made(tmp_path)
    assert containers.status_of(record) == "creating"
    record.sandbox = str(tmp_path / "gone")

    assert containers.status_of(record) == "stopped"


def test_resources_that_say_nothing_change_nothing() -> None:
    wanted = {
        "devices": [{"allow": False, "access": "rwm"}],
        "cpu": {"shares": 0, "quota": 50000, "cpus": ""},
        "memory": {"limit": None},
        "pids": {"limit": -1},
    }

    assert observation.effective(wanted) == {"cpu": {"quota": 50000}, "pids": {"limit": -1}}


def test_update_takes_numbers_only(tmp_path: Path) -> None:
    record = made(tmp_path)
    record.write()

    for text in ("1g", "", "0x10", "9" * 20):
        with pytest.raises(UsageError, match="--memory"):
            observation._of_flags(parsed("update", "--memory", text, "c1"))
    assert observation._of_flags(parsed("update", "--memory=5", "--cpuset-cpus", "0-1", "c1")) == {
        "memory": {"limit": 5},
        "cpu": {"cpus": "0-1"},
    }


def test_events_tell_of_processes_that_are_killed_for_want_of_memory_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path).write()
    options = GlobalOptions()
    options.root = str(tmp_path)
    seen = [Metrics(memory_oom_control=MemoryOomControl(oom_kill=count)) for count in (1, 1, 3)]
    monkeypatch.setattr(observation, "_metrics", lambda _: seen.pop(0) if seen else None)

    assert observation.HANDLERS["events"](parsed("events", "--interval=1ms", "c1"), options) == 0

    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["type"], one["id"]) for one in told] == [
        ("stats", "c1"),
        ("stats", "c1"),
        ("oom", "c1"),
        ("stats", "c1"),
    ]


@pytest.mark.parametrize(("text", "seconds"), [(None, 5.0), ("500ms", 0.5), ("2s", 2.0), ("1m", 60.0)])
def test_times_are_written_as_in_go(text: str | None, seconds: float) -> None:
    assert observation._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "0s", "1x", "nans", "infs"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--interval"):
        observation._seconds(text)


def test_a_process_of_exec_is_the_containers_with_what_was_asked_for(tmp_path: Path) -> None:
    record = made(tmp_path)
    record.bundle = str(tmp_path)
    process = {"args": ["sh"], "cwd": "/w", "env": ["A=1"], "user": {"uid": 5, "gid": 6}, "terminal": True}
    (tmp_path / "config.json").write_text(json.dumps({"process": process}))

    found = creation._process(
        parsed("exec", "-e", "B=2", "--user", "7:8", "-g", "9", "-c", "CAP_KILL", "c1", "ls", "-l"), record
    )

    assert found["args"] == ["ls", "-l"]
    assert (found["cwd"], found["env"], found["terminal"]) == ("/w", ["A=1", "B=2"], False)
    assert found["user"] == {"uid": 7, "gid": 8, "additionalGids": [9]}
    assert found["capabilities"]["effective"] == ["CAP_KILL"]
    for wrong in ("root", "1:", "-1", "1:x", str(1 << 32)):
        with pytest.raises(UsageError, match="no number"):
            creation._process(parsed("exec", "--user", wrong, "c1", "ls"), record)


def test_a_member_of_a_pod_is_known_by_namespace_or_annotation(tmp_path: Path) -> None:
    infra = made(tmp_path, "infra")
    infra.pid = 17
    infra.write()
    crio = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "infra"}

    def pod(path: str, annotations: dict[str, str]) -> str:
        config = {"linux": {"namespaces": [{"type": "network", "path": path}]}, "annotations": annotations}
        found = creation._pod(str(tmp_path), config)
        return found.id if found is not None else ""

    assert pod("/proc/17/ns/net", {}) == "infra"
    assert pod("/run/netns/x", crio) == "infra"
    assert pod("/run/netns/x", {}) == ""
    assert pod("/proc/18/ns/net", {}) == ""
    with pytest.raises(NotFoundError, match="'gone' does not exist"):
        pod("/run/netns/x", {**crio, "io.kubernetes.cri-o.SandboxID": "gone"})
    # Podman 4.3 names a pod without an infra container by itself.
    podman = {**crio, "io.container.manager": "libpod"}
    assert pod("/run/netns/x", {**podman, "io.kubernetes.cri-o.SandboxID": "pod"}) == ""
    assert pod("/run/netns/x", podman) == "infra"


def test_containers_of_two_roots_do_not_share_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", "/run/kata")

    own = creation.sandbox_directory("/run/kata/oci", "c1")
    others = creation.sandbox_directory("/run/other", "c1")

    assert own == "/run/kata/sandboxes/oci.c1"
    assert os.path.dirname(others) == os.path.dirname(own)
    assert others != own


def test_an_exec_without_a_command_names_what_is_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    root = tmp_path / "root"
    made(root)
    for number, client in enumerate(
        (
            {"name": "kata"},
            {"name": "containerd", "namespace": "k8s.io"},
            {"name": "containerd", "namespace": "moby"},
            {"name": "containerd", "namespace": "default"},
        )
    ):
        directory = tmp_path / f"run/sandboxes/{number}-there"
        directory.mkdir(parents=True)
        (directory / "sandbox.json").write_text(json.dumps({"id": f"{number}abc", "client": client}))
    options = GlobalOptions()
    options.root = str(root)

    def hint(reference: str, kind: type[KataError] = UsageError) -> str:
        with pytest.raises(kind) as refused:
            creation.HANDLERS["exec"](parsed("exec", reference), options)
        return refused.value.hint

    # None of them has an engine.
    assert hint("c1") == "a shell of its container, when it runs: kata-runtime exec -t c1 sh"
    shells = (
        "kata exec -it 0abc sh",
        "crictl exec -it CONTAINER sh",
        "docker exec -it 2abc sh",
        "nerdctl -n default exec",
    )
    for number, shell in enumerate(shells):
        found = hint(f"{number}ab")
        assert found.startswith(f"a shell of its container, when it runs: {shell}")
    assert "kata ps" in hint("none", NotFoundError)
    # With a command it is about a container of this command line, as ever.
    with pytest.raises(NotFoundError, match="container '0abc' does not exist"):
        creation.HANDLERS["exec"](parsed("exec", "0abc", "sh"), options)
