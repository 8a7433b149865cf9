"""Where the commands of users are typed: Docker and Podman with runc, and kata, in one network namespace.

Each client answers to the name ``docker``: a script in a directory of its own, which leads the shell's PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import images
from conftest import Kata
from podman_support import UNPACKED, Podman
from scripts import write_script
from test_docker import PROGRAMS, Docker
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("docker", "podman", "kata")
IMAGE = "bb"
REGISTRY = "127.0.0.1:5000"
_TIMEOUT_S = 120
_CLEARS = (
    "docker rm -f $(docker ps -aq); docker volume rm $(docker volume ls -q);"
    " for name in $(docker network ls --format '{{.Name}}'); do docker network rm $name; done;"
    " for name in $(docker images --format '{{.Repository}}:{{.Tag}}'); do"
    f' case $name in */{IMAGE}:latest|{IMAGE}:latest) ;; *) docker rmi -f "$name";; esac; done; true'
)
"""What takes away what a session has left, but for the image."""


@dataclass(frozen=True)
class Said:
    """What came of a command: its exit status, standard output and standard error."""

    code: int
    out: str
    err: str


class Rig:
    """The three clients, ready to be typed to.

    Attributes:
        versions: What each client calls itself.
    """

    def __init__(self, directory: Path, guest: Path) -> None:
        self.directory = directory
        self.versions: dict[str, str] = {}
        self.kata = Kata(directory / "k", guest)
        (directory / "d").mkdir()
        (directory / "p").mkdir()
        self._docker = Docker(directory / "d", guest)
        (directory / "d/daemon.json").write_text("{}")
        self._podman = Podman(directory / "p", guest)
        (directory / "p/registries.conf").write_text(
            f'unqualified-search-registries = []\n[[registry]]\nlocation = "{REGISTRY}"\ninsecure = true\n'
        )
        self.netns = self._docker.netns
        self._inside = self._docker.containerd.around
        self._registry: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and the registry, and give each client the image.

        Raises:
            AssertionError: Something does not answer.
            subprocess.CalledProcessError: A step failed.
        """
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        for words in (
            "link set lo up",
            "link add out0 type veth peer name out1",
            "link set out1 up",
            "addr add 10.90.0.2/24 dev out0",
            "link set out0 up",
            "route add default via 10.90.0.1",  # it leads nowhere, but who publishes ports looks for one
        ):
            subprocess.run(["ip", "-n", self.netns, *words.split()], check=True)
        self._docker.start()
        self._start_registry()
        layout, archive = self.directory / "layout", self.directory / "bb.tar"
        config = {
            "Cmd": ["sh"],
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "GREETING=good morning"],
            "Labels": {"maintainer": "me"},
            "ExposedPorts": {"80/tcp": {}},
        }
        image = images.Image(config, {"srv/hello": (0o644, b"hello from the container\n")})
        images.write(image, ROOT / "build/images/busybox", layout)
        copy = ["skopeo", "copy", "--quiet", f"oci:{layout}:latest"]
        subprocess.run([*copy, f"docker-archive:{archive}:{IMAGE}:latest"], check=True)
        podman = [self._podman.program, "--tmpdir", f"{self._podman.directory}/t", "--runtime", "runc"]
        commands = {
            "docker": (["docker"], self._docker.env),
            "podman": (podman, self._podman.env),
            "kata": (self.kata.command(), self.kata.env),
        }
        for client, (command, env) in commands.items():
            place = self.directory / "bin" / client
            place.mkdir(parents=True)
            given = {
                name: value
                for name, value in env.items()
                if name != "HOME" and (name.startswith("KATA_") or os.environ.get(name) != value)
            }
            write_script(place / "docker", command, given)
            (self.directory / "home" / client).mkdir(parents=True)
            done = self.type(client, f"docker load -i {archive}", self.directory)
            assert done.code == 0, f"{client}: {done.err}"
            self.versions[client] = self.type(client, "docker --version", self.directory).out.strip()
        policy = self.directory / "home/podman/.config/containers"
        policy.mkdir(parents=True)
        shutil.copy(self._podman.directory / "home/.config/containers/policy.json", policy)

    def _start_registry(self) -> None:
        config = self.directory / "registry.yml"
        config.write_text(
            "version: 0.1\nlog: {level: error}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/registry}}}}\n"
            f"http: {{addr: '{REGISTRY}'}}\n"
        )
        program = str(shutil.which("docker-registry", path=PROGRAMS))
        self._registry = subprocess.Popen(
            [*self._inside, program, "serve", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        listens = [*self._inside, "ss", "-Hltn", f"sport = :{REGISTRY.partition(':')[2]}"]
        until(
            lambda: subprocess.run(listens, capture_output=True, check=True).stdout, "the registry listens"
        )

    @contextmanager
    def session(self, client: str) -> Iterator[Path]:
        """A directory with the files that the commands name; what the session leaves is taken away."""
        directory = Path(tempfile.mkdtemp(prefix="s", dir=self.directory))
        try:
            (directory / "words").write_text("one\ntwo\n")
            (directory / "env.list").write_text("# a comment\nA=1\nB=two words\n")
            (directory / "site").mkdir()
            (directory / "site/index.html").write_text("<h1>It works</h1>\n")
            (directory / "tree/bin").mkdir(parents=True)
            for name in ("busybox", "sh", "echo"):
                shutil.copy("/bin/busybox", directory / "tree/bin" / name)
            subprocess.run(["tar", "-cf", "root.tar", "-C", "tree", "bin"], cwd=directory, check=True)
            yield directory
        finally:
            self.type(client, _CLEARS, directory)
            shutil.rmtree(directory, ignore_errors=True)

    def type(self, client: str, line: str, directory: Path, *, terminal: bool = False) -> Said:
        """Give a shell a line.

        Args:
            client: What ``docker`` means there.
            line: The line.
            directory: Where.
            terminal: With a terminal as its standard streams; else standard input is empty.
        """
        env = {
            "PATH": f"{self.directory}/bin/{client}:{PROGRAMS}:{UNPACKED}/usr/bin",
            "HOME": str(self.directory / "home" / client),
            "LC_ALL": "C.UTF-8",
            **{name: value for name, value in os.environ.items() if name.startswith("KATA_TEST")},
        }
        command = ["script", "-qec", line, "/dev/null"] if terminal else ["sh", "-c", line]
        # A terminal's input stays open: its end would be typed as a character.
        typed, silent = os.pipe()
        try:
            done = subprocess.run(
                [*self._inside, *command],
                stdin=typed if terminal else subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                env=env,
                cwd=directory,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Said(-1, (error.stdout or b"").decode(errors="replace"), f"not within {_TIMEOUT_S} s")
        finally:
            os.close(typed)
            os.close(silent)
        return Said(
            done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def stop(self) -> list[str]:
        """End everything.

        Returns:
            What was left, a line for each.
        """
        left: list[str] = []
        try:
            left += self.kata.clear()
        finally:
            try:
                for identity in self._docker("ps", "-aq", code=None).split():
                    self._docker("rm", "-f", identity, code=None)
                self._docker.stop()
            finally:
                if self._registry is not None:
                    self._registry.terminate()
                    self._registry.wait(30)
                self._podman.netns = self.netns
                left += self._podman.stop()
        return left


@contextmanager
def running(guest: Path) -> Iterator[Rig]:
    """A rig that has started; it has to have left nothing behind when it ends."""
    # A short path: there are sockets in it.
    directory = Path(tempfile.mkdtemp(prefix="kd", dir="/tmp"))
    left: list[str] = []
    try:
        rig = Rig(directory, guest)
        try:
            rig.start()
            yield rig
        finally:
            left = rig.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"left behind: {left}"
