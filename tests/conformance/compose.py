"""Compose files: `docker compose` and `podman-compose` with runc and with kata as the runtime, step by step.

What was seen with a client and a runtime replaces what was seen with them before
(``build/conformance/compose.json``), and all of it goes into docs/compose.md.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import images
import marked_page
from podman_support import Podman
from scripts import write_script
from test_docker import Docker
from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compose.md"
STATE = ROOT / "build/conformance/compose.json"
BEGIN, END = "<!-- written by tools/conformance --compose -->", "<!-- up to here -->"
PLUGIN = ROOT / "build/programs/compose/docker-compose"
PODMAN_COMPOSE = ROOT / "build/programs/compose/python"
RUNTIMES = {
    "docker": {"runc": "runc", "kata": "io.containerd.kata.v2"},
    "podman": {"runc": "runc", "kata": "kata"},
}
FILE = """\
services:
  web:
    image: {image}
    runtime: {runtime}
    command: httpd -f -p 80 -h /srv
    stop_signal: SIGKILL
    ports: ["{port}:80"]
    environment: {{GREETING: good morning}}
    volumes: ["./site:/srv:ro", "data:/data"]
    healthcheck: {{test: ["CMD", "wget", "-qO-", "http://127.0.0.1/"], interval: 1s, timeout: 30s, retries: 30}}
  client:
    image: {image}
    runtime: {runtime}
    command: wget -qO- http://web/index.html
    depends_on: {{web: {{condition: service_healthy}}}}
volumes: {{data: {{}}}}
"""
PORT = 18090


@dataclass
class Project:
    """A compose file of two services, and the program that reads it.

    Attributes:
        program: `docker compose` or `podman-compose`, without the command.
        env: Its environment.
        directory: Where the file is.
        around: What is to be put before a command that has to see published ports.
    """

    program: list[str]
    env: dict[str, str]
    directory: Path
    around: list[str]

    def __call__(self, *words: str, code: int | None = 0) -> str:
        """Run a command; its standard output.

        Raises:
            AssertionError: It ends otherwise than with `code`.
        """
        done = subprocess.run(
            [*self.program, *words],
            env=self.env,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert code is None or done.returncode == code, (
            f"{' '.join(words)}: {done.returncode}: {done.stderr[-600:]}"
        )
        return done.stdout

    def until(self, words: tuple[str, ...], pattern: str) -> str:
        """Repeat a command until its output has a pattern; what that found."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, said := self(*words, code=None))):
            assert time.monotonic() < deadline, f"{' '.join(words)}: {said[-600:]}"
            time.sleep(0.5)
        return found[0]


def up(project: Project) -> str:
    """`up -d`: the second service starts when the first is healthy, finds it by name, and ends"""
    project("up", "-d")
    return project.until(("logs", "client"), "It works")


def status(project: Project) -> str:
    """`ps` lists the service that runs"""
    return project.until(("ps",), r"\bweb\b|web_1|web-1") and "web"


def port(project: Project) -> str:
    """the published port answers on the host"""
    script = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{PORT}/').read().decode())"
    deadline = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(
            [*project.around, "python3", "-c", script], capture_output=True, text=True, check=False
        )
        if not done.returncode or time.monotonic() > deadline:
            return (done.stdout or done.stderr).strip()[-200:]
        time.sleep(0.5)


def execute(project: Project) -> str:
    """`exec` runs a command in a service, with the environment of the file"""
    return project("exec", "-T", "web", "sh", "-c", "echo $GREETING").strip()


def changed(project: Project) -> str:
    """a file changed in the project's directory is the one that is served (`./site:/srv:ro`)"""
    page = project.directory / "site/index.html"
    page.write_text("It works again\n")
    return port(project)


