"""The engine's log: for people and for programs, at each level, whatever the guest says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kata.engine.log import EngineLog, GuestLines, LoggedDurations, logfmt_value

SOURCE = Path(__file__).resolve().parents[2] / "src"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log = EngineLog("s1")
    log.write("the disk is full")
    log.write(
        "container.exited", "info", event="container.exited", container="c", exit_code=1, error="it died"
    )
    said = lines(capsys)
    assert [line[21:] for line in said] == [
        "the disk is full",
        "container.exited: it died container=c exit_code=1",
    ]
    assert said[0][:21].endswith("Z ")


def test_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    log = EngineLog("s1")
    log.form = "json"
    log.write("two\nlines \x1b", event="disk.error", exit_code=0)
    log.form = "logfmt"
    log.write('say "hi"', "info", name="\u4e2d", image="a=b", empty="", number=3)
    first, second = lines(capsys)
    found = json.loads(first)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "sandbox": "s1",
        "source": "engine",
        "msg": "two\nlines \x1b",
        "event": "disk.error",
        "exit_code": 0,
    }
    assert second.partition(" ")[2] == (
        r'level=info sandbox=s1 source=engine msg="say \"hi\"" name="\u4e2d" image="a=b" number=3'
    )
    assert logfmt_value("") == '""'


def test_a_name_that_is_no_utf_8_reaches_the_shims_log(tmp_path: Path) -> None:
    fifo = str(tmp_path / "log")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        EngineLog("s1", fifo).write(os.fsdecode(b"/images/\xff could not be read"))
        assert os.read(reader, 4096).endswith(b"kata s1: /images/\\udcff could not be read\n")
    finally:
        os.close(reader)


def test_levels_change_at_run_time(capsys: pytest.CaptureFixture[str]) -> None:
    log = EngineLog("s1")
    seen: list[bool] = []
    log.observers.append(seen.append)
    calls = LoggedDurations(log, "the agent")
    for level in ("info", "debug", "debug", "warning"):
        log.set_level(level)
        calls.add("Check\x1b", 1_500_000)
        log.write("event", "info")
        log.write("fault")
    assert seen == [True, False]
    said = [line[21:] for line in lines(capsys)]
    debug = [r'debug: the agent answered Check\x1b call="Check\\x1b" ms=1.5', "event", "fault"]
    assert said == ["event", "fault", *debug, *debug, "fault"]
    with pytest.raises(ValueError, match="not in"):
        log.set_level("loud")


def test_what_the_guest_says_is_marked_escaped_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    log = EngineLog("s1")
    log.set_level("debug")
    guest = GuestLines(log)
    guest.feed(b"Linux \x1b[2Jversion\r\n2026-01-01T00:00:00Z sandbox.en")
    guest.feed(b'ded\n{"level":"INFO","msg":"hi"}\n\n')
    guest.feed(b"x" * 100_000)
    said = [line[21:] for line in lines(capsys)]
    assert said[:3] == [
        r"debug: console: Linux \x1b[2Jversion",
        "debug: console: 2026-01-01T00:00:00Z sandbox.ended",
        'debug: agent: {"level":"INFO","msg":"hi"}',
    ]
    assert len(said) == 4
    assert all(len(line) < 3000 for line in said)


def test_the_file_is_turned_over(tmp_path: Path) -> None:
    program = (
        "from kata.engine import log\n"
        "log.MAX_BYTES = log._LOOK_BYTES = 10000\n"
        "one = log.EngineLog('s1')\n"
        "for n in range(2000): one.write(f'line {n}')\n"
    )
    path = tmp_path / "engine.log"
    with open(path, "ab") as file:
        environment = os.environ | {"PYTHONPATH": str(SOURCE)}
        subprocess.run([sys.executable, "-c", program], stderr=file, env=environment, check=True, timeout=60)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["engine.log", "engine.log.1"]
    kept = (tmp_path / "engine.log.1").read_text() + path.read_text()
    assert kept.splitlines()[-1].endswith("line 1999")
    assert len(kept) < 50_000
