"""What a scrape of a sandbox costs its host, beside the same sandbox that nobody scrapes.

Sandboxes are started by ``kata run`` with a network, and a ``kata-monitor`` for them. Printed are

* a scrape of one sandbox: processor time of engine and hypervisor for the engine's ``/metrics``, of these and the
  monitor for the monitor's (the client's is not counted), beside the agent's own answer: ``GetMetrics`` passed on by
  the same engine, which is what any implementation has to pay at least; series and bytes;
* a scrape of all sandboxes at once, as Prometheus does it: how long it takes;
* side by side, for as long as ``--seconds``: one sandbox scraped every 5 s, one not. What that adds to the processor
  time of engine and hypervisor, and to the memory of the engine (proportional set size); and what the monitor itself
  uses, scraped and unscraped.

Processor time is the scheduler's (``/proc/PID/task/*/schedstat``), in nanoseconds. Needs root and a guest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path.append(str(ROOT / "src"))

from overhead import IMAGE, field, kata  # noqa: E402

from kata import management, paths  # noqa: E402
from kata.agent_ctl.links import EngineLink  # noqa: E402

MONITOR = str(ROOT / "tools/kata-monitor")
AT_A_TIME = 3
"""Machines that are started together."""
INTERVAL_S = 5.0
WARM = 5
PATIENCE_S = float(os.environ.get("KATA_TEST_PATIENCE", "120"))
SETTLE_S = 3.0

# What is asked for, by name of the row.
AIMS = {
    "processor time of a scrape, ms": 20.0,
    "the engine's answer to the agent's own": 2.0,
    "scrape of all sandboxes, s": 1.0,
    "scraped every 5 s: processor added, %": 1.0,
    "scraped every 5 s: engine's memory added, KiB": 1024.0,
    "not scraped: engine, % of a processor": 0.1,
    "not scraped: monitor, % of a processor": 0.1,
}


class Sandbox:
    """A running sandbox.

    Args:
        environment: Of `kata`.
        name: The container's.
    """

    def __init__(self, environment: dict[str, str], name: str) -> None:
        found: dict[str, Any] = json.loads(kata(environment, "inspect", name))[0]
        self.identity = str(found["id"])
        self.engine = int(found["sandbox"]["engine_pid"])
        self.hypervisor = int(found["sandbox"]["hypervisor_pid"])
        self.accelerator = str(found["sandbox"]["accelerator"])
        self._directory = Path(environment["KATA_RUN_DIR"]) / "sandboxes" / self.identity
        self._agent: EngineLink | None = None

    def metrics(self) -> bytes:
        """The engine's answer to a scrape.

        Raises:
            SystemExit: It is no answer.
        """
        path = str(self._directory / paths.MANAGEMENT_SOCKET)
        status, _, text = management.get(path, "/metrics", PATIENCE_S)
        if status != 200:
            raise SystemExit(f"error: the engine answered {status}: {text.decode(errors='replace')}")
        return text

    def agents_own(self) -> bytes:
        """The agent's part of it alone, passed on by the engine."""
        if self._agent is None:
            self._agent = EngineLink(self.identity, self.identity, str(self._directory / "engine.sock"))
        return self._agent.call("grpc.AgentService", "GetMetrics", b"", PATIENCE_S)


def processor_ms(*pids: int) -> float:
    """Milliseconds of processor time that all threads of these processes have had so far."""
    total = 0
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e6


def pss_kib(pid: int) -> int:
    """The proportional set size of a process."""
    return field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss") >> 10


def cost(ask: Callable[[], object], pids: list[int], rounds: int) -> tuple[float, float]:
    """Processor time and time of one question, both the median, in milliseconds."""
    for _ in range(WARM):
        ask()
    spent, took = [], []
    for _ in range(rounds):
        time.sleep(0.05)
        before, began = processor_ms(*pids), time.perf_counter()
        ask()
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(0.02)  # whatever is done after the answer belongs to it
        spent.append(processor_ms(*pids) - before)
    return statistics.median(spent), statistics.median(took)


