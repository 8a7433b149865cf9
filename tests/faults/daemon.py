"""The containerd of these runs, with networks of its own, and the two clients: ctr and crictl."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import thin_pool
from cni_support import PLUGINS, write_network
from containerd_support import RUNTIME, USE_SECOND, Containerd, with_command
from waiting import PATIENCE

from faults import answers, stops
from faults.host import Place
from kata import journal_undo, sysio
from kata.errors import KataError
from kata.hypervisor import registry
from kata.journal import Journal, find

HERE = Path(__file__).resolve().parent
BUSYBOX = "docker.io/local/busybox:latest"
PAUSE = "docker.io/local/pause:latest"
MARK = "KATA_FAULTS"
CLIENT_S = 2 * PATIENCE
"""A client may wait that long: a Create whose guest says nothing is given up after 120 s."""


class Failure(Exception):
    """Something is not as it has to be after a fault."""


class Daemon(Containerd):
    """A containerd whose shim has stop points.

    Args:
        directory: A short path, made by the caller.
        guest: The guest's directory.
        second: Take containerd 2 instead of this machine's.
        stop_points: Whether the shim has them; without, it is the product's own program.
        wrong_answers: Whether the hypervisor can be made to answer wrongly (`orders`).
        templates: Whether machines have templates.
    """

    def __init__(
        self,
        directory: Path,
        guest: Path,
        *,
        second: bool = USE_SECOND,
        stop_points: bool = True,
        wrong_answers: bool = False,
        templates: bool = False,
    ) -> None:
        super().__init__(directory, guest, second=second)
        self.token = f"kf{os.getpid()}"
        self.points = directory / "points"
        self.points.mkdir()
        self.env = {**self.env, MARK: self.token, stops.VARIABLE: str(self.points)}
        configuration = directory / "configuration.toml"
        text = f"[runtime]\nhypervisor_name = '{stops.hypervisor()}'\n"
        self.orders = directory / "orders"
        if wrong_answers:
            program = directory / "bin" / stops.hypervisor()
            answers.write(program, registry.find(stops.hypervisor()).program({}), self.orders)
            text += f"[hypervisor.{stops.hypervisor()}]\npath = '{program}'\n"
        self.templates = directory / "templates"
        if templates:
            self.env = {**self.env, "KATA_TEMPLATES": "on"}
            text += f"[factory]\ntemplate_path = '{self.templates}'\n"
        configuration.write_text(text)
        # What an engine gets of its caller's environment begins with KATA_.
        self.env = {**self.env, "KATA_CONF_FILE": str(configuration)}
        if stop_points:
            shim = directory / "bin/containerd-shim-kata-v2"
            shim.unlink()
            shim.symlink_to(HERE / "shim.py")
        self.outer, self.inner = f"{self.token}o", f"{self.token}i"
        self.around = ["nsenter", f"--net=/run/netns/{self.outer}"]
        self.seen: set[str] = {self.token}
        self.place = Place(
            directory, f"{MARK}={self.token}", [self.outer, self.inner], lambda: self.seen, self._known
        )
        self._stack = contextlib.ExitStack()
        # One that is asked for disks while its machine runs gets root file systems on disks.
        self._needs_disks = stops.hypervisor() in stops.SHARES_NOTHING or wrong_answers
        # Pods are tried where they can have directories: what has none of them is copied into their machine or refused.
        self.has_pods = (
            shutil.which("crictl") is not None and (PLUGINS / "bridge").exists() and not self._needs_disks
        )
        self._clients: set[int] = set()
        self._events: subprocess.Popen[bytes] | None = None
        self._write_configuration()

    # ---- its surroundings ----

    def _write_configuration(self) -> None:
        networks = write_network(self.directory, self.token, "10.88.8.0/24")
        if self._needs_disks:
            self.env = {**self.env, "CONTAINERD_SNAPSHOTTER": "devmapper", **thin_pool.environment()}
            volumes = thin_pool.configuration(self.token, self.directory / "devmapper")
            self.configure(["io.containerd.grpc.v1.cri"], volumes)
            return
        section = 'plugins."io.containerd.grpc.v1.cri"'
        self.configure(
            [] if self.has_pods else ["io.containerd.grpc.v1.cri"],
            f"""
