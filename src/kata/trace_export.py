"""The helper process that hands an engine's spans to a collector, with OpenTelemetry's own exporter.

``... export-spans PID [FD]``, with the spans on standard input as `kata.engine.services.trace` writes them. It ends
with the engine, whose pid is given, and after `DEADLINE_S` in any case. FD is the network namespace to work in. What
goes wrong is one line on standard error, and the exit status 1.

Where to: ``[runtime] jaeger_endpoint`` of the configuration, else ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` or
``OTEL_EXPORTER_OTLP_ENDPOINT``, else ``http://localhost:4318/v1/traces``; always OTLP over HTTP.
"""

from __future__ import annotations

import json
import signal
import sys

from kata import __version__, sysio
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEADLINE_S = 15
REQUEST_S = 5.0
_JAEGER_PATH = "/api/traces"
_OTLP_PATH = "/v1/traces"
_OTLP_PORT = 4318


def main() -> int:
    """Export the spans of standard input.

    Returns:
        The exit status.
    """
    signal.alarm(DEADLINE_S)
    sysio.die_with_parent(int(sys.argv[2]))
    if len(sys.argv) > 3:
        sysio.setns(int(sys.argv[3]), sysio.CLONE_NEWNET)
    given = json.loads(sys.stdin.buffer.read())
    try:
        problem = export(given)
    except KataError as error:
        problem = error.message
    if problem:
        sys.stderr.write(problem + "\n")
    return int(bool(problem))


def endpoint(configured: str) -> str:
    """The URL that OTLP is posted to.

    Args:
        configured: ``jaeger_endpoint``. One of Jaeger's own protocol, which Kata's runtimes have spoken, stands for
            the same Jaeger's port for OTLP.

    Returns:
        The URL; empty where it is OpenTelemetry's own variables, or its default, that count.
    """
    if not configured:
        return ""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(configured)
    path, host = parts.path, parts.netloc
    if path.rstrip("/") == _JAEGER_PATH:
        path = _OTLP_PATH
        name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        host = f"{name}:{_OTLP_PORT}"
    return urlunsplit((parts.scheme, host, path if path.strip("/") else _OTLP_PATH, parts.query, ""))


def export(given: dict[str, Any]) -> str:
    """Export spans.

    Args:
        given: What the engine wrote.

    Returns:
        What went wrong; empty if nothing did.
    """
    from kata.config import files

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult
    except ImportError as error:
        return f"OpenTelemetry is not installed ({error}): pip install 'kata[tracing]'; docs/tracing.md"
    conf = files.load(str(given.get("config") or ""))
    headers = {}
    user = str(conf.get("runtime.jaeger_user", ""))
    if user:
        import base64

        pair = f"{user}:{conf.get('runtime.jaeger_password', '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    target = endpoint(str(conf.get("runtime.jaeger_endpoint", "")))
    exporter = OTLPSpanExporter(endpoint=target or None, headers=headers or None, timeout=REQUEST_S)
    said: list[str] = []
    _listen(said)
    result = exporter.export(spans_of(given))
    exporter.shutdown()  # type: ignore[no-untyped-call]
    if result is SpanExportResult.SUCCESS:
        return ""
    reason = said[0] if said else "no reason was given"
    return f"the collector did not take them: {reason[:400]}"


def _listen(said: list[str]) -> None:
    """Collect what the exporter logs, which is the only place where it says why something failed."""
    import logging

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    root = logging.getLogger()
    root.handlers[:] = [Collect()]


def spans_of(given: dict[str, Any]) -> list[Any]:
    """The engine's spans as those of OpenTelemetry's SDK, one resource for each service."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode

    kinds = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
    scope = InstrumentationScope("kata", __version__)
    resources: dict[str, Resource] = {}

    def resource(service: str) -> Resource:
        if service not in resources:
            about = {
                "service.version": __version__,
                "kata.sandbox": given["sandbox"],
                "kata.client": given["client"],
            }
            if given.get("namespace"):
                about["containerd.namespace"] = given["namespace"]
            # The service's name last, or OTEL_SERVICE_NAME would make one of all of them.
            resources[service] = Resource.create(about).merge(Resource({"service.name": service}))
        return resources[service]

    def context(trace: str, span: str) -> SpanContext | None:
        if not span:
            return None
        return SpanContext(int(trace, 16), int(span, 16), False, TraceFlags(TraceFlags.SAMPLED))

    return [
        ReadableSpan(
            name=one["name"],
            context=context(one["trace_id"], one["span_id"]),
            parent=context(one["trace_id"], one["parent_id"]),
            resource=resource(one["service"]),
            attributes=one["attributes"],
            kind=kinds[one["kind"]],
            status=Status(StatusCode.ERROR, one["error"]) if one["error"] else Status(),
            start_time=one["start_ns"],
            end_time=one["end_ns"],
            instrumentation_scope=scope,
        )
        for one in given["spans"]
    ]
