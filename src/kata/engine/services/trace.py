"""The trace of one sandbox: a span for its start, one for each step and each call, with those of the guest below them.

Made only where tracing is on. The engine records; a helper process of its own (`kata.trace_export`), which ends with
the engine, hands the spans to the collector: once the first process runs, then in batches, and at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

from kata import launcher, tracing
from kata.agent.client import Encoded
from kata.agent.text import escape_line
from kata.errors import GuestProtocolError, KataError
from kata.proto import agentext_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any, Protocol

    from kata.engine.lifecycle.machine_runtime import MachineRuntime
    from kata.engine.lifecycle.sandbox_state import Lifecycle
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.settings import SandboxSettings, TracingSettings
    from kata.ttrpc.messages import Encodable
    from kata.ttrpc.server import Context as CallContext

    class TracedSandbox(Protocol):
        """What of a sandbox is traced."""

        id: str
        settings: SandboxSettings
        timings: Timings
        runtime: MachineRuntime
        tasks: Tasks

        @property
        def life(self) -> Lifecycle:
            """Its state."""

    Handler = Callable[[Any, CallContext], Awaitable[Encodable]]

FEATURE = "kata.trace"
"""Of an agent: it reports what the calls that carry a context have spent their time on."""
FIRST_S = 1.0
"""How long after the start its spans are exported, in seconds: what it still does in the background is among them."""
BATCH_S = 30.0
BATCH = 512
"""Spans are exported when the oldest has waited so long (in seconds), or when there are so many."""
EXPORT_S = 20.0
"""How long the helper may take, in seconds; then it is killed."""
NETWORK_FD = 3
_GUEST_S = 5.0
_MOST_GUEST_SPANS = 256
_GUEST_BYTES = 256 << 10
"""What the spans of a guest that means well take at most; decoding a frame full of empty ones would take long."""
_LONG_POLLS = frozenset({"Wait", "WaitSandbox", "GetOOMEvent", "WaitProcess", "Check", "Take"})
"""Calls that last as long as something else does, or are made for ever: they say nothing about what takes long."""
_STARTS = frozenset({"Start", "StartSandbox"})
_CREATES = frozenset({"Create", "CreateSandbox"})


class SandboxTrace:
    """Records what a sandbox does, and has it exported.

    Args:
        sandbox: The sandbox.
        settings: What of tracing is configured.
    """

    def __init__(self, sandbox: TracedSandbox, settings: TracingSettings) -> None:
        self._sandbox = sandbox
        self._settings = settings
        self._tracer = tracing.Tracer()
        outside, self.wanted = tracing.recorded_by_caller()
        client = sandbox.settings.client.name
        self._root = self._tracer.begin(
            "kata run" if client == "kata" else "shim start",
            outside or tracing.new_trace(),
            tracing.CLIENT,
            tracing.SERVER if outside else tracing.INTERNAL,
            sandbox.timings.origin_ns,
            {"kata.sandbox": sandbox.id, "kata.client": client},
        )
        self._calls: dict[str, tracing.Span] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._exporter: _Exporter | None = None
        self._export_task: asyncio.Task[None] | None = None
        self._closing = False
        self._network = -1

    # ---- recording ----

    def began(self, steps: list[tuple[str, int, int]]) -> None:
        """The machine was started.

        Args:
            steps: Name, begin and end (CLOCK_MONOTONIC, ns) of each step of `boot.power_on`.
        """
        if steps:
            start = min(begin for _, begin, _ in steps)
            whole = self._tracer.begin("start the machine", self._root, tracing.ENGINE, start_ns=start)
            for name, begin, end in steps:
                step = self._tracer.begin(name.replace("_", " "), whole, tracing.ENGINE, start_ns=begin)
                step.end(end)
            whole.end(max(end for _, _, end in steps))
        host = self._sandbox.runtime.machine.host
        if host is not None and self._network < 0:
            # The engine itself may be in the pod's network, from which no collector is reached.
            self._network = host.copy_network()
        tracing.current.set(self._root)
        self._sandbox.timings.trace = self.step
        self._sandbox.runtime.trace = self.begin_call

    def step(self, name: str, start_ns: int, end_ns: int) -> None:
        """A step of the start; see `kata.engine.timings`."""
        if name in ("engine", "start machine"):
            return  # their own steps are there
        service = tracing.AGENT if name in ("kernel", "agent start") else tracing.ENGINE
        parent = tracing.current.get()
        if parent is None or parent.end_ns or parent.start_ns > start_ns:
            parent = self._root
        self._tracer.begin(name, parent, service, start_ns=start_ns).end(end_ns)

    async def call(self, handler: Handler, message: Any, context: CallContext) -> Encodable:
        """Carry out a call of a client's, in a span of its own; see `kata.ttrpc.server.Server.trace`."""
        if context.method in _LONG_POLLS:
            return await handler(message, context)
        given = context.metadata.get(tracing.HEADER) or [""]
        parent = tracing.parse(given[0]) or self._root
        name = f"{context.service}/{context.method}"
        about = {
            key: str(value)[:128]
            for key in ("id", "exec_id", "sandbox_id")
            if (value := getattr(message, key, ""))
        }
        span = self._tracer.begin(name, parent, tracing.ENGINE, tracing.SERVER, attributes=about)
        token = tracing.current.set(span)
        error = "cancelled"
        try:
            answer = await handler(message, context)
            error = ""
            return answer
        except Exception as failed:
            error = escape_line(str(failed))
            raise
        finally:
            tracing.current.reset(token)
            span.end(error=error)
            started = context.method in _STARTS and not error
            if not self._root.end_ns and (started or (error and context.method in _STARTS | _CREATES)):
                self._schedule(FIRST_S)
            elif self._root.end_ns:
                self._schedule(0 if len(self._tracer) >= BATCH else BATCH_S)

    def begin_call(self, service: str, method: str, timeout_s: float | None) -> tracing.Span | None:
        """Begin the span of a call to the agent; None if it is not part of anything that is recorded.

        Its `header` goes into the call's metadata.
        """
        parent = tracing.current.get()
        if parent is None or parent.end_ns or timeout_s is None or method in _LONG_POLLS:
            return None
        span = self._tracer.begin(f"{service}/{method}", parent, tracing.ENGINE, tracing.CALLER)
        self._calls[span.span_id] = span
        if len(self._calls) > 2 * _MOST_GUEST_SPANS:
            del self._calls[next(iter(self._calls))]
        return span

    # ---- export ----

    def _schedule(self, after_s: float) -> None:
        if self._closing or self._export_task is not None:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + after_s
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._begin_export)

    def _begin_export(self) -> None:
        self._timer = None
        self._export_task = self._sandbox.tasks.create_task(self._export())
        self._export_task.add_done_callback(self._exported)

    def _exported(self, task: asyncio.Task[None]) -> None:
        self._export_task = None
        if len(self._tracer):
            self._schedule(BATCH_S)

    async def _export(self) -> None:
        await self._take_guests()
        self._end_root()
        await self._send(self._take())

    def _end_root(self) -> None:
        if not self._root.end_ns:
            latest = max(
                (span.end_ns for span in self._tracer.waiting if span.trace_id == self._root.trace_id),
                default=0,
            )
            self._root.end(latest, self._sandbox.life.lost_reason if self._sandbox.life.failed else "")

    def _take(self) -> list[dict[str, Any]]:
        return self._tracer.take() if self.wanted else []

    async def _send(self, spans: list[dict[str, Any]]) -> None:
        if not spans:
            return
        about = {
            "config": self._settings.config,
            "sandbox": self._sandbox.id,
            "client": self._sandbox.settings.client.name,
            "namespace": self._sandbox.settings.client.namespace,
            "dropped": self._tracer.dropped,
            "spans": spans,
        }
        self._exporter = _Exporter(json.dumps(about).encode(), self._network)
        try:
            problem = await self._exporter.wait(EXPORT_S)
        finally:
            self._exporter.close()
            self._exporter = None
        if problem:
            self._sandbox.tasks.log(f"{len(spans)} spans of the trace were lost: {problem}")

    async def _take_guests(self) -> None:
        """What the agent has spent the time of the calls on. It is hostile: what it says is bounded and cut to fit."""
        agent = self._sandbox.runtime.living_agent
        calls, self._calls = self._calls, {}
        if agent is None or not self._settings.agent or FEATURE not in agent.features or not calls:
            return
        try:
            request = agentext_pb.TakeSpansRequest()
            answer = (await agent.call("kata.agent.v1.Trace", "Take", request, Encoded, _GUEST_S)).payload
            if len(answer) > _GUEST_BYTES:
                raise GuestProtocolError(f"the guest's part of the trace has {len(answer)} bytes")
            spans = agentext_pb.TakeSpansResponse.decode(answer).spans
        except (KataError, ValueError) as error:
            # It may just be going. The trace is worth no sandbox.
            self._sandbox.tasks.log(f"a trace lacks the guest's part: {escape_line(str(error))}")
            return
        for guest in spans[:_MOST_GUEST_SPANS]:
            call = calls.get(guest.parent.hex())
            if call is not None and call.end_ns:
                self._add_guest(call, guest)

    def _add_guest(self, call: tracing.Span, guest: agentext_pb.GuestSpan) -> None:
        """A call as the guest saw it, with its phases, in the middle of the time that it took from here."""
        outside = call.end_ns - call.start_ns
        inside = min(guest.duration_ns, outside)
        start = call.start_ns + (outside - inside) // 2
        end = start + inside
        name = escape_line(guest.name, 64) or "call"
        whole = self._tracer.begin(name, call, tracing.AGENT, tracing.SERVER, start)
        for phase in guest.phases[:_MOST_PHASES]:
            began = min(start + phase.start_ns, end)
            part = self._tracer.begin(
                escape_line(phase.name, 64) or "phase", whole, tracing.AGENT, start_ns=began
            )
            part.end(min(began + phase.duration_ns, end))
        whole.end(end)

    async def stop(self) -> None:
        """Export nothing while the sandbox is taken down; take the guest's spans while it is there."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._export_task is not None:
            # The helper is in the sandbox's cgroup, which has to be left.
            await asyncio.wait([self._export_task], timeout=EXPORT_S)
        elif not self._sandbox.runtime.is_lost:
            with contextlib.suppress(KataError, TimeoutError):
                await self._take_guests()

    async def close(self) -> None:
        """Export what is left; the last thing that an engine does."""
        self._closing = True
        self._end_root()
        await self._send(self._take())
        if self._network >= 0:
            os.close(self._network)
            self._network = -1


_MOST_PHASES = 16


class _Exporter:
    """The helper process, with the spans as its standard input. It ends with this process (`kata.trace_export`).

    Args:
        spans: What it is given.
        network: Descriptor of the network namespace that it is to work in; -1 is this process's.
    """

    def __init__(self, spans: bytes, network: int = -1) -> None:
        given = os.memfd_create("kata-spans")
        try:
            with open(given, "wb", closefd=False) as file:
                file.write(spans)
            os.lseek(given, 0, os.SEEK_SET)
            self._problem = os.memfd_create("kata-problem")
            argv = [*launcher.command(), "export-spans", str(os.getpid())]
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                actions = [
                    (os.POSIX_SPAWN_DUP2, given, 0),
                    (os.POSIX_SPAWN_DUP2, null, 1),
                    (os.POSIX_SPAWN_DUP2, self._problem, 2),
                ]
                if network >= 0:
                    actions.append((os.POSIX_SPAWN_DUP2, network, NETWORK_FD))
                    argv.append(str(NETWORK_FD))
                self.pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
            finally:
                os.close(null)
        finally:
            os.close(given)
        self._pidfd = os.pidfd_open(self.pid)

    async def wait(self, timeout_s: float) -> str:
        """Wait for its end, and make it end after *timeout_s* seconds.

        Returns:
            What it said went wrong; empty if nothing did.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def over() -> None:
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(self._pidfd, over)
        late = ""
        try:
            await asyncio.wait_for(ended, timeout_s)
        except TimeoutError:
            late = f"the export took longer than {timeout_s:g} s"
        finally:
            loop.remove_reader(self._pidfd)
        if late:
            return late
        status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        if status is None or status.si_status == 0:
            return ""
        said = os.pread(self._problem, 1024, 0).decode("utf-8", "replace")
        return escape_line(said.strip()) or f"the export ended with {status.si_status}"

    def close(self) -> None:
        """Take the process in, killing it if it runs."""
        with contextlib.suppress(ProcessLookupError):
            import signal

            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        os.close(self._problem)
