"""Prometheus servers of the tests, and a kata-monitor for them to scrape."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from waiting import PATIENCE, until

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = f"{ROOT}/build/programs/usr/bin:{os.environ['PATH']}"
NEWEST = ROOT / "build/programs/prometheus3/usr/bin/prometheus"
RULES = ROOT / "deploy/prometheus/kata-alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/kata.json"
_NOISE = re.compile(r"\blevel=(warn|error)\b", re.IGNORECASE)


def servers() -> dict[str, Path]:
    """The Prometheus servers that are there, by major version: Debian's own, and the newest one."""
    found = [shutil.which("prometheus", path=PROGRAMS), str(NEWEST) if NEWEST.exists() else None]
    named: dict[str, Path] = {}
    for program in found:
        if program is not None:
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
            version = re.search(r"version (\d+\.\d+)", said.stdout + said.stderr)
            assert version, said
            named[version[1]] = Path(program)
    return named


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(url: str, timeout_s: float = 30.0) -> bytes:
    """The body of a page; an error's body is in the assertion."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code}: {error.read().decode(errors='replace')}") from error


class Server:
    """A program that serves HTTP on a port of loopback, with its output in a file."""

    def __init__(self, name: str, directory: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def start(self, argv: list[str], ready: str, environment: dict[str, str] | None = None) -> None:
        """Start it, and wait until *ready*, a path, is answered."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"{argv[0]} has ended: {self.log.read_text()}"
            try:
                fetch(self.url + ready)
            except (OSError, AssertionError):
                return False
            return True

        until(answers, f"{argv[0]} answers", self.log.read_text)

    def stop(self) -> None:
        """End it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(PATIENCE) in (0, -15, 143), self.log.read_text()


class Target(Protocol):
    """What can be scraped on loopback."""

    @property
    def port(self) -> int:
        """Where."""


class Monitor(Server):
    """A kata-monitor of the node whose run directory is in *environment*."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        super().__init__("monitor", directory, free_port())
        where = f"127.0.0.1:{self.port}"
        self.start([str(ROOT / "tools/kata-monitor"), "--listen-address", where], "/healthz", environment)

    def metrics(self, query: str = "") -> str:
        """Its metrics as text."""
        return fetch(f"{self.url}/metrics{query}").decode()


class Prometheus(Server):
    """A Prometheus that scrapes one monitor, with our rules; its version is the name of its directory."""

    def __init__(self, program: Path, directory: Path, target: Target, interval_s: int) -> None:
        directory.mkdir()
        super().__init__("prometheus", directory, free_port())
        self.version = directory.name
        settings = {
            "global": {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "kata", "static_configs": [{"targets": [f"127.0.0.1:{target.port}"]}]}
            ],
        }
        (directory / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
        self.start(
            [
                str(program),
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            "/-/ready",
        )

    def api(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        answer = json.loads(fetch(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), (parameters, answer["warnings"])
        return answer["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """What a query finds now: each with ``metric`` and ``value``."""
        data = self.api("query", query=text)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def values(self, text: str) -> list[float]:
        """The values of a query."""
        return [float(one["value"][1]) for one in self.query(text)]

    def value(self, text: str) -> float:
        """The value of a query that finds exactly one."""
        found = self.query(text)
        assert len(found) == 1, (text, found)
        return float(found[0]["value"][1])

    def complaints(self) -> list[str]:
        """Lines of its log that warn."""
        return [line for line in self.log.read_text().splitlines() if _NOISE.search(line)]


def dashboard_queries() -> list[tuple[str, str]]:
    """Title of the panel and query, of all panels and variables of the dashboard, as Grafana would send them."""
    board = json.loads(DASHBOARD.read_text())
    found = []
    for panel in board["panels"]:
        for inner in (panel, *panel.get("panels", ())):
            found += [(inner["title"], one["expr"]) for one in inner.get("targets", ())]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
            inside = re.fullmatch(r"label_values\((.+), ?\w+\)", text)
            assert inside, text
            found.append((f"variable {variable['name']}", inside[1]))
    return [(title, filled(query)) for title, query in found]


def filled(query: str) -> str:
    """A query with Grafana's variables filled in: everything is chosen, and rates reach back half a minute."""
    query = query.replace("$__rate_interval", "30s").replace("$__range", "5m").replace("$__interval", "5s")
    query = re.sub(r"\$\{?[a-z]\w*(:\w+)?\}?", ".*", query)
    assert "$" not in query, query
    return query


def documented_queries(page: Path) -> list[str]:
    """The queries of a page's blocks of ``promql``: one a paragraph, comments left out."""
    blocks = re.findall(r"^```promql\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    found = []
    for block in blocks:
        for paragraph in re.split(r"\n\s*\n", block):
            lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith("#")]
            if text := " ".join(lines).strip():
                found.append(text)
    return found
