"""Starts that find a machine waiting (docs/templates.md), for `bench/performance`."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import start
from beside import Tree, took_ms
from performance_table import Rounds

from kata.config.files import VARIABLE

FILLED_S = 120.0
"""How long one may take to wait: a template may have to be made first."""
_FILL_S = 5.0
"""Without one for so long, another start is made, which has one wait."""
_MIB = 1 << 20


class Pool:
    """The machines that wait for one client.

    Args:
        tree: The checkout.
        environment: Of the client.
        run: Starts a container by a machine that waits, if there is one.
    """

    def __init__(self, tree: Tree, environment: dict[str, str], run: Callable[[], object]) -> None:
        self._program = tree.program
        self._environment = environment
        self._run = run
        self.memory: list[float] = []

    def waiting(self) -> list[dict[str, Any]]:
        """Those who wait."""
        command = [*self._program, "factory", "status", "--json"]
        done = subprocess.run(command, env=self._environment, capture_output=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)["waiting"]
        return found

    def timed(self) -> float:
        """Milliseconds of a start that takes one.

        Raises:
            SystemExit: None came to wait, or it was not taken.
        """
        one = self._one()
        self.memory.append(one["bytes"] / _MIB)
        took = took_ms(self._run)
        if any(other["pid"] == one["pid"] for other in self.waiting()):
            raise SystemExit("error: a machine waited, and was not taken")
        return took

    def _one(self) -> dict[str, Any]:
        began, filled = time.monotonic(), 0.0
        while not (found := self.waiting()):
            now = time.monotonic()
            if now - began > FILLED_S:
                raise SystemExit(f"error: no machine came to wait within {FILLED_S:g} s")
            if now - filled > _FILL_S:
                self._run()
                filled = time.monotonic()
            time.sleep(0.2)
        time.sleep(0.5)  # it gives up the processor now
        return found[0]

    def fill(self, count: int) -> None:
        """Return once so many wait.

        Raises:
            SystemExit: They did not come to wait.
        """
        until = time.monotonic() + FILLED_S + _FILL_S * count
        while (there := len(self.waiting())) < count:
            if time.monotonic() > until:
                raise SystemExit(f"error: {there} of {count} machines came to wait")
            if not there:
                self._run()
            time.sleep(_FILL_S)
        time.sleep(0.5)

    def end(self) -> None:
        """End them."""
        subprocess.run([*self._program, "factory", "destroy"], env=self._environment, capture_output=True)


def configured(tree: Tree, number: int) -> tuple[str, dict[str, str]]:
    """A configuration by which so many machines wait, and the environment of a client that has it.

    Args:
        tree: The checkout, which is up.
        number: How many.
    """
    lines = f"vm_cache_number = {number}\nvm_cache_least_free = 256"
    environment = start.configured(tree.directory, tree.environment, f"pool-{number}", lines)
    return environment[VARIABLE], environment


def measure(tree: Tree, runc: Callable[[], float], rounds: int) -> Rounds:
    """Milliseconds of starts from the pool, and beside them of others; MiB of a machine that waits.

    Args:
        tree: This checkout, which is up.
        runc: Milliseconds of ``ctr run`` with runc.
        rounds: How many.
    """
    conf, environment = configured(tree, 1)
    command = [*tree.program, "run", "--rm", tree.image, "true"]
    by_kata = Pool(tree, environment, partial(start.timed, command, environment))
    by_ctr = Pool(tree, tree.containerd.env, partial(tree.ctr_run, "--runtime-config-path", conf))
    contenders: dict[str, Callable[[], float]] = {
        "ctr run, pool": by_ctr.timed,
        "ctr run, beside the pool": partial(took_ms, tree.ctr_run),
        "ctr run, runc beside the pool": runc,
        "kata run user, pool": by_kata.timed,
        "kata run user, beside the pool": partial(start.timed, command, tree.environment),
    }
    took: Rounds = {name: [] for name in contenders}
    try:
        for number in range(-1, rounds):
            for name in random.sample(list(contenders), len(contenders)):
                value = contenders[name]()
                if number >= 0:
                    took[name].append(value)
    finally:
        for pool in (by_kata, by_ctr):
            pool.end()
    return took | {"one waits, kata run": by_kata.memory, "one waits, ctr": by_ctr.memory}
