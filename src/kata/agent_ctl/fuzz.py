"""``fuzz``: sends malformed frames and requests to an agent, and reports how it handled each.

After every case a health check follows, over a separate connection if the agent accepts several.
"""

from __future__ import annotations

import random
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter

from kata.agent_ctl import fuzz_cases, methods
from kata.agent_ctl.links import healthy
from kata.agent_ctl.options import Option, parse, table
from kata.agent_ctl.output import JSON, Style, code_name, show_json
from kata.errors import KataError, UsageError
from kata.ttrpc import envelope, frame
from kata.ttrpc.status import ProtocolError, TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.agent_ctl.fuzz_cases import Case
    from kata.agent_ctl.links import Link

OPTIONS = (
    Option("--cases", "N", "number of cases (500, or no limit with --seconds)"),
    Option("--seconds", "N", "stop after this time (no limit)"),
    Option(
        "--seed",
        "N",
        "seed of the random cases; the same seed gives the same cases (a random one, which is printed)",
    ),
    Option("--first", "N", "number of the first case (0)"),
    Option(
        "--only", "frames|requests", "only this kind of cases (both in turn; --sandbox takes only requests)"
    ),
    Option("--all", "", "also send requests that change the machine the agent runs on (--vm: always)"),
    Option("--wait", "SECONDS", "how long to wait for the answer to a case (3)"),
    Option("--patience", "SECONDS", "how long to wait for a health check (60)"),
)
NEVER = frozenset({"DestroySandbox", "GetOOMEvent"})
"""DestroySandbox ends the agent, as it should; GetOOMEvent is answered only when a container runs out of memory."""

_GLIMPSE_S = 0.1
"""How long (in seconds) to wait for answers to a case that need not be answered."""
_STEP_S = 0.5
"""How long (in seconds) an agent on a serial port has to answer before its stream is resynchronised."""
_LONGEST_HEX = 256
_FLUSH = bytes(frame.MAX_DATA) + b"\xff" * frame.HEADER_SIZE
"""Resynchronises a stream: it completes any partial frame, and the rest is no valid header, so the agent skips it. The
last bytes are not zeros, which could form a header together with the next bytes."""


def usage() -> str:
    """The help."""
    return (
        "usage: kata-agent-ctl TARGET fuzz [OPTION...]\n\n"
        "Sends malformed frames and requests, each followed by a health check, and reports how the cases were\n"
        "answered. The exit status is 0 if all health checks succeeded, otherwise 1.\n"
        "Never sent: DestroySandbox and GetOOMEvent.\n\n"
        f"options:\n{table([(option.head, option.text) for option in OPTIONS])}\n"
    )


class Finding(Exception):
    """The agent misbehaved, as the message says."""


def run(link: Link, words: Sequence[str], style: Style, own_vm: bool) -> int:
    """Send the cases and print the results.

    Args:
        link: The link to the agent.
        words: The options.
        style: How to print.
        own_vm: The agent runs in a machine that was made for this command.

    Raises:
        UsageError: *words* has invalid options.
    """
    values, _ = parse(OPTIONS, words, whole=True)
    only = values.value("only") or ""
    if only not in ("", "frames", "requests"):
        hint = methods.nearest(only, ("frames", "requests")) or "frames or requests"
        raise UsageError(f"--only: there is no kind {only!r}", hint)
    seed = values.integer("seed", int.from_bytes(random.randbytes(4), "big"), 0, 1 << 64)
    first = values.integer("first", 0)
    seconds = values.number("seconds", 0.0)
    cases = values.integer("cases", 1 << 40 if seconds else 500, 1)
    carrier = _carrier(link, values.number("wait", 3.0, 0.01), values.number("patience", 60.0, 0.1))
    takes_frames = isinstance(carrier, _FrameCarrier)
    if only == "frames" and not takes_frames:
        raise UsageError("an engine passes on calls, not frames", "--server or --vm; or --only requests")
    sorts = [only] if only else ["frames", "requests"] if takes_frames else ["requests"]
    chosen = [
        method
        for method in map(methods.find, methods.names())
        if method is not None
        and method.name not in NEVER
        and (own_vm or values.flag("all") or method.name not in methods.CHANGES_MACHINE)
    ]
    report = Report(link.label, seed)
    try:
        carrier.healthy()
        deadline = time.monotonic() + seconds if seconds else float("inf")
        for number in range(first, first + cases):
            if time.monotonic() >= deadline:
                break
            _one(carrier, report, sorts, chosen, seed, number)
    except Finding as finding:
        report.verdict = str(finding)
    finally:
        carrier.close()
    report.lost = link.lost()
    if style.form == JSON:
        show_json(report.to_json())
    else:
        print("\n".join(report.lines()))
    return 0 if report.passed else 1


