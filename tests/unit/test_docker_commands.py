"""The list of commands that users of Docker and Podman type, and how what came of them is compared."""

from __future__ import annotations

from collections.abc import Mapping

import docker_commands
import pytest
from docker_commands import Command, Seen
from docker_commands_rig import Said


def test_the_list_is_read_and_has_what_the_page_promises() -> None:
    listed = docker_commands.sessions(docker_commands.LIST.read_text())
    counting = [command for session in listed for command in session.commands if command.counts]
    assert len(counting) >= 200
    assert len({session.name for session in listed}) == len(listed)
    assert all("docker" in command.line or "wget" in command.line for command in counting)


def test_a_line_without_a_shape_is_told() -> None:
    with pytest.raises(ValueError, match="no shape that is known"):
        docker_commands.sessions("== one\ndocker ps\n")


def test_a_reason_belongs_to_the_command_above_it() -> None:
    [session] = docker_commands.sessions(
        "== one\ntext   docker ps\n  why: it has to\n-      docker run bb\n"
    )
    assert session.commands == [Command("text", "docker ps", "it has to"), Command("-", "docker run bb")]
    assert [command.counts for command in session.commands] == [True, False]


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        ("text", "3b0c7e1a2f4d\n", f"{'a1' * 32}\r\n"),
        ("text", "Exited (3) 2 seconds ago", "Exited (3) About a minute ago"),
        ("text", "Exited (3) Less than a second ago", "Exited (3) 1 hour ago"),
        ("text", "2026-11-29T09:00:00.123456789Z up", "2025-01-02T03:04:05+01:00 up"),
        ("text", "docker.io/library/bb:latest", "bb:latest"),
        ("text", "a  b \n", "a b"),
        ("set", "b\na\n", "a\nb"),
        ("table", "A   B C   D\n1  2  3\n", "A  B C  D\n11  22  33\n"),
        ("rows", "one\ntwo\n", "three\nfour"),
        ("json", '[{"A": {"B": {"C": 1}}, "80/tcp": 1}]', '{"A": {"B": 2}}'),
        ("code", "any", "thing"),
    ],
)
def test_what_differs_each_time_is_the_same(shape: str, one: str, other: str) -> None:
    shaped = docker_commands.SHAPES[shape]
    assert shaped(one) == shaped(other)


@pytest.mark.parametrize(
    ("shape", "one", "other"),
    [
        ("text", "Exited (3) 2 seconds ago", "Exited (4) 2 seconds ago"),
        ("text", "web", "db"),
        ("table", "A  B\n1  2\n", "A  B\n"),
        ("table", "A  B\n", "A  C\n"),
        ("rows", "one\n", "one\ntwo\n"),
        ("json", '{"A": 1}', '{"B": 1}'),
        ("json", '{"A": 1}', "A: 1"),
    ],
)
def test_what_means_something_is_not(shape: str, one: str, other: str) -> None:
    shaped = docker_commands.SHAPES[shape]
    assert shaped(one) != shaped(other)


def _row(command: Command, **seen: Seen) -> docker_commands.Row:
    both: Mapping[str, Seen] = seen
    return docker_commands.Row("one", command, both)


def test_verdicts() -> None:
    command, known = Command("text", "docker ps"), Command("text", "docker ps", "it has to")
    a, b, c = (Seen.of(command, Said(0, text, "")) for text in "abc")
    assert _row(command, docker=a, podman=a, kata=a).verdict == "both"
    assert _row(command, docker=a, podman=b, kata=b).verdict == "podman"
    assert _row(command, docker=a, podman=b, kata=a).verdict == "docker"
    assert _row(command, docker=a, podman=b, kata=c).verdict == "wrong"
    assert _row(known, docker=a, podman=b, kata=c).verdict == "differs"
    assert _row(known, docker=a, podman=b, kata=a).verdict == "needless reason"
    # A failure that nothing is said of is none of theirs.
    said, silent = (Seen.of(command, Said(1, "", text)) for text in ("no such container", ""))
    assert _row(command, docker=said, podman=said, kata=silent).verdict == "wrong"
    assert _row(command, docker=silent, podman=silent, kata=silent).verdict == "both"


def test_of_json_the_members_that_both_have_are_asked_for() -> None:
    command = Command("json", "docker inspect web")
    docker, podman, kata, less = (
        Seen.of(command, Said(0, text, ""))
        for text in ('{"A": 1, "B": 1}', '{"A": 1, "C": 1}', '{"A": 1, "D": 1}', '{"D": 1}')
    )
    assert _row(command, docker=docker, podman=podman, kata=kata).verdict == "both"
    assert _row(command, docker=docker, podman=podman, kata=less).verdict == "wrong"


def test_the_page_tells_every_command_and_every_reason() -> None:
    known = Command("text", "docker ps | cat", "it has to")
    a, b = (Seen.of(known, Said(0, text, "")) for text in "ab")
    found = [
        _row(known, docker=a, podman=a, kata=b),
        _row(Command("code", "docker x"), docker=a, podman=a, kata=a),
    ]
    text = docker_commands.page(
        found, {"docker": "Docker version 26", "podman": "podman 4", "kata": "kata 1"}
    )
    assert "| `docker ps \\| cat` | it has to |" in text
    assert "| `docker x` | both |" in text
    assert "* kata 1" in text
