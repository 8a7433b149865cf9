"""The manual pages: one for each command, with all that its ``--help`` says, and nothing that roff stumbles over."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kata.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import manpages  # noqa: E402

PAGES = manpages.pages()


def words(text: str) -> str:
    """Text without what roff and line breaks do to it."""
    plain = re.sub(r"\\f[BIR]|\\&", "", text).replace("\\-", "-").replace("\\e", "\\")
    return " ".join(plain.split())


def test_each_command_has_a_page() -> None:
    assert set(PAGES) == {
        "kata.1",
        "kata-agent-ctl.1",
        "kata-log-parser.1",
        "kata-monitor.1",
        "kata-runtime.1",
        *(f"kata-{name}.1" for name in COMMANDS),
    }
    for name in COMMANDS:
        assert f"kata-{name} (1)" in words(PAGES["kata.1"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_says_what_the_help_says(name: str) -> None:
    command = import_module(f"kata.cli.{COMMANDS[name][0]}").COMMANDS[name]
    page = words(PAGES[f"kata-{name}.1"])
    assert command.summary in page
    for option in command.options:
        assert ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "") in page
        assert option.text[1:].rstrip(".") in page
    for line in command.notes.split("\n"):
        assert " ".join(line.split()) in page


def test_what_looks_like_a_request_is_text() -> None:
    assert manpages.escape("a\n.so /etc/passwd\n'br\\x -y") == "a\n\\&.so /etc/passwd\n\\&'br\\ex \\-y"


def test_variables_are_those_of_the_module() -> None:
    assert [row[0] for row in manpages.paths_table()] == [
        f"KATA_{name}"
        for name in (
            "RUN_DIR",
            "STATE_DIR",
            "GUEST_DIR",
            "VC_DIR",
            "CACHE_DIR",
            "AGENT_BINARY",
            "INSPECTOR_BINARY",
        )
    ]


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff (apt-get install groff-base)")
def test_roff_has_nothing_to_complain_of(tmp_path: Path) -> None:
    for name, content in PAGES.items():
        (tmp_path / name).write_text(content)
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-wall", tmp_path / name],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), name
        assert "SYNOPSIS" in done.stdout or "SYNOPSIS" in re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)


def test_the_tool_writes_pages_and_completion(tmp_path: Path) -> None:
    subprocess.run(["/usr/bin/python3", "-I", ROOT / "tools/manpages.py", tmp_path], check=True)
    assert {path.name for path in (tmp_path / "man/man1").iterdir()} == set(PAGES)
    for program in ("kata", "kata-agent-ctl", "kata-log-parser", "kata-monitor", "kata-runtime"):
        script = (tmp_path / "bash-completion/completions" / program).read_text()
        assert f" {program}" in script.splitlines()[-1]
        assert (tmp_path / f"fish/vendor_completions.d/{program}.fish").exists()
    assert (
        (tmp_path / "zsh/site-functions/_kata")
        .read_text()
        .startswith("#compdef kata kata-agent-ctl kata-log-parser kata-monitor kata-runtime\n")
    )
