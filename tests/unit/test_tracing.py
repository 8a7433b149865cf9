"""Tracing: contexts, what an engine records and what it costs when off, and the export to a collector."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from otlp_support import Collector, collector
from waiting import PATIENCE, until

from kata import launcher, trace_export, tracing
from kata.agent.client import AgentClient, Encoded
from kata.engine.services import trace
from kata.engine.timings import Timings
from kata.errors import HostError
from kata.proto import agentext_pb, health_pb
from kata.settings import TracingSettings
from kata.ttrpc.server import Context

__all__ = ["collector"]
SOURCE = Path(tracing.__file__).parent
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


# ---- contexts ----


def test_a_context_is_read_as_w3c_has_it() -> None:
    context = tracing.parse(PARENT)
    assert context is not None
    assert (context.trace_id, context.span_id) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
    assert context.header() == PARENT
    later = tracing.parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings")
    assert later is not None
    for wrong in (
        *("", "00", "00-1-2-01", PARENT + "-more", PARENT.replace("00-", "ff-", 1), PARENT.upper()),
        *("00-" + "0" * 32 + "-00f067aa0ba902b7-01", PARENT.replace("00f067aa0ba902b7", "0" * 16)),
        *(PARENT[:-2] + "00", PARENT[:-2] + "0x", PARENT.replace("4bf9", "4bg9"), "-" * 55),
    ):
        assert tracing.parse(wrong) is None, wrong


@pytest.mark.parametrize(
    ("header", "known", "wanted"),
    [("", False, True), (PARENT, True, True), (PARENT[:-2] + "00", False, False), ("nonsense", False, True)],
)
def test_a_caller_may_say_that_a_trace_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, header: str, known: bool, wanted: bool
) -> None:
    monkeypatch.setenv(tracing.VARIABLE, header)
    context, recorded = tracing.recorded_by_caller()
    assert (context is not None, recorded) == (known, wanted)


def test_spans_are_bounded_and_counted() -> None:
    tracer = tracing.Tracer()
    root = tracing.new_trace()
    for _ in range(tracing.MOST_SPANS + 3):
        tracer.begin("x", root, tracing.ENGINE).end(error="e" * 10_000)
    taken = tracer.take()
    assert (len(taken), tracer.dropped, len(tracer)) == (tracing.MOST_SPANS, 3, 0)
    assert max(len(span["error"]) for span in taken) == 256


# ---- off ----


def test_nothing_of_it_is_imported_when_it_is_off() -> None:
    program = (
        f"import sys; sys.path.append({str(SOURCE.parent)!r})\n"
        "import kata.cli.session, kata.engine.main, kata.engine.lifecycle.sandbox, kata.agent.client\n"
        "print(sorted(name for name in sys.modules if 'trac' in name and 'traceback' not in name\n"
        "             and name not in ('kata.hypervisor.tsc',) or 'opentelemetry' in name))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


class _Answering:
    """A ttRPC client that answers at once."""

    metadata: Any = "none was given"

    async def call(self, *_: object, metadata: object = None, **__: object) -> health_pb.HealthCheckResponse:
        self.metadata = metadata
        return health_pb.HealthCheckResponse()


def test_a_call_costs_next_to_nothing_when_it_is_off() -> None:
    """Beside the call without any of it, its own checks included: a microsecond would be far too much."""

    async def seconds(call: Callable[[], Awaitable[object]]) -> float:
        best = 1.0
        for _ in range(15):
            began = time.perf_counter()
            for _ in range(1000):
                await call()
            best = min(best, (time.perf_counter() - began) / 1000)
        return best

    class Bare(AgentClient):
        """`AgentClient.call` as it would be without tracing."""

        async def call(
            self,
            service: Any,
            method: Any,
            request: Any,
            answer: Any,
            timeout_s: Any = 60.0,
            metadata: Any = None,
        ) -> Any:
            try:
                return await self._client.call(
                    service, method, request, answer, timeout=timeout_s, metadata=metadata
                )
            except HostError:
                raise

    async def compare() -> tuple[float, float]:
        inner: Any = _Answering()
        traced, bare = AgentClient(inner), Bare(inner)
        assert traced.trace is None
        await traced.check(1.0)
        assert inner.metadata is None
        return await seconds(lambda: traced.check(1.0)), await seconds(lambda: bare.check(1.0))

    with_it, without = asyncio.run(compare())
    assert with_it - without < 1e-6
    assert Timings(0).trace is None


# ---- the engine ----


class _Agent:
    def __init__(self, spans: list[agentext_pb.GuestSpan]) -> None:
        self.features = frozenset({trace.FEATURE})
        self.given = spans
        self.raw = b""

    async def call(self, *_: object) -> Encoded:
        return Encoded(self.raw or agentext_pb.TakeSpansResponse(spans=self.given).encode())


def sandbox(agent: object = None) -> Any:
    """A sandbox as far as it is traced."""
    loop = asyncio.get_running_loop()
    return SimpleNamespace(
        id="box",
        settings=SimpleNamespace(client=SimpleNamespace(name="kata", namespace="")),
        timings=Timings(time.monotonic_ns()),
        runtime=SimpleNamespace(
            trace=None, living_agent=agent, is_lost=agent is None, machine=SimpleNamespace(host=None)
        ),
        life=SimpleNamespace(failed=False, lost_reason=""),
        tasks=SimpleNamespace(create_task=loop.create_task, log=lambda line: logged.append(line)),
    )


logged: list[str] = []


async def recorded(one: trace.SandboxTrace, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What it would export."""
    sent: list[dict[str, Any]] = []

    async def send(spans: list[dict[str, Any]]) -> None:
        sent.extend(spans)

    monkeypatch.setattr(one, "_send", send)
    await one._export()
    return sent


