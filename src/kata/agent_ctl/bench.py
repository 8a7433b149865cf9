"""``bench``: measures the latency and throughput of calls."""

from __future__ import annotations

import os
import time

from kata.agent_ctl.methods import AGENT, HEALTH
from kata.agent_ctl.options import Option, parse, table
from kata.agent_ctl.output import JSON, Style, duration, show_json
from kata.errors import KataError, UsageError
from kata.proto import agent_pb, health_pb, oci_pb
from kata.ttrpc import frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.agent_ctl.links import Link
    from kata.proto.codec import Message

OPTIONS = (
    Option("--calls", "N", "empty calls to time, one after the other (1000)"),
    Option("--bytes", "N", "bytes to move for each throughput (67108864)"),
    Option("--size", "N", "bytes in one call (1048576)"),
    Option(
        "--container",
        "ID",
        "also measure its streams, which needs `dd` in it (with --sandbox: that container)",
    ),
)
_CALL_S = 60.0
_WARM_UP = 20
_ROOM = 4096
"""Bytes of a frame that are reserved for everything but the payload."""


def usage() -> str:
    """The help."""
    return (
        "usage: kata-agent-ctl TARGET bench [OPTION...]\n\n"
        "Measures Health.Check, then requests with a big payload (in Check's `service`, which agents ignore); and,\n"
        "given a container, output and input of a process that is started in it.\n"
        "With --sandbox every call goes through the engine.\n\n"
        f"options:\n{table([(option.head, option.text) for option in OPTIONS])}\n"
    )


def run(link: Link, words: Sequence[str], style: Style) -> int:
    """Measure and print the results.

    Args:
        link: The agent.
        words: The command's arguments.
        style: How to print.

    Raises:
        UsageError: *words* has invalid options.
        KataError, TtrpcError: A call failed.
    """
    values, _ = parse(OPTIONS, words, whole=True)
    calls = values.integer("calls", 1000, 1)
    total = values.integer("bytes", 64 << 20, 1)
    size = values.integer("size", 1 << 20, 1, frame.MAX_DATA - _ROOM)
    container = values.value("container") or link.container
    found: dict[str, Any] = {"target": link.label, "round_trip": round_trip(link, calls)}
    found["requests"] = requests(link, total, size)
    if container:
        found["stdout"] = stdout(link, container, total, size)
        found["stdin"] = stdin(link, container, total, size)
    if style.form == JSON:
        show_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    trip = found["round_trip"]
    times = ", ".join(
        f"{name} {duration(trip[name + '_us'] / 1e6)}" for name in ("min", "p50", "p99", "max")
    )
    lines = [
        found["target"],
        f"empty call: {times}; {trip['calls_per_s']:.0f} calls/s ({trip['calls']} calls)",
    ]
    for name, words in (
        ("requests", "requests with a payload"),
        ("stdout", "a process's output"),
        ("stdin", "a process's input"),
    ):
        if name in found:
            one = found[name]
            lines.append(f"{words}: {one['mb_per_s']:.1f} MB/s ({one['bytes']} bytes, {one['calls']} calls)")
    if "stdout" not in found:
        lines.append("streams: not measured; --container names a container to run `dd` in")
    return lines


