"""Traces: what a start, and each call after it, spent its time on, across client, engine and guest.

Spans are recorded here as plain values and nothing else: a helper process (`kata.trace_export`) hands them to a
collector with OpenTelemetry's own exporter. Imported only where tracing is on: whoever can be traced has an attribute
that is None otherwise.

Sources: W3C Trace Context (the header ``traceparent``), OpenTelemetry's trace data model.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADER = "traceparent"
"""The key of the context in a ttRPC call's metadata, as Kata's runtimes have it."""
VARIABLE = "TRACEPARENT"
"""The variable in which a caller passes its context on."""
CLIENT, ENGINE, AGENT = "kata", "kata-engine", "kata-agent"
"""Names of the services, by which a viewer groups spans."""
INTERNAL, SERVER, CALLER = "internal", "server", "client"
"""Kinds of spans."""
MOST_SPANS = 4096
"""Spans that wait for their export; more are dropped, and counted."""
_MOST_TEXT = 256


class Context:
    """A place in a trace.

    Args:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits; empty is the trace as a whole.
    """

    __slots__ = ("span_id", "trace_id")

    def __init__(self, trace_id: str, span_id: str) -> None:
        self.trace_id = trace_id
        self.span_id = span_id

    def header(self) -> str:
        """The value of `HEADER`."""
        return f"00-{self.trace_id}-{self.span_id}-01"


def parse(header: str) -> Context | None:
    """The context in a ``traceparent``.

    Args:
        header: Its value, from whoever calls.

    Returns:
        The context; None for a malformed one, and for one that says that its trace is not recorded.
    """
    parts = header.strip().split("-")
    if len(parts) < 4 or (len(parts) > 4 and parts[0] == "00"):
        return None
    version, trace_id, span_id, flags = parts[:4]
    sizes = (len(version), len(trace_id), len(span_id), len(flags))
    if sizes != (2, 32, 16, 2) or not set("".join(parts[:4])) <= set("0123456789abcdef") or version == "ff":
        return None
    if not trace_id.strip("0") or not span_id.strip("0") or not int(flags, 16) & 1:
        return None
    return Context(trace_id, span_id)


def recorded_by_caller() -> tuple[Context | None, bool]:
    """The context in this process's environment, and whether a trace is wanted (a caller may say that it is not)."""
    header = os.environ.get(VARIABLE, "")
    if not header:
        return None, True
    context = parse(header)
    if context is not None:
        return context, True
    # Well-formed but for its flags: not recorded. Anything else is no context at all, and a trace of our own begins.
    return None, parse(f"{header.strip()[:-2]}01") is None


class Span(Context):
    """A piece of work in a trace. Times are nanoseconds of CLOCK_MONOTONIC.

    Args:
        tracer: Where it is recorded when it ends.
        name: What was done.
        parent: What it is a part of.
        service: One of the names above.
        kind: One of the kinds above.
        start_ns: When it began.
        attributes: Texts and numbers about it.
    """

    __slots__ = (
        "_tracer",
        "attributes",
        "end_ns",
        "error",
        "kind",
        "name",
        "parent_id",
        "service",
        "start_ns",
    )

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        parent: Context,
        service: str,
        kind: str,
        start_ns: int,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(parent.trace_id, os.urandom(8).hex())
        self._tracer = tracer
        self.name = name
        self.parent_id = parent.span_id
        self.service = service
        self.kind = kind
        self.start_ns = start_ns
        self.end_ns = 0
        self.error = ""
        self.attributes = attributes

    def end(self, end_ns: int = 0, error: str = "") -> None:
        """Record it; once.

        Args:
            end_ns: When it ended; 0 is now.
            error: Why it failed; empty if it did not.
        """
        if not self.end_ns:
            self.end_ns = max(end_ns or time.monotonic_ns(), self.start_ns)
            self.error = error[:_MOST_TEXT]
            self._tracer.record(self)


current: ContextVar[Span | None] = ContextVar("current", default=None)
"""The span in which the running task works."""


class Tracer:
    """Records the spans of one process.

    Attributes:
        dropped: How many were not recorded, since too many waited.
    """

    __slots__ = ("_offset_ns", "_spans", "dropped")

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._spans: list[Span] = []
        self.dropped = 0

    def begin(
        self,
        name: str,
        parent: Context,
        service: str,
        kind: str = INTERNAL,
        start_ns: int = 0,
        attributes: dict[str, Any] | None = None,
    ) -> Span:
        """Begin a span; see `Span`. It began now if *start_ns* is 0."""
        return Span(self, name, parent, service, kind, start_ns or time.monotonic_ns(), attributes or {})

    def record(self, span: Span) -> None:
        """Take in a span that has ended."""
        if len(self._spans) < MOST_SPANS:
            self._spans.append(span)
        else:
            self.dropped += 1

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def waiting(self) -> list[Span]:
        """The spans that have ended and were not taken."""
        return self._spans

    def take(self) -> list[dict[str, Any]]:
        """Take all spans out, as JSON values; times are nanoseconds since the epoch."""
        spans, self._spans = self._spans, []
        return [
            {
                "trace_id": one.trace_id,
                "span_id": one.span_id,
                "parent_id": one.parent_id,
                "name": one.name,
                "service": one.service,
                "kind": one.kind,
                "start_ns": one.start_ns + self._offset_ns,
                "end_ns": one.end_ns + self._offset_ns,
                "error": one.error,
                "attributes": one.attributes,
            }
            for one in spans
        ]


def new_trace() -> Context:
    """A trace that begins here."""
    return Context(os.urandom(16).hex(), "")