def test_calls_nest_and_carry_their_context_to_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.VARIABLE, PARENT)

    async def run() -> list[dict[str, Any]]:
        box = sandbox()
        one = trace.SandboxTrace(box, TracingSettings())
        began = time.monotonic_ns()
        one.began([("plan_network", began, began + 10), ("start_monitor", began + 10, began + 30)])
        inner = _Answering()
        agent = AgentClient(inner)  # type: ignore[arg-type]
        agent.trace = box.runtime.trace

        async def create(message: object, context: Context) -> Any:
            box.timings.add("root file system", time.monotonic_ns())
            await agent.call(
                "grpc.AgentService",
                "CreateContainer",
                health_pb.CheckRequest(),
                health_pb.HealthCheckResponse,
            )
            return "created"

        async def wait(message: object, context: Context) -> Any:
            return "over"

        async def refuse(message: object, context: Context) -> Any:
            raise HostError("no \x1b[31mspace")

        context = Context("containerd.task.v2.Task", "Create", {}, None)
        message = SimpleNamespace(id="box")
        assert await one.call(create, message, context) == "created"
        sent_header = inner.metadata["traceparent"]
        with pytest.raises(HostError):
            await one.call(
                refuse,
                message,
                Context("t", "Start", {"traceparent": [PARENT.replace("4bf9", "5bf9")]}, None),
            )
        assert await one.call(wait, message, Context("t", "Wait", {}, None)) == "over"
        spans = await recorded(one, monkeypatch)
        assert sent_header.split("-")[2] in {span["span_id"] for span in spans}
        one._closing = True
        if one._timer is not None:
            one._timer.cancel()
        return spans

    spans = asyncio.run(run())
    named = {span["name"]: span for span in spans}
    root = named["kata run"]
    assert (root["trace_id"], root["parent_id"]) == tuple(PARENT.split("-")[1:3])
    assert named["start the machine"]["parent_id"] == root["span_id"]
    assert named["plan network"]["parent_id"] == named["start the machine"]["span_id"]
    create = named["containerd.task.v2.Task/Create"]
    assert create["parent_id"] == root["span_id"]
    assert create["attributes"] == {"id": "box"}
    assert named["grpc.AgentService/CreateContainer"]["parent_id"] == create["span_id"]
    assert named["root file system"]["parent_id"] == create["span_id"]
    # A call with a context of its own belongs to that trace.
    assert named["t/Start"]["trace_id"].startswith("5bf9")
    assert named["t/Start"]["error"] == "no \\x1b[31mspace"
    assert "t/Wait" not in named
    for span in (one for one in spans if one["trace_id"] == root["trace_id"]):
        assert root["start_ns"] <= span["start_ns"] <= span["end_ns"] <= root["end_ns"], span["name"]