[{section}]
sandbox_image = "{PAUSE}"
netns_mounts_under_state_dir = true
restrict_oom_score_adj = true
[{section}.cni]
bin_dir = "{PLUGINS}"
conf_dir = "{networks}"
[{section}.containerd]
default_runtime_name = "kata"
[{section}.containerd.runtimes.kata]
runtime_type = "{RUNTIME}"
privileged_without_host_devices = true
pod_annotations = ["io.katacontainers.*"]
[{section}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
            if self.has_pods
            else "",
        )

    def up(self, layout: Path) -> None:
        """Make the networks, start the daemon and give it its images (*layout* is busybox)."""
        script = f"""
            ip netns add {self.outer} && ip netns add {self.inner}
            ip -n {self.outer} link set lo up
            ip -n {self.inner} link add eth0 type veth peer name v0 netns {self.outer}
            ip -n {self.inner} address add 10.9.8.2/24 dev eth0
            ip -n {self.inner} link set eth0 up
            ip -n {self.inner} route add default via 10.9.8.1
            ip -n {self.outer} address add 10.9.8.1/24 dev v0
            ip -n {self.outer} link set v0 up
        """
        subprocess.run(["sh", "-ec", script], check=True)
        if self._needs_disks:
            self._stack.enter_context(thin_pool.pool(self.directory, self.token))
        self.start()
        self.import_image(layout, namespace=self.token)
        if self.has_pods:
            self.import_image(layout, BUSYBOX, "k8s.io")
            pause = with_command(layout, self.directory / "pause", "/bin/busybox", "sleep", "2147483647")
            self.import_image(pause, PAUSE, "k8s.io")

    def down(self) -> None:
        """Take all of it back, sandboxes that still live included."""
        self.stop_listening()
        for path in list(find(str(self.run_dir / "sandboxes"))):
            with contextlib.suppress(KataError):  # it has just ended by itself
                journal = Journal.open(path)
                journal.signal_owner(signal.SIGKILL, 5.0)
                journal_undo.undo(journal)
                journal.close()
        self.stop()
        for name in (self.outer, self.inner):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)
        # Mounts below a state directory are containerd's.
        for line in Path("/proc/self/mountinfo").read_text().splitlines()[::-1]:
            target = line.split()[4]
            if target.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", target], check=False)
        self._stack.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start the daemon, and return when it answers; with pods, when these work as well."""
        super().start()
        if self.has_pods:
            deadline = time.monotonic() + PATIENCE
            while self.crictl("pods", "-q", check=False).returncode:
                if time.monotonic() > deadline:
                    raise Failure("containerd's CRI does not answer")
                time.sleep(0.1)

    @property
    def version(self) -> str:
        """What the daemon calls itself, as in ``1.6.20``."""
        assert self.program is not None
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout
        return said.split()[2].partition("~")[0].removeprefix("v")

    @property
    def pid(self) -> int:
        """Of the daemon, which has taken the place of the program around it."""
        assert self._daemon is not None
        return self._daemon.pid

    def killed(self) -> None:
        """Reap a daemon that was killed."""
        assert self._daemon is not None
        self._daemon.wait(30)
        self._daemon = None

    def _known(self) -> set[int]:
        pids = {self.pid} if self._daemon is not None else set()
        return pids | self._clients

    # ---- clients ----

    def client(self, *argv: str, patience_s: float = CLIENT_S) -> subprocess.CompletedProcess[str]:
        """Run a client of the daemon to its end.

        Raises:
            Failure: It hangs.
        """
        process = subprocess.Popen(
            argv,
            env=self.env,
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

    def in_ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ctr in the namespace of these runs.

        Raises:
            Failure: It ended otherwise than with 0, and *check*.
        """
        done = self.client(self.ctr_program, "--address", str(self.socket), "-n", self.token, *arguments)
        if check and done.returncode:
            raise Failure(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def crictl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run crictl, as `in_ctr`."""
        address = f"unix://{self.socket}"
        done = self.client(
            *self.around,
            "crictl",
            "--timeout",
            "4m",
            "-r",
            address,
            "-i",
            address,
            *arguments,
            patience_s=300,
        )
        if check and done.returncode:
            raise Failure(f"crictl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def run_kata(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `kata` with the directories and configuration of these runs.

        Raises:
            Failure: It ended otherwise than with 0.
        """
        done = self.client(str(HERE.parents[1] / "tools/kata"), *arguments)
        if done.returncode:
            raise Failure(f"kata {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def template(self) -> str:
        """Name of a whole template; empty if there is none."""
        whole = sorted(path.parent.name for path in self.templates.glob("[!.]*/machine.json"))
        return whole[0] if whole else ""

    def makes_template(self) -> bool:
        """Whether a process is there that makes one."""
        return any("make-template" in line for line in self.place.snapshot()["process"])

    def task_states(self) -> dict[str, str]:
        """What containerd says of each task: its status."""
        lines = self.in_ctr("task", "ls").stdout.splitlines()[1:]
        return {name: status for name, _, status in map(str.split, lines)}

    # ---- events ----

    def listen(self) -> None:
        """Have the events of these runs written down from now on."""
        with open(self.directory / "events", "ab") as file:
            self._events = subprocess.Popen(
                [self.ctr_program, "--address", str(self.socket), "-n", self.token, "events"],
                env=self.env,
                stdout=file,
                stderr=subprocess.DEVNULL,  # it complains when the daemon is killed
            )
        self._clients.add(self._events.pid)
        # It says nothing by itself, so an event of our own tells when it listens.
        before = (self.directory / "events").stat().st_size
        deadline = time.monotonic() + PATIENCE
        while (self.directory / "events").stat().st_size == before:
            if time.monotonic() > deadline:
                raise Failure("containerd delivers no events")
            self.client(
                self.ctr_program,
                "--address",
                str(self.socket),
                "namespaces",
                "label",
                self.token,
                f"n={time.monotonic_ns()}",
            )
            time.sleep(0.02)

    def stop_listening(self) -> None:
        """The opposite."""
        if self._events is not None:
            self._events.terminate()
            self._events.wait(10)
            self._clients.discard(self._events.pid)
            self._events = None

    def topics(self, container: str) -> list[str]:
        """The events of a container's init so far, in order."""
        found = []
        for line in (self.directory / "events").read_text().splitlines():
            _, _, rest = line.partition(" /tasks/")
            topic, _, body = rest.partition(" ")
            if not body:
                continue
            event = json.loads(body)
            if event.get("container_id") == container and event.get("id", container) in (container, ""):
                found.append(topic)
        return found

    # ---- victims ----

    def find(self, victim: str, sandbox: str) -> int:
        """Pid of a sandbox's process, or of ``containerd``; 0 if it is not there (yet)."""
        if victim == "containerd":
            return self.pid
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

    def newest_sandbox(self, known: set[str]) -> str:
        """The sandbox that is not in *known*; empty if there is none."""
        return next((name for name in self.sandboxes() if name not in known and name[0] != "."), "")

    def order(self, part: str = "", kind: str = "") -> None:
        """Have requests for a part of the hypervisor's API answered wrongly from now on; without arguments none."""
        # In one write, into the file that is open there.
        self.orders.write_text(f"{part} {kind}\n" if kind else "\n")

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