def _one(
    carrier: _Carrier,
    report: Report,
    sorts: list[str],
    chosen: list[methods.Method],
    seed: int,
    number: int,
) -> None:
    rng = random.Random(f"{seed}/{number}")
    sort = sorts[number % len(sorts)]
    turn = number // len(sorts)
    if sort == "frames":
        case = fuzz_cases.frame_case(rng, turn, carrier.next_stream(200))
        sent = case.data
    else:
        method = chosen[turn % len(chosen)]
        sent = fuzz_cases.payload(rng, method)
        case = fuzz_cases.Case(method.name, sent)
    report.begin(sort, number, case.kind, sent)
    if sort == "frames" and isinstance(carrier, _FrameCarrier):
        outcomes = carrier.send_frames(case)
    else:
        outcomes = carrier.send_request(method, sent)
    report.add(sort, case.kind, outcomes)
    report.add_health(carrier.healthy())


class Report:
    """Collects the results of all cases.

    Args:
        target: Description of the agent.
        seed: Seed of the run.
    """

    def __init__(self, target: str, seed: int) -> None:
        self.target = target
        self.seed = seed
        self.count = 0
        self.verdict = "healthy"
        self.lost = ""
        self.slowest_s = 0.0
        self.outcomes: dict[str, dict[str, Counter[str]]] = {"frames": {}, "requests": {}}
        self._last: dict[str, Any] = {}

    @property
    def passed(self) -> bool:
        return self.verdict == "healthy" and not self.lost

    def begin(self, sort: str, number: int, kind: str, data: bytes) -> None:
        """Record the case that is sent next, which is the one to blame if the agent does not survive it.

        Args:
            sort: The layer that it is aimed at.
            number: Its number, from which it can be made again.
            kind: What is wrong with it, in a few words.
            data: The bytes that are sent.
        """
        self.count += 1
        self._last = {
            "case": number,
            "sort": sort,
            "kind": kind,
            "bytes": len(data),
            "hex": data[:_LONGEST_HEX].hex(),
        }

    def add(self, sort: str, kind: str, outcomes: Sequence[str]) -> None:
        """Record how a case went.

        Args:
            sort: See `begin`.
            kind: See `begin`.
            outcomes: How the agent answered: names of statuses, for example.
        """
        self.outcomes[sort].setdefault(kind, Counter()).update(outcomes)

    def add_health(self, seconds: float) -> None:
        self.slowest_s = max(self.slowest_s, seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seed": self.seed,
            "cases": self.count,
            **{
                sort: {kind: dict(found) for kind, found in kinds.items()}
                for sort, kinds in self.outcomes.items()
            },
            "slowest_health_check_ms": round(self.slowest_s * 1e3, 2),
            "verdict": self.verdict,
            **({"lost": self.lost} if self.lost else {}),
            **({} if self.passed or not self._last else {"last_case": self._last}),
        }

    def lines(self) -> list[str]:
        out = [f"{self.target}: {self.count} cases, seed {self.seed}"]
        for sort, kinds in self.outcomes.items():
            if kinds:
                out.append(f"{sort}:")
            for kind, found in kinds.items():
                out.append(
                    f"  {kind}: " + ", ".join(f"{what} {count}" for what, count in found.most_common())
                )
        out.append(f"slowest health check: {self.slowest_s * 1e3:.1f} ms")
        out.append(f"verdict: {self.verdict}{'; ' + self.lost if self.lost else ''}")
        if not self.passed and self._last:
            last = self._last
            out.append(
                f"last case: {last.get('case')} ({last.get('sort')}: {last.get('kind')}), {last.get('hex')}"
            )
            out.append(f"again: --seed {self.seed} --first {last.get('case')} --cases 1")
        return out


# ---- carriers ----


