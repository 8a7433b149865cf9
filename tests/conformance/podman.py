"""``tools/conformance --podman``: podman's operations with runc, crun and kata, for the table of docs/podman.md.

Resumable: what was seen is a line of ``build/conformance/podman.jsonl`` the moment it is there, and is not tried again.
Those that Docker has as well are done as there (`clients.Docker`), and have the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clients import EAT, LIMIT, READS, Docker, _fetched, _terminal, operations
from podman_page import EXPECTED, LEFT, works, write, wrong
from podman_support import GATEWAY, IMAGE, ROOT, RUNTIMES
from podman_support import Podman as Program
from podman_support import found as found_podman
from podman_support import running as podman_running
from terminal import Terminal
from waiting import until

MINE = (
    *("create, init, start", "detach keys", "exec -d", "rm -f", "run --rm", "run --init", "run --timeout"),
    *(
        "run --read-only",
        "run --user",
        "ports of a network",
        "secret",
        "diff",
        "mount",
        "restart policy",
        "pod",
    ),
    *("pod ps", "pod stop", "play kube", "names", "big output", "a lost conmon", "system prune"),
    *("build", "docker by podman's service", "ends of many"),
)
"""Rows that Docker's operations have not."""

STATE = ROOT / "build/conformance"
PAGE = ROOT / "docs/podman.md"
PATIENCE_S = 120