def kept(project: Project) -> str:
    """a named volume keeps its files over `restart` and `up --force-recreate`"""
    project("exec", "-T", "web", "sh", "-c", "echo kept > /data/file")
    project("restart", "web")
    first = project.until(("exec", "-T", "web", "cat", "/data/file"), "kept")
    project("up", "-d", "--force-recreate", "web")
    return f"{first} {project.until(('exec', '-T', 'web', 'cat', '/data/file'), 'kept')}"


def once(project: Project) -> str:
    """`run --rm` starts a service once with another command, and ends with its status"""
    project("run", "--rm", "--no-deps", "-T", "client", "sh", "-c", "exit 7", code=7)
    return "7"


def stopped(project: Project) -> str:
    """`stop` and `start`"""
    project("stop", "-t", "1", "web")
    project("start", "web")
    return project.until(("exec", "-T", "web", "echo", "back"), "back")


def down(project: Project) -> str:
    """`down -v` takes everything away"""
    project("down", "-v", "-t", "1")
    return project("ps", "-q").strip() or "nothing"


STEPS: dict[Callable[[Project], str], str] = {
    up: "It works",
    status: "web",
    port: "It works",
    execute: "good morning",
    changed: "It works again",
    kept: "kept kept",
    once: "7",
    stopped: "back",
    down: "nothing",
}
"""The steps in their order, and what is right."""


@contextmanager
def _docker(
    directory: Path, guest: Path, archive: Path
) -> Iterator[tuple[list[str], dict[str, str], list[str]]]:
    daemon = Docker(directory, guest)
    (directory / "daemon.json").write_text("{}")
    plugins = directory / "config/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-compose").symlink_to(PLUGIN)
    subprocess.run(["ip", "netns", "add", daemon.netns], check=True)
    try:
        subprocess.run(["ip", "-n", daemon.netns, "link", "set", "lo", "up"], check=True)
        try:
            daemon.start()
            daemon("load", "-i", str(archive))
            env = {**daemon.env, "DOCKER_CONFIG": str(directory / "config")}
            yield ["docker", "compose"], env, daemon.containerd.around
        finally:
            for identity in daemon("ps", "-aq", code=None).split():
                daemon("rm", "-f", identity, code=None)
            daemon.stop()
    finally:
        subprocess.run(["ip", "netns", "delete", daemon.netns], check=False)


@contextmanager
def _podman(
    directory: Path, guest: Path, archive: Path
) -> Iterator[tuple[list[str], dict[str, str], list[str]]]:
    one = Podman(directory, guest)
    left: list[str] = []
    try:
        one.start(f"docker-archive:{archive}")
        # podman-compose starts `podman` by name, and one that is not told where its files are would use the host's.
        write_script(directory / "bin/podman", one.command, one.env)
        env = {**one.env, "PYTHONPATH": str(PODMAN_COMPOSE), "PATH": f"{directory}/bin:{one.env['PATH']}"}
        yield [sys.executable, "-m", "podman_compose"], env, one.around
    finally:
        left = one.stop()
    assert not left, f"podman's containers left behind: {left}"


CLIENTS = {"docker": _docker, "podman": _podman}
NAMES = {"docker": "docker compose", "podman": "podman-compose"}


