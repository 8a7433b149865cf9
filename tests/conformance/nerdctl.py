"""nerdctl's operations: Docker's, where it has the same words for them."""

from __future__ import annotations

import json
import re
import subprocess
import time

from clients import EAT, KINDS, READS_SAYING_SO, TRAP, Docker, attached_to_terminal
from terminal import Terminal
from test_nerdctl import GATEWAY, complaints
from test_nerdctl import Nerdctl as Program
from waiting import until


class Nerdctl(Docker):
    """nerdctl, with a containerd 2 of its own."""

    name = "nerdctl"
    gateway = GATEWAY
    lacks = frozenset({"healthcheck"})
    """What Docker has and nerdctl 2.1 has not."""

    def __init__(self, nerdctl: Program) -> None:
        super().__init__(nerdctl)
        self._command = nerdctl.command

    def _run(self, runtime: str, *options: str) -> list[str]:
        return ["run", "--runtime", KINDS[runtime], *options]

    def _complaints(self, said: bytes) -> str:
        return complaints(said).strip()

    def run(self, runtime: str) -> str:
        # Without input: nerdctl with runc hangs now and then when that ends before the task is known.
        return self._said(*self._run(runtime, "--rm"), "bb", "sh", "-c", "echo out; echo err >&2; exit 3")

    def attach(self, runtime: str) -> str:
        # It attaches to what was run in the foreground of a terminal, and was left there by its keys.
        self._count += 1
        name = f"m{self._count}"
        command = [*self._command, *self._run(runtime, "-it", "--name", name), "bb"]
        try:
            with Terminal([*command, "sh", "-c", READS_SAYING_SO], self._docker.env) as first:
                first.expect("up")
                first.typed("\x10\x11")  # Ctrl-P, Ctrl-Q
                first.ended()
            said = attached_to_terminal([*self._command, "attach", name], self._docker.env)
            return f"{said}; status {self._format(name, '{{.State.ExitCode}}')}"
        finally:
            self._docker("rm", "-f", name, code=None)

    def stop(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", TRAP) as name:
            until(lambda: "up" in self._docker("logs", name), "the trap is set")
            self._docker("stop", "-t", "60", name)
            # A program of nerdctl's own writes the log, and may be behind.
            until(lambda: "bye" in self._docker("logs", name), "all is in the log")
            return f"{self._format(name, '{{.State.ExitCode}}')} {self._docker('logs', name).split()}"

    def run_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            return self._docker(
                "ps", "--filter", f"name={name}", "--format", "{{.Status}} {{.Image}}"
            ).strip()

    def events(self, runtime: str) -> str:
        # It shows what happens from now on, of this namespace, and does not say when it has begun to.
        path = self._docker.directory / "events"
        with open(path, "wb") as file:
            listener = subprocess.Popen(
                [*self._command, "events", "--format", "{{json .}}"], stdout=file, env=self._docker.env
            )
        try:

            def listens() -> bool:
                self._docker("tag", "bb", "probe")
                return path.stat().st_size > 0

            until(listens, "nerdctl events listens")
            with self._running(runtime, "true") as name:
                self._docker("wait", name)
                identity = self._format(name, "{{.ID}}")
                time.sleep(0.5)
        finally:
            listener.terminate()
            listener.wait(10)
            self._docker("rmi", "probe", code=None)
        seen = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return " ".join(
            event["Topic"].removeprefix("/tasks/")
            for event in seen
            if event["ID"] == identity and event["Topic"].startswith("/tasks/")
        )

    def a_missing_command(self, runtime: str) -> str:
        said = self._said(*self._run(runtime, "--rm"), "bb", "nosuch").replace("\\", "")
        found = re.search(r'exec: "nosuch": executable file not found in \$PATH', said)
        return f"{found[0] if found else said}; {said.rpartition('; ')[2]}"

    def oom(self, runtime: str) -> str:
        options = ("-m", "32m", "--memory-swap", "32m")
        with self._running(runtime, "sh", "-c", EAT, options=options) as name:
            return f"status {self._docker('wait', name).strip()}"
