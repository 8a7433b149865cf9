"""A containerd of the tests' own, with this checkout's shim on its PATH."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = "io.containerd.kata.v2"
IMAGE = "local/busybox:latest"
SECOND = ROOT / "build/programs/containerd2"
"""containerd 2 and its ctr, which set-up builds from the Go proxy's sources."""
USE_SECOND = os.environ.get("KATA_TEST_CONTAINERD") == "2"
"""Whether all tests are to be made with it; else with the containerd of this machine."""


class Containerd:
    """A daemon with everything of its own below one short directory.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
        second: Take containerd 2 instead of this machine's.

    Attributes:
        around: What the daemon is executed through (``nsenter`` and its options).
    """

    def __init__(self, directory: Path, guest: Path, *, second: bool = USE_SECOND) -> None:
        self.directory = directory
        self.second = second
        self.socket = directory / "c.sock"
        self.run_dir = directory / "r"
        self.log = directory / "containerd.log"
        place = SECOND if second else ROOT / "build/programs/usr/bin"
        programs = directory / "bin"
        programs.mkdir()
        (programs / "containerd-shim-kata-v2").symlink_to(ROOT / "src/kata/__main__.py")
        self.env = {
            **os.environ,
            "PATH": f"{programs}:{place}:{os.environ['PATH']}",
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": str(guest),
        }
        self.program = shutil.which("containerd", path=self.env["PATH"])
        if second and not (SECOND / "containerd").exists():
            pytest.skip("needs containerd 2 (tools/setup test builds it)")
        if self.program is None or shutil.which("ctr", path=self.env["PATH"]) is None:
            pytest.skip("needs containerd (apt-get install containerd)")
        # Found here, and not by subprocess, which looks along the PATH of the tests.
        self.ctr_program = str(shutil.which("ctr", path=self.env["PATH"]))
        self._daemon: subprocess.Popen[bytes] | None = None
        self.configure(["io.containerd.grpc.v1.cri"])
        self.around: list[str] = []

    def configure(self, disabled: list[str], more: str = "") -> None:
        """Write its configuration: plugins that are not wanted, and further text in TOML."""
        (self.directory / "config.toml").write_text(
            f"""\
version = 2
root = "{self.directory}/root"
state = "{self.directory}/state"
disabled_plugins = {json.dumps([*disabled, "io.containerd.internal.v1.opt"])}
[grpc]
address = "{self.socket}"
[ttrpc]
address = "{self.socket}.ttrpc"
{more}
"""
        )

    def kata_json(self, *arguments: str) -> list[dict[str, Any]]:
        """What a command of ours prints as JSON: a list, or an object on each line."""
        done = subprocess.run(
            [str(ROOT / "src/kata/__main__.py"), *arguments, "--json"],
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
        )
        if done.stdout.startswith("["):
            found: list[dict[str, Any]] = json.loads(done.stdout)
            return found
        return [json.loads(line) for line in done.stdout.splitlines()]

    def kata(self, *arguments: str) -> str:
        """Run a command of ours with this daemon's programs; what it says of what it has done."""
        done = subprocess.run(
            [str(ROOT / "src/kata/__main__.py"), *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.stderr}"
        return done.stderr

    def start(self) -> None:
        """Start the daemon, and return when it answers."""
        assert self.program is not None
        with open(self.log, "ab") as log:
            self._daemon = subprocess.Popen(
                [*self.around, self.program, "--config", str(self.directory / "config.toml")],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.ctr("version").returncode == 0, "containerd answers", self.log.read_text)

    def stop(self) -> None:
        """End the daemon; its containers go on."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(30)
            self._daemon = None

    def ctr(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run ctr to its end."""
        return subprocess.run(
            [self.ctr_program, "--address", str(self.socket), *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env=self.env,
            check=False,
        )

    def ok(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run ctr, which has to end with 0; its standard output."""
        done = self.ctr(*arguments, stdin=stdin)
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {done.stderr.decode()}\n{self.diagnosis()}"
        return done.stdout.decode()

    def run(
        self, name: str, *command: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """``ctr run --rm`` of busybox."""
        return self.ctr("run", "--rm", "--runtime", RUNTIME, *options, IMAGE, name, *command)

    def start_run(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """``ctr run -d`` of busybox, without waiting for it."""
        return subprocess.Popen(
            [
                self.ctr_program,
                "--address",
                str(self.socket),
                "run",
                "-d",
                "--runtime",
                RUNTIME,
                IMAGE,
                name,
                *command,
            ],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def victim(self, sandbox: str, which: str) -> int:
        """Pid of a sandbox's ``engine`` or ``machine``; 0 if it is not there (yet)."""
        try:
            lines = self.journal(sandbox)
        except FileNotFoundError:
            return 0
        if which == "engine":
            return self.engine_pid(sandbox)
        numbers = {line["n"] for line in lines if line.get("p", {}).get("role") == "qemu"}
        return next(
            (int(line["made"]["pid"]) for line in lines if "made" in line and line["n"] in numbers), 0
        )

    def detached(self, name: str, *command: str, options: tuple[str, ...] = ()) -> int:
        """``ctr run -d`` of busybox; the task's pid."""
        self.ok("run", "-d", "--runtime", RUNTIME, *options, IMAGE, name, *command)
        return self.tasks()[name][0]

    def spec(self, hooks: dict[str, Any]) -> dict[str, Any]:
        """A small specification of its own: a busybox that sleeps."""
        root = self.directory / "root-of-spec"
        if not root.exists():
            for name in ("bin", "proc", "dev"):
                (root / name).mkdir(parents=True)
            shutil.copy("/bin/busybox", root / "bin/busybox")
        return {
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/busybox", "sleep", "1000"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": str(root)},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
            "hooks": hooks,
        }

    def run_spec(self, name: str, spec: dict[str, Any]) -> int:
        """``ctr run -d --config``; the task's pid."""
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(spec))
        self.ok("run", "-d", "--runtime", RUNTIME, "--config", str(path), name)
        return self.tasks()[name][0]

    def tasks(self, namespace: str = "default") -> dict[str, tuple[int, str]]:
        """Pid and status of each task."""
        lines = self.ok("--namespace", namespace, "task", "ls").splitlines()[1:]
        return {name: (int(pid), status) for name, pid, status in map(str.split, lines)}

    def remove(self, name: str) -> None:
        """Remove a task and its container."""
        self.ok("task", "rm", "-f", name)
        self.ok("container", "rm", name)

    def sandboxes(self) -> list[str]:
        """Names of the sandboxes' run directories."""
        try:
            return sorted(os.listdir(self.run_dir / "sandboxes"))
        except FileNotFoundError:
            return []

    def has_no_sandbox(self, name: str) -> bool:
        """Whether a sandbox's run directory is gone."""
        return name not in self.sandboxes()

    def journal(self, sandbox: str) -> list[dict[str, Any]]:
        """The lines of a sandbox's journal."""
        path = self.run_dir / "sandboxes" / sandbox / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def engine_pid(self, sandbox: str) -> int:
        """Pid of the engine of a sandbox."""
        return int([line["owner"]["pid"] for line in self.journal(sandbox) if "owner" in line][-1])

    def diagnosis(self) -> str:
        """What the engines' logs and containerd's end with."""
        texts = [
            path.read_text(errors="replace")[-2000:] for path in self.run_dir.glob("sandboxes/*/engine.log")
        ]
        return "\n".join([*texts, self.log.read_text(errors="replace")[-2000:]])

    def import_image(self, layout: Path, name: str = IMAGE, namespace: str = "default") -> None:
        """Make an OCI layout's image known by a name, tag included."""
        archive = self.directory / "image.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(layout, arcname=".")
        base = name.rpartition(":")[0]
        self.ok("--namespace", namespace, "image", "import", "--base-name", base, str(archive))


@contextlib.contextmanager
def running(
    run_directory: Path,
    guest: Path,
    busybox: str,
    *,
    second: bool = USE_SECOND,
    plugins: str = "",
    around: Sequence[str] = (),
) -> Iterator[Containerd]:
    """A daemon with busybox's image; with it go the tasks that it has in the end.

    Args:
        run_directory: Its directory is made below it, so that what is left behind can be traced to it.
        guest: The guest's directory.
        busybox: The image, as an OCI layout.
        second: Take containerd 2 instead of this machine's.
        plugins: More of its configuration; ``{directory}`` in it is its own.
        around: A program that executes it, and the program's arguments.
    """
    # Sockets need a short path.
    directory = Path(tempfile.mkdtemp(prefix="c", dir=run_directory))
    one = Containerd(directory, guest, second=second)
    one.around = list(around)
    if plugins:
        one.configure(["io.containerd.grpc.v1.cri"], plugins.format(directory=directory))
    one.start()
    try:
        one.import_image(Path(busybox.removeprefix("oci:")))
        yield one
    finally:
        for namespace in ("default", "other"):
            for name in one.tasks(namespace):
                one.ctr("--namespace", namespace, "task", "rm", "-f", name)
        one.stop()
        shutil.rmtree(directory, ignore_errors=True)


def clean(daemon: Containerd) -> None:
    """Remove all tasks and containers; no sandbox may be left."""
    for name in daemon.tasks():
        daemon.ctr("task", "rm", "-f", name)
    for name in daemon.ok("container", "ls", "-q").split():
        daemon.ctr("container", "rm", name)
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis, 15)


