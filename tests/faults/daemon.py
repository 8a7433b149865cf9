"""The containerd of these runs, with networks of its own, and the two clients: ctr and crictl."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import thin_pool
from cni_support import PLUGINS, write_network
from containerd_support import RUNTIME, USE_SECOND, Containerd, with_command
from waiting import PATIENCE

from faults import answers, stops
from faults.host import Place
from faults.target import MARK, Failure, Target
from kata import journal_undo
from kata.errors import KataError
from kata.hypervisor import registry
from kata.journal import Journal, find

HERE = Path(__file__).resolve().parent
BUSYBOX = "docker.io/local/busybox:latest"
PAUSE = "docker.io/local/pause:latest"


class Daemon(Containerd, Target):
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
        Containerd.__init__(self, directory, guest, second=second)
        Target.__init__(self)
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
        self._has_stop_points = stop_points
        if stop_points:
            shim = directory / "bin/containerd-shim-kata-v2"
            shim.unlink()
            shim.symlink_to(HERE / "shim.py")
        self.outer, self.inner = f"{self.token}o", f"{self.token}i"
        self.around = ["nsenter", f"--net=/run/netns/{self.outer}"]
        self.seen: set[str] = {self.token}
        self.place = Place(
            directory,
            f"{MARK}={self.token}",
            [self.outer, self.inner],
            lambda: self.seen,
            self._known,
            {
                "address of a pod": ("ipam", 2),
                "bundle": ("state/io.containerd.runtime.v2.task", 2),
                "task's directory": ("root/io.containerd.runtime.v2.task", 2),
                "pod's directory": ("state/io.containerd.grpc.v1.cri/sandboxes", 1),
                "pod's network namespace": ("state/io.containerd.grpc.v1.cri/netns", 1),
            },
        )
        self._stack = contextlib.ExitStack()
        # One that is asked for disks while its machine runs gets root file systems on disks.
        self._needs_disks = stops.hypervisor() in stops.SHARES_NOTHING or wrong_answers
        # Pods are tried where they can have directories: what has none of them is copied into their machine or refused.
        self.has_pods = (
            shutil.which("crictl") is not None and (PLUGINS / "bridge").exists() and not self._needs_disks
        )
        self.kinds = ("ctr", "crictl") if self.has_pods else ("ctr",)
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
        if self._has_stop_points:
            self.listen()

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
    def title(self) -> str:
        """What the daemon calls itself, as in ``containerd 1.6.20``."""
        assert self.program is not None
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout
        return f"containerd {said.split()[2].partition('~')[0].removeprefix('v')}"

    @property
    def pid(self) -> int:
        """Of the daemon, which has taken the place of the program around it."""
        assert self._daemon is not None
        return self._daemon.pid

    def was_killed(self, victim: str) -> None:
        """Reap a daemon that was killed."""
        if victim == "containerd":
            assert self._daemon is not None
            self._daemon.wait(30)
            self._daemon = None

    def recover(self, victim: str, point: stops.Point | None) -> None:
        """Start a daemon that was killed; anew where the shim that clears up was.

        It has the clearing up done once; if that fails, again when it is started the next time.
        """
        if victim == "containerd" or (victim == "shim" and point is not None and point.phase == "clear"):
            self.stop_listening()
            self.stop()
            self.start()
            self.listen()

    def forget(self) -> None:
        """Remove the containers, whose tasks have ended."""
        for name in self.in_ctr("container", "ls", "-q").stdout.split():
            self.in_ctr("container", "rm", name)

    def _known(self) -> set[int]:
        pids = {self.pid} if self._daemon is not None else set()
        return pids | self._clients

    # ---- clients ----

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
        """Also ``containerd``, and a command of the shim that starts an engine."""
        if victim == "containerd":
            return self.pid
        if victim == "shim":
            return next(self.commands(self.directory / "bin/containerd-shim-kata-v2", "start"), 0)
        return super().find(victim, sandbox)

    def order(self, part: str = "", kind: str = "") -> None:
        """Have requests for a part of the hypervisor's API answered wrongly from now on; without arguments none."""
        # In one write, into the file that is open there.
        self.orders.write_text(f"{part} {kind}\n" if kind else "\n")
