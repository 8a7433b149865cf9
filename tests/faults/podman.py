"""The podman of these runs, whose `kata-runtime` has stop points."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oci_support
from podman_support import IMAGE, Podman

from faults import stops
from faults.host import Place
from faults.target import MARK, Failure, Target
from kata import sysio

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "oci.py"


class PodmanTarget(Target):
    """A podman with everything of its own.

    Args:
        directory: A short path, made by the caller.
        guest: The guest's directory.
        stop_points: Whether its runtime has them; without, it is the product's own program.
        base: Where podman's packages are, if not where `podman_support.found` finds them.
        templates: Whether machines have templates.
    """

    kinds = ("podman",)

    def __init__(
        self,
        directory: Path,
        guest: Path,
        *,
        stop_points: bool = True,
        base: Path | None = None,
        templates: bool = False,
    ) -> None:
        super().__init__()
        self.directory = directory
        self.token = f"kf{os.getpid()}"
        self.points = directory / "points"
        self.points.mkdir()
        given = {MARK: self.token, stops.VARIABLE: str(self.points)} if stop_points else {}
        program = PROGRAM if stop_points else None
        self.templates = directory / "templates"
        self._configuration = directory / "configuration.toml"
        if templates:
            given |= {"KATA_TEMPLATES": "on", "KATA_CONF_FILE": str(self._configuration)}
            self.configure()
        self.podman = Podman(directory, guest, base, program=program, environment=given)
        self.run_dir = self.podman.run_dir
        own = {"KATA_RUN_DIR": str(self.run_dir), "KATA_STATE_DIR": str(directory / "s")}
        self.env = {**self.podman.env, **own, **given, MARK: self.token}
        self.runtime = str(directory / "bin/kata-runtime")
        self.rootfs = directory / "rootfs"
        self.seen: set[str] = {self.token}
        self._configurations: set[Path] = set()
        self.place = Place(
            directory,
            f"{MARK}={self.token}",
            [self.podman.netns],
            lambda: self.seen,
            lambda: self._clients,
            {
                "container's directory": ("st/overlay-containers", 1),
                "container's run directory": ("ru/overlay-containers", 1),
                "layer": ("st/overlay", 1),
                "attach socket": ("t/socket", 1),
            },
            run=self.run_dir.name,
            more_lines={"firewall rule": self._firewall},
        )

    @property
    def title(self) -> str:
        """What it calls itself, as in ``podman 4.3.1``."""
        return f"podman {self.podman('--version').split()[-1]}"

    def configure(self, **keys: int) -> None:
        """Say what the table ``factory`` of the configuration has beside the place of templates. It stays one file."""
        lines = "".join(f"{name} = {value}\n" for name, value in keys.items())
        self._configuration.write_text(f"[factory]\ntemplate_path = '{self.templates}'\n{lines}")

    # ---- its life ----

    def up(self, layout: Path) -> None:
        """Make its network, and give it its image."""
        self.podman.start(f"oci:{layout}")
        self.rootfs.mkdir()
        oci_support.unpack(layout, self.rootfs)

    def down(self) -> None:
        """Take all of it back, sandboxes that still live included."""
        for path in self.run_dir.glob("oci/*"):
            subprocess.run([self.runtime, "delete", "--force", path.name], check=False, capture_output=True)
        self.podman.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def diagnosis(self) -> str:
        """What the engines' logs end with, and podman's view."""
        listed = self.podman("ps", "-a", code=None)
        return f"{self.podman.diagnosis()}\n{listed}"

    # ---- clients ----

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run podman.

        Args:
            arguments: What follows its name.
            check: It has to succeed.

        Raises:
            Failure: It hangs, or did not.
        """
        done = self.client(*self.podman.command, *arguments, directory=self.directory)
        if check and done.returncode:
            raise Failure(f"podman {' '.join(arguments)}: {done.returncode}: {done.stderr.strip()}")
        return done

    def bundle(self, name: str, *argv: str) -> Path:
        """A bundle for `kata-runtime` itself, whose container runs *argv*."""
        path = self.directory / "bundles" / name
        path.mkdir(parents=True)
        subprocess.run([self.runtime, "spec", "--bundle", path], check=True, capture_output=True)
        config = json.loads((path / "config.json").read_text())
        config["root"] = {"path": str(self.rootfs)}
        config["process"].update({"args": list(argv), "terminal": False})
        (path / "config.json").write_text(json.dumps(config))
        return path

    def look(self) -> None:
        """See which containers there are, for `place`: their ids, and their network namespaces."""
        for path in self.directory.glob("st/overlay-containers/*/userdata/config.json"):
            if path in self._configurations:
                continue
            with contextlib.suppress(OSError, ValueError):  # half written, or gone
                config = json.loads(path.read_text())
                self.seen.add(path.parts[-3])
                for namespace in config["linux"]["namespaces"]:
                    if namespace["type"] == "network" and namespace.get("path"):
                        self.seen.add(os.path.basename(namespace["path"]))
                        self.place.net_inodes.add(os.stat(namespace["path"]).st_ino)
                self._configurations.add(path)

    def _firewall(self) -> Iterator[str]:
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.podman.netns}", "iptables-save"],
            capture_output=True,
            text=True,
            check=False,
        )
        yield from (line for line in done.stdout.splitlines() if line.startswith("-A "))

    # ---- victims ----

    def sandboxes(self) -> list[str]:
        """Names of the sandboxes' run directories."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.run_dir / "sandboxes"))
        return []

    def journal(self, sandbox: str) -> list[dict[str, Any]]:
        """The lines of a sandbox's journal."""
        path = self.run_dir / "sandboxes" / sandbox / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def find(self, victim: str, sandbox: str) -> int:
        """Also a command of `kata-runtime`, the process that stands for the container, and conmon.

        *sandbox* may be empty: of the container that was made last.
        """
        if victim == "standing":
            return self._standing(sandbox)
        if victim == "runtime":
            return max(self.commands(PROGRAM), default=0)
        if victim in ("conmon", "exec-conmon"):
            return max(self._monitors(victim), default=0)
        return super().find(victim, sandbox) if sandbox else 0

    def _standing(self, sandbox: str) -> int:
        for path in self.run_dir.glob("oci/*/state.json"):
            with contextlib.suppress(OSError, ValueError):
                kept = json.loads(path.read_text())
                known = os.path.basename(kept["sandbox"]) == sandbox
                if known and kept["pid"] and sysio.proc_starttime(kept["pid"]) == kept["started"]:
                    return int(kept["pid"])
        return 0

    def _monitors(self, victim: str) -> Iterator[int]:
        """The conmons of these runs: of containers, or of execs."""
        of_here = str(self.directory)
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            is_one = words[0].endswith("/conmon") and any(of_here in word for word in words)
            if is_one and ("-e" in words) == (victim == "exec-conmon"):
                yield pid


__all__ = ["IMAGE", "PodmanTarget"]