@contextlib.contextmanager
def monitor(environment: dict[str, str], log: Path) -> Iterator[tuple[int, str]]:
    """A kata-monitor: its pid, and where it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [MONITOR, "--listen-address", where], env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{where}/healthz"):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: kata-monitor does not answer: {log.read_text()}")
            time.sleep(0.1)
        yield process.pid, f"http://{where}"
    finally:
        process.terminate()
        process.wait()
        if complaints := log.read_text(errors="replace").strip():
            print(f"kata-monitor said:\n{complaints}", file=sys.stderr)


def get(url: str) -> bytes:
    """A page.

    Raises:
        SystemExit: There is an error in its place.
    """
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise SystemExit(f"error: {url}: {error.code} {error.read().decode(errors='replace')}") from error


def series(text: bytes) -> int:
    """How many series an exposition has."""
    return sum(1 for line in text.splitlines() if line and not line.startswith(b"#"))


def side_by_side(
    scraped: Sandbox, beside: Sandbox, watcher: int, url: str, seconds: float
) -> dict[str, float]:
    """Two sandboxes for a while, of which one is scraped every `INTERVAL_S`; then none, for as long."""

    def used() -> list[float]:
        both = [processor_ms(one.engine, one.hypervisor) for one in (scraped, beside)]
        return [*both, processor_ms(watcher), processor_ms(beside.engine), processor_ms(scraped.engine)]

    memory = [pss_kib(one.engine) for one in (scraped, beside)]
    get(f"{url}/metrics?sandbox={scraped.identity}")  # the first one loads what it needs
    before, began = used(), time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        get(f"{url}/metrics?sandbox={scraped.identity}")
        time.sleep(min(INTERVAL_S, left))
    spent = time.monotonic() - began
    busy = [(now - then) / spent / 10 for now, then in zip(used(), before, strict=True)]  # ms/s -> %
    grown = [pss_kib(one.engine) - had for one, had in zip((scraped, beside), memory, strict=True)]
    before, began = used(), time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    idle = [(now - then) / spent / 10 for now, then in zip(used(), before, strict=True)]
    return {
        "scraped every 5 s: processor added, %": busy[0] - busy[1],
        "scraped every 5 s: of it the engine's, %": busy[4] - busy[3],
        "scraped every 5 s: engine's memory added, KiB": grown[0] - grown[1],
        "scraped every 5 s: monitor, % of a processor": busy[2],
        "not scraped: engine, % of a processor": idle[3],
        "not scraped: engine that was scraped before, % of a processor": idle[4],
        "not scraped: monitor, % of a processor": idle[2],
    }


def measure(environment: dict[str, str], base: Path, chosen: argparse.Namespace) -> dict[str, float]:
    """Everything, by name of the row."""
    names = [f"scrape{number}" for number in range(chosen.sandboxes)]

    def start(name: str) -> Sandbox:
        options = ("-d", "--name", name, "-m", "64m")
        kata(environment, "run", *options, f"oci:{IMAGE}", "sleep", "1000000")
        return Sandbox(environment, name)

    try:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            sandboxes = list(pool.map(start, names))
        time.sleep(SETTLE_S)
        one = sandboxes[2]
        with monitor(environment, base / "monitor.log") as (watcher, url):
            # First, since one of them must not have been scraped ever.
            beside = side_by_side(sandboxes[0], sandboxes[1], watcher, url, chosen.seconds)
            own, _ = cost(one.agents_own, [one.engine, one.hypervisor], chosen.rounds)
            guest, _ = cost(one.agents_own, [one.hypervisor], chosen.rounds)
            engine, answered = cost(one.metrics, [one.engine, one.hypervisor], chosen.rounds)
            in_guest, _ = cost(one.metrics, [one.hypervisor], chosen.rounds)
            host = [one.engine, one.hypervisor, watcher]
            through, _ = cost(lambda: get(f"{url}/metrics?sandbox={one.identity}"), host, chosen.rounds)
            text = one.metrics()
            found = {
                "the agent's own answer, processor ms": own,
                "the agent's own answer, of it the hypervisor's": guest,
                "the engine's answer, processor ms": engine,
                "the engine's answer, of it the hypervisor's": in_guest,
                "the engine's answer to the agent's own": engine / own,
                "the engine's answer takes, ms": answered,
                "processor time of a scrape, ms": through,
                "series of a sandbox": series(text),
                "bytes of a sandbox": len(text),
            }
            get(f"{url}/metrics")
            took = []
            everybody = [watcher, *(pid for each in sandboxes for pid in (each.engine, each.hypervisor))]
            before = processor_ms(*everybody)
            for _ in range(max(3, chosen.rounds // 5)):
                began = time.perf_counter()
                text = get(f"{url}/metrics")
                took.append(time.perf_counter() - began)
            spent = (processor_ms(*everybody) - before) / len(took) / len(sandboxes)
            found["sandboxes"] = len(sandboxes)
            found["scrape of all sandboxes, s"] = statistics.median(took)
            found["processor time of a sandbox's part in it, ms"] = spent
            found["series of all"] = series(text)
            found["bytes of all"] = len(text)
            found["monitor's memory, KiB"] = pss_kib(watcher)
            found |= beside
            found["accelerator"] = one.accelerator == "kvm"
        return found
    finally:
        kata(environment, "rm", "-f", *names)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="What a scrape of a sandbox costs its host.")
    parser.add_argument("--sandboxes", type=int, default=20, help="at least 3 (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=30, help="scrapes for each figure (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="side by side (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: it needs root")
    if chosen.sandboxes < 3:
        raise SystemExit("error: --sandboxes: at least 3: one is asked, one is scraped, one is not")
    with tempfile.TemporaryDirectory(prefix="kata-scrape-") as base:
        environment = {**os.environ, "KATA_RUN_DIR": f"{base}/r", "KATA_STATE_DIR": f"{base}/s"}
        found = measure(environment, Path(base), chosen)
    if chosen.json:
        print(json.dumps(found))
        return 0
    kvm = found.pop("accelerator")
    print(f"accelerator: {'kvm' if kvm else 'tcg'}\n")
    print("| | | aim |\n|---|---|---|")
    for name, value in found.items():
        aim = AIMS.get(name)
        print(
            f"| {name} | {value:.{0 if float(value).is_integer() else 2}f} | {f'{aim:g}' if aim else ''} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
