"""`kata logs --guest` and `--engine`, on files such as an engine writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kata.cli import main as cli

SOURCE = Path(__file__).resolve().parents[2] / "src"
IDENTITY = "a" * 32


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    directory = tmp_path / "r/sandboxes" / f"k8s.io.{IDENTITY}"
    directory.mkdir(parents=True)
    (directory / "sandbox.json").write_text(json.dumps({"id": IDENTITY}))
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    status = cli.main(["logs", *arguments])
    told = capsys.readouterr()
    return status, told.out.splitlines(), told.err


def test_the_console_is_escaped_and_whole(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sandbox / "console.log.1").write_bytes(b"one\r\ntw")
    (sandbox / "console.log").write_bytes(b"o\n\x1b]0;evil\x07\xff\x9b\nthe end")
    assert run(capsys, "--guest", "aaa") == (
        0,
        ["one", "two", "\\x1b]0;evil\\x07\ufffd\ufffd", "the end"],
        "",
    )
    assert run(capsys, "--guest", "-n", "1", "aaa")[1] == ["the end"]
    _, lines, _ = run(capsys, "--guest", "-n", "2", "--json", "aaa")
    assert [json.loads(line)["line"] for line in lines] == ["\x1b]0;evil\x07\ufffd\ufffd", "the end"]
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_a_line_that_does_not_end_is_cut(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sandbox / "console.log").write_bytes(b"x" * 1_000_000)
    _, lines, _ = run(capsys, "--guest", "aaa")
    assert sum(map(len, lines)) == 1_000_000
    assert max(map(len, lines)) <= (1 << 14) + (1 << 16)


def test_what_cannot_be_is_said(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sandbox / "engine.log").write_text("2026-01-01T00:00:00Z sandbox.ready\n")
    assert run(capsys, "--engine", "aaa")[1] == ["2026-01-01T00:00:00Z sandbox.ready"]
    for wrong in (["--engine", "--guest", "aaa"], ["--engine", "-t", "aaa"], ["--guest", "other"]):
        status, lines, error = run(capsys, *wrong)
        assert (status, lines) == (125, [])
        assert error.startswith("error: ")
    assert run(capsys, "--guest", "aaa") == (0, [], "")  # it has said nothing yet


def test_following_a_log_across_its_turn_over_until_the_end(sandbox: Path) -> None:
    path = sandbox / "engine.log"
    path.write_text("before\n")
    program = [sys.executable, str(SOURCE / "kata/__main__.py"), "logs", "--engine", "-f", "aaa"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "before\n"

        def write() -> None:
            for number in range(200):
                if number % 50 == 49:
                    os.rename(path, f"{path}.1")
                with open(path, "a") as file:
                    file.write(f"{number}\n")
                time.sleep(0.005)
            (sandbox / "sandbox.json").unlink()
            for one in sandbox.iterdir():
                one.unlink()
            sandbox.rmdir()

        writer = threading.Thread(target=write)
        writer.start()
        told = child.stdout.read().splitlines()
        writer.join()
        assert child.wait(10) == 0
    assert told[:190] == [str(number) for number in range(190)]
