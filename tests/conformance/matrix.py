"""The client matrix: every operation of every client with both runtimes, what was seen, and why it may differ."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import page
import pytest
from clients import IMAGE, OPERATIONS, Crictl, CriDaemon, Ctr, Docker, operations
from crio_support import BUSYBOX, Crio, runc_handler
from crio_support import lacks as crio_lacks
from nerdctl import Nerdctl
from rig import ROOT, Rig
from test_docker import Docker as Dockerd
from test_nerdctl import running as nerdctl_running

HOST_PROCESS = (
    "Processes of the host are shown: the virtual machine is one. `exec NAME ps` shows the guest's."
)
REASONS = {
    "top": ("qemu.*", HOST_PROCESS),
    "cp": (
        "(?s)failed: .*read-only file system.*",
        "It goes through /proc/PID/root of the task: the hypervisor's, an empty directory (docs/nerdctl.md).",
    ),
    "CRI-O oci stats": (
        "failed: AssertionError: not within .* s: usage",
        "CRI-O reads the container's cgroup on the host, which has none of what it uses in its guest."
        " Type vm has the guest's figures.",
    ),
    "OOM": (
        "OOMKilled 137",
        "runc's shim tells of the kill beside the exit, and now and then too late to be the reason.",
    ),
}
"""Operation, with its client's name before it where it is that one's alone -> what is seen with kata where it differs
from runc, and why.
"""

CRIO = {"CRI-O vm": "kata", "CRI-O oci": "kata-oci"}
"""A column of CRI-O -> the handler that is compared with runc there."""
_LIKE_DOCKER = {
    "run -it": "yes; status 0",
    "exec -it": "yes; status 0",
    "logs": "out; err; status 0",
    "kill": "137",
    "stop": r"3 \['up', 'bye'\]",
    "pause": "paused running",
    "restart": "running",
    "wait": "9",
    "cp": "content back",
    "top": "sleep",
    "stats": r"limit 128MiB; 1 processes; used memory, network: \[True, .*\]",
    "update": "134217728 67108864",
    "inspect": "running True 134217728 True",
    "commit": "kept",
    "network": "True",
    "port": "served",
}
"""What nerdctl and Docker say alike."""
_OF_CRI = {
    "run -d": "CONTAINER_RUNNING",
    "exec": "in; status 4; .*; status 5",
    "exec -it": "yes; status 0",
    "attach": "hello got hello; Error 5",
    "logs": r"Error 5; \['stderr F err', 'stdout F out'\]",
    "stop": r"Error 3; \['up', 'bye'\]",
    "stats": ".*memory.workingSetBytes.*cpu counted: True",
    "update": "134217728; .*67108864; status 0",
    "inspect": ".*exitCode.*network.ip.*",
    "volume": "Error 1; .*Read-only.*",
    "network": "its address: True; True",
    "port": "served",
    "a missing command": ".*executable file not found.*",
    "OOM": "(OOMKilled|Error) 137",
}
"""What crictl says, whichever daemon it asks."""
EXPECTED = {
    "ctr": {
        "run": "out; err; status 3",
        "run -it": "yes; status 0",
        "run -d": "RUNNING",
        "exec": "in; err; status 4",
        "exec -it": "yes; status 0",
        "attach": "late; ; status 5",
        "kill": "status 3",
        "pause": "PAUSED RUNNING",
        "top": "sleep",
        "stats": r".*cpuacct.usage.*pids.current.*more than nothing: \['memory.usage_in_bytes', 'cpuacct.usage'\]",
        "inspect": ".*Spec.process.args.*",
        "events": "create start exit delete",
        "volume": ".*Read-only file system; status 1",
        "a missing command": ".*executable file not found.*; status 1",
        "OOM": "status 137",
    },
    "crictl": _OF_CRI,
    "nerdctl": {
        **_LIKE_DOCKER,
        "run": "out; err.*; status 3",
        "run -d": "Up docker.io/library/bb:latest",
        "exec": "in; err.*exit code 4.*; status 1",
        "attach": "hello got hello.*; status 5",
        "events": "create start exit delete",
        "volume": "file; .*Read-only file system.*; status 1",
        "a missing command": ".*executable file not found.*status 1",
        "OOM": "status 137",
    },
    "docker": {
        **_LIKE_DOCKER,
        "run": "in; err; status 3",
        "run -d": "running bb",
        "exec": "in; err; status 4",
        "attach": "got hello; status 5",
        "events": ".*start.*die.*",
        "volume": "file; .*Read-only file system; status 1",
        "healthcheck": "unhealthy healthy",
        "a missing command": ".*executable file not found.*status 127",
        "OOM": "137 OOMKilled: true",
    },
    **dict.fromkeys(CRIO, _OF_CRI),
}
"""What is seen of each operation that works, with runc; anything else would make the comparison worthless."""


@dataclass(frozen=True)
class Cell:
    """What was seen of one operation of one client."""

    runc: str
    kata: str

    @property
    def same(self) -> bool:
        """Whether a person cannot tell the difference."""
        return self.runc == self.kata


class Cells:
    """What has been seen so far: (client, operation) -> cell.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[str, str], Cell] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                client, operation = entry.pop("client"), entry.pop("operation")
                if operation in EXPECTED.get(client, {}):
                    self.found[client, operation] = Cell(**entry)

    def add(self, client: str, operation: str, cell: Cell) -> None:
        """Note one, at once and for good."""
        self.found[client, operation] = cell
        with open(self._path, "a") as file:
            file.write(json.dumps({"client": client, "operation": operation, **asdict(cell)}) + "\n")

    def forget(self, text: str) -> None:
        """Drop those whose client and operation contain a text."""
        kept = {key: cell for key, cell in self.found.items() if text not in " ".join(key)}
        self._path.unlink(missing_ok=True)
        self.found = {}
        for (client, operation), cell in kept.items():
            self.add(client, operation, cell)