def test_a_hostile_guest_reports_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless times, unknown parents, control characters, thousands of everything."""
    monkeypatch.delenv(tracing.VARIABLE, raising=False)
    most = (1 << 64) - 1

    async def run() -> tuple[list[dict[str, Any]], tracing.Span]:
        agent = _Agent([])
        one = trace.SandboxTrace(sandbox(agent), TracingSettings(agent=True))
        one.began([])
        span = one.begin_call("grpc.AgentService", "CreateContainer", 1.0)
        assert span is not None
        time.sleep(0.002)
        span.end()
        phase = agentext_pb.GuestPhase(name="p\x1b]0;x\x07" * 20, start_ns=most, duration_ns=most)
        lie = agentext_pb.GuestSpan(
            parent=bytes.fromhex(span.span_id), name="n\n" * 500, duration_ns=most, phases=[phase] * 30
        )
        stranger = agentext_pb.GuestSpan(parent=b"12345678", name="stranger", duration_ns=1)
        agent.given = [lie, stranger, agentext_pb.GuestSpan(parent=b"", name="none")] + [lie] * 20
        return await recorded(one, monkeypatch), span

    spans, call = asyncio.run(run())
    of_guest = [span for span in spans if span["service"] == tracing.AGENT]
    assert (
        len(of_guest) == 255 * 17 - (255 * 17 + 2 - tracing.MOST_SPANS)
        or len(of_guest) <= tracing.MOST_SPANS
    )
    assert not any("stranger" in span["name"] for span in spans)
    (outside,) = (span for span in spans if span["span_id"] == call.span_id)
    for span in of_guest:
        assert outside["start_ns"] <= span["start_ns"] <= span["end_ns"] <= outside["end_ns"]
        assert span["name"].isprintable()
        assert len(span["name"]) <= 64


@pytest.mark.parametrize("answer", [b"\x0a\x00" * (1 << 20), b"\x0a\xff", b"\x00" * 100])
def test_an_answer_that_is_too_long_or_none_costs_the_guests_part_alone(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.delenv(tracing.VARIABLE, raising=False)

    async def run() -> list[dict[str, Any]]:
        agent = _Agent([])
        agent.raw = answer
        one = trace.SandboxTrace(sandbox(agent), TracingSettings(agent=True))
        one.began([])
        span = one.begin_call("grpc.AgentService", "CreateContainer", 1.0)
        assert span is not None
        span.end()
        return await recorded(one, monkeypatch)

    logged.clear()
    began = time.process_time()
    spans = asyncio.run(run())
    assert time.process_time() - began < 1
    assert {span["service"] for span in spans} == {tracing.CLIENT, tracing.ENGINE}
    assert logged[0].startswith("a trace lacks the guest's part")


# ---- the export ----


def given(**more: object) -> dict[str, Any]:
    tracer = tracing.Tracer()
    context = tracing.parse(PARENT)
    assert context is not None
    root = tracer.begin("root", context, tracing.CLIENT, tracing.SERVER)
    tracer.begin("call", root, tracing.AGENT, attributes={"id": "x", "n": 3}).end(error="it failed")
    root.end()
    return {"sandbox": "box", "client": "containerd", "namespace": "k8s.io", "spans": tracer.take(), **more}


def export(spans: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-I", "-S", str(SOURCE / "__main__.py"), "export-spans", str(os.getpid())]
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        command,
        input=json.dumps(spans).encode(),
        env={**env, **environment},
        capture_output=True,
        check=False,
    )


def test_a_collector_gets_them(collector: Collector, tmp_path: Path) -> None:
    config = tmp_path / "configuration.toml"
    config.write_text(
        f'[runtime]\nenable_tracing = true\njaeger_endpoint = "{collector.url}/"\njaeger_user = "me"\n'
        'jaeger_password = "pass"\n'
    )
    done = export(
        given(config=str(config)), OTEL_SERVICE_NAME="something", OTEL_RESOURCE_ATTRIBUTES="rack=7"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    path, headers = collector.requests[0]
    assert path == "/v1/traces"
    assert headers["authorization"] == "Basic bWU6cGFzcw=="
    spans = {span.name: (service, about, span) for service, about, span in collector.spans}
    service, about, root = spans["root"]
    assert service == "kata"
    assert about["rack"] == "7"
    assert about["kata.sandbox"] == "box"
    assert about["containerd.namespace"] == "k8s.io"
    assert root.trace_id.hex() == PARENT.split("-")[1]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    service, _, call = spans["call"]
    assert service == "kata-agent"
    assert call.parent_span_id == root.span_id
    assert (call.status.code, call.status.message) == (2, "it failed")
    assert {one.key: one.value for one in call.attributes}["n"].int_value == 3
    assert root.start_time_unix_nano <= call.start_time_unix_nano <= call.end_time_unix_nano
    assert abs(call.end_time_unix_nano - time.time_ns()) < 60e9


def test_what_goes_wrong_is_one_sentence(tmp_path: Path) -> None:
    refusing = Collector(status=403)
    try:
        done = export(given(), OTEL_EXPORTER_OTLP_ENDPOINT=refusing.url)
    finally:
        refusing.close()
    assert done.returncode == 1
    assert b"the collector did not take them" in done.stderr
    assert done.stderr.count(b"\n") == 1
    # Without OpenTelemetry: this Python without the development packages.
    program = (
        f"import sys; sys.path[:0] = [{str(SOURCE.parent)!r}]\n"
        f"sys.argv[:] = ['x', 'export-spans', '{os.getpid()}']\n"
    )
    bare = subprocess.run(
        [
            "/usr/bin/python3",
            "-I",
            "-S",
            "-c",
            program + "from kata.trace_export import main; sys.exit(main())",
        ],
        input=json.dumps(given()).encode(),
        capture_output=True,
        check=False,
    )
    assert bare.returncode == 1
    assert b"OpenTelemetry is not installed" in bare.stderr


@pytest.mark.parametrize(
    ("configured", "url"),
    [
        ("", ""),
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("https://h/", "https://h/v1/traces"),
        ("http://h:14268/api/traces", "http://h:4318/v1/traces"),
        ("http://[::1]:14268/api/traces/", "http://[::1]:4318/v1/traces"),
        ("http://h/otlp/v1/traces?a=b", "http://h/otlp/v1/traces?a=b"),
    ],
)
def test_the_endpoint_is_completed(configured: str, url: str) -> None:
    assert trace_export.endpoint(configured) == url


def test_the_helper_is_bounded_and_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs is killed, and what one says on its way out is reported."""

    async def run(script: str, timeout_s: float) -> tuple[str, int]:
        monkeypatch.setattr(launcher, "command", lambda: ["/bin/sh", "-c", script])
        helper = trace._Exporter(b"{}")
        try:
            return await helper.wait(timeout_s), helper.pid
        finally:
            helper.close()

    began = time.monotonic()
    problem, pid = asyncio.run(run("exec sleep 100", 0.2))
    assert "took longer" in problem
    assert time.monotonic() - began < 10
    assert not Path(f"/proc/{pid}").exists()
    assert asyncio.run(run("cat >/dev/null; echo words >&2; exit 3", 10))[0] == "words"
    assert asyncio.run(run("exit 4", 10))[0] == "the export ended with 4"
    assert asyncio.run(run("exit 0", 10))[0] == ""


def test_the_helper_ends_with_its_engine(tmp_path: Path) -> None:
    """Also one that is in the middle of a request, to a collector that does not answer."""
    silent = socket.create_server(("127.0.0.1", 0))
    spans = tmp_path / "spans"
    spans.write_text(json.dumps(given()))
    program = (
        "import sys, time; from pathlib import Path; from kata.engine.services import trace\n"
        f"print(trace._Exporter(Path({str(spans)!r}).read_bytes()).pid, flush=True); time.sleep(100)"
    )
    env = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "PYTHONPATH": str(SOURCE.parent),
    }
    engine = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
    try:
        assert engine.stdout is not None
        helper = int(engine.stdout.readline())
        silent.settimeout(PATIENCE)
        connection, _ = silent.accept()
        assert Path(f"/proc/{helper}").exists()
    finally:
        engine.kill()
        engine.communicate()
    until(lambda: not _runs(helper), "the helper is gone")
    connection.close()
    silent.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
