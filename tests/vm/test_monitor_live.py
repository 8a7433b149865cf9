"""kata-monitor and the engines of real sandboxes."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
from conftest import Kata
from monitor_support import CONFINED, Monitor, Stream, monitor
from prometheus_client.openmetrics import parser as openmetrics
from waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

NAME = "watched"


def check_metrics(one: Monitor, sandbox: str) -> None:
    """What a scrape has of the only sandbox."""
    text = one.get("/metrics", Accept="application/openmetrics-text").text
    parsed = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parsed}
    assert families["kata_monitor_sandbox_up"].samples[0].value == 1
    assert families["kata_shim_agent_up"].samples[0].labels == {"sandbox_id": sandbox}
    own = [name for name in families if not name.startswith("kata_monitor")]
    assert all(sample.labels["sandbox_id"] == sandbox for name in own for sample in families[name].samples)
    prefixes = {"_".join(name.split("_")[:2]) for name in own}
    assert {"kata_agent", "kata_guest", "kata_hypervisor", "kata_shim", "kata_container"} <= prefixes
    assert "kata_monitor_sandbox_series_dropped" not in families, "ours keep to the rules"
    # The same as the engine says it, but for what changes from one scrape to the next.
    alone = one.get(f"/metrics?sandbox={sandbox}").text
    names = set(re.findall(r"^# TYPE (\S+) ", alone, re.M))
    assert names == set(re.findall(r"^# TYPE (kata_(?!monitor)\S+) ", one.get("/metrics").text, re.M))


def test_a_sandbox_from_its_start_to_its_end(kata_env: Kata, busybox_image: str) -> None:
    script = "echo said by it; dd if=/dev/zero of=/dev/null bs=1M count=200 2>/dev/null; sleep 10000"
    # Without a capability: an engine's socket is its owner's, and that is enough.
    with monitor(
        kata_env.run_dir.parent, "--timeout", "2", run_dir=kata_env.run_dir, around=CONFINED
    ) as one:
        assert one.get("/sandboxes").text == "", "neither a sandbox nor the directory of one is there"
        stream = Stream(one, "/api/v1/stream?interval=60")
        assert stream.next()[1]["sandboxes"] == []
        kata_env.ok("run", "-d", "--name", NAME, busybox_image, "sh", "-c", script)
        sandbox = json.loads(kata_env.ok("inspect", NAME))[0]["id"]
        seen = []
        while "container.started" not in seen:
            name, event = stream.next()
            assert (name, event["sandbox"]) == ("life", sandbox)
            seen.append(event["event"])
        assert seen[:2] == ["sandbox.created", "sandbox.ready"]
        stream.close()
        assert one.get("/sandboxes").text == f"{sandbox}\n"

        check_metrics(one, sandbox)
        (state,) = one.get("/api/v1/sandboxes").json["sandboxes"]
        assert (state["id"], state["name"], state["state"]) == (sandbox, NAME, "ready")
        assert (state["reachable"], state["cri"]) == (True, None)
        assert state["containers"][0]["state"] == "running"
        assert "said by it" in one.get(f"/api/v1/sandboxes/{sandbox}/logs?container={sandbox}").text
        assert "kata-agent" in one.get(f"/api/v1/sandboxes/{sandbox}/console").text
        assert one.get(f"/api/v1/sandboxes/{sandbox}/logs?container=none").status == 404

        # Nobody asks: neither the engine's files nor its guest wake the monitor.
        time.sleep(0.5)
        before = one.switches()
        time.sleep(3.0)
        assert one.switches() == before

        # An engine that does not answer is told of within the deadline.
        engine = kata_env.engine_pid(NAME)
        os.kill(engine, signal.SIGSTOP)
        try:
            started = time.monotonic()
            text = one.get("/metrics", X_Prometheus_Scrape_Timeout_Seconds="8").text
            assert time.monotonic() - started < 8
            assert f'kata_monitor_sandbox_up{{sandbox_id="{sandbox}"}} 0\n' in text
            assert one.get(f"/metrics?sandbox={sandbox}").status == 502
            (state,) = one.get("/api/v1/sandboxes").json["sandboxes"]
            assert "within 2 s" in state["problem"]
        finally:
            os.kill(engine, signal.SIGCONT)
        up = f'kata_monitor_sandbox_up{{sandbox_id="{sandbox}"}} 1\n'
        until(lambda: up in one.get("/metrics").text, "it answers again", lambda: one.get("/metrics").text)

        kata_env.ok("rm", "-f", NAME)
        until(lambda: one.get("/sandboxes").text == "", "it has gone")
        kept = [event["event"] for event in one.get("/api/v1/events").json["events"]]
        # The engine, which removes the container, tells of that and of its own end.
        assert kept[-2:] == ["container.deleted", "sandbox.ended"]
