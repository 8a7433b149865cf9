"""Container records on disk, and the log reader on top of them; no engine needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kata import journal, journal_undo, paths, sysio
from kata.cli import ending, lifecycle, listing, records, table
from kata.engine import client
from kata.errors import AlreadyExistsError, JournalError, NotFoundError, UsageError
from kata.proto import task_pb


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "s"


def make(name: str | None = None, **more: object) -> records.Container:
    pending = records.PendingContainer(name)
    record = {
        "id": pending.id,
        "name": pending.name,
        "created_at": records.now(),
        "auto_remove": False,
        **more,
    }
    return pending.commit(record, {"process": {}})


def test_a_container_is_found_by_name_id_and_beginning(state: Path) -> None:
    one = make("one")
    make()
    assert records.find("one").id == one.id
    assert records.find(one.id).name == "one"
    assert records.find(one.id[:10]).name == "one"
    assert len(records.all_containers()) == 2
    with pytest.raises(NotFoundError, match="no container named 'ome'") as caught:
        records.find("ome")
    assert caught.value.hint == "did you mean one?"


def test_an_ambiguous_beginning_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tail in ("0", "1"):
        monkeypatch.setattr(records, "new_id", lambda tail=tail: "ab" * 15 + "c" + tail)
        make()
    with pytest.raises(UsageError, match="beginning of 2 container ids"):
        records.find("abab")


def test_a_name_is_unique_and_free_again_after_removal(state: Path) -> None:
    one = make("one")
    with pytest.raises(AlreadyExistsError, match="taken by container"):
        records.PendingContainer("one")
    assert len(os.listdir(state / "containers")) == 1
    records.remove(one)
    assert os.listdir(state / "containers") == []
    assert os.listdir(state / "names") == []
    make("one")


def test_a_change_keeps_what_others_changed_meanwhile(state: Path) -> None:
    one = make("one")
    records.change(one, networks=["front"])
    records.change(one, restart={"policy": "always"})
    records.rename(one, "two")
    records.change(one, networks=["back"])
    found = records.find("two").record
    assert found["networks"] == ["back"]
    assert found["restart"] == {"policy": "always"}
    records.remove(one)
    with pytest.raises(NotFoundError, match="container one is gone"):
        records.change(one, networks=[])


def test_an_engine_is_believed_more_than_the_file(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk may have been full, or the file is older than what happens now."""
    one = make("one")
    said: list[object] = []

    class Engine:
        def __init__(self, path: str) -> None:
            assert path == one.socket

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def state(self, _: str, timeout: float) -> object:
            answer = said[-1]
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(client, "EngineClient", Engine)
    os.makedirs(os.path.dirname(one.socket))
    Path(one.socket).touch()
    path = os.path.join(one.directory, "state.json")
    for answer, status in (
        (task_pb.StateResponse(status=2, pid=7), "running"),
        (task_pb.StateResponse(status=4, pid=7), "paused"),
        (task_pb.StateResponse(status=1), "exited"),  # it is opened for a copy, or about to start
        (task_pb.StateResponse(status=3), "exited"),
        (NotFoundError("not yet"), "exited"),
    ):
        said.append(answer)
        records.write_json(path, {"status": "stopped", "exit_code": 3})
        assert one.state()["status"] == status
    os.unlink(one.socket)
    said.append(AssertionError("nobody is to be asked"))
    assert one.state()["status"] == "exited"


@pytest.mark.parametrize("force", [True, False])
def test_an_engine_that_hangs_is_ended_where_it_is_to_be(
    state: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.setattr(ending, "TELL_AFTER_S", 0.1)
    monkeypatch.setattr(ending, "KILL_AFTER_S", 0.3)
    one = make("one")
    directory = Path(paths.sandbox_dir(one.id))
    engine = subprocess.Popen(["sleep", "1000"])
    made = journal.Journal.create_dir(str(directory.parent), one.id, {})
    made.set_owner(engine.pid)
    made.close()
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        assert ending.wait_for_engine(one, 1.0, tell=force) is force
        assert directory.exists() is not force
    finally:
        engine.kill()
    assert engine.wait() == -signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts")
def test_a_removal_that_its_engine_could_not_end_is_told_and_resumed(state: Path, tmp_path: Path) -> None:
    one = make("one")
    disk = Path(one.directory, "rw.img")
    disk.touch()
    (tmp_path / "other").touch()
    child = os.fork()
    if child == 0:  # a mount namespace of its own
        status = 1
        try:
            sysio.unshare(sysio.CLONE_NEWNS)
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "--bind", tmp_path / "other", disk], check=True)
            engines = journal.Journal.open(os.path.join(one.directory, "journal"))
            assert journal_undo.undo(engines)
            assert records.load(one.id) is None, "its record has gone, and its disk has not"
            with pytest.raises(JournalError, match="could not be removed completely"):
                lifecycle.remove(one, force=True)
            subprocess.run(["umount", disk], check=True)
            lifecycle.remove(one, force=True)
            assert not os.path.lexists(one.directory)
            lifecycle.remove(one, force=True)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.listdir(state / "containers") == []


def test_a_discarded_draft_leaves_nothing(state: Path) -> None:
    pending = records.PendingContainer("draft")
    Path(pending.path("rw.img")).write_bytes(b"x")
    pending.discard()
    assert os.listdir(state / "containers") == []
    assert os.listdir(state / "names") == []


