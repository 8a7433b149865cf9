"""Machines that wait for sandboxes, with daemons and engines of the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

from kata.engine.client import EngineClient

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 0.5


def configured(path: Path, **keys: int) -> Path:
    """A configuration with such keys in its table ``factory``."""
    path.write_text("[factory]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
    return path


@contextmanager
def switched_on(path: Path) -> Iterator[None]:
    """What starts in there is configured so that one machine waits; *path* becomes the configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KATA_CONF_FILE", str(configured(path, vm_cache_number=1, vm_cache_least_free=64)))
        patch.setenv("KATA_TEMPLATES", "on")
        yield


class Pool:
    """The pool below a run directory.

    Args:
        run_dir: The directory.
        env: The environment of commands that look at it.
    """

    def __init__(self, run_dir: Path, env: Mapping[str, str]) -> None:
        self.run_dir = run_dir
        self._env = dict(env)

    def kata(self, *arguments: str) -> str:
        """Run a command of ours; its output."""
        done = subprocess.run(
            [str(ROOT / "src/kata/__main__.py"), *arguments],
            env=self._env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What ``kata factory status --json`` says."""
        found: dict[str, Any] = json.loads(self.kata("factory", "status", "--json"))
        return found

    def those_waiting(self) -> list[int]:
        """The processes that wait."""
        return [one["pid"] for one in self.status()["waiting"]]

    def filled(self, start: Callable[[], object], more: Callable[[], str] = str) -> int:
        """Have one wait; its process.

        Args:
            start: Starts a sandbox of the kind that it is to be for, and ends it.
            more: What else to say if none comes to wait.
        """
        began = time.monotonic()
        while not (found := self.those_waiting()):
            assert time.monotonic() < began + PATIENCE, f"none waits: {self.status()}\n{more()}"
            start()
            for _ in range(10):  # it makes a template, or has one wait
                time.sleep(SOON_S)
                if self.those_waiting():
                    break
        return found[0]

    def only(self) -> str:
        """The name of the directory of the only sandbox."""
        (name,) = os.listdir(self.run_dir / "sandboxes")
        return name

    def path_of(self, sandbox: str) -> str:
        """By which path a sandbox's machine started, with the reason for that; *sandbox* is its directory's name."""
        with EngineClient(str(self.run_dir / "sandboxes" / sandbox / "engine.sock")) as engine:
            found = engine.timings()
        return f"{found.path}: {found.reason}".removesuffix(": ")

    def engine_of(self, sandbox: str) -> int:
        """The pid of a sandbox's engine."""
        lines = (self.run_dir / "sandboxes" / sandbox / "journal").read_text().splitlines()
        return int([line["owner"]["pid"] for line in map(json.loads, lines) if "owner" in line][-1])

    def end(self) -> None:
        """End those who wait, and remove the templates. Nothing of them may be left."""
        self.kata("factory", "destroy")
        deadline = time.monotonic() + 15
        directory = self.run_dir / "pool"
        while directory.exists() and os.listdir(directory):
            assert time.monotonic() < deadline, os.listdir(directory)
            time.sleep(0.1)
            self.kata("factory", "destroy")  # one may just have come to wait
