"""What each client of containerd can do to a container: done with runc and with kata, and what is seen compared.

An operation is a method named after it that takes the runtime, makes what it needs, removes it again, and returns what
a person would see, without what differs from one time to the next (ids, times, addresses).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
from rig import Rig
from terminal import Terminal
from test_docker import Docker as Dockerd
from test_nerdctl import Nerdctl
from waiting import PATIENCE, until

OPERATIONS = (
    *("run", "run -it", "run -d", "exec", "exec -it", "logs", "attach", "kill", "stop", "pause", "restart"),
    *("wait", "cp", "top", "stats", "update", "inspect", "events", "commit", "volume", "network", "port"),
    *("healthcheck", "a missing command", "OOM"),
)
"""The rows of the matrix. A client has a method for each that it knows: `run_it` for ``run -it``."""

IMAGE = f"{images.KUBERNETES}/busybox:1.29-2"
TRAP = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done"
READS = "read a; echo got $a; exit 5"
READS_SAYING_SO = "while ! read -t 1 a; do echo up; done; echo got $a; exit 5"
"""The same for who is attached to a terminal: what is typed before the client has prepared its own is echoed there."""
LIMIT = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
EAT = "x=a; while :; do x=$x$x; done"
MIB = 1 << 20
KINDS = {"runc": "io.containerd.runc.v2", "kata": "io.containerd.kata.v2"}


def operations(client: object) -> dict[str, Callable[[str], str]]:
    """What a client knows of `OPERATIONS`."""
    named = {name: re.sub("[ -]+", "_", name.lower()) for name in OPERATIONS}
    lacks = getattr(client, "lacks", ())
    return {
        name: getattr(client, method)
        for name, method in named.items()
        if hasattr(client, method) and name not in lacks
    }


def _terminal(command: list[str], env: dict[str, str]) -> str:
    """What a command prints on a terminal."""
    quoted = " ".join(f"'{word}'" if re.search(r"[^\w./:=-]", word) else word for word in command)
    # Input that stays open: its end would be typed as a character.
    typed, silent = os.pipe()
    try:
        done = subprocess.run(
            ["script", "-qec", quoted, "/dev/null"],
            stdin=typed,
            env=env,
            capture_output=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(typed)
        os.close(silent)
    return done.stdout.decode(errors="replace").replace("\r\n", "\n").strip() + f"; status {done.returncode}"


def _attached(command: list[str], env: dict[str, str]) -> str:
    """What a client that is attached to a container shows, when it has been typed a line."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        time.sleep(1)
        if client.poll() is not None:
            assert client.stderr is not None
            return f"it ended: {client.stderr.read().decode().strip()}"
        client.stdin.write(b"hello\n")
        client.stdin.flush()
        # Its input stays open until the container's end ends it.
        try:
            client.wait(60)
        except subprocess.TimeoutExpired:
            client.kill()
        return client.stdout.read().decode().strip()