def test_a_draft_of_a_dead_process_is_cleared(state: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        records.PendingContainer("dying")
        os._exit(0)
    os.waitpid(child, 0)
    kept = make("kept")
    report = journal_undo.reconcile(str(tmp_path / "r"), str(state))
    assert len(report.undone) == 1
    assert not report.failures
    assert os.listdir(state / "names") == ["kept"]
    assert records.find("kept").id == kept.id


def test_a_state_is_checked_against_the_engine(state: Path) -> None:
    box = make("box")
    assert box.state()["status"] == "created"
    me = {"pid": os.getpid(), "starttime": sysio.proc_starttime(os.getpid()), "boot_id": sysio.boot_id()}
    path = os.path.join(box.directory, "state.json")
    records.write_json(path, {"status": "running", "engine": me})
    assert box.state()["status"] == "running"
    records.write_json(path, {"status": "running", "engine": {**me, "starttime": 1}})
    lost = box.state()
    assert (lost["status"], lost["exit_code"]) == ("exited", 137)
    assert lost["error"]
    records.write_json(path, {"status": "stopped", "exit_code": 3})
    assert box.state()["status"] == "exited"
    assert box.state()["exit_code"] == 3


def test_what_outlived_its_purpose_is_cleared(state: Path) -> None:
    brief = make("brief", auto_remove=True)
    gone = {"pid": 1, "starttime": 1, "boot_id": "another"}
    records.write_json(os.path.join(brief.directory, "state.json"), {"status": "running", "engine": gone})
    (state / "names" / "stale").write_text("0" * 64)
    make("stays")
    cleared = records.clear_stale()
    assert len(cleared) == 2
    assert [c.name for c in records.all_containers()] == ["stays"]
    assert os.listdir(state / "names") == ["stays"]


def _log(box: records.Container, *entries: tuple[str, str], suffix: str = "") -> None:
    with open(box.log + suffix, "a") as file:
        for stream, text in entries:
            file.write(
                json.dumps({"time": "2026-01-02T03:04:05.000000006Z", "stream": stream, "log": text}) + "\n"
            )


def test_logs_are_read_across_rotations(state: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    box = make("box")
    _log(box, ("stdout", "1\n2"), suffix=".2")
    _log(box, ("stdout", "\n3\n"), suffix=".1")
    _log(box, ("stderr", "oops\n"), ("stdout", "4\n5\n"))
    run = listing.HANDLERS["logs"]
    run(listing.COMMANDS["logs"].parse(["box"]))
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err) == (b"1\n2\n3\n4\n5\n", b"oops\n")
    run(listing.COMMANDS["logs"].parse(["--tail", "2", "box"]))
    assert capfdbinary.readouterr().out == b"4\n5\n"
    run(listing.COMMANDS["logs"].parse(["--tail", "4", "box"]))
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err) == (b"3\n4\n5\n", b"oops\n")
    run(listing.COMMANDS["logs"].parse(["-t", "-n", "1", "box"]))
    assert capfdbinary.readouterr().out == b"2026-01-02T03:04:05.000000006Z 5\n"
    run(listing.COMMANDS["logs"].parse(["-n", "0", "box"]))
    assert capfdbinary.readouterr().out == b""


def test_bytes_that_are_no_text_come_back_exactly(
    state: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    box = make("box")
    with open(box.log, "w") as file:
        file.write(json.dumps({"time": "t", "stream": "stdout", "log64": "/wD+Cg=="}) + "\n")
    listing.HANDLERS["logs"](listing.COMMANDS["logs"].parse(["box"]))
    assert capfdbinary.readouterr().out == b"\xff\x00\xfe\n"


def test_tables_cannot_be_made_to_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    table.show(["A", "B"], [["\x1b[2J\r\n", "ok"]])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (10 << 30, "10GiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert table.human_size(count) == text


def test_a_container_whose_run_died_before_its_start_is_cleared(state: Path) -> None:
    """One that `kata create --rm` made, or whose maker lives, stays."""
    make("alive", auto_remove=True, made_to_run=True)
    pid = os.fork()
    if pid == 0:
        make("dead", auto_remove=True, made_to_run=True)
        make("created", auto_remove=True, made_to_run=False)
        make("kept", auto_remove=False, made_to_run=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert records.clear_stale() == ["container dead, made with --rm"]
    assert sorted(os.listdir(state / "names")) == ["alive", "created", "kept"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("place", ["kata.storage.ext4.make_writable", "kata.cli.session.sandbox_settings"])
def test_a_run_that_is_told_to_end_before_the_start_leaves_nothing(
    state: Path, tmp_path: Path, number: signal.Signals, place: str
) -> None:
    (tmp_path / "root").mkdir()
    module, _, function = place.rpartition(".")
    program = f"""
import importlib, os, signal, sys, time
from kata.cli.main import main
for number in ({int(signal.SIGTERM)}, {int(signal.SIGHUP)}, {int(signal.SIGQUIT)}):
    signal.signal(number, signal.SIG_DFL)  # who runs the tests may ignore some (nohup)
def told(*arguments, **more):
    os.kill(os.getpid(), {int(number)})
    time.sleep(10)
setattr(importlib.import_module({module!r}), {function!r}, told)
if os.geteuid() != 0:
    os.geteuid = lambda: 0
sys.exit(main(["run", "--rm", "--name", "xx", "rootfs:{tmp_path}/root", "true"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (-number, b"")
    assert os.listdir(state / "containers") == []
    assert os.listdir(state / "names") == []
