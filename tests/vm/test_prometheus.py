"""Real Prometheus servers, of Debian 12 and the newest one, scrape a node of twenty sandboxes through kata-monitor.

What they have stored is compared with what the guests were made to do, and the queries of the dashboard, of the
documentation and of the alert rules are asked of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import netlab
import prometheus_support as support
import pytest
from conftest import Kata
from prometheus_support import Monitor, Prometheus
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SANDBOXES = 20
AT_A_TIME = 3
"""Machines that are started together; each takes most of a processor while it boots."""
INTERVAL_S = 3
TOLERANCE = 0.05
MIB = 1 << 20
CONTAINER_CPU = "kata_container_cpu_seconds_total"
CONTAINER_MEMORY = "kata_container_memory_working_set_bytes"
LINTED = {
    # promtool's advice, and the names that are the original's, which its dashboards ask for.
    "kata_agent_scrape_count": ("_total", "_count"),
    "kata_monitor_running_shim_count": ("_count",),
    "kata_monitor_scrape_count": ("_total", "_count"),
    "kata_monitor_scrape_failed_count": ("_total", "_count"),
    "kata_monitor_scrape_durations_histogram_milliseconds": ("seconds", "type"),
    "kata_shim_agent_rpc_durations_histogram_milliseconds": ("seconds", "type"),
    "kata_shim_rpc_durations_histogram_milliseconds": ("seconds", "type"),
}
ALL_UP = "sum(kata_monitor_sandbox_up)"
METRICS_PAGE = support.ROOT / "docs/metrics.md"
HELD_MIB = 64
SENT_MIB = 16
BURNT_S = 4.0
BURN = f"""
while :; do
    read -r _ _ _ _ _ _ _ _ _ _ _ _ _ user system _ </proc/$$/stat
    [ $((user + system)) -ge {int(BURNT_S * 100)} ] && break
    n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done
done
echo $((user + system))
"""
"""Until the shell has had that much processor time by its own account, which it prints in hundredths of a second."""


class Node:
    """Twenty sandboxes, a monitor, and the Prometheus servers that scrape it.

    Attributes:
        ids: Sandbox ids by name.
        servers: By version.
    """

    def __init__(self, kata: Kata, image: str, stack: contextlib.ExitStack) -> None:
        self.kata = kata
        self._image = image
        self._stack = stack
        self.directory = Path(tempfile.mkdtemp(prefix="prom", dir=kata.directory.parent))
        # What a container sends must not leave this machine: its host is a namespace.
        self._host, self.internet = stack.enter_context(netlab.lab())
        self.ids: dict[str, str] = {}
        self.servers: dict[str, Prometheus] = {}

    def start(self) -> None:
        """Start all of them."""
        roles = {
            "burner": ("-m", "64m", "--network", "none"),
            "holder": ("-m", f"{HELD_MIB * 2}m", "--network", "none"),
            "sender": ("-m", "64m"),
            "hungry": ("-m", "48m", "--network", "none"),
            "hostile": ("-m", "48m", "--cap-add", "NET_ADMIN"),
            "throttled": ("-m", "48m", "--network", "none", "--cpus", "0.1"),
        }
        for number in range(SANDBOXES - len(roles)):
            roles[f"idle{number}"] = ("-m", "48m", "--network", "none")
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            for name, identity in zip(roles, pool.map(self._run, roles, roles.values()), strict=True):
                self.ids[name] = identity
        self.monitor = Monitor(self.directory, self.kata.env)
        self._stack.callback(self.monitor.stop)
        for version, program in support.servers().items():
            directory = self.directory / version
            self.servers[version] = Prometheus(program, directory, self.monitor, INTERVAL_S)
            self._stack.callback(self.servers[version].stop)

    def _run(self, name: str, options: tuple[str, ...]) -> str:
        command = self.kata.command("run", "-d", "--name", name, *options, self._image, "sleep", "1000000")
        if name == "sender":
            command = ["nsenter", f"--net=/run/netns/{self._host}", *command]
        self._stack.callback(self.kata.call, "rm", "-f", name)
        done = subprocess.run(command, capture_output=True, text=True, env=self.kata.env, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def hypervisor_s(self, name: str) -> float:
        """Processor time of a sandbox's hypervisor, by the host, in seconds."""
        pid = json.loads(self.kata.ok("inspect", name))[0]["sandbox"]["hypervisor_pid"]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def guest_s(self, name: str) -> float:
        """User and system time of a sandbox's guest, by its kernel, in seconds."""
        fields = self.sh(name, "head -n 1 /proc/stat").split()
        return (int(fields[1]) + int(fields[3])) / 100

    def sh(self, name: str, script: str) -> str:
        """What a script in a container prints."""
        return self.kata.ok("exec", name, "sh", "-c", script)


