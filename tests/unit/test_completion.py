"""Completion of command lines: what the programs offer, and what real shells make of it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kata.agent_ctl import complete as agent_ctl
from kata.agent_ctl import methods
from kata.agent_ctl.main import OPTIONS
from kata.cli import complete, records
from kata.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


def offered(line: str) -> list[str]:
    """The candidates of ``kata`` at the end of *line*, which begins with the program's name."""
    words = complete.split(line)[1:]
    return [text for text, _ in complete.kata(COMMANDS, words[:-1], words[-1])]


def offered_by_agent_ctl(line: str) -> list[str]:
    words = complete.split(line)[1:]
    return [text for text, _ in agent_ctl.complete(OPTIONS, words[:-1], words[-1])]


@pytest.fixture
def containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers in a state directory of the test's own: web and worker."""
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    for name in ("web", "worker"):
        draft = records.PendingContainer(name)
        draft.commit({"id": draft.id, "name": name, "created_at": records.now(), "auto_remove": False}, {})


def test_commands_come_from_the_table() -> None:
    assert offered("kata ") == [*COMMANDS, "--help", "--version"]
    assert offered("kata help res") == ["restart", "resume"]
    assert offered("kata help run ") == []
    assert offered("kata nonsense ") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_offered(name: str) -> None:
    from importlib import import_module

    command = import_module(f"kata.cli.{COMMANDS[name][0]}").COMMANDS[name]
    expected = {spelling for option in command.options for spelling in option.names}
    assert set(offered(f"kata {name} -")) == expected | {"-h", "--help"}


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("kata run --network ", ["none", "user", "tap"]),
        ("kata run --network=n", ["--network=none"]),
        ("kata run --storage t", ["tmpfs"]),
        ("kata run -it --pull=al", ["--pull=always"]),
        ("kata logs -fn ", ["all"]),  # a joined short option waits for its value, too
        ("kata logs -n5 --js", ["--json"]),
        ("kata kill -s HU", ["HUP"]),
        ("kata install ", ["containerd", "docker", "podman", "crio"]),
        ("kata install docker ", []),
        ("kata config c", ["check"]),
        ("kata config check ", [":files"]),
        ("kata run --env-file x", [":files"]),
        ("kata run -v ./x", [":files"]),
        ("kata run -w ", []),  # in the container
        ("kata run --name ", []),
        ("kata run --cap-add NET_A", ["NET_ADMIN"]),
        ("kata run --rm=", []),
        ("kata run image ls -", []),  # another program's command line
        ("kata rm -- -", []),
        ("kata 'logs' \"--tim", ["--timestamps"]),
    ],
)
def test_values_and_arguments(line: str, candidates: list[str]) -> None:
    assert offered(line) == candidates


@pytest.mark.usefixtures("containers")
def test_names_of_containers() -> None:
    assert sorted(offered("kata stop ")) == ["web", "worker"]
    assert offered("kata stop web w") == ["worker"]
    assert offered("kata attach web ") == []
    assert sorted(offered("kata cp ")) == [":files", "web:", "worker:"]
    assert offered("kata container rm wo") == ["worker"]
    assert offered("kata exec -u root we") == ["web"]
    assert offered_by_agent_ctl("kata-agent-ctl --sandbox=we") == ["--sandbox=web"]


def test_agent_ctl() -> None:
    assert set(methods.names()) < set(offered_by_agent_ctl("kata-agent-ctl --vm "))
    assert offered_by_agent_ctl("kata-agent-ctl -o ") == ["json", "text"]
    assert offered_by_agent_ctl("kata-agent-ctl --vm SignalProcess --s") == ["--signal"]
    assert offered_by_agent_ctl("kata-agent-ctl --vm fuzz --only ") == ["frames", "requests"]
    assert offered_by_agent_ctl("kata-agent-ctl --vm fuzz --pat") == ["--patience"]
    assert offered_by_agent_ctl("kata-agent-ctl list SignalP") == ["SignalProcess"]


@pytest.mark.parametrize("words", [[], ["line"], ["nonsense", "x"], ["line", "kata rmx '\""], ["words"]])
def test_whatever_is_asked_there_is_no_error(words: list[str]) -> None:
    done = subprocess.run(
        [ROOT / "tools/kata", "__complete", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- in shells ----

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "PS1='ready> '; . {script}"),
    "zsh": (
        ["zsh", "-f", "-i"],
        # Files of completion functions are named after them; a list of choices would wait for a key.
        "PS1='ready> '; mkdir -p f; cp {script} f/_kata; fpath=($PWD/f $fpath); autoload -U compinit;"
        " compinit -u -D; LISTMAX=-1",
    ),
    "fish": (
        ["fish", "--no-config", "-i", "-C", "function fish_prompt; echo 'ready> '; end"],
        "source {script}",
    ),
}


@pytest.mark.usefixtures("containers")
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    """Types the beginning of words, presses Tab, and looks at the arguments that a program of that name gets."""
    argv, set_up = SHELLS[shell]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{shell} is not installed (tools/setup test installs it)")
    (tmp_path / "bin").mkdir()
    (tmp_path / "a file").touch()
    for name in ("kata", "kata-agent-ctl"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(
            f'#!/bin/sh\n[ "$1" = __complete ] && exec {ROOT}/tools/{name} "$@"\nprintf "<%s>" "$@" >>"$OUT"\n'
        )
        stand_in.chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **{name: os.environ[name] for name in ("KATA_STATE_DIR", "KATA_RUN_DIR")},
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OUT": str(out),
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
    }
    pid, ours = pty.fork()  # fish wants a controlling terminal
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(argv[0], argv, environment)
    seen = b""

    def look(condition: str, holds: Callable[[], bool]) -> None:
        """Read what the shell shows until *holds* is true."""
        nonlocal seen
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, f"{condition}: {seen.decode(errors='replace')}"
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 4096)

    def typed(keys: str, arguments: str) -> None:
        nonlocal seen
        out.unlink(missing_ok=True)
        seen = b""
        os.write(ours, keys.encode())
        # What is typed while it completes is taken for a part of the word by some.
        last = time.monotonic()
        while time.monotonic() < last + 1.5:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 4096)
                last = time.monotonic()
        os.write(ours, b"\n")
        look(keys, lambda: out.exists() and out.read_text().endswith(">"))
        assert out.read_text() == arguments, seen

    try:
        os.write(
            ours, set_up.format(script=ROOT / f"tools/completion/kata.{shell}").encode() + b"; : > began\n"
        )
        look("the shell starts", (tmp_path / "began").exists)
        typed("kata renam\tweb", "<rename><web>")
        typed("kata stop we\t", "<stop><web>")
        typed("kata run --pul\tnev\timage", "<run><--pull><never><image>")
        typed("kata cp wo\t/x a\t", "<cp><worker:/x><a file>")
        typed("kata-agent-ctl --sandb\two\tGetOO\t", "<--sandbox><worker><GetOOMEvent>")
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
