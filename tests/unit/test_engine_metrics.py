"""What an engine tells of its sandbox, for Prometheus and as a document, against a double of the agent.

A double can lie, repeat itself, and say nothing. What a real guest's figures are is in tests/vm.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sandbox_support
from engine_double import Engine, make
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from kata.engine.containers.described import described
from kata.engine.services import figures, metrics, state
from kata.engine.services.sandbox_service import SERVICE
from kata.errors import KataError
from kata.metrics import exposition, families, procfs
from kata.metrics.overhead import Overhead
from kata.proto import agent_pb, sandbox_pb

__all__ = ["make"]
T = TypeVar("T")
Maker = Callable[..., Engine]
HOSTILE = """kata_agent_threads 1
kata_agent_threads 2
kata_agent_threads NaN
kata_agent_total_vm 1e400
kata_agent_total_vm +Inf
kata_shim_threads 666
kata_container_pids{container_id="c1"} 666
up 0
# TYPE kata_shim_threads counter
# HELP kata_shim_threads evil
kata_guest_load{item="load1"} 0.5 1700000000
kata_guest_load{item="load\\"5"} 1
kata_guest_load{item="a\x1b[2J"} 1
kata_guest_load{item="load15"
kata_guest_load{item="load15"} 0.25
kata_guest_meminfo{item="mem_total"} +Inf
kata_guest_meminfo{item="mem_available"} 99
kata_guest_meminfo{item="x",sandbox_id="other"} 1
kata_guest_cpu_time{cpu="total",item="user"} 1e99
<script>alert(1)</script>
\u2028
"""


@pytest.fixture
def running(make: Maker) -> Engine:
    """An engine with a container that sleeps."""
    engine = make()
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
    return engine


def ask(engine: Engine, what: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run_coroutine_threadsafe(what(engine.sandbox), engine.loop).result(30)


def scrape(engine: Engine) -> dict[str, Metric]:
    """All families, as Prometheus' own client reads them, and by us: each is known, and no series occurs twice."""
    text = ask(engine, metrics.collect)
    ours = {one.name: one for one in exposition.parse(text.encode())}
    found = {}
    seen = set()
    for family in text_string_to_metric_families(text):
        name = family.name if family.name in ours else f"{family.name}_total"
        definition = families.DEFINITIONS[name]
        assert (family.type, family.documentation) == (definition.kind, definition.help)
        for sample in family.samples:
            series = (sample.name, tuple(sorted(sample.labels.items())))
            assert series not in seen
            seen.add(series)
            assert set(sample.labels) - {"le"} == set(definition.labels), sample
        assert len(family.samples) == len(ours[name].samples)
        found[name] = family
    assert set(found) == set(ours)
    return found


def value(found: dict[str, Metric], name: str, **labels: str) -> float:
    (sample,) = [
        one for one in found[name].samples if one.name == name and labels.items() <= one.labels.items()
    ]
    return float(sample.value)


def usage(**changes: Any) -> agent_pb.StatsContainerResponse:
    group = agent_pb.CgroupStats(
        cpu_stats=agent_pb.CpuStats(
            cpu_usage=agent_pb.CpuUsage(
                total_usage=3 * 10**9, usage_in_usermode=2 * 10**9, usage_in_kernelmode=10**9
            ),
            throttling_data=agent_pb.ThrottlingData(
                periods=10, throttled_periods=4, throttled_time=5 * 10**8
            ),
        ),
        memory_stats=agent_pb.MemoryStats(
            usage=agent_pb.MemoryData(usage=1000, max_usage=2000, failcnt=7, limit=4096),
            stats={"inactive_file": 100, "oom_kill": 2},
        ),
        pids_stats=agent_pb.PidsStats(current=3, limit=50),
        blkio_stats=agent_pb.BlkioStats(
            io_service_bytes_recursive=[
                agent_pb.BlkioStatsEntry(major=254, minor=0, op="Read", value=11),
                agent_pb.BlkioStatsEntry(major=254, minor=0, op="Write", value=12),
            ]
        ),
    )
    answer = agent_pb.StatsContainerResponse(
        cgroup_stats=group, network_stats=[agent_pb.NetworkStats(name="eth0", rx_bytes=5, tx_packets=6)]
    )
    for name, changed in changes.items():
        setattr(answer, name, changed)
    return answer


def test_a_container_is_told_of(running: Engine) -> None:
    running.double.usage = usage()
    running.double.says = "kata_agent_threads 1\n"
    found = scrape(running)
    assert value(found, "kata_shim_agent_up") == 1
    assert value(found, "kata_container_cpu_seconds_total", container_id="c1", mode="user") == 2
    assert value(found, "kata_container_cpu_seconds_total", container_id="c1", mode="system") == 1
    assert value(found, "kata_container_cpu_throttled_periods_total") == 4
    assert value(found, "kata_container_cpu_throttled_seconds_total") == 0.5
    assert value(found, "kata_container_memory_working_set_bytes") == 900
    assert value(found, "kata_container_memory_limit_bytes") == 4096
    assert value(found, "kata_container_oom_kills_total") == 2
    assert value(found, "kata_container_pids_limit") == 50
    assert value(found, "kata_container_io_bytes_total", operation="write", device="254:0") == 12
    assert value(found, "kata_pod_network_receive_bytes_total", interface="eth0") == 5
    assert value(found, "kata_shim_containers", state="running") == 1
    assert value(found, "kata_agent_threads") == 1
    assert value(found, "kata_shim_process_start_time_seconds") == pytest.approx(
        time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + started_s(os.getpid()), abs=2
    )
    counts = {
        one.labels["action"]: one.value
        for one in found["kata_shim_agent_rpc_durations_histogram_milliseconds"].samples
        if one.name.endswith("_count")
    }
    assert counts["CreateContainerRequest"] == 1
    document = ask(running, state.state)
    (container,) = document["containers"]
    assert (container["cpu_seconds"], container["memory_bytes"], container["written_bytes"]) == (3, 900, 12)
    assert document["hypervisor"]["version"] == "1.2.3"


def test_calls_that_a_client_has_made_up_have_no_name_of_their_own(running: Engine) -> None:
    evil = 'x"} 1\\nkata_shim_threads{a="'
    calls = [("grpc.AgentService", evil), (evil, "Check"), ("grpc.AgentService", "ReadStdout"), ("", "")]
    with running.client() as client:
        for service, method in calls:
            request = sandbox_pb.AgentCallRequest(service=service, method=method)
            with pytest.raises(KataError):
                client.call(SERVICE, "AgentCall", request, sandbox_pb.AgentCallResponse, 10)
    found = scrape(running)
    actions = {
        one.labels["action"] for one in found["kata_shim_agent_rpc_durations_histogram_milliseconds"].samples
    }
    assert {"CheckRequest", "GuestDetailsRequest", "ReadStreamRequest", "CreateContainerRequest"} <= actions
    assert all(action.isalpha() and action.endswith("Request") for action in actions)


def test_kills_for_want_of_memory_are_told_of_a_container_that_has_ended(running: Engine) -> None:
    running.double.usage = usage()
    assert value(scrape(running), "kata_container_oom_kills_total", container_id="c1") == 2
    for _ in range(3):
        running.do(lambda: running.double.oom.put_nowait("c1"))
    with running.client() as client:
        client.kill("c1", 9)
        client.wait("c1")
    found = scrape(running)
    assert value(found, "kata_container_state", container_id="c1", state="stopped") == 1
    assert value(found, "kata_container_oom_kills_total", container_id="c1") == 3
    assert "kata_container_pids" not in found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (tools/setup test unpacks it)")
def test_promtool_objects_to_names_of_the_originals_only(running: Engine) -> None:
    running.double.usage = usage()
    running.double.says = "kata_agent_scrape_count 1\n"
    running.do(lambda: running.sandbox.calls.add("State", 1))
    text = ask(running, metrics.collect)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False
    )
    named = {line.split()[0] for line in done.stderr.decode().splitlines()}
    assert named == {
        "kata_agent_scrape_count",
        "kata_shim_agent_rpc_durations_histogram_milliseconds",
        "kata_shim_rpc_durations_histogram_milliseconds",
    }


def test_the_documents_members_are_in_the_reference(running: Engine) -> None:
    running.double.usage = usage()
    said = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs/reference.md").read_text()))
    document = ask(running, state.state)
    parts = [
        document,
        *(part for part in document.values() if isinstance(part, dict) and part != document["labels"]),
    ]
    parts += [
        *document["host"]["processes"],
        *document["network"],
        *document["containers"],
        *document["timings"],
    ]
    assert {name for part in parts for name in part} <= said


def started_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def test_a_lying_guest_spoils_nothing(running: Engine) -> None:
    evil = 'eth0"} 1\nkata_shim_threads 3\n#'
    cards = [
        agent_pb.NetworkStats(name=name, rx_bytes=2**64 - 1) for name in ("eth0", "eth0", evil, "x" * 5000)
    ]
    running.double.usage = usage(network_stats=cards * 10)
    running.double.says = HOSTILE
    found = scrape(running)
    assert value(found, "kata_shim_guest_samples_dropped") == 12
    assert value(found, "kata_agent_threads") == 1
    assert value(found, "kata_shim_threads") < 666
    assert len(found["kata_guest_load"].samples) == 2
    assert 1 <= len(found["kata_pod_network_receive_bytes_total"].samples) <= metrics.MAX_CARDS
    text = ask(running, metrics.collect)
    assert not any(word in text for word in ("evil\n", "<script", "\x1b", "sandbox_id"))
    document = ask(running, state.state)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["guest"]["memory_total_bytes"] is None
    assert document["guest"]["memory_available_bytes"] == 99
    assert max(len(card["interface"]) for card in document["network"]) <= state.MAX_TEXT


def test_what_a_hypervisor_has_counted(running: Engine) -> None:
    """By device, in families of its own where it has some, and nothing that would end a line."""
    vm: Any = running.sandbox.runtime.vm
    vm.counted = {
        "disk0": {"read_bytes": 7, 'x"} 1\nkata_x': 1},
        "block": {"read_bytes": 9},
        'disk"1': {"a": 1},
    }
    found = scrape(running)
    samples = found["kata_hypervisor_device"].samples
    assert [(one.labels, one.value) for one in samples] == [({"device": "disk0", "item": "read_bytes"}, 7)]
    assert "kata_firecracker_block" not in found  # whose machine this is not
    running.sandbox.settings.described().hypervisor.name = "firecracker"
    assert value(scrape(running), "kata_firecracker_block", item="read_bytes") == 9


def test_a_guest_that_says_very_much_is_cut(running: Engine) -> None:
    lines = (f'kata_guest_vm_stat{{item="k{number}"}} {number}' for number in range(90_000))
    running.double.says = "\n".join(lines)
    found = scrape(running)
    assert len(found["kata_guest_vm_stat"].samples) == exposition.MAX_FAMILY_SAMPLES
    assert value(found, "kata_shim_guest_samples_dropped") > 10_000


def test_devices_are_bounded(make: Maker) -> None:
    engine = make(client={"ends_with_init": False})
    answer = usage()
    assert answer.cgroup_stats is not None
    assert answer.cgroup_stats.blkio_stats is not None
    entries = [agent_pb.BlkioStatsEntry(major=number, op="read", value=1) for number in range(2000)]
    answer.cgroup_stats.blkio_stats.io_service_bytes_recursive = entries
    engine.double.usage = answer
    with engine.client() as client:
        for number in range(8):
            client.create(f"c{number + 1}", engine.bundle("sleep"))
    found = scrape(engine)
    assert len(found["kata_container_pids"].samples) == 8
    assert len(found["kata_container_io_bytes_total"].samples) == exposition.MAX_FAMILY_SAMPLES


@pytest.mark.parametrize(
    ("annotations", "name", "labels"),
    [
        (
            {
                "io.kubernetes.cri.sandbox-name": "web",
                "io.kubernetes.cri.sandbox-namespace": "shop",
                "io.kubernetes.cri.sandbox-uid": "u1",
            },
            "web",
            {
                "io.kubernetes.pod.name": "web",
                "io.kubernetes.pod.namespace": "shop",
                "io.kubernetes.pod.uid": "u1",
            },
        ),
        (
            {"io.kubernetes.cri.sandbox-name": "web", "io.kubernetes.cri.container-name": "app"},
            "app",
            {"io.kubernetes.pod.name": "web"},
        ),
        (
            {"io.kubernetes.container.name": "POD", "io.kubernetes.pod.name": "web"},
            "web",
            {"io.kubernetes.pod.name": "web"},
        ),
        ({"nerdctl/name": "one"}, "one", {}),
        ({}, "", {}),
    ],
)
def test_a_pods_containers_have_its_labels(
    tmp_path: Path, annotations: dict[str, str], name: str, labels: dict[str, str]
) -> None:
    settings = sandbox_support.sandbox("s", str(tmp_path), accel="tcg", kernel="/k", initrd="/i")
    about = described(settings, "other", {"annotations": annotations})
    assert (about["name"], about["labels"]) == (name, labels)


def test_figures_that_would_fill_the_engines_memory_end_the_sandbox(running: Engine) -> None:
    answer = usage()
    assert answer.cgroup_stats is not None
    assert answer.cgroup_stats.blkio_stats is not None
    answer.cgroup_stats.blkio_stats.sectors_recursive = [agent_pb.BlkioStatsEntry()] * 200_000
    running.double.usage = answer
    found = scrape(running)
    assert "kata_container_pids" not in found
    assert "400" in ask(running, state.state)["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_interfaces_are_those_of_the_processs_namespace() -> None:
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up; echo; read x"], stdin=-1, stdout=-1
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        ((name, items),) = procfs.interfaces(child.pid)
        child.stdin.write(b"\n")
    assert (name.strip(), items["recv_bytes"], set(items)) == ("lo", 0, set(procfs.NET_ITEMS))
    assert list(procfs.interfaces(child.pid)) == []


def test_a_guest_that_does_not_answer_is_asked_once(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "GUEST_S", 0.5)
    running.double.says = "kata_agent_threads 1\n"
    running.double.usage = usage()
    assert "kata_shim_pod_overhead_cpu" in scrape(running)
    silence = asyncio.Event()

    async def fault(method: str) -> None:
        if method == "GetMetrics":
            await silence.wait()

    running.double.fault = fault
    asked = running.double.calls.count("GetMetrics")
    for limit_s in (2, 0.4, 0.4):  # it is waited for once
        began = time.monotonic()
        text = ask(running, metrics.collect)
        assert time.monotonic() - began < limit_s
        assert "kata_shim_agent_up 0\n" in text
        found = scrape(running)
        assert value(found, "kata_shim_agent_up") == 0
        assert value(found, "kata_shim_threads") > 0
        assert value(found, "kata_container_pids") == 3  # which was answered
        assert not {"kata_agent_threads", "kata_shim_pod_overhead_cpu"} & set(found)
    assert running.double.calls.count("GetMetrics") == asked + 1
    assert ask(running, state.state)["overhead"] == {"cpu_seconds": None, "memory_bytes": None}
    running.do(silence.set)
    found = scrape(running)
    assert value(found, "kata_shim_agent_up") == 1
    assert running.double.calls.count("GetMetrics") <= asked + 2


def test_those_who_ask_together_share_the_questions(running: Engine) -> None:
    running.double.says = "kata_agent_threads 1\n"
    before = running.double.calls.count("GetMetrics")
    gate = asyncio.Event()

    async def fault(method: str) -> None:
        await gate.wait()

    running.double.fault = fault

    async def together(sandbox: Any) -> list[str]:
        asking = [asyncio.ensure_future(metrics.collect(sandbox)) for _ in range(5)]
        await asyncio.sleep(0.1)
        gate.set()
        return await asyncio.gather(*asking)

    for text in ask(running, together):
        assert "kata_agent_threads 1\n" in text
    assert running.double.calls.count("GetMetrics") == before + 1


def test_a_machine_that_has_died_leaves_the_engines_figures(running: Engine) -> None:
    running.do(lambda: running.sandbox.machine_double.die())
    for _ in range(100):
        found = scrape(running)
        if value(found, "kata_shim_sandbox_state") and found["kata_shim_sandbox_state"].samples[0].labels[
            "state"
        ] in ("failed", "ending", "ended"):
            break
        time.sleep(0.02)
    assert value(found, "kata_shim_agent_up") == 0
    assert "kata_hypervisor_threads" not in found
    assert ask(running, state.state)["error"]


def test_overhead_is_right_at_the_first_look_and_when_containers_go() -> None:
    overhead = Overhead(100.0)
    assert overhead.cpu_percent(110.0, 5.0, {"a": 2.0, "b": 1.0}) == pytest.approx(20)
    assert overhead.cpu_percent(110.01, 50.0, {}) == pytest.approx(20)  # too close to say
    # b has gone with its second, and c has come: what is left of 6 seconds is 1.
    assert overhead.cpu_percent(120.0, 11.0, {"a": 4.0, "c": 3.0}) == pytest.approx(10)
    assert overhead.cpu_percent(130.0, 11.5, {"a": 5.0, "c": 3.0}) == 0