def everywhere(node: Node, holds: Callable[[Prometheus], object], what: str) -> None:
    """Wait until something holds in every server."""
    for version, server in node.servers.items():
        until(functools.partial(holds, server), f"{what}, in Prometheus {version}")


def now(node: Node, query: str) -> dict[str, float]:
    """The value of a query in every server, as of its last scrape."""
    found: dict[str, float] = {}

    def known(server: Prometheus) -> bool:
        # A guest that has a lot to do may be too late for a scrape.
        values = server.values(query)
        found[server.version] = values[0] if values else 0.0
        return len(values) == 1

    everywhere(node, known, f"one value of {query}")
    return found


def grown(node: Node, query: str, before: dict[str, float], expected: float, what: str) -> None:
    """Every server has *expected* more than before, within five per cent, once it has scraped again."""
    seen: dict[str, list[float]] = {}

    def near(server: Prometheus) -> bool:
        values = seen[server.version] = [value - before[server.version] for value in server.values(query)]
        return len(values) == 1 and abs(values[0] - expected) <= TOLERANCE * abs(expected)

    for version, server in node.servers.items():
        until(
            functools.partial(near, server),
            f"{what}, {expected:g} by the guest, in Prometheus {version}",
            lambda: f"{query}: {seen}",
            patience_s=30,
        )


def every_target_is_up(node: Node) -> None:
    # The first scrape of an engine loads what it needs, and on a busy host not all are in time for it.
    everywhere(node, lambda server: server.values(ALL_UP) == [SANDBOXES], "that all sandboxes answer")
    for version, server in node.servers.items():
        target = server.api("targets")["activeTargets"]
        assert [(one["health"], one["lastError"]) for one in target] == [("up", "")], (version, target)
        assert server.value("kata_monitor_running_shim_count") == SANDBOXES
        told = {one["metric"]["sandbox_id"] for one in server.query("kata_guest_load{item='load1'}")}
        assert told == set(node.ids.values())


def processor_time_is_what_was_burnt(node: Node) -> None:
    one = node.ids["burner"]
    container = f'sum({CONTAINER_CPU}{{sandbox_id="{one}"}})'
    before = now(node, container)
    burnt = int(node.sh("burner", BURN)) / 100
    grown(node, container, before, burnt, "processor time of the container")
    # Guest and hypervisor are told of by their kernels, which count ticks: on a busy host, the guest's too few of them
    # or those of waiting, too. What they count is what is told.
    guest = f'kata_guest_cpu_time{{sandbox_id="{one}", cpu="total", item=~"user|system"}}'
    hypervisor = f'kata_hypervisor_proc_stat{{sandbox_id="{one}", item=~"utime|stime"}}'
    counted(node, guest, node.guest_s("burner"))
    counted(node, hypervisor, node.hypervisor_s("burner"))


def counted(node: Node, query: str, seconds: float) -> None:
    """Every server has that many ticks in all, within five per cent, once it has scraped again."""

    def near(server: Prometheus) -> bool:
        return any(
            abs(value - seconds) <= TOLERANCE * seconds for value in server.values(f"sum({query}) / 100")
        )

    everywhere(node, near, f"{query}: {seconds} s")


def memory_is_what_is_held(node: Node) -> None:
    one = node.ids["holder"]
    container = f'{CONTAINER_MEMORY}{{sandbox_id="{one}"}}'
    available = f'kata_guest_meminfo{{sandbox_id="{one}", item="mem_available"}}'
    time.sleep(2 * INTERVAL_S)
    in_container, in_guest = now(node, container), now(node, available)
    node.sh("holder", f"dd if=/dev/zero of=/dev/shm/held bs=1M count={HELD_MIB}")
    grown(node, container, in_container, HELD_MIB * MIB, "memory of the container")
    grown(node, available, in_guest, -HELD_MIB * MIB, "memory of the guest that is available")