def run(rig: Rig, cells: Cells, only: str) -> None:
    """Try out what has not been tried.

    Args:
        rig: Started; for ctr and crictl. Docker gets daemons of its own.
        cells: Is filled in.
        only: Only operations whose name, with their client's, contains this.
    """
    rig.pull(IMAGE)
    handlers = {"runc": "runc", "kata": "kata"}
    containerd = CriDaemon(
        *("crictl", rig.endpoint, rig.directory, rig.inside, rig.daemon.env, IMAGE, "10.89.7.1", handlers)
    )
    for client in (Ctr(rig), Crictl(containerd)):
        _run(client.name, operations(client), cells, only)
    if not is_wanting(cells, only):
        return
    try:
        with _docker(rig) as docker:
            _run(docker.name, operations(docker), cells, only)
    except pytest.skip.Exception as reason:
        print(f"no Docker: {reason}", flush=True)
    try:
        # A short path: there are sockets in it.
        directory = Path(tempfile.mkdtemp(prefix="kn", dir="/tmp"))
        busybox = f"oci:{ROOT}/build/images/busybox"
        with nerdctl_running(directory, Path(os.environ["KATA_GUEST_DIR"]), busybox) as program:
            nerdctl = Nerdctl(program)
            _run(nerdctl.name, operations(nerdctl), cells, only)
    except pytest.skip.Exception as reason:
        print(f"no nerdctl: {reason}", flush=True)


def is_wanting(cells: Cells, only: str) -> bool:
    """Whether `run` would have something to do."""
    known = {(client.name, name) for client in (Ctr, Nerdctl, Docker) for name in operations(client)}
    known |= {("crictl", name) for name in operations(Crictl)}
    return any(only in " ".join(key) for key in known - set(cells.found))


def run_crio(cells: Cells | None, only: str) -> None:
    """`run` for CRI-O, which is a daemon of its own; with None nothing is tried."""
    if cells is None:
        return
    known = {(client, name) for client in CRIO for name in operations(Crictl)}
    if not any(only in " ".join(key) for key in known - set(cells.found)):
        return
    if missing := crio_lacks():
        print(f"no CRI-O: it needs {missing}", flush=True)
        return
    with _crio() as crio:
        for name, handler in CRIO.items():
            handlers = {"runc": "runc", "kata": handler}
            daemon = CriDaemon(
                *(name, crio.endpoint, crio.directory, crio.around, crio.env),
                *(BUSYBOX, "10.87.7.1", handlers),
            )
            _run(name, operations(Crictl(daemon)), cells, only)


def _run(client: str, known: Mapping[str, Callable[[str], str]], cells: Cells, only: str) -> None:
    for name, operation in known.items():
        if (client, name) in cells.found or only not in f"{client} {name}":
            continue
        cell = Cell(_seen(operation, "runc"), _seen(operation, "kata"))
        cells.add(client, name, cell)
        said = verdict(client, name, cell)
        print(f"{client} {name}: {said}", flush=True)
        if said != "works":
            print(f"    runc: {cell.runc[:500]}\n    kata: {cell.kata[:500]}", flush=True)


