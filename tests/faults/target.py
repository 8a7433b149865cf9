"""What a round needs of the clients that it is tried with: containerd's (`faults.daemon`), podman (`faults.podman`)."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import PATIENCE

from faults import stops
from faults.host import Place
from kata import sysio

ROOT = Path(__file__).resolve().parents[2]
MARK = "KATA_FAULTS"
CLIENT_S = 2 * PATIENCE
"""A client may wait that long: a Create whose guest says nothing is given up after 120 s."""


class Failure(Exception):
    """Something is not as it has to be after a fault."""


class Target(ABC):
    """The surroundings of one sort of client, with everything of its own.

    Attributes:
        title: What it is, with its version: ``containerd 1.6.20``.
        kinds: Its scenarios (`faults.scenarios`), those of random rounds.
        env: The environment of its clients.
        run_dir: The run directory of its engines.
        templates: Where their templates are, if they have any.
        points: Where stop points are armed.
        place: What of the host is compared.
        token: Is in the environment of what it starts, as the value of `MARK`.
        seen: Parts of names by which things on the host are known as those of its sandboxes.
    """

    kinds: tuple[str, ...]
    env: dict[str, str]
    run_dir: Path
    templates: Path
    points: Path
    place: Place
    seen: set[str]
    token: str

    def __init__(self) -> None:
        self._clients: set[int] = set()

    @property
    @abstractmethod
    def title(self) -> str:
        """See the class."""

    # ---- its life ----

    @abstractmethod
    def up(self, layout: Path) -> None:
        """Make what it needs; *layout* is busybox, as an OCI layout."""

    @abstractmethod
    def down(self) -> None:
        """Take all of it back, sandboxes that still live included."""

    def forget(self) -> None:  # noqa: B027 - not all have something to do
        """Remove what clients keep of containers that have ended."""

    def was_killed(self, victim: str) -> None:  # noqa: B027 - not all have something to do
        """A victim was killed: reap it, if it is a child of this process."""

    def recover(self, victim: str, point: stops.Point | None) -> None:  # noqa: B027 - not all have something to do
        """Do what whoever runs the host would do before anything is checked.

        Args:
            victim: Who was killed.
            point: At which point; None at a random moment.
        """

    @abstractmethod
    def diagnosis(self) -> str:
        """What logs end with."""

    # ---- clients ----

    def client(
        self, *argv: str, patience_s: float = CLIENT_S, directory: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client to its end.

        Args:
            argv: Program and arguments.
            patience_s: How long it may take.
            directory: Its working directory; this process's if None.

        Raises:
            Failure: It hangs.
        """
        process = subprocess.Popen(
            argv,
            env=self.env,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._clients.add(process.pid)
        try:
            out, error = process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            raise Failure(f"`{' '.join(argv)}` hangs") from None
        finally:
            self._clients.discard(process.pid)
        return subprocess.CompletedProcess(argv, process.returncode, out, error)

    def run_kata(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `kata` with the directories and configuration of these runs.

        Raises:
            Failure: It ended otherwise than with 0.
        """
        done = self.client(str(ROOT / "tools/kata"), *arguments)
        if done.returncode:
            raise Failure(f"kata {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    # ---- templates ----

    def template(self) -> str:
        """Name of a whole template; empty if there is none."""
        whole = sorted(path.parent.name for path in self.templates.glob("[!.]*/machine.json"))
        return whole[0] if whole else ""

    def makes_template(self) -> bool:
        """Whether a process is there that makes one."""
        return any("make-template" in line for line in self.place.snapshot()["process"])

    # ---- victims ----

    @abstractmethod
    def journal(self, sandbox: str) -> list[dict[str, Any]]:
        """The lines of a sandbox's journal."""

    @abstractmethod
    def sandboxes(self) -> list[str]:
        """Names of the sandboxes' run directories."""

    def find(self, victim: str, sandbox: str) -> int:
        """Pid of a sandbox's process (engine, hypervisor, file server); 0 if it is not there (yet)."""
        try:
            lines = self.journal(sandbox)
        except (OSError, ValueError):
            return 0
        if victim == "engine":
            # Until the engine is forked, the owner is the command that forks it.
            known = [line["owner"] for line in lines if "owner" in line][1:]
        else:
            role = stops.hypervisor() if victim in ("hypervisor", "hang") else victim
            numbers = {line["n"] for line in lines if line.get("p", {}).get("role") == role}
            known = [line["made"] for line in lines if "made" in line and line["n"] in numbers]
        one = known[-1] if known else None
        return int(one["pid"]) if one and sysio.process_alive(one["pid"], one["start"], one["boot"]) else 0

    def commands(self, program: Path, word: str = "") -> Iterator[int]:
        """The processes of these runs that execute a program of ours, with this word if one is given."""
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if {str(program), word or str(program)} <= {*words} and f"{MARK}={self.token}" in environment:
                yield pid

    def newest_sandbox(self, known: set[str]) -> str:
        """The sandbox that is not in *known*; empty if there is none."""
        return next((name for name in self.sandboxes() if name not in known and name[0] != "."), "")

    def order(self, part: str = "", kind: str = "") -> None:
        """Have requests for a part of the hypervisor's API answered wrongly from now on; without arguments none.

        Raises:
            Failure: It has nothing that could.
        """
        raise Failure(
            f"{self.title}: nothing stands between engines and their hypervisors here ({part} {kind})"
        )

    def arm(self, point: str) -> Armed:
        """Have the next process that reaches a point stop there."""
        return Armed(self.points / point)


class Armed:
    """A point that is armed until `release`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def reached(self) -> int:
        """Pid of who waits at the point; 0 if nobody does."""
        try:
            text = os.read(self._fd, 64)
        except BlockingIOError:
            return 0
        return int(text.split()[0]) if text else 0

    def release(self) -> None:
        """Let it go on."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


class Script(threading.Thread):
    """A client that does one thing after the other, and remembers how each ended.

    Args:
        steps: Names, and functions that give an exit status and what was said.
    """

    def __init__(self, steps: list[tuple[str, Any]]) -> None:
        super().__init__()
        self._steps = steps
        self.at = ""
        self.ended: list[tuple[str, int, str]] = []
        self.hangs = ""
        self.cancelled = False

    def run(self) -> None:
        for name, step in self._steps:
            if self.cancelled:
                return
            self.at = name
            try:
                done: subprocess.CompletedProcess[str] = step()
            except Failure as failure:
                self.hangs = str(failure)
                return
            self.ended.append((name, done.returncode, (done.stderr or "").strip()))
            if done.returncode:
                return