def run(
    guest: Path, clients: list[str], runtimes: list[str]
) -> tuple[dict[tuple[str, str, str], str], dict[str, str]]:
    """Take every step with every client and runtime.

    Returns:
        What was seen, by the step's description, client and runtime; and what each client calls itself.
    """
    seen: dict[tuple[str, str, str], str] = {}
    versions = {}
    directory = Path(tempfile.mkdtemp(prefix="kc", dir="/tmp"))  # a short path: there are sockets in it
    try:
        layout, archive = directory / "layout", directory / "bb.tar"
        images.write(images.Image({"Cmd": ["sh"]}), ROOT / "build/images/busybox", layout)
        copy = [
            "skopeo",
            "copy",
            "--quiet",
            f"oci:{layout}:latest",
            f"docker-archive:{archive}:localhost/bb:latest",
        ]
        subprocess.run(copy, check=True)
        for client in clients:
            (directory / client).mkdir()
            with CLIENTS[client](directory / client, guest, archive) as (program, env, around):
                for runtime in runtimes:
                    place = directory / f"{client}-{runtime}"
                    (place / "site").mkdir(parents=True)
                    (place / "site/index.html").write_text("It works\n")
                    text = FILE.format(image="localhost/bb", runtime=RUNTIMES[client][runtime], port=PORT)
                    (place / "compose.yaml").write_text(text)
                    project = Project(program, env, place, around)
                    versions[client] = _version(project)
                    try:
                        for step in STEPS:
                            seen[str(step.__doc__), client, runtime] = said = _said(step, project)
                            print(f"{NAMES[client]}, {runtime}: {said[:300]!r}: {step.__doc__}", flush=True)
                    finally:
                        project("down", "-v", "-t", "1", code=None)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return seen, versions


def _version(project: Project) -> str:
    found = re.search(r"compose version:? v?([\d.]+)", project("version"), re.IGNORECASE)
    return found[1] if found else "?"


def _said(step: Callable[[Project], str], project: Project) -> str:
    try:
        return step(project)
    except (AssertionError, subprocess.SubprocessError, OSError) as error:
        return f"failed: {str(error)[:600]}"


def table(seen: dict[tuple[str, str, str], str], versions: dict[str, str]) -> list[str]:
    """The table's lines."""
    columns = [(client, runtime) for client in CLIENTS for runtime in RUNTIMES[client] if client in versions]
    titles = [f"{NAMES[client]} {versions[client]}, {runtime}" for client, runtime in columns]
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(columns) + 1)]
    for step, right in STEPS.items():
        cells = []
        for column in columns:
            said = seen.get((str(step.__doc__), *column))
            fault = json.dumps((said or "")[:90]).replace("|", "/").replace("`", "'")
            cells.append("" if said is None else "works" if said == right else f"`{fault}`")
        lines.append(f"| {step.__doc__} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Take the steps, and write the table once all clients and runtimes were looked at.

    Returns:
        1 when a step that works with runc does not with kata.
    """
    parser = argparse.ArgumentParser(prog="tools/conformance --compose", description=__doc__)
    parser.add_argument("--client", choices=CLIENTS, help="with this one alone")
    parser.add_argument("--runtime", choices=("runc", "kata"), help="with this one alone")
    options = parser.parse_args()
    if not PLUGIN.exists() or not PODMAN_COMPOSE.exists():
        parser.error("there is no compose: tools/setup conformance unpacks docker's and podman's")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that containers are removed on the way out
    clients = [options.client] if options.client else list(CLIENTS)
    runtimes = [options.runtime] if options.runtime else ["runc", "kata"]
    kept = json.loads(STATE.read_text()) if STATE.exists() else {"seen": [], "versions": {}}
    new, versions = run(Path(os.environ["KATA_GUEST_DIR"]), clients, runtimes)
    seen = {(step, client, runtime): said for step, client, runtime, said in kept["seen"]} | new
    versions = kept["versions"] | versions
    STATE.parent.mkdir(parents=True, exist_ok=True)
    STATE.write_text(
        json.dumps({"seen": [[*key, said] for key, said in seen.items()], "versions": versions})
    )
    if all((str(up.__doc__), client, runtime) in seen for client in CLIENTS for runtime in ("runc", "kata")):
        marked_page.write(PAGE, BEGIN, END, table(seen, versions))
        print(f"{PAGE.relative_to(ROOT)} is written")
    wrong = [
        f"{NAMES[client]}: {step.__doc__}: {said}"
        for step, right in STEPS.items()
        for client in clients
        if (said := seen.get((str(step.__doc__), client, "kata"))) is not None
        and said != right
        and seen.get((str(step.__doc__), client, "runc"), right) == right
    ]
    for what in wrong:
        print(f"not right: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
