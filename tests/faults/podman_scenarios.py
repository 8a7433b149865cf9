"""A container by podman, and one by `kata-runtime run`, while faults happen; what has to hold afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess

from faults.podman import IMAGE, PodmanTarget
from faults.scenario import CRASHES, Step, until
from faults.target import Failure

_GONE = ("absent", "exited", "stopped")
_MAY_COMPLAIN = ("conmon", "hang")
"""Victims after which the first `podman rm -f` may say that something was lost."""


class ByPodman:
    """One container by podman, in podman's own network.

    Args:
        target: Whose podman it is.
        name: The container's.
    """

    before_containerd = ""

    def __init__(self, target: PodmanTarget, name: str) -> None:
        self._target = target
        self.name = name
        self._known = set(target.sandboxes())

    def steps(self) -> list[Step]:
        """The client's calls, in order."""
        run = self._target.run
        return [
            ("run", lambda: self._run()),
            ("exec", lambda: run("exec", self.name, "echo", "here", check=False)),
            ("kill", lambda: run("kill", self.name, check=False)),
            ("rm", lambda: self._wait_and_remove()),
        ]

    def _run(self) -> subprocess.CompletedProcess[str]:
        return self._target.run(
            *("--runtime", "kata", "run", "-d", "--name", self.name, "-p", "12091:80"),
            *(IMAGE, "sleep", "1000"),
            check=False,
        )

    def _wait_and_remove(self) -> subprocess.CompletedProcess[str]:
        with contextlib.suppress(Failure):  # whatever it is, the checks look at it
            until(lambda: self._state() in _GONE, "the end of a killed container")
        return self._target.run("rm", self.name, check=False)

    def sandbox(self) -> str:
        """Name of the sandbox's run directory; empty until it is there."""
        target = self._target
        target.look()
        name = target.newest_sandbox(self._known)
        if name:
            target.seen.add(name)
        return name

    def _state(self) -> str:
        done = self._target.run("inspect", "--format", "{{.State.Status}}", self.name, check=False)
        return done.stdout.strip() if done.returncode == 0 else "absent"

    def check(self, victim: str) -> str:
        """See `Scenario.check`."""
        self._target.look()
        state = self._state()
        if victim in CRASHES and state == "running":
            until(lambda: self._state() != "running", f"the end of a container without {victim}")
            state = self._state()
        if victim in CRASHES and state == "exited":
            self._told()
        if state == "running" and victim not in ("hang", "conmon"):
            self._answers()
        self._remove(victim)
        self._again()
        self._remove("")
        return state

    def _told(self) -> None:
        """Who was told of a start is told of the end; its status is that of one that was killed."""
        run = self._target.run
        named = ("--filter", f"container={self.name}")
        events = ("events", "--stream=false", *named, "--format", "{{.Status}}")
        if "start" in run(*events).stdout.split():
            until(lambda: "died" in run(*events).stdout.split(), "the event of the end")
            status = run("inspect", "--format", "{{.State.ExitCode}}", self.name).stdout.strip()
            if status != "137":
                raise Failure(f"the status is {status} instead of 137")

    def _answers(self) -> None:
        done = self._target.run("exec", self.name, "echo", "alive", check=False)
        if done.stdout != "alive\n":
            raise Failure(f"the container is said to run, and does not: {done.stderr.strip()}")

    def _remove(self, victim: str) -> None:
        run = self._target.run
        if self._state() != "absent":
            done = run("rm", "-f", "-t", "0", self.name, check=False)
            if done.returncode and victim in _MAY_COMPLAIN:
                done = run("rm", "-f", "-t", "0", self.name, check=False)
            if done.returncode:
                raise Failure(f"`podman rm -f`: {done.returncode}: {done.stderr.strip()}")
            if self._state() != "absent":
                raise Failure(f"`podman rm -f` has not removed the container: {done.stderr.strip()}")
        run("system", "prune", "-f")

    def _again(self) -> None:
        """The same once more: nothing that is left stands in its way."""
        done = self._run()
        if done.returncode:
            raise Failure(f"the second attempt failed: {done.stderr.strip()}")
        self._target.look()
        self._answers()


class Direct:
    """One container by `kata-runtime run`, which is its monitor itself.

    Args:
        target: Whose `kata-runtime` it is.
        name: The container's.
    """

    before_containerd = ""

    def __init__(self, target: PodmanTarget, name: str) -> None:
        self._target = target
        self.name = f"{target.token}-{name}"  # by which it is known in all places of the host
        self._known = set(target.sandboxes())
        self._bundle = target.bundle(name, "sleep", "2")
        target.seen.add(self.name)

    def _runtime(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._target.client(self._target.runtime, *arguments)

    def steps(self) -> list[Step]:
        """The one call."""
        return [("run", lambda: self._runtime("run", "--bundle", str(self._bundle), self.name))]

    def sandbox(self) -> str:
        """Name of the sandbox's run directory; empty until it is there."""
        name = self._target.newest_sandbox(self._known)
        if name:
            self._target.seen.add(name)
        return name

    def check(self, victim: str) -> str:
        """See `Scenario.check`."""
        state = self._state()
        done = self._runtime("delete", "--force", self.name)
        if done.returncode or self._state() != "absent":
            raise Failure(f"`kata-runtime delete --force`: {done.returncode}: {done.stderr.strip()}")
        again = self._runtime("run", "--bundle", str(self._bundle), self.name)
        if again.returncode:
            raise Failure(f"the second attempt failed: {again.returncode}: {again.stderr.strip()}")
        return state

    def _state(self) -> str:
        done = self._runtime("state", self.name)
        if done.returncode:
            if "does not exist" not in done.stderr:
                raise Failure(f"`kata-runtime state`: {done.stderr.strip()}")
            return "absent"
        return str(json.loads(done.stdout)["status"])