def _seen(operation: Callable[[str], str], runtime: str) -> str:
    try:
        return operation(runtime)
    except (AssertionError, subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
        return f"failed: {type(error).__name__}: {str(error)[:300]}"


@contextmanager
def _crio() -> Iterator[Crio]:
    # A short path: there are sockets in it.
    directory = Path(tempfile.mkdtemp(prefix="ko", dir="/tmp"))
    guest, busybox = Path(os.environ["KATA_GUEST_DIR"]), ROOT / "build/images/busybox"
    crio = Crio(directory, guest, busybox, more=runc_handler(directory))
    try:
        crio.make_namespace()
        crio.start()
        yield crio
    finally:
        crio.ask("rm", "-a", "-f")
        crio.ask("rmp", "-a", "-f")
        left = crio.sandboxes()
        crio.remove()
        if left:
            print(f"sandboxes are left: {', '.join(left)}", flush=True)


@contextmanager
def _docker(rig: Rig) -> Iterator[Docker]:
    # A short path: there are sockets in it.
    directory = Path(tempfile.mkdtemp(prefix="kd", dir="/tmp"))
    daemon = Dockerd(directory, Path(os.environ["KATA_GUEST_DIR"]))
    daemon.netns = daemon.containerd.around[1].rpartition("/")[2]
    (directory / "daemon.json").write_text("{}")
    subprocess.run(["ip", "netns", "add", daemon.netns], check=True)
    try:
        subprocess.run(["ip", "-n", daemon.netns, "link", "set", "lo", "up"], check=True)
        daemon.start()
        layers = ROOT / "build/images/busybox/blobs/sha256"
        largest = max(layers.iterdir(), key=lambda path: path.stat().st_size)
        daemon("import", "-", "bb", stdin=largest.read_bytes())
        yield Docker(daemon)
    finally:
        daemon.stop()
        subprocess.run(["ip", "netns", "delete", daemon.netns], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def verdict(client: str, operation: str, cell: Cell) -> str:
    """What the table says of an operation."""
    if not re.fullmatch(EXPECTED[client][operation], cell.runc, re.DOTALL):
        return "not with runc"
    return "works" if cell.same else "differs"


def why(client: str, operation: str, cell: Cell) -> str:
    """Why an operation differs; empty if that is not known."""
    seen, reason = REASONS.get(f"{client} {operation}") or REASONS.get(operation, ("", ""))
    return reason if seen and re.fullmatch(seen, cell.kata) else ""


def unexplained(found: Mapping[tuple[str, str], Cell]) -> list[str]:
    """The operations that differ for no known reason, or could not be compared."""
    return [
        f"{client} {operation}"
        for (client, operation), cell in sorted(found.items())
        if verdict(client, operation, cell) != "works" and not why(client, operation, cell)
    ]


def section(
    found: Mapping[tuple[str, str], Cell], versions: Mapping[str, str], before: Iterable[str] = ()
) -> list[str]:
    """The matrix's lines of the page.

    Args:
        found: What was seen.
        versions: Client -> what it calls itself.
        before: The section so far: what it says of operations that were not seen here stays.
    """
    lines = list(before)
    words, titles, differing = _told(lines)
    for key, cell in found.items():
        words[key] = verdict(*key, cell)
        titles[key[0]] = f"{key[0]} {versions.get(key[0], '')}".strip()
        differing.pop(key, None)
        if words[key] != "works":
            told = why(*key, cell) or "not known"
            differing[key] = f"| {' '.join(key)} | {_short(cell.runc)} | {_short(cell.kata)} | {told} |"
    clients = [name for name in EXPECTED if any(client == name for client, _ in words)]
    lines = [
        "## What clients can do",
        "",
        "Each operation was done with a runc container and with one of ours, and what a person would see was compared.",
        "An empty cell: the client has no such operation, or it is not tried here.",
        "nerdctl's containers were containerd 2's. CRI-O was asked by crictl, and had kata as either type.",
        "",
        f"| | {' | '.join(titles[name] for name in clients)} |",
        "|" + "---|" * (len(clients) + 1),
    ]
    for operation in OPERATIONS:
        if any((client, operation) in words for client in clients):
            cells = [words.get((client, operation), "") for client in clients]
            lines.append(f"| {operation} | {' | '.join(cells)} |")
    if differing:
        lines += ["", "| what differs | with runc | with kata | why |", "|---|---|---|---|"]
    return [*lines, *(line for _, line in sorted(differing.items())), ""]


def _told(
    lines: Sequence[str],
) -> tuple[dict[tuple[str, str], str], dict[str, str], dict[tuple[str, str], str]]:
    """What a section says: of operations by client, of the clients' versions, and how some differ (a line each)."""
    rows = page.table(lines)
    heading = rows.pop("", [])
    columns = [_client(title) for title in heading]
    known = {(client, operation) for client in EXPECTED for operation in EXPECTED[client]}
    words = {
        (client, operation): word
        for operation, cells in rows.items()
        for client, word in zip(columns, cells, strict=False)
        if word and (client, operation) in known
    }
    titles = {client: title for client, title in zip(columns, heading, strict=True) if client}
    by_name = {" ".join(key): key for key in words}
    differing = {by_name[name]: line for line in lines if (name := line[2:].partition(" | ")[0]) in by_name}
    return words, titles, differing


def _client(title: str) -> str:
    """Whose column a title is, which has the client's version behind its name; empty if nobody's."""
    return next((name for name in EXPECTED if f"{title} ".startswith(f"{name} ")), "")


def _short(text: str) -> str:
    return "`" + text.replace("\n", " ").replace("|", "/").replace("`", "'")[:160] + "`"
