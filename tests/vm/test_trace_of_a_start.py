"""One trace of a start, from the command down into the guest, as a collector of OpenTelemetry gets it."""

from __future__ import annotations

import subprocess

from conftest import Kata
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_support import Collector, collector
from waiting import PATIENCE, until

__all__ = ["collector"]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def traced(kata: Kata, collector: Collector, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    env = {
        **kata.env,
        "KATA_TRACING": "1",
        "KATA_AGENT_TRACING": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "TRACEPARENT": f"00-{TRACE}-{PARENT}-01",
    }
    return subprocess.run(
        kata.command(*arguments), env=env, capture_output=True, timeout=PATIENCE, check=False
    )


def path_to(spans: dict[bytes, tuple[str, Span]], span: Span) -> list[str]:
    """Services and names from the root to a span."""
    found = []
    while True:
        service, _ = spans[span.span_id]
        found.append(f"{service}: {span.name}")
        if span.parent_span_id.hex() == PARENT:
            return found[::-1]
        span = spans[span.parent_span_id][1]


def test_a_trace_from_the_command_to_the_guest(
    shared_kata: Kata, busybox_image: str, collector: Collector
) -> None:
    secret = "dont-trace-7Xy"
    done = traced(
        shared_kata,
        collector,
        "run",
        "--rm",
        "-e",
        f"S={secret}",
        busybox_image,
        "sh",
        "-c",
        f"echo {secret}1",
    )
    assert done.returncode == 0, done.stderr
    until(lambda: any("Delete" in span.name for _, _, span in collector.spans), "the last of the spans")
    came = collector.spans
    spans = {span.span_id: (service, span) for service, _, span in came}
    assert len(spans) == len(came)
    assert {span.trace_id.hex() for _, span in spans.values()} == {TRACE}
    paths = {" / ".join(path_to(spans, span)): span for _, span in spans.values()}
    root = paths["kata: kata run"]
    steps = "kata: kata run / kata-engine: start the machine / kata-engine: "
    assert {f"{steps}{name}" for name in ("plan network", "start monitor", "join cgroup")} <= set(paths)
    create = "kata: kata run / kata-engine: containerd.task.v2.Task/Create"
    assert f"{create} / kata-engine: root file system" in paths
    assert "kata: kata run / kata-agent: kernel" in paths
    starts = "kata: kata run / kata-engine: containerd.task.v2.Task/Start"
    assert f"{starts} / kata-engine: grpc.AgentService/StartContainer" in paths
    guest = f"{create} / kata-engine: grpc.AgentService/CreateContainer / kata-agent: CreateContainer"
    phases = ("preparation", "devices", "storages", "namespaces", "mounts", "root", "program")
    assert {f"{guest} / kata-agent: {phase}" for phase in phases} <= set(paths)
    assert f"{starts} / kata-engine: grpc.AgentService/StartContainer / kata-agent: StartContainer" in paths
    for path, span in paths.items():
        assert span.start_time_unix_nano <= span.end_time_unix_nano, path
        if span is not root and "Delete" not in path:
            _, parent = spans[span.parent_span_id]
            assert parent.start_time_unix_nano <= span.start_time_unix_nano, path
            assert span.end_time_unix_nano <= parent.end_time_unix_nano, path
    assert root.end_time_unix_nano - root.start_time_unix_nano > 50_000_000
    assert secret.encode() not in b"".join(span.SerializeToString() for _, span in spans.values())


def test_a_start_that_fails_has_its_trace_as_well(
    shared_kata: Kata, busybox_image: str, collector: Collector
) -> None:
    done = traced(shared_kata, collector, "run", "--rm", busybox_image, "/no/such")
    assert done.returncode == 127
    until(
        lambda: any(span.name == "kata run" for _, _, span in collector.spans),
        "the trace of the failed start",
    )
    failed = [span for _, _, span in collector.spans if span.status.message]
    assert "grpc.AgentService/CreateContainer" in {span.name for span in failed}
    assert all("no such file" in span.status.message for span in failed)
