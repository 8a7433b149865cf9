"""kata.events: what engines write, whoever reads it, whatever happens to the file."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sandbox_support

from kata import events, journal_undo
from kata.cli import main as cli
from kata.engine.lifecycle.life_events import LifeEvents
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.log import EngineLog
from kata.errors import VMLostError
from kata.journal import Journal
from kata.proto import events_pb

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    return tmp_path


def names() -> list[str]:
    return [one["event"] for one in events.read()]


def test_events_come_back_as_they_were_written(run_dir: Path) -> None:
    events.append(
        "container.exited", {"sandbox": "s", "exit_code": 0, "error": "", "x": None, "y": 'a"\n\x1b'}
    )
    (one,) = events.read()
    assert one | {"time": ""} == {
        "time": "",
        "event": "container.exited",
        "sandbox": "s",
        "exit_code": 0,
        "y": 'a"\n\x1b',
    }
    assert len(one["time"]) == len("2026-11-28T12:00:00.000000000Z")
    assert (run_dir / events.FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert (run_dir / events.FILE_NAME).read_bytes().count(b"\n") == 1


def test_a_line_is_bounded() -> None:
    members = {f"m{number}": "\U0001f600" * 5000 for number in range(20)}
    assert len(events.line("e", members)) <= events.MAX_LINE
    assert json.loads(events.line("e", {"a": "x" * 5000}))["a"] == "x" * (events.MAX_TEXT - 1) + "\u2026"


def test_the_file_is_turned_over_and_followed(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    monkeypatch.setattr(events, "MAX_BYTES", 2000)
    events.append("before", {})
    with events.Follower() as follower, events.Follower(from_start=True) as whole:
        seen, all_of_it = [], []
        for number in range(100):
            events.append("e", {"number": number})
            if number % 7 == 0:
                seen += follower.poll()
                all_of_it += whole.poll()
        seen += follower.poll()
        all_of_it += whole.poll()
    assert [one["number"] for one in seen] == list(range(100))
    assert [one["event"] for one in all_of_it][:2] == ["before", "e"]
    assert len(all_of_it) == 101
    kept = sorted(path.name for path in run_dir.iterdir())
    assert kept == [events.FILE_NAME, f"{events.FILE_NAME}.1"]
    assert sum((run_dir / name).stat().st_size for name in kept) < 2 * 2000 + 2 * events.MAX_LINE
    assert [one["number"] for one in events.read(3)] == [97, 98, 99]


def test_several_writers_lose_nothing(run_dir: Path) -> None:
    program = (
        "import sys; from kata import events; events.MAX_BYTES = 50000\n"
        "for n in range(300): events.append('e', {'writer': sys.argv[1], 'number': n})"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    with events.Follower() as follower:
        writers = [
            subprocess.Popen([sys.executable, "-c", program, str(n)], env=environment) for n in range(4)
        ]
        seen: list[dict[str, Any]] = []
        while any(one.poll() is None for one in writers):
            follower.wait(0.05)
            seen += follower.poll()
        assert [one.wait() for one in writers] == [0] * 4
        seen += follower.poll()
    for writer in "0123":
        numbers = [one["number"] for one in seen if one["writer"] == writer]
        assert numbers == list(range(300))
    assert (run_dir / f"{events.FILE_NAME}.1").exists()  # turned over once: nothing of it is gone


def test_a_torn_line_is_passed_over(run_dir: Path) -> None:
    (run_dir / events.FILE_NAME).write_bytes(b'{"event":"x","ti\n[]\n\xff\n')
    events.append("whole", {})
    assert names() == ["whole"]


def life(tmp_path: Path) -> LifeEvents:
    settings = sandbox_support.sandbox("s1", str(tmp_path / "c"), accel="tcg", kernel="/k", initrd="/i")
    sandbox_support.change(settings, client={"name": "containerd", "namespace": "k8s.io"})
    return LifeEvents(settings, str(tmp_path / "sandboxes" / "s1"), EngineLog("s1"))


def test_what_happens_to_tasks_and_the_sandbox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = life(tmp_path)
    log.entered(SandboxState.BOOTING, None)
    log.entered(SandboxState.READY, None)
    log.of_task("/tasks/create", events_pb.TaskCreate(container_id="c"))
    log.of_task("/tasks/start", events_pb.TaskStart(container_id="c"))
    log.of_task("/tasks/exec-added", events_pb.TaskExecAdded(container_id="c", exec_id="e"))
    log.of_task("/tasks/exec-started", events_pb.TaskExecStarted(container_id="c", exec_id="e"))
    log.of_task("/tasks/exit", events_pb.TaskExit(container_id="c", id="e", exit_status=3))
    log.of_task("/tasks/oom", events_pb.TaskOOM(container_id="c"))
    log.of_task("/tasks/exit", events_pb.TaskExit(container_id="c", id="c", exit_status=137))
    log.entered(SandboxState.CLOSING, None)
    log.entered(SandboxState.FAILED, VMLostError("the machine went away"))
    log.entered(SandboxState.ENDED, None)
    (tmp_path / "journal").touch()
    log.ended(str(tmp_path / "journal"))  # not yet: whoever undoes the rest says so
    log.ended(str(tmp_path / "gone"))
    assert names() == [
        *("sandbox.created", "sandbox.ready", "container.created", "container.started", "exec.started"),
        *("exec.exited", "container.oom", "container.exited", "sandbox.failed"),
        "sandbox.ended",
    ]
    found = events.read()
    assert found[5] | {"time": 0} == {
        "time": 0,
        "event": "exec.exited",
        "sandbox": "s1",
        "container": "c",
        "client": "containerd",
        "namespace": "k8s.io",
        "exit_code": 3,
        "exec": "e",
    }
    assert found[8]["error"] == "the machine went away"
    lines = [line[len("2026-11-28T12:00:00Z ") :] for line in capsys.readouterr().err.splitlines()]
    assert lines[-1] == "sandbox.ended"
    assert lines[5] == "exec.exited container=c exit_code=3 exec=e"
    assert lines[8] == "sandbox.failed: the machine went away"
    assert len(lines) == len(found)


def test_nothing_fails_for_want_of_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = life(tmp_path / "nowhere")
    for _ in range(3):
        log.record("sandbox.created")
    assert capsys.readouterr().err.count("not recorded") == 1


def test_an_engine_that_was_killed_has_an_end_by_its_own_name(tmp_path: Path) -> None:
    meta = {"id": "s9", "client": "containerd", "namespace": "k8s.io"}
    for owner in ({"pid": os.getpid(), "start": 1, "boot": "another"}, None):
        journal = Journal.create_dir(str(tmp_path / "sandboxes"), "k8s.io.s9", meta)
        if owner is not None:
            with open(journal.path, "a", encoding="ascii") as file:
                file.write(json.dumps({"owner": owner}) + "\n")
        assert journal_undo.undo(journal) == []
    (one,) = events.read()  # the second one's owner, this process, lives: it says so itself
    assert one | {"time": ""} == {
        "time": "",
        "event": "sandbox.ended",
        "sandbox": "s9",
        "client": "containerd",
        "namespace": "k8s.io",
        "error": "its engine was killed",
    }


def test_a_late_line_in_a_file_that_was_turned_over_comes_in_order(run_dir: Path) -> None:
    events.append("e", {"number": 0})
    with events.Follower() as follower:
        late = os.open(run_dir / events.FILE_NAME, os.O_WRONLY | os.O_APPEND)
        os.rename(run_dir / events.FILE_NAME, run_dir / f"{events.FILE_NAME}.1")
        events.append("e", {"number": 3})
        assert [one["number"] for one in follower.poll()] == [3]
        os.write(late, events.line("e", {"number": 4}).encode() + b"\n")
        os.close(late)
        events.append("e", {"number": 5})
        assert [one["number"] for one in follower.poll()] == [4, 5]
    assert [one["number"] for one in events.read()] == [0, 4, 3, 5]


def test_a_line_behind_a_torn_one_is_whole(run_dir: Path) -> None:
    whole = events.line("e", {"number": 1, "error": '{"time":"'})
    (run_dir / events.FILE_NAME).write_text(f"{whole[:25]}{whole}\n")
    assert [one["number"] for one in events.read()] == [1]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["events", *arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.usefixtures("run_dir")
def test_the_command_filters(capsys: pytest.CaptureFixture[str]) -> None:
    events.append(
        "container.exited", {"sandbox": "a" * 32, "container": "a" * 32, "exit_code": 7, "error": "it\x1b"}
    )
    events.append("sandbox.ended", {"sandbox": "b" * 32})
    status, out, _ = run(capsys)
    assert status == 0
    assert out.splitlines()[0].endswith(f"container.exited    {'a' * 12}  exit_code=7  error=it\\x1b")
    assert len(out.splitlines()) == 2
    for filters, expected in (
        (["--filter", "event=container.*"], 1),
        (["--filter", "exit_code=7"], 1),
        (["--filter", "event=x", "--filter", "event=sandbox.ended"], 1),
        (["--filter", "event=sandbox.ended", "--filter", "exit_code=7"], 0),
        (["--since", "1h"], 2),
        (["--since", "2999-01-01T00:00:00Z"], 0),
    ):
        _, out, _ = run(capsys, "--json", *filters)
        assert len([json.loads(line) for line in out.splitlines()]) == expected, filters
    for wrong in (["--since", "yesterday"], ["--filter", "event"], ["--since", "-5m"]):
        status, _, error = run(capsys, *wrong)
        assert status != 0
        assert "hint: " in error


def test_a_time_without_a_fraction_is_shown_as_it_is(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / events.FILE_NAME).write_text('{"time":"2026-01-02T03:04:05Z","event":"e"}\n')
    assert run(capsys)[1].split() == ["2026-01-02T03:04:05Z", "e"]


def test_the_command_follows_until_it_is_interrupted(run_dir: Path) -> None:
    events.append("old", {})
    program = [sys.executable, str(SOURCE / "kata" / "__main__.py"), "events", "-f", "--json"]
    # A shell starts its background jobs with SIGINT ignored, and this may be below one.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, preexec_fn=heeds) as child:
        assert child.stdout is not None
        line = ""
        while not line:  # until it listens: what was before is not shown
            events.append("new", {})
            if select.select([child.stdout], [], [], 0.1)[0]:
                line = child.stdout.readline()
        assert json.loads(line)["event"] == "new"
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert child.wait(10) == 130