def round_trip(link: Link, calls: int) -> dict[str, float]:
    """Measure the latency of empty calls, in microseconds.

    Args:
        link: The agent.
        calls: How many.
    """
    payload = health_pb.CheckRequest().encode()
    for _ in range(min(_WARM_UP, calls)):
        link.call(HEALTH, "Check", payload, _CALL_S)
    times = []
    began = time.perf_counter()
    for _ in range(calls):
        sent = time.perf_counter()
        link.call(HEALTH, "Check", payload, _CALL_S)
        times.append(time.perf_counter() - sent)
    elapsed = time.perf_counter() - began
    times.sort()
    return {
        "calls": calls,
        "min_us": round(times[0] * 1e6, 1),
        "p50_us": round(times[calls // 2] * 1e6, 1),
        "p99_us": round(times[min(calls - 1, calls * 99 // 100)] * 1e6, 1),
        "max_us": round(times[-1] * 1e6, 1),
        "calls_per_s": round(calls / elapsed, 1),
    }


def _rate(moved: int, calls: int, seconds: float) -> dict[str, float]:
    return {
        "bytes": moved,
        "calls": calls,
        "seconds": round(seconds, 4),
        "mb_per_s": round(moved / max(seconds, 1e-9) / 1e6, 2),
    }


def requests(link: Link, total: int, size: int) -> dict[str, float]:
    """Measure the throughput of requests with a payload.

    Args:
        link: The agent.
        total: Bytes to send in all.
        size: Bytes of each payload.
    """
    payload = health_pb.CheckRequest(service="x" * size).encode()
    calls = max(1, total // size)
    began = time.perf_counter()
    for _ in range(calls):
        link.call(HEALTH, "Check", payload, _CALL_S)
    return _rate(calls * size, calls, time.perf_counter() - began)


class _Process:
    """A process in a container, which is ended afterwards.

    Args:
        link: The link to the agent.
        container: The container's id.
        argv: Its command.
    """

    def __init__(self, link: Link, container: str, argv: list[str]) -> None:
        self._link = link
        self.container_id = container
        self.exec_id = f"bench-{os.urandom(6).hex()}"
        process = oci_pb.Process(
            Args=argv,
            Env=["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            Cwd="/",
            User=oci_pb.User(),
        )
        request = agent_pb.ExecProcessRequest(container_id=container, exec_id=self.exec_id, process=process)
        self.call("ExecProcess", request)

    def call(self, method: str, request: Message) -> bytes:
        return self._link.call(AGENT, method, request.encode(), _CALL_S)

    def kill(self) -> None:
        request = agent_pb.SignalProcessRequest(
            container_id=self.container_id, exec_id=self.exec_id, signal=9
        )
        self.call("SignalProcess", request)

    def wait(self) -> int:
        request = agent_pb.WaitProcessRequest(container_id=self.container_id, exec_id=self.exec_id)
        return agent_pb.WaitProcessResponse.decode(self.call("WaitProcess", request)).status


def stdout(link: Link, container: str, total: int, size: int) -> dict[str, float]:
    """Measure the throughput of a process's output.

    Args:
        link: The agent.
        container: Id of a container that runs.
        total: Bytes that the process writes.
        size: Bytes to ask for in each call.
    """
    process = _Process(link, container, ["dd", "if=/dev/zero", "bs=65536", f"count={max(1, total >> 16)}"])
    request = agent_pb.ReadStreamRequest(container_id=container, exec_id=process.exec_id, len=size)
    moved = calls = 0
    began = time.perf_counter()
    try:
        while data := agent_pb.ReadStreamResponse.decode(process.call("ReadStdout", request)).data:
            moved += len(data)
            calls += 1
    except BaseException:
        process.kill()
        raise
    elapsed = time.perf_counter() - began
    _expect_success(process.wait())
    return _rate(moved, calls, elapsed)


def stdin(link: Link, container: str, total: int, size: int) -> dict[str, float]:
    """Measure the throughput of a process's input.

    Args:
        link: The agent.
        container: Id of a container that runs.
        total: Bytes to write to the process.
        size: Bytes of each call.

    Raises:
        KataError: The agent says that it took more than it was given, or nothing.
    """
    process = _Process(link, container, ["dd", "of=/dev/null", "bs=65536"])
    moved = calls = 0
    began = time.perf_counter()
    try:
        while moved < total:
            piece = bytes(min(size, total - moved))
            request = agent_pb.WriteStreamRequest(
                container_id=container, exec_id=process.exec_id, data=piece
            )
            taken = agent_pb.WriteStreamResponse.decode(process.call("WriteStdin", request)).len
            if not 0 < taken <= len(piece):
                raise KataError(f"the agent says it took {taken} of {len(piece)} bytes")
            moved += taken
            calls += 1
        request_end = agent_pb.CloseStdinRequest(container_id=container, exec_id=process.exec_id)
        process.call("CloseStdin", request_end)
    except BaseException:
        process.kill()
        raise
    _expect_success(process.wait())
    return _rate(moved, calls, time.perf_counter() - began)


def _expect_success(status: int) -> None:
    if status:
        raise UsageError(
            f"`dd` in the container ended with status {status}", "the container needs the program dd"
        )
