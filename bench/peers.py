"""What a benchmark measures kata beside: runc, crun and podman, and the OCI command lines of runc and kata."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import start
from beside import Tree, said


class Oci:
    """An OCI runtime's command line, and a bundle that sleeps.

    Args:
        command: The runtime with its global options.
        bundle: The bundle.
        environment: Of the runtime.
    """

    def __init__(self, command: list[str], bundle: Path, environment: dict[str, str]) -> None:
        self.command = command
        self.bundle = bundle
        self.environment = environment

    def __call__(self, *words: str) -> str:
        """Run a command; its standard output.

        Raises:
            SystemExit: It failed.
        """
        return said([*self.command, *words], self.environment)

    def sleeping(self, name: str) -> None:
        """Have a container sleep."""
        for words in (["create", "--bundle", str(self.bundle), name], ["start", name]):
            # It keeps its standard streams, so they are no pipe that somebody would read to its end.
            subprocess.run(
                [*self.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self.environment,
                check=True,
            )

    def stopped(self, name: str) -> None:
        """Make a container and end it: only its removal is left."""
        self.sleeping(name)
        self("kill", name, "KILL")
        while json.loads(self("state", name))["status"] != "stopped":
            pass


class Peers:
    """Runtimes without a machine, and what they run.

    Args:
        work: A directory of their own, which does not exist.
        tree: The checkout whose `kata-runtime` is measured.
    """

    def __init__(self, work: Path, tree: Tree) -> None:
        self.work = work
        work.mkdir()
        self.runc_run = start.runc_bundle(work)
        self.environment = dict(os.environ)
        sleeps = work / "sleeps"
        shutil.copytree(work / "bundle", sleeps, symlinks=True)
        spec = json.loads((sleeps / "config.json").read_text())
        spec["process"]["args"] = ["sleep", "1000000"]
        # What `runc spec` writes has these without the inheritable ones, without which the kernel refuses them.
        spec["process"]["capabilities"].pop("ambient", None)
        (sleeps / "config.json").write_text(json.dumps(spec))
        kata = ["/usr/bin/python3", "-I", "-S", str(tree.root / "src/kata/oci_runtime/__main__.py")]
        self.runc = Oci(["runc", "--root", str(work / "runc")], sleeps, self.environment)
        self.kata_runtime = Oci([*kata, "--root", str(work / "kata")], sleeps, tree.environment)

    def commands(self) -> dict[str, list[str]]:
        """By the name of the contender: what runs ``true`` in a container."""
        found = {"runc run": self.runc_run}
        if shutil.which("crun"):
            bundle = ["--bundle", str(self.work / "bundle")]
            found["crun run"] = ["crun", "--root", str(self.work / "crun"), "run", *bundle, "bench"]
        return found