def bytes_sent_are_counted(node: Node) -> None:
    one = node.ids["sender"]
    sent = f'kata_guest_netdev_stat{{sandbox_id="{one}", interface="eth0", item="sent_bytes"}}'
    of_pod = f'kata_pod_network_transmit_bytes_total{{sandbox_id="{one}", interface="eth0"}}'
    time.sleep(2 * INTERVAL_S)
    before, of_pod_before = now(node, sent), now(node, of_pod)
    there = f"--net=/run/netns/{node.internet}"
    listen = ["nsenter", there, "busybox", "nc", "-l", "-p", "9000"]
    # A pipe as its input, at whose end it would hang up.
    with subprocess.Popen(listen, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sink:
        assert sink.stdout is not None
        until(lambda: _listens(node.internet, 9000), "somebody listens")
        send = f"dd if=/dev/zero bs=1M count={SENT_MIB} | nc {netlab.INTERNET4} 9000"
        sender = node.kata.start("exec", "sender", "sh", "-c", send, stdout=subprocess.DEVNULL)
        received = len(sink.stdout.read())
        assert sender.wait(60) == 0
        sender.communicate()
    assert received == SENT_MIB * MIB
    grown(node, sent, before, received, "bytes sent by the guest")
    grown(node, of_pod, of_pod_before, received, "bytes sent by the pod")


def what_goes_wrong_in_a_container_is_counted(node: Node) -> None:
    killed = f'kata_container_oom_kills_total{{sandbox_id="{node.ids["hungry"]}"}}'
    throttled = f'kata_container_cpu_throttled_seconds_total{{sandbox_id="{node.ids["throttled"]}"}}'
    time.sleep(2 * INTERVAL_S)
    before, before_throttled = now(node, killed), now(node, throttled)
    assert node.kata.call("exec", "hungry", "tail", "/dev/zero").returncode == 137
    grown(node, killed, before, 1, "OOM kills")
    node.kata.call("exec", "throttled", "timeout", "3", "sh", "-c", "while :; do :; done")
    everywhere(
        node,
        lambda server: any(
            value > before_throttled[server.version] + 0.2 for value in server.values(throttled)
        ),
        "the time in which it was throttled",
    )


def names_that_a_container_chose_are_only_names(node: Node) -> None:
    def rename(old: str, new: str) -> None:
        script = 'ip link set dev "$1" down && ip link set dev "$1" name "$(printf "$2")"'
        node.kata.ok("exec", "hostile", "sh", "-c", script, "sh", old, new)

    def are(*names: str) -> Callable[[Prometheus], bool]:
        return lambda server: sorted(one["metric"]["interface"] for one in server.query(shown)) == [*names]

    shown = f'kata_guest_netdev_stat{{sandbox_id="{node.ids["hostile"]}", item="recv_bytes"}}'
    odd = 'e"v\\{l=,}'
    rename("eth0", odd.replace("\\", "\\\\"))
    everywhere(node, are(odd, "lo"), "the interface's new name")
    # Two that are no UTF-8, and become the same text: only one may be told.
    rename("lo", r"a\376")
    rename(odd, r"a\377")
    everywhere(node, are("a\ufffd"), "one of two interfaces of the same name")


def one_that_is_stuck_delays_no_other(node: Node) -> None:
    stuck = node.kata.engine_pid("idle1")
    of_it = f'kata_monitor_sandbox_up{{sandbox_id="{node.ids["idle1"]}"}}'
    os.kill(stuck, signal.SIGSTOP)
    try:
        everywhere(
            node,
            lambda server: server.values(of_it) == [0] and server.values(ALL_UP) == [SANDBOXES - 1],
            "that one sandbox does not answer, and all others do",
        )
    finally:
        os.kill(stuck, signal.SIGCONT)
    everywhere(node, lambda server: server.values(of_it) == [1], "that it answers again")


def _rates(server: Prometheus) -> bool:
    """Whether the oldest scrape is as old as rates need."""
    return server.value("time() - min_over_time(timestamp(up)[5m:1s])") > 15


def every_query_finds_something(node: Node) -> None:
    """Those of the dashboard and of the documentation; a comparison may be true of nobody, and still has to be one."""
    queries = support.dashboard_queries()
    queries += [("docs/metrics.md", query) for query in support.documented_queries(METRICS_PAGE)]
    assert len(queries) > 40
    everywhere(node, _rates, "enough scrapes for rates")
    for version, server in node.servers.items():
        empty = [(title, query) for title, query in queries if not server.query(query)]
        assert empty == [], version
        nan = [
            (title, query)
            for title, query in queries
            if "histogram_quantile" in query and "rate(" not in query
            if all(one["value"][1] == "NaN" for one in server.query(query))
        ]
        assert nan == [], version


def _rules(server: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in server.api("rules")["groups"] for rule in group["rules"]]


def alert_rules_are_evaluated(node: Node) -> None:
    everywhere(
        node, lambda server: all(rule["health"] != "unknown" for rule in _rules(server)), "an evaluation"
    )
    for server in node.servers.values():
        rules = _rules(server)
        assert len(rules) == support.RULES.read_text().count("- alert:")
        assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
        alerts = server.api("alerts")["alerts"]
        firing = {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}
        assert "KataOOMKill" in firing  # of the test before
        assert not firing & {
            "KataSandboxDown",
            "KataAgentNotAnswering",
            "KataMonitorDown",
            "KataSeriesLeftOut",
        }


def promtool_has_nothing_new_to_say(node: Node) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=node.monitor.metrics(),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": support.PROGRAMS},
    )
    assert done.returncode in (0, 3), done.stderr
    advice = [line for line in done.stderr.splitlines() if line]
    new = [line for line in advice if not any(word in line for word in LINTED.get(line.split()[0], ()))]
    assert new == []


