"""Health checks: what the options and images say, and what the engine makes of outcomes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.cli import health as options
from kata.cli import run
from kata.engine.containers import health
from kata.engine.containers.process import PAUSED, RUNNING, Process
from kata.engine.tasks import Tasks
from kata.errors import CommandNotFoundError, UsageError
from kata.settings import HealthSettings

IMAGE = {"Healthcheck": {"Test": ["CMD", "check", "it"], "Interval": 2_000_000_000, "Retries": 5}}


def wanted(*words: str, image: dict[str, Any] | None = None) -> dict[str, Any] | None:
    return options.wanted(run.COMMANDS["run"].parse([*words, "x"]), image or {})


def test_options_and_images() -> None:
    assert wanted() is None
    assert wanted("--health-interval", "5s") is None
    assert wanted("--health-cmd", "a | b", "--health-interval", "1m30s", "--health-retries", "2") == {
        "command": ["/bin/sh", "-c", "a | b"], "retries": 2, "interval_s": 90.0, "timeout_s": 30.0,
        "start_period_s": 0.0,
    }  # fmt: skip
    own = wanted(image=IMAGE)
    assert own is not None
    assert (own["command"], own["interval_s"], own["retries"]) == (["check", "it"], 2.0, 5)
    changed = wanted("--health-timeout", "500ms", image=IMAGE)
    assert changed is not None
    assert (changed["command"], changed["timeout_s"], changed["interval_s"]) == (["check", "it"], 0.5, 2.0)
    assert wanted("--no-healthcheck", image=IMAGE) is None
    assert wanted("--health-cmd", "none", image=IMAGE) is None
    listed = wanted("--health-cmd", '["CMD", "one", "two words"]')
    assert listed is not None
    assert listed["command"] == ["one", "two words"]
    for odd in ({"Test": ["NONE"]}, {"Test": "CMD x"}, {"Test": ["CMD"]}, {"Test": [1, 2]}, "x"):
        assert wanted(image={"Healthcheck": odd}) is None


@pytest.mark.parametrize(
    "words",
    [
        ["--health-interval", "5"], ["--health-interval", "-1s"], ["--health-timeout", "x"],
        ["--health-retries", "0"], ["--no-healthcheck", "--health-cmd", "x"],
        ["--health-cmd", "x", "--health-interval", "0s"],
    ],
)  # fmt: skip
def test_nonsense(words: list[str]) -> None:
    with pytest.raises(UsageError):
        wanted(*words)


class Box:
    """A container whose commands end as the test says.

    Args:
        outcomes: Of each check: an exit status, an error, or None for one that does not end.
    """

    def __init__(self, *outcomes: int | Exception | None) -> None:
        self.init = Process("c", "", SimpleNamespace())  # type: ignore[arg-type]
        self.init.state = RUNNING
        self.config = {"process": {"args": ["init"], "cwd": "/", "consoleSize": {}, "terminal": True}}
        self.outcomes = list(outcomes)
        self.execs: dict[str, Process] = {}
        self.specs: list[dict[str, Any]] = []
        self.killed: list[str] = []

    def add_exec(self, exec_id: str, stdio: Any, process_spec: dict[str, Any]) -> Process:
        self.specs.append(process_spec)
        self.execs[exec_id] = Process("c", exec_id, stdio)
        return self.execs[exec_id]

    async def start(self, exec_id: str) -> Process:
        process = self.execs[exec_id]
        outcome = self.outcomes.pop(0)
        fd, _ = process.stdio.stdout.open_sink()
        with open(fd, "wb") as file:
            file.write(f"said {outcome}".encode())
        process.stdio.close()
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            process.exit_status = outcome
            process.ended.set()
        if not self.outcomes:
            self.init.ended.set()
        return process

    async def kill(self, exec_id: str, signal: int, everything: bool) -> None:
        self.killed.append(exec_id)
        self.execs[exec_id].ended.set()

    async def delete_exec(self, exec_id: str) -> Process:
        return self.execs.pop(exec_id)


def checked(tmp_path: Path, box: Box, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """Let all checks run, and one more, whose outcome comes too late to count."""
    told: list[str] = []
    path = tmp_path / "health.json"

    async def go() -> None:
        settings = HealthSettings(command=["check"], **{"interval_s": 0.001, "timeout_s": 5.0, **more})
        checks = health.HealthChecks(box, settings, str(path), Tasks("c"), told.append)
        await asyncio.wait_for(checks.run(), 20)

    asyncio.run(go())
    assert box.execs == {}, "every check is deleted"
    return json.loads(path.read_text()), told


def test_a_series(tmp_path: Path) -> None:
    box = Box(0, 1, 1, 1, 0, 3, 0)
    found, told = checked(tmp_path, box)
    assert told == ["healthy", "unhealthy", "healthy"]
    assert (found["Status"], found["FailingStreak"], len(found["Log"])) == ("healthy", 1, 5)
    assert (found["Log"][-1]["ExitCode"], found["Log"][-1]["Output"]) == (3, "said 3")
    assert box.specs[0] == {"args": ["check"], "cwd": "/", "terminal": False}


def test_failures_do_not_count_while_it_starts(tmp_path: Path) -> None:
    found, told = checked(tmp_path, Box(1, 1, 1, 1, 0, 1, 0), start_period_s=60.0)
    assert told == ["healthy"]
    assert found["FailingStreak"] == 1, "after the first success they do"
    found, told = checked(tmp_path, Box(1, 1, 1, 0))
    assert told == ["unhealthy"]


def test_one_that_takes_too_long_and_one_that_cannot_be_run(tmp_path: Path) -> None:
    box = Box(None, CommandNotFoundError('exec: "check": executable file not found in $PATH'), 0)
    found, _ = checked(tmp_path, box, timeout_s=0.05, retries=2)
    assert found["Status"] == "unhealthy"
    assert (found["Log"][0]["ExitCode"], len(box.killed)) == (-1, 1)
    assert found["Log"][0]["Output"] == "said NoneHealth check exceeded timeout (0.05s)"
    assert found["Log"][1]["ExitCode"] == 127
    assert "not found" in found["Log"][1]["Output"]


def test_a_paused_one_is_not_asked(tmp_path: Path) -> None:
    box = Box(0)
    box.init.state = PAUSED

    async def go() -> None:
        settings = HealthSettings(command=["check"], interval_s=0.001)
        checks = health.HealthChecks(box, settings, str(tmp_path / "h"), Tasks("c"), print)
        task = asyncio.create_task(checks.run())
        await asyncio.sleep(0.1)
        box.init.ended.set()
        await asyncio.wait_for(task, 20)

    asyncio.run(go())
    assert box.specs == []


def test_output_is_bounded(tmp_path: Path) -> None:
    async def go() -> str:
        with health._Output() as output:
            stdio = output.stdio()
            fd, _ = stdio.stdout.open_sink()
            stdio.close()
            for _ in range(100):
                while True:
                    try:
                        with open(fd, "wb", closefd=False, buffering=0) as file:
                            file.write(b"x" * 4096)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(0)
            with open(fd, "wb"):
                pass
            await asyncio.sleep(0)
            return output.text()

    assert asyncio.run(go()) == "x" * 4096
