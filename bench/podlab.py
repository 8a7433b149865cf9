"""Where the benchmarks of pods take place: a containerd of their own, CNI's bridge, pods by kata and by runc."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

from containerd_support import with_layer  # noqa: E402
from faults.daemon import BUSYBOX, Daemon  # noqa: E402

IMAGE = ROOT / "build/images/busybox"
KATA = ["/usr/bin/python3", "-I", "-S", str(ROOT / "src/kata/__main__.py")]
RUNTIMES = ("kata", "runc")
TEMPLATE_S = 120.0
PAUSE_S = 3
GATEWAY = "10.88.8.1"
"""The host's end of the bridge."""
TOOLS = "/load"
"""Where a container finds the load program's directory."""


class Lab:
    """The daemon; a context manager that leaves nothing behind.

    Attributes:
        directory: A short path for whatever is needed; it goes with the lab.
        about: The machine and containerd, in a line.
    """

    def __enter__(self) -> Lab:
        """Start it.

        Raises:
            SystemExit: Something is not installed.
        """
        if os.geteuid() != 0:
            raise SystemExit("error: virtual machines and containerd need root for now")
        for program in ("crictl", "runc", "containerd", "ip"):
            if not shutil.which(program):
                raise SystemExit(f"error: {program} is not installed\nhint: tools/setup test installs it")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
        self.directory = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
        self._count = 0
        self._lock = threading.Condition()
        self._starting = 0
        self._closed = False
        self._serving: list[subprocess.Popen[bytes]] = []
        try:
            guest = Path(os.environ.get("KATA_GUEST_DIR") or ROOT / "build/guest")
            self.daemon = Daemon(self.directory, guest, stop_points=False)
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        try:
            self.daemon.up(IMAGE)
            version = subprocess.run(
                [str(self.daemon.program), "--version"], capture_output=True, text=True, check=True
            )
        except BaseException:
            self.close()
            raise
        self.about = f"{os.cpu_count()} processors; {' '.join(version.stdout.split()[:3])}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything back; what other threads are about to start, too."""
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._starting)
        for server in self._serving:
            server.terminate()
            server.wait()
        self.remove_all()
        self.daemon.down()

    def start(
        self,
        runtime: str,
        mounts: list[tuple[Path, str, bool]] | None = None,
        *,
        image: str = BUSYBOX,
        annotations: dict[str, str] | None = None,
    ) -> str:
        """Start a pod with one container, which sleeps; the container's id.

        Args:
            runtime: ``kata`` or ``runc``.
            mounts: Host path, container path, whether read-only.
            image: Of the container; the daemon has it.
            annotations: Of the pod.

        Raises:
            RuntimeError: It did not start.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the lab is being closed")
            self._count += 1
            name = f"{runtime}{self._count}"
            self._starting += 1
        try:
            return self._start(runtime, name, mounts, image, annotations or {})
        finally:
            with self._lock:
                self._starting -= 1
                self._lock.notify_all()

    def _start(
        self,
        runtime: str,
        name: str,
        mounts: list[tuple[Path, str, bool]] | None,
        image: str,
        annotations: dict[str, str],
    ) -> str:
        about = {"name": name, "uid": name, "namespace": "bench"}
        pod = {"metadata": about, "annotations": annotations, "linux": {}}
        one: dict[str, Any] = {
            "metadata": {"name": "one"},
            "image": {"image": image},
            "command": ["sleep", "100000"],
            "mounts": [
                {"host_path": str(path), "container_path": target, "readonly": readonly}
                for path, target, readonly in mounts or ()
            ],
            "linux": {},
        }
        files = [self.directory / f"{name}-{kind}.json" for kind in ("one", "pod")]
        for path, content in zip(files, (one, pod), strict=True):
            path.write_text(json.dumps(content))
        done = self.daemon.crictl("run", "--runtime", runtime, "--no-pull", *map(str, files), check=False)
        if done.returncode:
            raise RuntimeError(f"{name} did not start: {done.stderr.strip()}\n{self.daemon.diagnosis()}")
        return done.stdout.strip()

    def import_files(self, count: int, size: int, name: str) -> None:
        """Give the daemon an image: busybox and a layer with ``/image/small/0`` and so on above it.

        Args:
            count: How many files there are.
            size: How many bytes each has.
            name: The image's, tag included.
        """
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for number in range(count):
                member = tarfile.TarInfo(f"image/small/{number}")
                member.size, member.mode = size, 0o644
                tar.addfile(member, io.BytesIO(number.to_bytes(4, "little") * (size // 4)))
        layout = self.directory / "files-image"
        with_layer(IMAGE, layout, layer.getvalue())
        self.daemon.import_image(layout, name, "k8s.io")

    def await_template(self, kata: list[str]) -> bool:
        """Start pods by kata, one after the other, until there is a template of their machines, from which all further
        ones go on. The maker has the lowest priority: among many starts none would be made.

        Args:
            kata: The ``kata`` command of the checkout whose shim the lab has.

        Returns:
            Whether there is one; never if that checkout has no templates.

        Raises:
            RuntimeError: A pod did not start.
            SystemExit: There is none after TEMPLATE_S seconds.
        """
        until = time.monotonic() + TEMPLATE_S
        while time.monotonic() < until:
            self.start("kata")
            self.remove_all()
            status = subprocess.run(
                [*kata, "factory", "status", "--json"], env=self.daemon.env, capture_output=True, check=False
            )
            if status.returncode:
                return False
            if json.loads(status.stdout)["templates"]:
                return True
            time.sleep(PAUSE_S)
        raise SystemExit(f"error: no template of a pod's machine after {TEMPLATE_S:g} s")

    def remove_all(self) -> None:
        """Remove all pods."""
        pods = self.daemon.crictl("pods", "-q", check=False).stdout.split()
        if pods:
            self.daemon.crictl("rmp", "-f", *pods, check=False)

    def run(self, container: str, *command: str) -> str:
        """What a command in a container says, which has to end with 0.

        Raises:
            RuntimeError: It did not.
        """
        done = self.daemon.crictl("exec", "-s", container, *command, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} {done.stdout.strip()}")
        return done.stdout

    def build_load(self) -> Path:
        """Compile the load program; the directory that it is alone in.

        Raises:
            SystemExit: There is no compiler.
        """
        target = self.directory / "load"
        target.mkdir()
        source = ROOT / "bench/load.c"
        done = subprocess.run(
            ["gcc", "-O2", "-Wall", "-static", "-o", str(target / "load"), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"error: cannot compile {source}: {done.stderr}")
        return target

    def serve(self, port: int) -> None:
        """Run the load program's server on the host's side of the bridge."""
        command = [*self.daemon.around, str(self.directory / "load/load"), "serve", str(port)]
        self._serving.append(subprocess.Popen(command))


def shuffled() -> list[str]:
    """The runtimes in an order that is new every time, so that none always runs on the warmer machine."""
    return random.sample(RUNTIMES, len(RUNTIMES))


def progress(text: str) -> None:
    """Say on a terminal how far things are."""
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="" if text else "\r", file=sys.stderr, flush=True)