def a_sandbox_that_ends_is_gone_at_once(node: Node) -> None:
    one = node.ids["idle0"]
    for server in node.servers.values():
        assert server.value(f'kata_monitor_sandbox_up{{sandbox_id="{one}"}}') == 1
    node.kata.ok("rm", "-f", "idle0")
    everywhere(node, lambda server: not server.query(f'{{sandbox_id="{one}"}}'), "the end of its series")


def servers_had_nothing_to_complain_of(node: Node) -> None:
    """After everything else: no warning in either log, no scrape failed, no sandbox left anything out."""
    for version, server in node.servers.items():
        assert server.complaints() == [], version
        assert server.value("min_over_time(up[10m])") == 1
        assert server.query("kata_monitor_sandbox_series_dropped > 0") == []
        assert server.value("max(kata_shim_guest_samples_dropped)") == 0
    # It may warn of the one that was stuck, and on a busy host of others that were late.
    assert "level=error" not in node.monitor.log.read_text()


def _listens(namespace: str, port: int) -> bool:
    shown = subprocess.run(
        ["ip", "netns", "exec", namespace, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return f":{port:04X} " in shown


CHECKS = (
    every_target_is_up,
    processor_time_is_what_was_burnt,
    memory_is_what_is_held,
    bytes_sent_are_counted,
    what_goes_wrong_in_a_container_is_counted,
    names_that_a_container_chose_are_only_names,
    every_query_finds_something,
    alert_rules_are_evaluated,
    promtool_has_nothing_new_to_say,
    one_that_is_stuck_delays_no_other,
    a_sandbox_that_ends_is_gone_at_once,
    servers_had_nothing_to_complain_of,
)
"""In this order: some look at what those before have done."""


@pytest.mark.timeout(900)
def test_real_prometheus_servers_scrape_twenty_sandboxes(
    run_directory: Path, guest_assets: Path, busybox_image: str
) -> None:
    """One test, since every process of a run that has a part of them would start the twenty."""
    if not support.servers():
        pytest.skip("needs prometheus (tools/setup test unpacks it)")
    kata = Kata(Path(tempfile.mkdtemp(dir=run_directory, prefix="p")), guest_assets)
    try:
        with contextlib.ExitStack() as stack:
            node = Node(kata, busybox_image, stack)
            node.start()
            for check in CHECKS:
                check(node)
        left = kata.clear()
        assert not left, left
    finally:
        kata.clear()
        shutil.rmtree(kata.directory, ignore_errors=True)


def test_the_newest_prometheus_is_one_of_them() -> None:
    if not support.NEWEST.exists():
        pytest.skip(
            "needs Prometheus 3 of Debian sid (tools/setup test unpacks it where the mirror serves it)"
        )
    assert any(version.startswith("3.") for version in support.servers())