class _Carrier(ABC):
    """Sends cases to the agent.

    Args:
        link: The link to the agent.
        wait_s: Seconds to wait for the answer to a case.
        patience_s: Seconds to wait for a health check.
    """

    def __init__(self, link: Link, wait_s: float, patience_s: float) -> None:
        self.link = link
        self.wait_s = wait_s
        self.patience_s = patience_s
        self._stream = 1

    def next_stream(self, count: int) -> int:
        """Reserve *count* unused stream numbers. Returns the first of them."""
        first = self._stream
        self._stream += 2 * count
        if self._stream > 0xFFF00000:
            self._stream = 1
        return first

    @abstractmethod
    def send_request(self, method: methods.Method, payload: bytes) -> list[str]:
        """Send a call. Returns a description of each answer."""

    def healthy(self) -> float:
        """Make a health check. Returns how long it took, in seconds.

        Raises:
            Finding: The agent is not healthy.
        """
        began = time.monotonic()
        try:
            self._ask()
        except TtrpcError as error:
            raise Finding(f"hung: {error.message}") from None
        except TimeoutError:
            raise Finding(f"hung: Health.Check was not answered within {self.patience_s:g} s") from None
        except (KataError, OSError) as error:
            raise Finding(f"gone: {error}") from None
        return time.monotonic() - began

    def _ask(self) -> None:
        healthy(self.link, self.patience_s)

    def close(self) -> None:  # noqa: B027 - some have nothing to end
        """Close its connections."""


class _FrameCarrier(_Carrier):
    """A carrier that can also send bytes that are not calls."""

    def send_frames(self, case: Case) -> list[str]:
        """Send bytes. Returns a description of each answer."""
        stream = self._send(case.data, case.pieces, case.due, self.patience_s if case.due else _GLIMPSE_S)
        return _outcomes(stream, case.due, self.patience_s)

    def send_request(self, method: methods.Method, payload: bytes) -> list[str]:
        number = self.next_stream(1)
        stream = self._send(_call(method, payload, number, self.wait_s), 1, {number}, self.wait_s)
        return _outcomes(stream, set(), self.wait_s)

    @abstractmethod
    def _send(self, data: bytes, pieces: int, due: set[int], wait_s: float) -> _Stream:
        """Send bytes in so many pieces, and wait for answers in the streams that are due."""


class _Calls(_Carrier):
    """Sends only calls, as an engine passes nothing else on."""

    def send_request(self, method: methods.Method, payload: bytes) -> list[str]:
        try:
            self.link.call(method.service, method.method, payload, self.wait_s)
        except TtrpcError as error:
            return [_code(error.code)]
        except KataError as error:
            raise Finding(f"gone: {error.message}") from None
        return ["OK"]


def _code(code: int) -> str:
    return "no answer" if code == 4 else code_name(code)


