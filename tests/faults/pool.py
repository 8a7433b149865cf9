"""Faults of the warm pool: its stop points, who can be killed there, and the clients whose machines wait."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from containerd_support import IMAGE, RUNTIME

from faults import podman
from faults.podman_scenarios import ByPodman
from faults.scenario import Step, until
from faults.scenarios import Clone
from faults.stops import HANG
from faults.target import ROOT, Failure, Target

FILLED_S = 120.0
SOON_S = 1.0
"""Within that, a container that runs has had somebody started who fills the pool."""
_OF_CLIENTS = ("containerd", "conmon", HANG)
"""Victims of which the checks have to know."""
_END = "from kata.engine.factory import pool; pool.end()"
"""What ends those who wait, and leaves the templates."""


def child(parent: int, role: str) -> int:
    """Pid of a process's hypervisor (also for ``hang``) or ``virtiofsd``; 0 if it has none."""
    beginning = "qemu-system" if role in ("hypervisor", "hang") else role
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().startswith(beginning):
                return int(pid)
    return 0


class Waiters:
    """The machines that wait for a target's sandboxes.

    Args:
        target: Whose they are.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    def fill(
        self, start: Callable[[], subprocess.CompletedProcess[str]]
    ) -> subprocess.CompletedProcess[str]:
        """Have one wait; *start* starts a sandbox of the kind that it is to be for, and ends it."""
        for _ in range(2):  # such a machine has ports, so its template is another one than that of others
            done = start()
            with contextlib.suppress(Failure):  # who is to wait may have been killed
                until(lambda: not self._target.makes_template(), "the end of who makes the template")
                time.sleep(SOON_S)
                until(lambda: self._waits() or not self._is_filled(), "a machine that waits", FILLED_S)
            if done.returncode or self._waits():
                break
        return done

    def _waits(self) -> bool:
        return any((self._target.run_dir / "pool").glob("*/take.sock"))

    def _is_filled(self) -> bool:
        """Whether somebody is about to have one wait."""
        return any("wait-for-sandbox" in line for line in self._target.place.snapshot()["process"])

    def check(self, checks: Callable[[str], str], victim: str) -> str:
        """Have the checks of a scenario made; afterwards nobody waits any more, and nothing is left of those who have.

        Returns:
            What the checks return.

        Raises:
            Failure: Something of that does not hold.
        """
        # Who else was killed: if that was before the machine was the sandbox's, the start went on with another one.
        try:
            result = checks(victim if victim in _OF_CLIENTS else "")
        except Failure:
            with contextlib.suppress(Failure):
                self._end()
            raise
        self._end()
        return result

    def _all_ended(self) -> bool:
        """Tell those to end who wait by now; whether nobody does any more, nor is about to."""
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {_END}"],
            env=self._target.env,
            check=True,
        )
        return not self._is_filled()

    def _end(self) -> None:
        target = self._target
        until(self._all_ended, "the end of those who waited", FILLED_S)
        target.run_kata("gc")
        directory = target.run_dir / "pool"
        if directory.exists() and (left := os.listdir(directory)):
            raise Failure(f"of machines that waited is left: {left}")
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        # What stays where the pool is on, and is not there in rounds without.
        for name in ("pool.lock", "pool.counts"):
            (target.run_dir / name).unlink(missing_ok=True)


class Pool(Clone):
    """The container of `Ctr` in a machine that has waited for it."""

    def steps(self) -> list[Step]:
        """As for `Ctr`; one comes to wait before. The template is there."""
        return [("have one wait", self._fill), *super().steps()]

    def _options(self) -> tuple[str, ...]:
        """Of ctr, for starts that take a machine from the pool, and have another one wait."""
        path = self._daemon.directory / "pool.toml"
        if not path.exists():
            usual = (self._daemon.directory / "configuration.toml").read_text()
            path.write_text(f"{usual}vm_cache_number = 1\nvm_cache_least_free = 64\n")
        return ("--runtime", RUNTIME, "--runtime-config-path", str(path))

    def _run(self) -> subprocess.CompletedProcess[str]:
        network = f"network:/run/netns/{self._daemon.inner}"
        options = ("-d", *self._options(), "--with-ns", network)
        return self._daemon.in_ctr("run", *options, IMAGE, self.name, "sleep", "1000", check=False)

    def _fill(self) -> subprocess.CompletedProcess[str]:
        name = f"{self.name}w"
        self._daemon.seen.add(f"{self._daemon.token}.{name}")
        network = f"network:/run/netns/{self._daemon.inner}"
        run = ("run", "--rm", *self._options(), "--with-ns", network, IMAGE, name, "true")
        return Waiters(self._daemon).fill(lambda: self._daemon.in_ctr(*run, check=False))

    def check(self, victim: str) -> str:
        """As for `Ctr`; see `Waiters.check`."""
        result = Waiters(self._daemon).check(super().check, victim)
        about = (self._daemon.directory / "pool.toml").stat()
        (self._daemon.run_dir / f"configuration.{about.st_dev}-{about.st_ino}").unlink(missing_ok=True)
        return result


class ByPodmanFromPool(ByPodman):
    """The same container by podman in a machine that has waited for it."""

    def steps(self) -> list[Step]:
        """As for `ByPodman`; one comes to wait before."""
        return [("have one wait", self._fill), *super().steps()]

    def _fill(self) -> subprocess.CompletedProcess[str]:
        target = self._target
        target.configure(vm_cache_number=1, vm_cache_least_free=64)
        run = ("--runtime", "kata", "run", "--rm", podman.IMAGE, "true")
        done = Waiters(target).fill(lambda: target.run(*run, check=False))
        self._known |= set(target.sandboxes())
        return done

    def check(self, victim: str) -> str:
        """As for `ByPodman`; see `Waiters.check`."""
        try:
            return Waiters(self._target).check(super().check, victim)
        finally:
            self._target.configure()
