"""Command lines: what is accepted, and the words for what is not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kata.cli import making, signals, values, words
from kata.cli.args import Command, Option
from kata.cli.main import COMMANDS, main
from kata.cli.pump import parse_detach_keys
from kata.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
RUN = Command(
    "run",
    "IMAGE [COMMAND...]",
    "Runs.",
    [
        Option("-i --interactive", "", "in"),
        Option("-t --tty", "", "tty"),
        Option("--name", "NAME", "name"),
        Option("-e --env", "K=V", "env", many=True),
        Option("--rm", "", "remove"),
    ],
    least=1,
    interspersed=False,
)


def test_options_end_at_the_first_positional_argument() -> None:
    parsed = RUN.parse(
        ["-it", "--name", "x", "-eA=1", "-e", "B=2", "--env=C=3", "busybox", "ls", "--rm", "-e"]
    )
    assert parsed.flag("interactive")
    assert parsed.flag("tty")
    assert parsed.value("name") == "x"
    assert parsed.many("env") == ["A=1", "B=2", "C=3"]
    assert parsed.rest == ["busybox", "ls", "--rm", "-e"]
    assert not parsed.flag("rm")


def test_a_double_dash_ends_the_options_and_flags_take_false() -> None:
    parsed = RUN.parse(["--rm=false", "--tty=true", "--", "--name"])
    assert not parsed.flag("rm")
    assert parsed.flag("tty")
    assert parsed.rest == ["--name"]
    for argv, tty in ((["-t=true"], True), (["-it=false"], False), (["-t", "-t=0"], False)):
        parsed = RUN.parse([*argv, "x"])
        assert parsed.flag("tty") is tty
        assert parsed.flag("interactive") is (argv == ["-it=false"])
    with pytest.raises(UsageError, match="-t is a switch, not 'perhaps'"):
        RUN.parse(["-t=perhaps", "x"])


@pytest.mark.parametrize(
    ("argv", "words", "hint"),
    [
        (["--nmae", "x", "i"], "unknown option --nmae", "did you mean --name?"),
        (["-x", "i"], "unknown option -x", "--help"),
        (["--name"], "--name needs a value: NAME", "--help"),
        (["--rm=perhaps", "i"], "--rm is a switch, not 'perhaps'", "--rm=false"),
        ([], "too few arguments", "usage: kata run IMAGE"),
    ],
)
def test_mistakes_are_named_with_a_hint(argv: list[str], words: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        RUN.parse(argv)
    assert words in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: kata {name} ")
    assert shown.err == ""


def test_an_unknown_command_is_an_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 125
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown command 'rnu'" in shown.err
    assert "did you mean 'kata run'?" in shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", 512),
        ("64b", 64),
        ("1k", 1024),
        ("1.5m", 3 << 19),
        ("2G", 2 << 30),
        ("10GiB", 10 << 30),
        ("3mb", 3 << 20),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert values.size(text, "-m") == expected


@pytest.mark.parametrize("text", ["", "m", "-1", "0", "1x", "nan", "inf", "1 0m", "1mm"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        values.size(text, "-m")


def test_ports() -> None:
    assert values.port("8080:80") == [{"host_ip": "", "host_port": 8080, "guest_port": 80, "proto": "tcp"}]
    assert values.port("127.0.0.1:5353:53/udp") == [
        {"host_ip": "127.0.0.1", "host_port": 5353, "guest_port": 53, "proto": "udp"}
    ]
    assert values.port("[::1]:80:80")[0]["host_ip"] == "::1"
    assert values.port("53:53/UDP")[0]["proto"] == "udp"
    for text in ("80", "0:80", "127.0.0.1::80"):
        [one] = values.port(text)
        assert (one["host_port"], one["guest_port"]) == (0, 80)
    assert [p["guest_port"] for p in values.port("7000-7002:8000-8002")] == [8000, 8001, 8002]


@pytest.mark.parametrize(
    "text", ["", "x", "80:0", "80:70000", "1-2:5", "80:80/sctp", "localhost:80:80", "1:2:3:4"]
)
def test_wrong_ports(text: str) -> None:
    with pytest.raises(UsageError, match="-p "):
        values.port(text)


def test_volumes(tmp_path: object) -> None:
    assert values.volume(f"{tmp_path}:/data:ro") == (str(tmp_path), "/data", ["rbind", "rprivate", "ro"])
    assert values.volume(f"{tmp_path}:/data/") == (str(tmp_path), "/data", ["rbind", "rprivate", "rw"])
    for wrong in (
        "a",
        "name:/data",
        f"{tmp_path}:data",
        f"{tmp_path}:/",
        f"{tmp_path}:/d:rx",
        "/does/not/exist:/d",
    ):
        with pytest.raises(UsageError, match="-v ") as caught:
            values.volume(wrong)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (word, ["rbind", "rprivate", "rw"])
            for word in ("cached", "delegated", "consistent", "nocopy", "z", "Z", "rw,z", "bind")
        ),
        *((word, ["rbind", word, "rw"]) for word in ("slave", "rslave", "shared", "rshared", "rprivate")),
        ("ro,Z,noexec", ["rbind", "rprivate", "ro", "noexec"]),
    ],
)
def test_options_of_volumes(tmp_path: object, text: str, expected: list[str]) -> None:
    assert values.volume(f"{tmp_path}:/d:{text}")[2] == expected


@pytest.mark.parametrize("text", ["U", "O", "idmap=x", "suid", "ro,rw", "slave,shared"])
def test_options_of_volumes_that_are_not_offered(tmp_path: object, text: str) -> None:
    with pytest.raises(UsageError, match=r"not offered|contradict"):
        values.volume(f"{tmp_path}:/d:{text}")


def test_environment_files_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    """A byte order mark is no part of a name, and a line ends at a newline only."""
    file = tmp_path / "env"
    text = "\ufeffFIRST=1\r\nSECOND=two\u2028words\n  THIRD=a\x0cb \n\tFOURTH=\x85\x1c\n#X=1\nLAST=\r"
    file.write_bytes(text.encode())
    expected = ["FIRST=1", "SECOND=two\u2028words", "THIRD=a\x0cb ", "FOURTH=\x85\x1c", "LAST="]
    assert values.environment([], [str(file)]) == expected
    file.write_bytes(b"two words=x\n")
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        values.environment([], [str(file)])


def test_environment(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    file = f"{tmp_path}/env"
    with open(file, "w") as out:
        out.write("# comment\n\nA=1\nB=two words\nTAKEN\n")
    monkeypatch.setenv("TAKEN", "from here")
    monkeypatch.delenv("ABSENT", raising=False)
    assert values.environment(["C=3", "ABSENT"], [file]) == ["A=1", "B=two words", "TAKEN=from here", "C=3"]
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        values.environment(["=x"], [])


@pytest.mark.parametrize(
    ("text", "expected"), [("KILL", 9), ("sigterm", 15), ("1", 1), ("RTMIN+1", 35), ("SIGRTMAX-1", 63)]
)
def test_signals(text: str, expected: int) -> None:
    assert signals.number(text) == expected


@pytest.mark.parametrize("text", ["KIL", "0", "99", "", "RTMIN-1"])
def test_wrong_signals(text: str) -> None:
    with pytest.raises(UsageError, match="unknown signal"):
        signals.number(text)


def test_detach_keys() -> None:
    assert parse_detach_keys("ctrl-p,ctrl-q") == b"\x10\x11"
    assert parse_detach_keys("") == b""
    assert parse_detach_keys("a,ctrl-[") == b"a\x1b"
    with pytest.raises(ValueError, match="ctrl-"):
        parse_detach_keys("ctrl-")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["buildx", "x"], "kata has no command 'buildx'\nhint: kata build"),
        (["run", "--rmi", "x"], "kata run has no option --rmi\nhint: kata rmi IMAGE afterwards"),
        (["run", "--health-startup-cmd", "y", "x"], "--health-cmd and --health-start-period do it"),
        (["run", "--device-read-bps", "/dev/vda:1mb", "x"], "limits are --cpus"),
        (["run", "--device-cgroup-rule", "c 1:1 r", "x"], "--device HOST:CONTAINER:rwm"),
        (["port", "--format", "{{.ID}}", "x"], "--json, and jq"),
        (["run", "-a", "stdout", "x"], "without -d its output is attached"),
        (["wait", "-a"], "name them: $(kata ps -aq)"),
        (["stop", "-a", "x"], "some are named, too"),
        (["stop"], "too few arguments"),
        (["image", "build", "/nowhere"], "'/nowhere' is no directory"),
        (["stop", "-f", "x"], "kata stop: unknown option -f"),
        (["prune", "networks"], "one of container, image, build, system"),
        (["run", "--nmae", "x", "y"], "did you mean --name?"),
        (["network", "create", "--ipv4=false", "--ipv6", "x"], "IPv4 in any case, and with --ipv6 both"),
        (["run", "--ip6", "fd00::2", "x"], "ends as the one of --ip does"),
        (["unpuase", "x"], "unknown command 'unpuase'"),
        (["help", "unpuase"], "unknown command 'unpuase'"),
        (["run", "--expose", "x", "y"], "--expose 'x': 'x' is not a port\nhint: the form is PORT["),
        (["run", "--restart", "sometimes", "y"], "--restart 'sometimes' is no policy"),
        (["run", "--health-interval", "soon", "y"], "--health-interval 'soon' is no duration"),
        (["run", "oci:/nowhere/at/all"], "no such directory\nhint: check the path\n"),
        (["doctor", "x"], "hint: usage: kata doctor\n"),
    ],
)
def test_words_of_docker_and_podman(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert main(argv) == 125
    assert said in capsys.readouterr().err.replace("error: ", "")


def test_other_names_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["unpause", "--help"], ["container", "unpause", "--help"]):
        assert main(argv) == 0
        assert "usage: kata resume" in capsys.readouterr().out
    assert not set(words.COMMANDS) & set(COMMANDS)
    assert not set(words.ALIASES) & set(COMMANDS)


def _options() -> dict[str, set[str]]:
    """Every command -> the options that it has."""
    found = {}
    for name, (module, *_) in COMMANDS.items():
        command = import_module(f"kata.cli.{module}").COMMANDS[name]
        found[name] = {spelling for option in command.options for spelling in option.names}
    return found


def _named(text: str) -> Iterator[tuple[str, list[str]]]:
    """The command lines of kata in a text: the command, and the options that follow it before anything else."""
    for found in re.finditer(r"\bkata ([a-z][a-z-]*)((?: -[^ ;,|>()']*)*)", text):
        yield found[1], [option for option in found[2].split() if option != "-"]


def _has(options: set[str], option: str) -> bool:
    """Whether an option, or several that are joined (``-aq``), are among these."""
    name = option.partition("=")[0]
    return (
        name in options
        or name == "--help"
        or (name[1:2] != "-" and all(f"-{x}" in options for x in name[1:]))
    )


VERBS = {
    "again",
    "agent",
    "and",
    "as",
    "changes",
    "does",
    "has",
    "is",
    "itself",
    "knows",
    "maps",
    "reads",
    "runs",
    "with",
}
"""What follows the name in sentences that are about kata."""


def test_an_answer_names_only_what_there_is() -> None:
    """For each word of Docker's and Podman's, the command or option that is named instead."""
    options = _options()
    for word, text in words.COMMANDS.items():
        named = list(_named(text))
        assert all(command in options or command in VERBS for command, _ in named), (word, text)
    keys = [
        (commands, names, text) for commands, table in words.OPTIONS.items() for names, text in table.items()
    ]
    for commands, names, text in keys:
        for command in commands.split():
            assert command in options, commands
            for name in names.split():
                assert name.startswith("-")
                assert not name.endswith("*") or name.startswith("--")
                assert name not in options[command], f"kata {command} has {name}"
                assert words.about_option(command, name.replace("*", "x"))
            for other, _ in _named(text):
                assert other in options or other in VERBS, text
            # What is left without the command lines of kata and of others are options of this very command.
            own = re.sub(r"\bkata [a-z]+[^;,|>()]*|\bjq\b.*|\bhead -1", "", text)
            for option in re.findall(r"(?:^|[ (])(-{1,2}[A-Za-z][a-z-]*)", own):
                assert _has(options[command], option), f"{text!r} for kata {command} {names}"
    for text in [*words.COMMANDS.values(), *(text for _, _, text in keys)]:
        for page in re.findall(r"docs/\S+\.md", text):
            assert (ROOT / page).exists(), text


def test_every_hint_of_ours_can_be_typed() -> None:
    """In all the texts of the sources: a command that kata is said to have, with the options that follow it."""
    options = _options()
    for path in sorted((ROOT / "src/kata").rglob("*.py")):
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        prose |= {
            id(node.value) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue | ast.Attribute)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                text = node.value
            else:
                continue
            for command, given in _named(text):
                if command not in options:
                    assert command in VERBS, f"{path}: {text!r}"
                for option in given if command in options else ():
                    assert _has(options[command], option), f"{path}: {text!r}"


def test_what_an_error_quotes_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "\x1b[2Jnonsense\udcff"]) == 125
    said = capsys.readouterr().err
    assert "\\x1b[2Jnonsense" in said
    assert "\x1b" not in said


def test_an_image_has_the_volumes_on_which_nothing_is_mounted() -> None:
    spec = {"mounts": [{"destination": "/conf"}, {"destination": "/proc"}]}
    volumes: dict[str, Any] = {"Volumes": {"/conf": {}, "//data/": {}, "/": {}, "logs": {}}}
    assert making._image_volumes(volumes, spec) == ["/data", "/logs"]


def test_the_page_for_dockers_users_is_as_the_sources_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/docker_users_table.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"run tools/docker_users_table.py:\n{done.stdout[:3000]}{done.stderr}"


def test_the_page_has_a_reason_for_all_that_is_not_there() -> None:
    """Of Docker's and Podman's words none is answered with a guess: each is there, or it is said what to do instead."""
    page = (ROOT / "docs/docker-users.md").read_text().splitlines()
    assert len([line for line in page if line.startswith("| `--")]) > 400
    assert [line for line in page if line.endswith("| no |")] == []
