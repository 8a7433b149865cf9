"""What nobody expected: one sentence, an exit status, and a file to attach."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import kata
from kata import crash
from kata.agent_ctl import main as agent_ctl
from kata.cli import main as cli

_MAIN = str(Path(kata.__file__).parent / "__main__.py")
_BROKEN = """
import importlib, runpy, sys
def broken(*arguments, **more):
    raise ValueError("half\\ud800 of\\n it\\x1b[31m")
setattr(importlib.import_module(sys.argv[1]), sys.argv[2], broken)
sys.argv = sys.argv[3:]
sys.exit(runpy.run_path(sys.argv[0], run_name="kata.started")["main"]())
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("module", "function", "argv", "status", "called"),
    [
        ("kata.cli.main", "dispatch", ["run", "--secret=password"], 125, "kata run"),
        ("kata.shim.main", "Arguments", ["shim", "start"], 1, "containerd-shim-kata-v2"),
        ("kata.engine.main", "main", ["engine", "/nowhere"], 1, "kata engine"),
        ("kata.launcher", "settle", ["ps"], 125, "kata ps"),
    ],
)
def test_every_program_has_a_last_resort(
    state: Path, module: str, function: str, argv: list[str], status: int, called: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(_MAIN).parents[1])}
    command = [sys.executable, "-c", _BROKEN, module, function, _MAIN, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    said = done.stderr.decode()
    assert (done.returncode, done.stdout) == (status, b"")
    first, second, *rest = said.splitlines()
    assert first == f"error: {called} met a fault of its own: ValueError: half? of it?[31m"
    (file,) = (state / "crashes").iterdir()
    assert second == f"hint: please report it, and attach {file}"
    assert not rest
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    text = file.read_text()
    assert "in broken" in text
    assert text.endswith("builtins.ValueError\n")
    assert "password" not in text
    assert "of it" not in text


def test_the_file_says_what_and_where_and_no_values(state: Path) -> None:
    """Exceptions quote what they stumbled over: a password, a line of a file, a path."""
    value = "".join(["pass", "word"])
    try:
        try:
            try:
                os.environ.copy()[value]
            except KeyError as error:
                error.add_note(value)
                raise OSError(errno.ENOSPC, value, value) from error
        except OSError:
            raise ExceptionGroup(value, [ValueError(value), SyntaxError(value, (value, 1, 1, value))])  # noqa: B904
    except ExceptionGroup as error:
        error.exceptions[0].__context__ = error.exceptions[0].__cause__ = error  # in a circle
        crash.explain(error, "kata run")
    (file,) = (state / "crashes").iterdir()
    text = file.read_text()
    assert value not in text
    words = [
        *(
            "builtins.KeyError\n",
            "was the cause of:",
            "builtins.OSError [ENOSPC]\n",
            "While that was handled:",
        ),
        *("builtins.ExceptionGroup\n", "Among them:", "builtins.ValueError\n", "builtins.SyntaxError\n"),
    ]
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert text.count("in test_the_file_says_what_and_where_and_no_values") >= 3


def test_the_files_are_bounded(state: Path) -> None:
    def deep(left: int) -> None:
        if not left:
            raise RuntimeError("x" * 200_000)
        (deep, shallow)[left % 2](left - 1)

    def shallow(left: int) -> None:
        # Two that call each other: lines of theirs are not summed up as repeated.
        deep(left - 1)

    for _ in range(12):
        try:
            deep(900)
        except RuntimeError as error:
            told = crash.explain(error, "kata run")
    assert len(told.message) < 400
    files = sorted((state / "crashes").iterdir())
    assert len(files) == 8
    assert all(file.stat().st_size < 70_000 for file in files)
    assert str(files[-1]) in told.hint


def test_a_state_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = crash.explain(ValueError("x"), "kata run")
    assert told.hint.startswith(f"please report it, and attach {tmp_path}/kata-crash-")


def test_within_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> int:
        raise TypeError

    monkeypatch.setattr(cli, "dispatch", broken)
    assert cli.main(["ps"]) == 125
    monkeypatch.setattr(agent_ctl, "dispatch", broken)
    assert agent_ctl.main([]) == 1
    said = capsys.readouterr().err
    assert "kata-agent-ctl met a fault of its own: TypeError\n" in said
    assert "kata ps met a fault of its own: TypeError\n" in said


def test_a_file_that_cannot_be_written_whole_is_not_left(state: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        told = crash.explain(ValueError("x"), "kata run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.hint == "please report it; its details could not be written down: File too large"
    assert os.listdir(state / "crashes") == []