def with_command(layout: Path, target: Path, *command: str) -> Path:
    """A copy of a single-platform OCI layout whose image runs another command."""

    def change(config: dict[str, Any], manifest: dict[str, Any], blobs: Path) -> None:
        config["config"] = {**config["config"], "Entrypoint": None, "Cmd": list(command)}

    return _changed(layout, target, change)


def with_layer(layout: Path, target: Path, layer: bytes) -> Path:
    """A copy of a single-platform OCI layout whose image has one more layer, an uncompressed archive."""

    def change(config: dict[str, Any], manifest: dict[str, Any], blobs: Path) -> None:
        name = hashlib.sha256(layer).hexdigest()
        (blobs / name).write_bytes(layer)
        config["rootfs"]["diff_ids"].append(f"sha256:{name}")
        kind = "application/vnd.oci.image.layer.v1.tar"
        manifest["layers"].append({"mediaType": kind, "digest": f"sha256:{name}", "size": len(layer)})

    return _changed(layout, target, change)


def _changed(
    layout: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any], Path], None]
) -> Path:
    """A copy of a layout with another configuration and manifest."""
    shutil.copytree(layout, target)
    blobs = target / "blobs/sha256"

    def load(digest: str) -> dict[str, Any]:
        return dict(json.loads((blobs / digest.removeprefix("sha256:")).read_bytes()))

    def store(content: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(content).encode()
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    index = json.loads((target / "index.json").read_text())
    [entry] = index["manifests"]
    manifest = load(entry["digest"])
    config = load(manifest["config"]["digest"])
    change(config, manifest, blobs)
    manifest["config"].update(store(config))
    entry.update(store(manifest))
    (target / "index.json").write_text(json.dumps(index))
    return target


class Events:
    """What ``ctr events`` prints while this is open."""

    def __init__(self, daemon: Containerd) -> None:
        self._path = daemon.directory / "events"
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [daemon.ctr_program, "--address", str(daemon.socket), "events"],
            env=daemon.env,
            stdout=self._file,
        )
        # It prints nothing of its own, so an event of ours tells when it listens.
        until(lambda: self._shows(daemon), "ctr events listens")

    def _shows(self, daemon: Containerd) -> bool:
        daemon.ok("namespaces", "create", name := f"n{time.monotonic_ns()}")
        daemon.ok("namespaces", "remove", name)
        return self._path.stat().st_size > 0

    def topics(self, container: str) -> list[tuple[str, dict[str, Any]]]:
        """(topic, event) of each task event of a container so far, in order."""
        found = []
        for line in self._path.read_text().splitlines():
            _, _, rest = line.partition(" /tasks/")
            topic, _, body = rest.partition(" ")
            if body and (event := json.loads(body)).get("container_id") == container:
                found.append((topic, event))
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._file.close()


@pytest.fixture(name="daemon", scope="module")
def daemon_fixture(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Containerd]:
    """One containerd for the tests of a module."""
    with running(run_directory, guest_assets, busybox_image) as one:
        yield one


@pytest.fixture(name="_clean", autouse=True)
def clean_fixture(daemon: Containerd) -> Iterator[None]:
    """A test that failed leaves nothing to its next try, or to the tests after it."""
    yield
    clean(daemon)