def attached_to_terminal(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a client shows that is attached to a container with a terminal, which runs `READS_SAYING_SO`."""
    with Terminal(command, env) as client:
        client.expect("up")
        client.typed("hello\r")
        client.ended()
        return " ".join(word for word in client.said.split() if word != "up")


def _names(found: object, prefix: str = "") -> Iterator[str]:
    """The names of all values in a JSON object."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _names(value, f"{prefix}.{key}")
    else:
        yield prefix.removeprefix(".")


class Ctr:
    """containerd's own command, with images that it has been given."""

    name = "ctr"

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._count = 0

    def _ctr(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return self._rig.daemon.ctr("--namespace", "k8s.io", *arguments, stdin=stdin)

    def _said(self, *arguments: str, stdin: bytes = b"") -> str:
        done = self._ctr(*arguments, stdin=stdin)
        return f"{done.stdout.decode().strip()}; {done.stderr.decode().strip()}; status {done.returncode}"

    def _run(self, runtime: str, *options: str) -> list[str]:
        return ["run", "--runtime", KINDS[runtime], *options, IMAGE]

    def _id(self) -> str:
        self._count += 1
        return f"m{os.getpid()}-{self._count}"

    @contextmanager
    def _running(self, runtime: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        name = self._id()
        done = self._ctr(*self._run(runtime, "-d", *options), name, *command)
        assert done.returncode == 0, done.stderr.decode()
        try:
            yield name
        finally:
            self._ctr("task", "rm", "-f", name)
            self._ctr("container", "rm", name)

    def _state(self, name: str) -> str:
        lines = self._ctr("task", "ls").stdout.decode().splitlines()
        return next((line.split()[2] for line in lines if line.split()[0] == name), "none")

    def run(self, runtime: str) -> str:
        # Without input: ctr with runc hangs now and then when that ends before the task is known.
        return self._said(
            *self._run(runtime, "--rm"), self._id(), "sh", "-c", "echo out; echo err >&2; exit 3"
        )

    def run_it(self, runtime: str) -> str:
        command = [
            *self._run(runtime, "--rm", "-t"),
            self._id(),
            "sh",
            "-c",
            "test -t 0 && sleep 1 && echo yes",
        ]
        ctr = ["ctr", "--address", str(self._rig.daemon.socket), "--namespace", "k8s.io"]
        return _terminal([*ctr, *command], self._rig.daemon.env)

    def run_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            return self._state(name)

    def exec(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            return self._said(
                "task", "exec", "--exec-id", "e", name, "sh", "-c", "cat; echo err >&2; exit 4", stdin=b"in"
            )

    def exec_it(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            ctr = ["ctr", "--address", str(self._rig.daemon.socket), "--namespace", "k8s.io"]
            command = [
                *ctr,
                "task",
                "exec",
                "-t",
                "--exec-id",
                "e",
                name,
                "sh",
                "-c",
                "test -t 0 && sleep 1 && echo yes",
            ]
            return _terminal(command, self._rig.daemon.env)

    def attach(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", "sleep 3; echo late; exit 5") as name:
            return self._said("task", "attach", name)

    def kill(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", TRAP) as name:
            time.sleep(2)
            self._ctr("task", "kill", "-s", "TERM", name)
            until(lambda: self._state(name) == "STOPPED", "the task is stopped")
            said = re.search(r"non-zero exit code (\d+)", self._said("task", "rm", name))
            return f"status {said[1]}" if said else "status 0"

    def pause(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            states = []
            for what in ("pause", "resume"):
                self._ctr("task", what, name)
                states.append(self._state(name))
            return " ".join(states)

    def top(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            lines = self._ctr("task", "ps", name).stdout.decode().splitlines()[1:]
            return " ".join(Path(f"/proc/{line.split()[0]}/comm").read_text().strip() for line in lines)

    def stats(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            lines = self._ctr("task", "metrics", name).stdout.decode().splitlines()
            values = {line.split()[0]: line.split()[-1] for line in lines if "." in line.partition(" ")[0]}
            some = [key for key in ("memory.usage_in_bytes", "cpuacct.usage") if values.get(key, "0") != "0"]
            return f"{sorted(values)}; more than nothing: {some}"

    def inspect(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            found = json.loads(self._ctr("container", "info", name).stdout)
            return " ".join(sorted(key for key in _names(found) if not key.startswith("Runtime.Options")))

    def events(self, runtime: str) -> str:
        name = self._id()
        listening = subprocess.Popen(
            ["ctr", "--address", str(self._rig.daemon.socket), "--namespace", "k8s.io", "events"],
            env=self._rig.daemon.env,
            stdout=subprocess.PIPE,
        )
        time.sleep(1)
        self._ctr(*self._run(runtime, "--rm"), name, "true")
        time.sleep(1)
        listening.terminate()
        said = listening.communicate()[0].decode()
        return " ".join(re.findall(rf"/tasks/(\S+) [^\n]*\"{name}\"", said))

    def a_missing_command(self, runtime: str) -> str:
        done = self._ctr(*self._run(runtime, "--rm"), self._id(), "nosuch")
        found = re.search(r'exec: "nosuch": executable file not found in \$PATH', done.stderr.decode())
        return f"{found[0] if found else done.stderr.decode()}; status {done.returncode}"

    def volume(self, runtime: str) -> str:
        mount = f"type=bind,src={self._rig.directory}/net.d,dst=/v,options=rbind:ro"
        return self._said(
            *self._run(runtime, "--rm", "--mount", mount), self._id(), "sh", "-c", "ls /v; touch /v/x"
        )

    def oom(self, runtime: str) -> str:
        done = self._ctr(
            *self._run(runtime, "--rm", "--memory-limit", str(32 * MIB)), self._id(), "sh", "-c", EAT
        )
        return f"status {done.returncode}"


@dataclass(frozen=True)
class CriDaemon:
    """A daemon that kubelets speak to.

    Attributes:
        name: Of its column.
        endpoint: Its socket, as a URI.
        directory: Takes files, and has the configuration of its networks in ``net.d``.
        around: What is executed in its network namespace goes through this.
        env: Its environment.
        image: One of busybox's that it has.
        gateway: The address of its bridge.
        handlers: Runtime -> its handler.
    """

    name: str
    endpoint: str
    directory: Path
    around: list[str]
    env: dict[str, str]
    image: str
    gateway: str
    handlers: dict[str, str]


class Crictl:
    """What a kubelet asks for, in pods."""

    def __init__(self, daemon: CriDaemon) -> None:
        self.name = daemon.name
        self._daemon = daemon
        self._count = 0
        # Without one it complains, on a terminal into the midst of what is compared.
        self._config = daemon.directory / "crictl.yaml"
        self._config.write_text(
            f"runtime-endpoint: {daemon.endpoint}\nimage-endpoint: {daemon.endpoint}\ntimeout: {PATIENCE:g}\n"
        )

    def _command(self, *arguments: str) -> list[str]:
        return [*self._daemon.around, "crictl", "--config", str(self._config), *arguments]

    def _crictl(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self._command(*arguments), input=stdin, capture_output=True, timeout=PATIENCE, check=False
        )

    def _said(self, *arguments: str, stdin: bytes = b"") -> str:
        done = self._crictl(*arguments, stdin=stdin)
        status = re.search(r"exit (?:code|status) (\d+)|exited with (\d+)", done.stderr.decode())
        return (
            f"{done.stdout.decode().strip()}; status {status[1] or status[2] if status else done.returncode}"
        )

    def _json(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self._crictl(*arguments).stdout))

    @contextmanager
    def _running(
        self, runtime: str, *command: str, pod_more: dict[str, Any] | None = None, **more: Any
    ) -> Iterator[tuple[str, str]]:
        """A container in a pod: the ids of both."""
        self._count += 1
        name = f"m{self._count}"
        logs = self._daemon.directory / f"logs-{name}"
        pod = {
            "metadata": {"name": name, "uid": name, "namespace": "matrix"},
            "log_directory": str(logs),
            "linux": {},
            **(pod_more or {}),
        }
        image = {"image": self._daemon.image}
        container = {"metadata": {"name": "c"}, "image": image, "log_path": "c.log", "linux": {}}
        files = []
        for kind, content in (("pod", pod), ("container", {**container, "command": command, **more})):
            files.append(self._daemon.directory / f"{name}-{kind}.json")
            files[-1].write_text(json.dumps(content))
        done = self._crictl("runp", "--runtime", self._daemon.handlers[runtime], str(files[0]))
        assert done.returncode == 0, done.stderr.decode()
        pod_id = done.stdout.decode().strip()
        try:
            made = self._crictl("create", pod_id, str(files[1]), str(files[0]))
            assert made.returncode == 0, made.stderr.decode()
            container_id = made.stdout.decode().strip()
            started = self._crictl("start", container_id)
            assert started.returncode == 0, started.stderr.decode()
            yield container_id, pod_id
        finally:
            self._crictl("rmp", "-f", pod_id)

    def _status(self, container: str) -> dict[str, Any]:
        return dict(self._json("inspect", container)["status"])

    def _ended(self, container: str) -> str:
        until(lambda: self._status(container)["state"] == "CONTAINER_EXITED", "it has ended")
        status = self._status(container)
        return f"{status['reason']} {status['exitCode']}"

    def run_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as (container, _):
            return str(self._status(container)["state"])

    def exec(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as (container, _):
            streamed = self._said("exec", "-i", container, "sh", "-c", "cat; exit 4", stdin=b"in")
            return f"{streamed}; {self._said('exec', '-s', container, 'sh', '-c', 'echo out; exit 5')}"

    def exec_it(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as (container, _):
            command = self._command("exec", "-it", container, "sh", "-c", "test -t 0 && sleep 1 && echo yes")
            return _terminal(command, self._daemon.env)

    def logs(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", "echo out; echo err >&2; exit 5") as (container, _):
            ended = self._ended(container)
            lines = Path(self._status(container)["logPath"]).read_text().splitlines()
            return f"{ended}; {sorted(' '.join(line.split()[1:]) for line in lines)}"

    def attach(self, runtime: str) -> str:
        # Without a terminal it is one of critest's.
        with self._running(runtime, "sh", "-c", READS_SAYING_SO, tty=True, stdin=True) as (container, _):
            said = attached_to_terminal(self._command("attach", "-it", container))
            return f"{said}; {self._ended(container)}"

    def stop(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", TRAP) as (container, _):
            until(lambda: b"up" in self._crictl("logs", container).stdout, "the trap is set")
            self._crictl("stop", "--timeout", "60", container)
            return f"{self._ended(container)}; {self._crictl('logs', container).stdout.decode().split()}"

    def stats(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as (container, _):

            def found() -> dict[str, Any]:
                [one] = self._json("stats", "-o", "json", container)["stats"]
                return dict(one)

            until(
                lambda: int((found().get("memory") or {}).get("workingSetBytes", {}).get("value") or 0),
                "usage",
            )
            one = found()
            counted = int(one["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
            return f"{' '.join(sorted(_names(one)))}; cpu counted: {counted}"

    def update(self, runtime: str) -> str:
        limits = {"resources": {"memory_limit_in_bytes": 128 * MIB}}
        with self._running(runtime, "sleep", "1000", linux=limits) as (container, _):
            before = self._said("exec", "-s", container, "sh", "-c", LIMIT)
            self._crictl("update", "--memory", str(64 * MIB), container)
            return f"{before}; {self._said('exec', '-s', container, 'sh', '-c', LIMIT)}"

    def inspect(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as (container, pod):
            names = set(_names(self._json("inspect", container)["status"]))
            names |= set(_names(self._json("inspectp", pod)["status"]))
            return " ".join(sorted(names))

    def volume(self, runtime: str) -> str:
        source = str(self._daemon.directory / "net.d")
        mounts = [{"container_path": "/v", "host_path": source, "readonly": True}]
        with self._running(runtime, "sh", "-c", "ls /v; touch /v/x 2>&1", mounts=mounts) as (container, _):
            ended = self._ended(container)
            return f"{ended}; {self._crictl('logs', container).stdout.decode().split()}"

    def network(self, runtime: str) -> str:
        # CRI-O gives nobody what a ping takes, unless it is asked for.
        raw = {"security_context": {"capabilities": {"add_capabilities": ["NET_RAW"]}}}
        with self._running(runtime, "sleep", "1000", linux=raw) as (container, pod):
            address = self._json("inspectp", pod)["status"]["network"]["ip"]
            seen = self._said("exec", "-s", container, "ip", "-4", "address", "show", "eth0")
            ping = self._said("exec", "-s", container, "ping", "-c", "1", "-W", "20", self._daemon.gateway)
            return f"its address: {address in seen}; {'1 packets received' in ping}"

    def port(self, runtime: str) -> str:
        ports = {"port_mappings": [{"container_port": 80, "host_port": 12080}]}
        serve = "echo served >/tmp/x; exec httpd -f -p 80 -h /tmp"
        with self._running(runtime, "sh", "-c", serve, pod_more=ports):
            # Not by the loopback, which CRI-O does not forward.
            return _fetched(self._daemon.around, f"http://{self._daemon.gateway}:12080/x")

    def a_missing_command(self, runtime: str) -> str:
        try:
            with self._running(runtime, "nosuch"):
                return "it started"
        except AssertionError as error:
            found = re.search(r'exec: \\?"nosuch\\?": executable file not found in \$PATH', str(error))
            return found[0].replace("\\", "") if found else str(error)

    def oom(self, runtime: str) -> str:
        limits = {"resources": {"memory_limit_in_bytes": 32 * MIB}}
        with self._running(runtime, "sh", "-c", EAT, linux=limits) as (container, _):
            return self._ended(container)


class Docker:
    """Docker 23 or newer."""

    name = "docker"
    gateway = "10.77.0.1"

    def __init__(self, docker: Dockerd | Nerdctl) -> None:
        self._docker = docker
        self._command = ["docker"]
        self._count = 0

    def _said(self, *arguments: str, stdin: bytes = b"") -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            input=stdin,
            capture_output=True,
            timeout=120,
            env=self._docker.env,
            check=False,
        )
        return f"{done.stdout.decode().strip()}; {self._complaints(done.stderr)}; status {done.returncode}"

    def _complaints(self, said: bytes) -> str:
        """What a person would see on standard error."""
        return said.decode().strip()

    def _run(self, runtime: str, *options: str) -> list[str]:
        return ["run", "--runtime", "runc" if runtime == "runc" else KINDS[runtime], *options]

    @contextmanager
    def _running(self, runtime: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        self._count += 1
        name = f"m{self._count}"
        try:
            self._docker(*self._run(runtime, "-d", "--name", name, *options), "bb", *command)
            yield name
        finally:
            self._docker("rm", "-f", name, code=None)

    def _format(self, name: str, template: str) -> str:
        return self._docker("inspect", "--format", template, name).strip()

    def run(self, runtime: str) -> str:
        return self._said(
            *self._run(runtime, "--rm", "-i"), "bb", "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in"
        )

    def run_it(self, runtime: str) -> str:
        command = [*self._run(runtime, "--rm", "-it"), "bb", "sh", "-c", "test -t 0 && sleep 1 && echo yes"]
        return _terminal([*self._command, *command], self._docker.env)

    def run_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            return self._docker(
                "ps", "--filter", f"name={name}", "--format", "{{.State}} {{.Image}}"
            ).strip()

    def exec(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            return self._said("exec", "-i", name, "sh", "-c", "cat; echo err >&2; exit 4", stdin=b"in")

    def exec_it(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            command = ["exec", "-it", name, "sh", "-c", "test -t 0 && sleep 1 && echo yes"]
            return _terminal([*self._command, *command], self._docker.env)

    def logs(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", "echo out; echo err >&2") as name:
            self._docker("wait", name)
            return self._said("logs", name)

    def attach(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", READS, options=("-i",)) as name:
            said = _attached([*self._command, "attach", name], self._docker.env)
            return f"{said}; status {self._docker('wait', name).strip()}"

    def kill(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._docker("kill", name)
            return self._docker("wait", name).strip()

    def stop(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", TRAP) as name:
            until(lambda: "up" in self._docker("logs", name), "the trap is set")
            self._docker("stop", "-t", "60", name)
            return f"{self._format(name, '{{.State.ExitCode}}')} {self._docker('logs', name).split()}"

    def pause(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            states = []
            for what in ("pause", "unpause"):
                self._docker(what, name)
                states.append(self._format(name, "{{.State.Status}}"))
            return " ".join(states)

    def restart(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", TRAP) as name:
            until(lambda: "up" in self._docker("logs", name), "the trap is set")
            self._docker("restart", "-t", "60", name)
            until(lambda: self._docker("logs", name).split() == ["up", "bye", "up"], "it has restarted")
            return self._format(name, "{{.State.Status}}")

    def wait(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", "sleep 2; exit 9") as name:
            return self._docker("wait", name).strip()

    def cp(self, runtime: str) -> str:
        file = self._docker.directory / "copied"
        file.write_text("content")
        with self._running(runtime, "sleep", "1000") as name:
            self._docker("cp", str(file), f"{name}:/there")
            inside = self._docker("exec", name, "cat", "/there")
            self._docker("exec", name, "sh", "-c", "echo back >/back")
            self._docker("cp", f"{name}:/back", str(file))
            return f"{inside} {file.read_text().strip()}"

    def top(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            lines = self._docker("top", name, "-o", "pid,comm").splitlines()[1:]
            return " ".join(line.split()[-1] for line in lines)

    def stats(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000", options=("-m", "128m")) as name:
            template = "{{.MemUsage}}|{{.PIDs}}|{{.NetIO}}|{{.CPUPerc}}"
            usage, pids, net, _ = self._docker("stats", "--no-stream", "--format", template, name).split("|")
            used = [what[:2] != "0B" for what in (usage, net)]
            return f"limit {usage.split('/')[1].strip()}; {pids} processes; used memory, network: {used}"

    def update(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000", options=("-m", "128m")) as name:
            before = self._docker("exec", name, "sh", "-c", LIMIT).strip()
            self._docker("update", "--memory", "64m", "--memory-swap", "64m", name)
            return f"{before} {self._docker('exec', name, 'sh', '-c', LIMIT).strip()}"

    def inspect(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000", options=("-m", "128m")) as name:
            [found] = json.loads(self._docker("inspect", name))
            state = found["State"]
            address = bool(found["NetworkSettings"]["IPAddress"])
            return f"{state['Status']} {state['Pid'] > 0} {found['HostConfig']['Memory']} {address}"

    def events(self, runtime: str) -> str:
        since = str(time.time())
        with self._running(runtime, "true") as name:
            self._docker("wait", name)
            time.sleep(0.5)
            seen = self._docker(
                *("events", "--since", since, "--until", str(time.time())),
                *("--filter", f"container={name}", "--format", "{{.Action}}"),
            )
            return " ".join(seen.split())

    def commit(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._docker("exec", name, "sh", "-c", "echo kept >/kept")
            self._docker("commit", name, f"made-{runtime}")
            try:
                return self._docker(*self._run(runtime, "--rm"), f"made-{runtime}", "cat", "/kept").strip()
            finally:
                self._docker("rmi", "-f", f"made-{runtime}", code=None)

    def volume(self, runtime: str) -> str:
        (self._docker.directory / "v").mkdir(exist_ok=True)
        (self._docker.directory / "v/file").write_text("x")
        options = ("--rm", "-v", f"{self._docker.directory}/v:/v:ro", "-v", f"named-{runtime}:/named")
        try:
            return self._said(*self._run(runtime, *options), "bb", "sh", "-c", "ls /v; touch /named/y /v/x")
        finally:
            self._docker("volume", "rm", f"named-{runtime}", code=None)

    def network(self, runtime: str) -> str:
        said = self._said(*self._run(runtime, "--rm"), "bb", "ping", "-c", "1", "-W", "20", self.gateway)
        return str("1 packets received" in said)

    def port(self, runtime: str) -> str:
        serve = "echo served >/x; exec httpd -f -p 80 -h /"
        with self._running(runtime, "sh", "-c", serve, options=("-p", "12081:80")):
            return _fetched(self._docker.containerd.around, "http://127.0.0.1:12081/x")

    def healthcheck(self, runtime: str) -> str:
        options = ("--health-cmd", "test -e /ok", "--health-interval", "1s", "--health-retries", "1")
        with self._running(runtime, "sleep", "1000", options=options) as name:
            seen = []
            for state in ("unhealthy", "healthy"):
                until(lambda state=state: self._format(name, "{{.State.Health.Status}}") == state, state)  # type: ignore[misc]
                seen.append(state)
                self._docker("exec", name, "sh", "-c", "touch /ok")
            return " ".join(seen)

    def a_missing_command(self, runtime: str) -> str:
        said = self._said(*self._run(runtime, "--rm"), "bb", "nosuch")
        found = re.search(r'exec: "nosuch": executable file not found in \$PATH', said)
        return f"{found[0] if found else said}; {said.rpartition('; ')[2]}"

    def oom(self, runtime: str) -> str:
        options = ("-m", "32m", "--memory-swap", "32m")
        with self._running(runtime, "sh", "-c", EAT, options=options) as name:
            code = self._docker("wait", name).strip()
            return f"{code} OOMKilled: {self._format(name, '{{.State.OOMKilled}}')}"


def _fetched(around: list[str], url: str) -> str:
    """What a web server says, seen from a network namespace."""
    fetch = f"import urllib.request; print(urllib.request.urlopen('{url}', timeout=5).read().decode())"
    said = ""

    def answers() -> bool:
        nonlocal said
        done = subprocess.run([*around, "python3", "-c", fetch], capture_output=True, check=False)
        said = done.stdout.decode().strip()
        return done.returncode == 0

    until(answers, f"{url} answers")
    return said
