"""What an engine tells of a real guest, against what that guest was made to do and what its own kernel counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_support import Box, make
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from kata import management
from kata.guest import manifest
from kata.hypervisor import virtiofsd
from kata.metrics import families
from kata.settings import VolumeSettings

__all__ = ["make"]
MIB = 1 << 20
APART_S = 6.0
"""Longer than the engine keeps what it knows of the guest's memory on the host."""


class Scrape:
    """The answer to one scrape, as Prometheus' own client reads it."""

    def __init__(self, box: Box) -> None:
        began = time.monotonic()
        status, headers, body = management.get(str(box.sandbox_dir / "shim-monitor.sock"), "/metrics")
        self.seconds = time.monotonic() - began
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        self.series: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.families: set[str] = set()
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in self.series, f"twice: {key}"
                self.series[key] = sample.value
            self.families.add(family.name if family.name in families.DEFINITIONS else f"{family.name}_total")

    def value(self, name: str, **labels: str) -> float:
        """The one series of this name that has these labels."""
        found = [
            value
            for (own, its), value in self.series.items()
            if own == name and labels.items() <= dict(its).items()
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def has(self, name: str, **labels: str) -> bool:
        """Whether there is a series of this name that has these labels."""
        return any(own == name and labels.items() <= dict(its).items() for own, its in self.series)


def counters(box: Box, file: str) -> dict[str, int]:
    """A file of names and numbers as a process in the container sees it."""
    status, streams = box.exec(f"x{os.urandom(4).hex()}", "cat", file)
    assert status == 0
    words = streams.stdout.decode().split()
    if len(words) == 1:
        return {"": int(words[0])}
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def test_figures_are_what_the_guest_was_made_to_do(
    make: Callable[..., Box], guest_assets: Path, tmp_path: Path
) -> None:
    bounces = manifest.load(str(guest_assets)).bounces
    box = make(
        network={"mode": "user"},
        machine={"size": {"memory_mib": 512}, "guest": {"bounces": bounces}},
        container={"volumes": [VolumeSettings(source=str(tmp_path), destination="/data")]},
    )
    volumes = [(str(tmp_path), "/data", ["rbind", "rw"])]
    argv = ("sh", "-c", "while :; do :; done")
    box.create(*argv, cpus=0.5, memory=200 * MIB, pids_limit=60, volumes=volumes)
    box.client.start(box.id)
    what_is_there(box)
    what_it_holds(box)
    what_it_writes_and_sends(box)
    what_goes_wrong(box)
    while_it_stands_still(box)


def what_is_there(box: Box) -> None:
    identity = {"container_id": box.id}
    # What counts upwards lies between what the guest's kernel says before and after.
    before = counters(box, "/sys/fs/cgroup/cpu.stat")
    scrape = Scrape(box)
    after = counters(box, "/sys/fs/cgroup/cpu.stat")
    for name, theirs, unit in (
        ("kata_container_cpu_throttled_seconds_total", "throttled_usec", 1e6),
        ("kata_container_cpu_throttled_periods_total", "nr_throttled", 1),
        ("kata_container_cpu_periods_total", "nr_periods", 1),
    ):
        assert before[theirs] / unit <= scrape.value(name, **identity) <= after[theirs] / unit, name
    for mode in ("user", "system"):
        used = scrape.value("kata_container_cpu_seconds_total", **identity, mode=mode)
        # The kernel estimates how time is shared between the two, so its own figures go back now and then.
        assert before[f"{mode}_usec"] / 1e6 - 0.2 <= used <= after[f"{mode}_usec"] / 1e6 + 0.2
    assert scrape.value("kata_container_cpu_throttled_seconds_total") > 0

    assert scrape.value("kata_shim_agent_up") == 1
    assert scrape.value("kata_shim_guest_samples_dropped") == 0
    assert scrape.value("kata_shim_pod_overhead_cpu") > 0  # at the first scrape
    assert scrape.value("kata_shim_pod_overhead_memory_in_bytes") > 10 * MIB
    assert scrape.value("kata_shim_guest_memory_bytes") == 512 * MIB
    assert scrape.value("kata_container_memory_limit_bytes", **identity) == 200 * MIB
    assert scrape.value("kata_container_pids_limit", **identity) == 60
    assert scrape.value("kata_container_state", **identity, state="running") == 1
    assert scrape.value("kata_hypervisor_threads") >= 2
    assert scrape.value("kata_helper_fds", role="passt") > 0
    assert scrape.value("kata_shim_start_phase_duration_seconds_sum", phase="kernel") > 0
    assert scrape.value("kata_shim_start_phase_duration_seconds_count", phase="total") == 1
    calls = "kata_shim_rpc_durations_histogram_milliseconds"
    assert scrape.value(f"{calls}_count", action="create") == 1
    assert scrape.value(f"{calls}_bucket", action="create", le="+Inf") == 1
    expected = set(families.DEFINITIONS)
    if box.client.describe()["hypervisor"]["capabilities"]["shares"][0] == "9p" or virtiofsd.find() is None:
        expected -= {name for name in expected if name.startswith("kata_virtiofsd_")}
    # What other hypervisors count, tests/kvm looks at.
    expected -= {
        name for name in expected if name.startswith(("kata_firecracker_", "kata_hypervisor_device"))
    }
    # Who is in the host's network namespace has no interfaces of his own, and there may be no cgroups here.
    assert expected - scrape.families <= {
        "kata_shim_netdev",
        "kata_hypervisor_netdev",
        "kata_shim_host_memory_limit_bytes",
        "kata_shim_host_oom_kills_total",
    }


def what_it_holds(box: Box) -> None:
    """Memory in the guest, and on the host for it."""
    time.sleep(APART_S)
    first = Scrape(box)
    status, _ = box.exec("hold", "dd", "if=/dev/urandom", "of=/dev/shm/held", "bs=1M", "count=60")
    assert status == 0
    current = counters(box, "/sys/fs/cgroup/memory.current")[""]
    time.sleep(APART_S)
    second = Scrape(box)
    usage = second.value("kata_container_memory_usage_bytes")
    assert usage == pytest.approx(current, rel=0.05)
    for name in ("kata_container_memory_usage_bytes", "kata_container_memory_working_set_bytes"):
        assert second.value(name) - first.value(name) == pytest.approx(60 * MIB, rel=0.05)
    name = "kata_shim_guest_memory_returned_bytes"
    assert first.value(name) - second.value(name) == pytest.approx(60 * MIB, rel=0.25)
    box.exec("free", "rm", "/dev/shm/held")
    until(lambda: Scrape(box).value(name) > second.value(name) + 45 * MIB, "the host has its memory back")


def what_it_writes_and_sends(box: Box) -> None:
    first = Scrape(box)
    box.exec("write", "dd", "if=/dev/zero", "of=/file", "bs=1M", "count=20", "conv=fsync")
    raw = {kind: ["CAP_NET_RAW"] for kind in ("bounding", "effective", "permitted")}
    box.exec("send", "ping", "-c", "1", "-s", "30000", "-w", "1", "10.0.2.2", capabilities=raw)
    second = Scrape(box)

    def grown(name: str, **labels: str) -> float:
        return sum(
            value - first.series.get(key, 0)
            for key, value in second.series.items()
            if key[0] == name and labels.items() <= dict(key[1]).items()
        )

    assert grown("kata_container_io_bytes_total", operation="write") == pytest.approx(20 * MIB, rel=0.05)
    assert grown("kata_guest_diskstat", item="sectors_written") * 512 == pytest.approx(20 * MIB, rel=0.1)
    sent = grown("kata_pod_network_transmit_bytes_total", interface="eth0")
    assert 30_000 <= sent <= 34_000
    assert grown("kata_guest_netdev_stat", interface="eth0", item="sent_bytes") == pytest.approx(
        sent, rel=0.05
    )
    assert grown("kata_hypervisor_io_stat", item="writebytes") >= 20 * MIB


def what_goes_wrong(box: Box) -> None:
    """Something is killed for want of memory, and the container goes on."""
    box.exec("burst", "tail", "/dev/zero")
    assert Scrape(box).value("kata_container_oom_kills_total") == 1
    status, _, body = management.get(str(box.sandbox_dir / "shim-monitor.sock"), "/kata/v1/state")
    document = json.loads(body)
    assert (status, document["state"]) == (200, "ready")
    assert document["containers"][0]["oom_kills"] == 1
    assert document["network"][0]["sent_bytes"] >= 30_000


def while_it_stands_still(box: Box) -> None:
    """A paused container has figures; a machine that stands still has none, and the rest comes in time."""
    box.client.pause(box.id)
    assert Scrape(box).value("kata_container_state", state="paused") == 1
    box.client.resume(box.id)
    pid = box.hypervisor_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        still = Scrape(box)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert still.seconds < 3
    assert still.value("kata_shim_agent_up") == 0
    assert still.value("kata_hypervisor_threads") >= 2
    assert not {"kata_agent_threads", "kata_container_pids", "kata_shim_pod_overhead_cpu"} & still.families
    until(lambda: Scrape(box).value("kata_shim_agent_up") == 1, "the guest answers again")


@pytest.fixture
def pods_network() -> Iterator[str]:
    """Name of a network namespace with an ``eth0`` whose other end is in there, too."""
    name = f"katam{os.getpid()}"
    commands = (
        f"ip netns add {name}",
        f"ip -n {name} link add eth0 type veth peer name other",
        f"ip -n {name} addr add 198.51.100.2/24 dev eth0",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} link set other up",
    )
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_pods_network_is_told_and_a_machine_that_dies(make: Callable[..., Box], pods_network: str) -> None:
    def sent() -> int:
        answer = subprocess.check_output(["ip", "-n", pods_network, "-s", "-j", "link", "show", "eth0"])
        return int(json.loads(answer)[0]["stats64"]["tx"]["bytes"])

    network = {"mode": "netns", "path": f"/run/netns/{pods_network}", "model": "tcfilter"}
    box = make(network=network, client={"ends_with_init": False})
    box.create("sleep", "100000")
    box.client.start(box.id)
    before = sent()
    scrape = Scrape(box)
    after = sent()
    for family in ("kata_hypervisor_netdev", "kata_shim_netdev"):
        assert before <= scrape.value(family, interface="eth0", item="sent_bytes") <= after
    assert scrape.value("kata_pod_network_receive_bytes_total", interface="eth0") >= 0

    os.kill(box.hypervisor_pid(), signal.SIGKILL)
    until(lambda: Scrape(box).has("kata_container_state", state="stopped"), "its end is on record")
    scrape = Scrape(box)
    assert scrape.seconds < 1
    assert scrape.value("kata_shim_sandbox_state", state="failed") == 1
    assert scrape.value("kata_shim_agent_up") == 0
    assert "kata_hypervisor_threads" not in scrape.families