class Podman(Docker):
    """podman 4.3 or newer, as root."""

    name = "podman"
    gateway = GATEWAY
    lacks = frozenset[str]()

    def __init__(self, podman: Program) -> None:
        self._podman = self.program = podman
        self._docker = podman  # type: ignore[assignment]
        self._command = podman.command
        self._count = 0

    def _run(self, runtime: str, *options: str) -> list[str]:
        return ["--runtime", runtime, "run", *options]

    def _complaints(self, said: bytes) -> str:
        # Warnings about the host, which are the same with every runtime.
        lines = [line for line in said.decode().splitlines() if "level=warning" not in line]
        return "\n".join(lines).strip()

    @contextmanager
    def _running(self, runtime: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        self._count += 1
        name = f"m{self._count}"
        try:
            self._podman(*self._run(runtime, "-d", "--name", name, *options), IMAGE, *command)
            yield name
        finally:
            self._podman("rm", "-f", "-t", "0", name, code=None)

    def _bb(self, runtime: str, *words: str) -> str:
        """What a container says that runs something and is removed."""
        return self._said(*self._run(runtime, "--rm"), *words)

    # ---- where podman says something else than Docker ----

    def run(self, runtime: str) -> str:
        return self._said(
            *self._run(runtime, "--rm", "-i"), IMAGE, "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in"
        )

    def run_it(self, runtime: str) -> str:
        command = [*self._run(runtime, "--rm", "-it"), IMAGE, "sh", "-c", "test -t 0 && sleep 1 && echo yes"]
        return _terminal([*self._command, *command], self._podman.env)

    def attach(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", READS, options=("-i",)) as name:
            command = [*self._command, "attach", "--no-stdin=false", name]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._podman.env
            ) as client:
                time.sleep(1)
                said, _ = client.communicate(b"hello\n", timeout=PATIENCE_S)
            return f"{said.decode().strip()}; status {self._podman('wait', name).strip()}"

    def top(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            lines = self._podman("top", name, "pid", "comm").splitlines()[1:]
            return " ".join(line.split()[-1] for line in lines)

    def stats(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000", options=("-m", "128m")) as name:
            template = "{{.MemUsage}}|{{.PIDs}}|{{.NetIO}}"
            said = self._podman("stats", "--no-stream", "--format", template, name)
            usage, pids, net = said.strip().splitlines()[-1].split("|")
            used = [what.strip()[:2] not in ("0B", "--") for what in (usage, net)]
            return f"limit {usage.split('/')[1].strip()}; {pids} processes; used memory, network: {used}"

    def events(self, runtime: str) -> str:
        with self._running(runtime, "true") as name:
            self._podman("wait", name)
            time.sleep(0.5)
            seen = self._podman(
                "events", "--stream=false", "--filter", f"container={name}", "--format", "{{.Status}}"
            )
            return " ".join(word for word in seen.split() if word not in ("cleanup", "wait"))

    def commit(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._podman("exec", name, "sh", "-c", "echo kept >/kept")
            self._podman("commit", "-q", name, f"localhost/made-{runtime}")
            try:
                said = self._bb(runtime, f"localhost/made-{runtime}", "cat", "/kept")
                return said.partition(";")[0]
            finally:
                self._podman("rmi", "-f", f"localhost/made-{runtime}", code=None)

    def volume(self, runtime: str) -> str:
        (self._podman.directory / "x").mkdir(exist_ok=True)
        (self._podman.directory / "x/file").write_text("x")
        options = ("-v", f"{self._podman.directory}/x:/v:ro", "-v", f"named-{runtime}:/named")
        try:
            return self._bb(runtime, *options, IMAGE, "sh", "-c", "ls /v; touch /named/y /v/x")
        finally:
            self._podman("volume", "rm", "-f", f"named-{runtime}", code=None)

    def network(self, runtime: str) -> str:
        options = ("--cap-add", "NET_RAW")  # podman 5 does not give it
        said = self._bb(runtime, *options, IMAGE, "ping", "-c1", "-W20", self.gateway)
        return str("1 packets received" in said)

    def port(self, runtime: str) -> str:
        serve = "echo served >/x; exec httpd -f -p 80 -h /"
        with self._running(runtime, "sh", "-c", serve, options=("-p", "12081:80")):
            return _fetched(self._podman.around, "http://127.0.0.1:12081/x")

    def healthcheck(self, runtime: str) -> str:
        # Without systemd nobody calls it at intervals.
        options = ("--health-cmd", "test -e /ok", "--health-interval", "disable", "--health-retries", "1")
        with self._running(runtime, "sleep", "1000", options=options) as name:
            seen = []
            for _ in range(2):
                self._podman("healthcheck", "run", name, code=None)
                seen.append(self._format(name, "{{.State.Health.Status}}"))
                self._podman("exec", name, "sh", "-c", "touch /ok")
            return " ".join(seen)

    def a_missing_command(self, runtime: str) -> str:
        return self._bb(runtime, IMAGE, "nosuch")

    def update(self, runtime: str) -> str:
        with self._running(
            runtime, "sleep", "1000", options=("-m", "128m", "--memory-swap", "128m")
        ) as name:
            before = self._podman("exec", name, "sh", "-c", LIMIT).strip()
            self._podman("update", "--memory", "64m", name)
            return f"{before} {self._podman('exec', name, 'sh', '-c', LIMIT).strip()}"

    # ---- what Docker has not, or is not tried with it ----

    def create_init_start(self, runtime: str) -> str:
        self._count += 1
        name = f"m{self._count}"
        states = []
        try:
            self._podman("--runtime", runtime, "create", "--name", name, IMAGE, "sleep", "1000")
            states.append(self._format(name, "{{.State.Status}}"))
            for verb in ("init", "start"):
                self._podman(verb, name)
                states.append(self._format(name, "{{.State.Status}}"))
            return " ".join(states)
        finally:
            self._podman("rm", "-f", "-t", "0", name, code=None)

    def detach_keys(self, runtime: str) -> str:
        self._count += 1
        name = f"m{self._count}"
        command = [*self._command, *self._run(runtime, "-it", "--name", name), IMAGE, "sh"]
        try:
            with Terminal(command, self._podman.env) as first:
                first.typed("echo a-$((1+1))\r")
                first.expect("a-2")
                first.typed("\x10")  # Ctrl-P, Ctrl-Q: podman takes them one by one
                time.sleep(0.5)
                first.typed("\x11")
                first.ended()
            return self._format(name, "{{.State.Status}}")
        finally:
            self._podman("rm", "-f", "-t", "0", name, code=None)

    def exec_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._podman("exec", "-d", name, "sh", "-c", "echo done >/tmp/made")
            until(lambda: self._podman("exec", name, "cat", "/tmp/made", code=None) == "done\n", "it ran")
            return "done"

    def rm_f(self, runtime: str) -> str:
        with self._running(runtime, "sh", "-c", "trap '' TERM; sleep 1000") as name:
            self._podman("rm", "-f", "-t", "0", name)
            return "gone" if name not in self._podman("ps", "-a", "--format", "{{.Names}}") else "there"

    def run_rm(self, runtime: str) -> str:
        said = self._bb(runtime, IMAGE, "sh", "-c", "exit 7")
        return f"{len(self._podman('ps', '-aq').split())} containers, {said.split('; ')[-1]}"

    def run_init(self, runtime: str) -> str:
        said = self._bb(runtime, "--init", IMAGE, "cat", "/proc/1/comm")
        return said.partition(";")[0]

    def run_timeout(self, runtime: str) -> str:
        return self._bb(runtime, "--timeout", "3", IMAGE, "sleep", "1000").rpartition("status ")[2]

    def run_read_only(self, runtime: str) -> str:
        said = self._bb(runtime, "--read-only", IMAGE, "touch", "/x")
        return "Read-only file system" if "Read-only file system" in said else said

    def run_user(self, runtime: str) -> str:
        said = self._bb(runtime, "--user", "1000:1000", IMAGE, "id")
        return f"{' '.join(said.split()[:2])}; {said.split('; ')[-1]}".replace(";;", ";")

    def ports_of_a_network(self, runtime: str) -> str:
        name = f"net-{runtime}"
        self._podman("network", "create", name)
        serve = "echo served >/x; exec httpd -f -p 80 -h /"
        try:
            with self._running(runtime, "sh", "-c", serve, options=("--network", name, "-p", "12082:80")):
                return _fetched(self._podman.around, "http://127.0.0.1:12082/x")
        finally:
            self._podman("network", "rm", "-f", name, code=None)

    def names(self, runtime: str) -> str:
        name = f"nam-{runtime}"
        self._podman("network", "create", name)
        serve = "echo found >/x; exec httpd -f -p 80 -h /"
        try:
            with self._running(runtime, "sh", "-c", serve, options=("--network", name)) as other:
                fetch = f"for i in 1 2 3 4 5 6 7 8; do wget -q -O- http://{other}/x && break; sleep 1; done"
                return self._bb(runtime, "--network", name, IMAGE, "sh", "-c", fetch).partition(";")[0]
        finally:
            self._podman("network", "rm", "-f", name, code=None)

    def secret(self, runtime: str) -> str:
        name = f"sec-{runtime}"
        self._podman("secret", "create", name, "-", stdin=b"hidden")
        try:
            return self._bb(runtime, "--secret", name, IMAGE, "cat", f"/run/secrets/{name}").partition(";")[
                0
            ]
        finally:
            self._podman("secret", "rm", name, code=None)

    def diff(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._podman("exec", name, "touch", "/new")
            return "\n".join(line for line in self._podman("diff", name).splitlines() if "/new" in line)

    def mount(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            self._podman("exec", name, "sh", "-c", "echo there >/here")
            place = self._podman("mount", name).strip()
            said = Path(place, "here").read_text().strip()
            self._podman("umount", name)
            return said

    def restart_policy(self, runtime: str) -> str:
        command = "echo start >>/v/starts; exit 1"
        where = self._podman.directory / f"starts-{runtime}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        options = ("--restart", "on-failure:2", "-v", f"{where}:/v")
        with self._running(runtime, "sh", "-c", command, options=options) as name:

            def has_ended() -> bool:
                return self._format(name, "{{.State.Status}} {{.RestartCount}}") == "exited 2"

            until(has_ended, "it is not started again")
            return f"{len((where / 'starts').read_text().split())} starts"

    @contextmanager
    def _pod(self, runtime: str) -> Iterator[str]:
        self._count += 1
        name = f"p{self._count}"
        try:
            self._podman("--runtime", runtime, "pod", "create", "--name", name)
            serve = "echo served >/x; exec httpd -f -p 8080 -h /"
            self._podman(
                *self._run(runtime, "-d", "--pod", name, "--name", f"{name}a"), IMAGE, "sh", "-c", serve
            )
            self._podman(
                *self._run(runtime, "-d", "--pod", name, "--name", f"{name}b"), IMAGE, "sleep", "1000"
            )
            yield name
        finally:
            self._podman("pod", "rm", "-f", "-t", "0", name, code=None)

    def pod(self, runtime: str) -> str:
        with self._pod(runtime) as name:
            fetch = "for i in 1 2 3 4 5 6; do wget -q -O- http://127.0.0.1:8080/x && break; sleep 1; done"
            said = self._podman("exec", f"{name}b", "sh", "-c", fetch).strip()
            names = {self._podman("exec", f"{name}{which}", "hostname").strip() for which in "ab"}
            return f"{said}; same host name: {len(names) == 1}"

    def pod_ps(self, runtime: str) -> str:
        with self._pod(runtime) as name:
            template = "{{.NumberOfContainers}} containers, {{.Status}}"
            return self._podman("pod", "ps", "--filter", f"name={name}", "--format", template).strip()

    def pod_stop(self, runtime: str) -> str:
        with self._pod(runtime) as name:
            self._podman("pod", "stop", "-t", "1", name)
            until(
                lambda: (
                    "Exited"
                    in self._podman("pod", "ps", "--filter", f"name={name}", "--format", "{{.Status}}")
                ),
                "the pod has stopped",
            )
            return "Exited"

    def play_kube(self, runtime: str) -> str:
        container = {
            "name": "c",
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": ["sh", "-c", "echo served >/x; exec httpd -f -p 80 -h /"],
            "ports": [{"containerPort": 80, "hostPort": 12083}],
        }
        kube = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"kube-{runtime}"},
            "spec": {"containers": [container]},
        }
        path = self._podman.directory / "kube.yaml"
        path.write_text(json.dumps(kube))
        try:
            self._podman("--runtime", runtime, "play", "kube", str(path))
            said = _fetched(self._podman.around, "http://127.0.0.1:12083/x")
        finally:
            self._podman("play", "kube", "--down", str(path), code=None)
        pods = self._podman("pod", "ps", "-q").split()
        return f"{said}; {'removed' if not pods else 'still there'}"

    def big_output(self, runtime: str) -> str:
        produce = "head -c 20000000 /dev/zero"
        counted = []
        done = subprocess.run(
            [*self._command, *self._run(runtime, "--rm"), IMAGE, "sh", "-c", produce],
            capture_output=True, env=self._podman.env, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        counted.append(str(len(done.stdout)))
        with self._running(runtime, "sleep", "1000") as name:
            done = subprocess.run(
                [*self._command, "exec", name, "sh", "-c", produce],
                capture_output=True, env=self._podman.env, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
            counted.append(str(len(done.stdout)))
        return " ".join(counted)

    def a_lost_conmon(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            os.kill(int(self._format(name, "{{.State.ConmonPid}}")), signal.SIGKILL)
            time.sleep(0.3)
            for _ in range(2):  # podman 5 complains of the lost conmon first
                self._podman("rm", "-f", "-t", "0", name, code=None)
            return "removed" if name not in self._podman("ps", "-a", "--format", "{{.Names}}") else "there"

    def run_d(self, runtime: str) -> str:
        with self._running(runtime, "sleep", "1000") as name:
            said = self._podman(
                "ps", "--filter", f"name={name}", "--format", "{{.Status}} {{.Image}}"
            ).split()
            return f"{said[0].lower()} {said[-1]}"

    def oom(self, runtime: str) -> str:
        options = ("-m", "32m", "--memory-swap", "32m")
        with self._running(runtime, "sh", "-c", EAT, options=options) as name:
            return self._podman("wait", name).strip()

    def system_prune(self, runtime: str) -> str:
        self._podman(*self._run(runtime, "--name", "ended"), IMAGE, "true")
        self._podman("container", "prune", "-f")
        return (
            "nothing of it" if "ended" not in self._podman("ps", "-a", "--format", "{{.Names}}") else "there"
        )

    def build(self, runtime: str) -> str:
        context = self._podman.directory / "context"
        context.mkdir(exist_ok=True)
        (context / "Containerfile").write_text(f"FROM {IMAGE}\nRUN echo made >/made\n")
        program = str(self._podman.directory / "bin" / ("kata-runtime" if runtime == "kata" else runtime))
        tag = f"localhost/built-{runtime}"
        try:
            self._podman(
                "build", "--runtime", program, "--pull=never", "--no-cache", "-t", tag, str(context)
            )
            return self._bb("runc", tag, "cat", "/made").partition(";")[0]
        finally:
            self._podman("rmi", "-f", tag, code=None)

    def docker_by_podmans_service(self, runtime: str) -> str:
        socket = self._podman.directory / "service.sock"
        address = f"unix://{socket}"
        docker = shutil.which("docker", path=f"{ROOT}/build/programs/usr/bin:{os.environ['PATH']}")
        if docker is None:
            return "failed: there is no docker"
        with subprocess.Popen(
            [*self._command, "--runtime", runtime, "system", "service", "--time", "0", address],
            env=self._podman.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as service:  # fmt: skip
            try:
                until(socket.exists, "the service listens")
                done = subprocess.run(
                    [
                        *(docker, "-H", address, "run", "-i", "--name", "served", IMAGE),
                        *("sh", "-c", "cat; echo err >&2; exit 3"),
                    ],
                    input=b"in", capture_output=True, timeout=PATIENCE_S, check=False,
                )  # fmt: skip
            finally:
                service.terminate()
        socket.unlink(missing_ok=True)
        self._podman("rm", "-f", "-t", "0", "served", code=None)
        return f"{done.stdout.decode()}; {done.stderr.decode().strip()}; status {done.returncode}"

    def ends_of_many(self, runtime: str) -> str:
        """Twenty short runs and execs: the status and every byte of each."""
        script = "head -c $0 /dev/zero; exit $1"
        right = 0
        with self._running(runtime, "sleep", "1000") as name:
            for number in range(20):
                size = 4099 * number
                for words in ([*self._run(runtime, "--rm"), IMAGE], ["exec", name]):
                    done = subprocess.run(
                        [*self._command, *words, "sh", "-c", script, str(size), str(number)],
                        capture_output=True, env=self._podman.env, timeout=PATIENCE_S, check=False,
                    )  # fmt: skip
                    right += done.stdout == bytes(size) and done.returncode == number
        return f"{right} right"


def tried(client: Podman) -> dict[str, Callable[[str], str]]:
    """What is done with podman: row -> operation."""
    found = dict(operations(client))
    for name in MINE:
        found[name] = getattr(client, re.sub("[ ,-]+", "_", name.replace("'", "")))
    return found


class Record:
    """What was seen so far: (operation, runtime) -> words.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[str, str], str] = {}
        with suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                operation, runtime, seen = json.loads(line)
                if operation in EXPECTED:
                    self.found[operation, runtime] = seen

    def add(self, operation: str, runtime: str, seen: str) -> None:
        """Note one, at once and for good."""
        self.found[operation, runtime] = seen
        with open(self._path, "a") as file:
            file.write(json.dumps([operation, runtime, seen]) + "\n")

    def forget(self, text: str, runtimes: tuple[str, ...]) -> None:
        """Drop those of runtimes whose operation contains a text."""
        kept = {
            key: seen for key, seen in self.found.items() if key[1] not in runtimes or text not in key[0]
        }
        self._path.unlink(missing_ok=True)
        self.found = {}
        for (operation, runtime), seen in kept.items():
            self.add(operation, runtime, seen)


def run(guest: Path, record: Record, runtimes: tuple[str, ...], only: str, base: Path | None = None) -> None:
    """Try out what has not been tried.

    Args:
        guest: The guest's directory.
        record: Is filled in.
        runtimes: With these alone.
        only: Only operations whose name contains this.
        base: Where podman's packages are, if not where `podman_support.found` finds them.
    """
    directory = Path(tempfile.mkdtemp(prefix="kp", dir="/tmp"))
    with podman_running(directory, guest, f"oci:{ROOT}/build/images/busybox", base) as program:
        for name, operation in tried(Podman(program)).items():
            for runtime in runtimes:
                if (name, runtime) in record.found or only not in name:
                    continue
                started = time.monotonic()
                seen = _seen(operation, runtime)
                record.add(name, runtime, seen)
                if left := program.sweep():
                    words = sorted({re.sub(r"[0-9a-f]{12,}|\d{3,}", "N", one) for one in left})
                    record.add(LEFT, runtime, f"{name}: {'; '.join(words)}")
                elif not only and (LEFT, runtime) not in record.found:
                    record.add(LEFT, runtime, "nothing")
                right = "works" if works(name, seen) else "differs"
                print(f"{name}, {runtime}: {right} ({time.monotonic() - started:.1f} s)", flush=True)
                if right != "works":
                    print(f"    {seen[:1500]}", flush=True)


def _seen(operation: Callable[[str], str], runtime: str) -> str:
    try:
        return operation(runtime)
    except (AssertionError, subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
        return f"failed: {type(error).__name__}: {str(error)[:1200]}"


def version(base: Path | None = None) -> str:
    """What a podman calls itself, without its last number: ``4.3``.

    Args:
        base: As `run` has it.
    """
    program = (base or found_podman()) / "usr/bin/podman"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return ".".join(said.split()[-1].split(".")[:2])


def main() -> int:
    """Try out what has not been tried, and write the table.

    Returns:
        1 when something with kata differs for no known reason.
    """
    parser = argparse.ArgumentParser(prog="tools/conformance --podman", description=__doc__)
    parser.add_argument("--again", metavar="TEXT", action="append", default=[], help="try these once more")
    parser.add_argument("--fresh", action="store_true", help="try everything once more")
    parser.add_argument("--only", metavar="TEXT", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIRECTORY",
        help="podman's packages (tools/debian-podman unpacks another suite's)",
    )
    parser.add_argument("--runtime", choices=RUNTIMES, help="with this runtime alone")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that containers are removed on the way out
    STATE.mkdir(parents=True, exist_ok=True)
    record = Record(STATE / f"podman-{version(options.base)}.jsonl")
    runtimes = (options.runtime,) if options.runtime else RUNTIMES
    for text in [""] if options.fresh else options.again:
        record.forget(text, runtimes)
    run(Path(os.environ["KATA_GUEST_DIR"]), record, runtimes, options.only, options.base)
    if PAGE.exists():
        records = sorted(
            STATE.glob("podman-*.jsonl"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]
        )
        write(PAGE, {path.stem.removeprefix("podman-"): Record(path).found for path in records})
        print(f"{PAGE.relative_to(ROOT)} is written")
    found = wrong(record.found)
    for what in found:
        print(f"not right: {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
