"""Engines that are forked off a parent, with real machines: `kata run`, and what becomes of them without it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Kata
from waiting import until


@pytest.fixture
def parents(kata_env: Kata) -> Iterator[Kata]:
    kata_env.env["KATA_ENGINE_PARENT"] = "on"
    yield kata_env
    kata_env.call("factory", "destroy")


def running(kata: Kata) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(kata.ok("factory", "status", "--json"))["engine_parents"]
    return found


def start_of(kata: Kata, container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", container))[0]["start"]
    return found


def is_forked(start: dict[str, Any]) -> bool:
    return "fork" in {step["name"] for step in start["steps"]}


def pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def test_engines_are_forked_and_outlive_their_parent(parents: Kata, busybox_image: str) -> None:
    def run(name: str) -> dict[str, Any]:
        parents.ok("run", "-d", "--name", name, "--network", "none", busybox_image, "sleep", "600")
        return start_of(parents, name)

    executed = run("one")
    assert not is_forked(executed)
    assert "its parent was not there, and is being started" in executed["reason"]
    until(lambda: list(parents.run_dir.glob("factory/*/parent.sock")), "a parent listens")
    forked = run("two")
    assert is_forked(forked), forked["reason"]
    assert "executed" not in forked["reason"]
    # It is an engine like the other one, and takes less.
    engines = [parents.engine_pid(name) for name in ("one", "two")]
    shown = [Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[1:-1] for pid in engines]
    assert shown[0] == shown[1]
    assert pss(engines[1]) < pss(engines[0]) - 1024
    assert parents.ok("exec", "two", "echo", "there").strip() == "there"
    # Without their parent they go on, and there are others.
    (parent,) = running(parents)
    os.kill(parent["pid"], signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{parent['pid']}"), "it has ended")
    assert parents.ok("exec", "two", "echo", "there").strip() == "there"
    parents.ok("rm", "-f", "two")
    parents.ok("run", "--rm", "--network", "none", busybox_image, "true")  # has no parent, and starts one
    until(lambda: bool(running(parents)), "there is another parent")
    until(lambda: list(parents.run_dir.glob("factory/*/parent.sock")), "it listens")
    # An engine that is killed harms neither parent nor siblings.
    assert is_forked(run("three"))
    os.kill(parents.engine_pid("three"), signal.SIGKILL)
    assert is_forked(run("four"))
    assert parents.ok("exec", "four", "echo", "there").strip() == "there"
    parents.ok("rm", "-f", "one", "three", "four")
    parents.ok("gc")
    assert "ended engines-" in parents.ok("factory", "destroy")
    assert running(parents) == []
    assert os.listdir(parents.run_dir / "factory") == []
