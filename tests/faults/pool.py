"""Faults of the warm pool: its stop points, who can be killed there, and the client whose machine waits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from containerd_support import IMAGE, RUNTIME

from faults.scenario import Step, until
from faults.scenarios import Clone
from faults.stops import HANG
from faults.target import Failure

FILLED_S = 120.0
SOON_S = 1.0
"""Within that, a container that runs has had somebody started who fills the pool."""
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


class Pool(Clone):
    """The same container in a machine that has waited for it."""

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

    def _waits(self) -> bool:
        return any(self._places())

    def _places(self) -> list[Path]:
        return list((self._daemon.run_dir / "pool").glob("*/take.sock"))

    def _is_filled(self) -> bool:
        """Whether somebody is about to have one wait."""
        return any("wait-for-sandbox" in line for line in self._daemon.place.snapshot()["process"])

    def _fill(self) -> subprocess.CompletedProcess[str]:
        name = f"{self.name}w"
        self._daemon.seen.add(f"{self._daemon.token}.{name}")
        network = f"network:/run/netns/{self._daemon.inner}"
        run = ("run", "--rm", *self._options(), "--with-ns", network, IMAGE, name, "true")
        for _ in range(2):  # such a machine has ports, so its template is another one than that of `Clone`
            done = self._daemon.in_ctr(*run, check=False)
            with contextlib.suppress(Failure):  # who is to wait may have been killed
                until(lambda: not self._daemon.makes_template(), "the end of who makes the template")
                time.sleep(SOON_S)
                until(lambda: self._waits() or not self._is_filled(), "a machine that waits", FILLED_S)
            if done.returncode or self._waits():
                break
        return done

    def check(self, victim: str) -> str:
        """As for `Ctr`; and afterwards nobody waits any more, and nothing is left of those who have."""
        # Whoever else is killed: if that was before the machine was the sandbox's, the start went on with another one.
        try:
            result = super().check(victim if victim in ("containerd", HANG) else "")
        except Failure:
            with contextlib.suppress(Failure):
                self._end()
            raise
        self._end()
        return result

    def _all_ended(self) -> bool:
        """Tell those to end who wait by now; whether nobody does any more, nor is about to."""
        source = Path(__file__).parents[2] / "src"
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r}); {_END}"],
            env=self._daemon.env,
            check=True,
        )
        return not self._is_filled()

    def _end(self) -> None:
        daemon = self._daemon
        until(self._all_ended, "the end of those who waited", FILLED_S)
        daemon.run_kata("gc")
        directory = daemon.run_dir / "pool"
        if directory.exists() and (left := os.listdir(directory)):
            raise Failure(f"of machines that waited is left: {left}")
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        # What stays where the pool is on, and is not there in rounds without.
        for name in ("pool.lock", "pool.counts"):
            (daemon.run_dir / name).unlink(missing_ok=True)
        about = (daemon.directory / "pool.toml").stat()
        (daemon.run_dir / f"configuration.{about.st_dev}-{about.st_ino}").unlink(missing_ok=True)