class _Stream:
    """A connection that sends arbitrary bytes and parses answers.

    Args:
        sock: The socket; `close` closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self.sent_garbage = False
        self.answers: list[tuple[int, str]] = []
        self._parser = frame.Parser()

    def send(self, data: bytes, pieces: int, timeout_s: float) -> None:
        """Write all of *data*, and read meanwhile: an agent may stop reading until its answers are read."""
        step = max(1, -(-len(data) // pieces))
        deadline = time.monotonic() + timeout_s
        view = memoryview(data)
        at = 0
        while at < len(view) and not self.closed:
            self.sock.settimeout(0.02)
            try:
                at += self.sock.send(view[at : at + step])
            except TimeoutError:
                self.receive(0.0)
                if time.monotonic() > deadline:
                    raise Finding("hung: it does not read what it is sent") from None
            except OSError:
                self.closed = True

    def receive(self, timeout_s: float) -> bool:
        """Wait for data and read it. Returns whether there was any."""
        if self.closed:
            return False
        self.sock.settimeout(max(timeout_s, 1e-6))
        try:
            data = self.sock.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return False
        try:
            for item in self._parser.feed(data):
                answer = envelope.Response.decode(item.data) if item.kind == frame.RESPONSE else None
                what = (
                    "a frame that is no answer"
                    if answer is None
                    else _code(answer.code)
                    if answer.code
                    else "OK"
                )
                self.answers.append((item.stream, what))
        except (ProtocolError, ValueError):
            self.sent_garbage = True
        return True

    def collect(self, streams: set[int], timeout_s: float) -> None:
        """Wait until these streams were answered, the connection has ended, or the time is up."""
        deadline = time.monotonic() + timeout_s
        while not self.closed and not self.sent_garbage:
            if streams and streams <= {stream for stream, _ in self.answers}:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self.receive(left)

    def close(self) -> None:
        self.sock.close()


class _Sockets(_FrameCarrier):
    """For an agent that accepts several connections: one for each case, and another one for the health check."""

    def _new(self) -> _Stream:
        sock = self.link.raw()
        assert sock is not None
        return _Stream(sock)

    def _send(self, data: bytes, pieces: int, due: set[int], wait_s: float) -> _Stream:
        try:
            stream = self._new()
        except (KataError, OSError) as error:
            raise Finding(f"gone: {error}") from None
        try:
            stream.send(data, pieces, self.patience_s)
            stream.collect(due, wait_s)
        finally:
            stream.close()
        return stream

    def _ask(self) -> None:
        stream = self._new()
        try:
            _check_health(stream, 1, self.patience_s)
        finally:
            stream.close()


class _Port(_FrameCarrier):
    """For an agent with a single stream: after a case the stream is resynchronised."""

    def __init__(self, link: Link, wait_s: float, patience_s: float) -> None:
        super().__init__(link, wait_s, patience_s)
        sock = link.raw()
        assert sock is not None
        self._wire = _Stream(sock)

    def _send(self, data: bytes, pieces: int, due: set[int], wait_s: float) -> _Stream:
        self._wire.answers.clear()
        self._wire.send(data, pieces, self.patience_s)
        self._wire.collect(due, wait_s)
        return self._wire

    def _ask(self) -> None:
        try:
            _check_health(self._wire, self.next_stream(1), min(_STEP_S, self.patience_s))
        except TimeoutError:
            # The agent may be waiting for the rest of a frame, or have taken our check for a part of it.
            self._wire.send(_FLUSH, 1, self.patience_s)
            _check_health(self._wire, self.next_stream(1), self.patience_s)

    def close(self) -> None:
        self._wire.close()


def _carrier(link: Link, wait_s: float, patience_s: float) -> _Carrier:
    if link.shared:
        return _Port(link, wait_s, patience_s)
    probe = link.raw()
    if probe is None:
        return _Calls(link, wait_s, patience_s)
    probe.close()
    return _Sockets(link, wait_s, patience_s)


def _call(method: methods.Method, payload: bytes, stream: int, timeout_s: float) -> bytes:
    body = envelope.Request(method.service, method.method, payload, int(timeout_s * 1e9)).encode()
    return frame.encode(stream, frame.REQUEST, body)


def _check_health(stream: _Stream, number: int, timeout_s: float) -> None:
    """Make a health check over this stream.

    Raises:
        TimeoutError: There was no answer in time.
        ConnectionError: The stream ended.
        Finding: The answer is malformed, or an error.
    """
    stream.answers.clear()
    stream.send(fuzz_cases.check(number), 1, timeout_s)
    stream.collect({number}, timeout_s)
    found = [what for at, what in stream.answers if at == number]
    if stream.sent_garbage:
        raise Finding("it sent something that is no frame")
    if stream.closed and not found:
        raise ConnectionError("it hung up on a right call")
    if not found:
        raise TimeoutError
    if found[0] != "OK":
        raise Finding(f"Health.Check was answered {found[0]}")


def _outcomes(stream: _Stream, due: set[int], waited_s: float) -> list[str]:
    """Describe the answers, each in a word.

    Raises:
        Finding: A valid call was not answered, or an answer is malformed.
    """
    if stream.sent_garbage:
        raise Finding("it sent something that is no frame")
    answered = {number for number, _ in stream.answers}
    if due - answered and stream.closed:
        raise Finding(f"it hung up before {len(due - answered)} of {len(due)} right calls were answered")
    if due - answered:
        raise Finding(
            f"hung: {len(due - answered)} of {len(due)} right calls were not answered in {waited_s:g} s"
        )
    found = [what for _, what in stream.answers]
    if stream.closed:
        found.append("closed")
    return found or ["no answer"]
