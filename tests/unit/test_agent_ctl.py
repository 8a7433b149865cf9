"""kata-agent-ctl as a program: against a double of the agent, and against servers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_double import AgentDouble
from waiting import Reader

from kata.agent_ctl import fuzz, fuzz_cases, main, methods, session, shell
from kata.errors import UsageError
from kata.proto import agent_pb
from kata.ttrpc import frame
from kata.ttrpc.status import UNIMPLEMENTED, ProtocolError, TtrpcError

ROOT = Path(__file__).resolve().parents[2]


class Double(AgentDouble):
    """With what the engine never calls."""

    async def GetMetrics(self, request: Any, context: Any) -> agent_pb.Metrics:
        return agent_pb.Metrics(metrics="a 1\nb \x1b[31m2\n")

    async def ListRoutes(self, request: Any, context: Any) -> agent_pb.Routes:
        return agent_pb.Routes()

    async def GetVolumeStats(self, request: Any, context: Any) -> Any:
        raise TtrpcError(UNIMPLEMENTED, "no volumes \x1b[31m\nhint: have some")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, AgentDouble]]:
    """A double that serves on a unix socket: its address, and itself."""
    path = tmp_path / "agent.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    started = threading.Event()
    made: list[Any] = []

    async def serve() -> None:
        double = Double()
        serving = double.server()
        ended = asyncio.Event()
        made.extend((double, asyncio.get_running_loop(), ended))
        await serving.start(listener)
        started.set()
        await ended.wait()
        await serving.shutdown(0.1)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    yield f"unix://{path}", made[0]
    made[1].call_soon_threadsafe(made[2].set)
    thread.join(30)
    assert not thread.is_alive()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line: exit status, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        status = main.main(words)
        out, err = capfd.readouterr()
        return status, out, err

    return call


def lines(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# ---- calls ----


def test_answers_as_json_and_as_text(server: tuple[str, AgentDouble], run: Run) -> None:
    address = server[0]
    assert run("--server", address, "Check") == (0, '{\n  "status": "SERVING"\n}\n', "")
    assert run("-s", address, "-o", "text", "Check") == (0, "status: SERVING\n", "")
    assert json.loads(run("-s", address, "GetMetrics")[1]) == {"metrics": "a 1\nb \x1b[31m2\n"}
    assert (
        run("-s", address, "-o", "text", "GetMetrics")[1] == "a 1\nb \x1b[31m2\n"
    )  # a pipe gets it as it is
    details = json.loads(run("-s", address, "--omit-defaults", "--camel-case", "GetGuestDetails")[1])
    assert details == {"agentDetails": {"version": "double"}}
    text = run("-s", address, "-o", "text", "GetGuestDetails")[1]
    assert "  version: double\n" in text
    assert "  device_handlers: none\n" in text
    assert run("-s", address, "-o", "text", "ReseedRandomDev", "--data", "text:x")[1] == "ok\n"


def test_several_commands_share_a_connection_and_end_at_the_first_failure(
    server: tuple[str, AgentDouble], run: Run
) -> None:
    address, double = server
    status, out, err = run(
        *("-s", address, "-c", 'CreateSandbox {"hostname": "a b", "dns": ["x"]} --sandbox_id s'),
        *("-c", "ReadStdout --container_id none", "-c", "DestroySandbox"),
    )
    assert (status, out) == (1, "{}\n")
    assert err == "error: ReadStdout: NOT_FOUND: no process  in none\n"
    request = double.requests["CreateSandbox"]
    assert (request.hostname, request.dns, request.sandbox_id) == ("a b", ["x"], "s")
    assert "DestroySandbox" not in double.calls


def test_what_an_agent_says_is_made_fit_for_a_terminal(server: tuple[str, AgentDouble], run: Run) -> None:
    status, _, err = run("-s", server[0], "GetVolumeStats")
    assert status == 1
    assert err == "error: GetVolumeStats: UNIMPLEMENTED: no volumes \\x1b[31m\nhint: have some\n"


def test_time_and_timeout(server: tuple[str, AgentDouble], run: Run) -> None:
    _, _, err = run("-s", server[0], "--timing", "Check")
    assert err.startswith("Check: ")
    assert err.endswith(" 0 bytes out, 2 bytes back\n")
    status, _, err = run("-s", server[0], "--timeout", "0.1", "GetOOMEvent")
    assert status == 1
    assert "DEADLINE_EXCEEDED" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--server", "SERVER", "Chekc"], "no method 'Chekc'\nhint: did you mean Check?"),
        (["--server", "SERVER", "benhc"], "no method 'benhc'\nhint: did you mean bench?"),
        (["--server", "SERVER", "Check", "--servcie", "x"], "did you mean service?"),
        (["--srever", "SERVER", "Check"], "unknown option --srever\nhint: did you mean --server?"),
        (["--server"], "--server needs a value: ADDRESS"),
        (["--vm=yes"], "--vm is a switch"),
        (["--server", "SERVER", "--vm", "Check"], "--server and --vm name two agents"),
        (["Check"], "which agent?"),
        ([], "which agent?"),
        (
            ["--server", "unix:///no/such", "Check"],
            "cannot connect to unix:///no/such: there is no such socket",
        ),
        (
            ["--server", "SERVER", "--output", "jsno", "Check"],
            "there is no form 'jsno'\nhint: did you mean json?",
        ),
        (["--server", "SERVER", "--timeout", "soon", "Check"], "--timeout: 'soon' is not a number"),
        (["--server", "SERVER", "--timeout", "nan", "Check"], "--timeout: 'nan' is not a number"),
        (["--server", "SERVER", "-c", "Check", "Check"], "are both commands"),
        (["--server", "SERVER", "-c", ""], "the command is empty"),
        (["--server", "SERVER", "-c", "Check 'x"], "cannot be split into words: no closing quotation"),
        (["--server", "SERVER", "-c", "Chekc", "-c", "Check"], "did you mean Check?"),
        (["--hybrid-vsock", "Check"], "--hybrid-vsock goes with --server"),
        (["--vm-memory", "64", "--server", "SERVER", "Check"], "--vm-memory goes with --vm"),
        (["--sandbox", "no-such", "Check"], "there is no sandbox named 'no-such'"),
        (["--sandbox", "../x", "Check"], "is not the name of a sandbox"),
        (["--server", "SERVER", "bench", "--calls", "0"], "--calls: '0' is not a whole number from 1"),
        (["--server", "SERVER", "bench", "--size", "5000000"], "--size: '5000000' is not a whole number"),
        (
            ["--server", "SERVER", "bench", "--call", "5"],
            "unknown option --call\nhint: did you mean --calls?",
        ),
        (["--server", "SERVER", "fuzz", "--only", "frame"], "no kind 'frame'\nhint: did you mean frames?"),
        (["--server", "SERVER", "fuzz", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_input_is_a_clear_message_and_exit_1(
    server: tuple[str, AgentDouble], run: Run, words: list[str], message: str
) -> None:
    status, out, err = run(*(word.replace("SERVER", server[0]) for word in words))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err


def test_the_program_itself(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "KATA_RUN_DIR": str(tmp_path), "KATA_STATE_DIR": str(tmp_path)}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / "tools/kata-agent-ctl", *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
        )

    listed = call("--list")
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout or f"  {name}\n" in listed.stdout for name in methods.names())
    named = json.loads(call("--list", "-o", "json").stdout)
    assert [one["name"] for one in named] == methods.names()
    assert call("--help").stdout.startswith("usage: kata-agent-ctl TARGET")
    assert "--cases N" in call("fuzz", "--help").stdout
    assert "additionalGids  string, any number" in call("CreateContainer", "--help").stdout
    assert call("list", "UpdateRoutes").stdout == call("--list", "UpdateRoutes").stdout
    wrong = call("--vm", "Chek")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "error: there is no method 'Chek'\nhint: did you mean Check?\n",
    )
    nowhere = call("--sandbox", "x", "Check")
    assert (nowhere.returncode, "fault of its own" in nowhere.stderr) == (1, False)


# ---- the interactive mode ----


def test_lines_are_commands(
    server: tuple[str, AgentDouble], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
    # a comment
    Check
    Nonsense
    timing on
    output text
    CreateSandbox {"hostname": "it's", "dns": ["a", "b"]} --sandbox_id x
    timing off
    timeout 0.1
    GetOOMEvent
    timeout soon
    help Check
    quit
    Check
    """
    lines(monkeypatch, text)
    status, out, err = run("-s", server[0])
    assert status == 1
    assert out.startswith('{\n  "status": "SERVING"\n}\nok\nusage: Check ')
    assert "no method 'Nonsense'" in err
    assert "CreateSandbox: " in err
    assert "GetOOMEvent: DEADLINE_EXCEEDED" in err
    assert "timeout soon: not understood" in err
    assert server[1].requests["CreateSandbox"].hostname == "it's"
    assert server[1].calls.count("Check") == 1


def test_a_clean_script_ends_with_0(
    server: tuple[str, AgentDouble], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(monkeypatch, "Check\nhelp\nVersion --help")
    assert run("-s", server[0])[0] == 0


def test_lines_are_split_as_a_shell_would_and_json_is_left_whole() -> None:
    assert session.split("A --b 'c d' e") == ["A", "--b", "c d", "e"]
    assert session.split('A {"b": "c d"}') == ["A", '{"b": "c d"}']
    assert session.split('  A {"b": {"c": "}"}} --d "e f"') == ["A", '{"b": {"c": "}"}}', "--d", "e f"]
    assert session.split("A '{\"b\": 1}'") == ["A", '{"b": 1}']
    assert session.split("A --b '{\"c\": 1}'") == ["A", "--b", '{"c": 1}']
    with pytest.raises(UsageError, match="cannot be split"):
        session.split("A 'b")


def test_completion() -> None:
    assert shell.complete([], "Get") == [f"{name} " for name in methods.names() if name.startswith("Get")]
    assert "quit " in shell.complete([], "q")
    assert shell.complete(["help"], "Che") == ["Check "]
    assert shell.complete(["SignalProcess"], "--s") == ["--signal "]
    assert shell.complete(["CreateContainer"], "--OCI.Pro") == ["--OCI.Process."]
    assert shell.complete(["CreateContainer"], "--OCI.Process.Cw") == ["--OCI.Process.Cwd "]
    assert shell.complete(["CreateContainer"], "--none.x") == []
    assert shell.complete(["nonsense"], "--") == []


def test_completion_and_history_on_a_terminal(server: tuple[str, AgentDouble], tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [ROOT / "tools/kata-agent-ctl", "-s", server[0]],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"},
    )
    os.close(theirs)
    until = Reader(ours).until
    until(b"agent> ")
    os.write(ours, b"Vers\t")
    until(b"Version ")
    os.write(ours, b"\x15Chec\t\n")
    until(b"SERVING")
    until(b"agent> ")
    os.write(ours, b"\x04")
    assert child.wait(60) == 0
    os.close(ours)
    history = (tmp_path / "kata-agent-ctl/history").read_text()
    assert history.split() == ["Check"]


# ---- bench and fuzz ----


def test_bench_measures_calls_and_streams(
    server: tuple[str, AgentDouble], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, double = server
    # The double's processes know no dd: one that gives and takes as much.
    real = double._make

    def make(container_id: str, exec_id: str, argv: list[str]) -> Any:
        argv = ["flood", str(int(argv[-1][6:]) << 16)] if argv[1].startswith("if=") else ["cat"]
        made = real(container_id, exec_id, argv)
        if argv == ["cat"]:
            monkeypatch.setattr(made.stdout, "write", lambda data: asyncio.sleep(0))
        return made

    monkeypatch.setattr(double, "_make", make)
    found = json.loads(
        run(
            "-s",
            address,
            "bench",
            "--calls",
            "50",
            "--bytes",
            "1048576",
            "--size",
            "65536",
            "--container",
            "c",
        )[1]
    )
    assert found["round_trip"]["calls"] == 50
    trip = found["round_trip"]
    assert 0 < trip["min_us"] <= trip["p50_us"] <= trip["p99_us"] <= trip["max_us"]
    for name in ("requests", "stdout", "stdin"):
        assert found[name]["bytes"] == 1 << 20
        assert found[name]["mb_per_s"] > 0
    text = run("-s", address, "-o", "text", "bench", "--calls", "5", "--bytes", "4096", "--size", "4096")[1]
    assert "empty call: min" in text
    assert "streams: not measured" in text


def test_fuzz_finds_a_right_server_healthy(server: tuple[str, AgentDouble], run: Run) -> None:
    words = ["-s", server[0], "fuzz", "--cases", "120", "--seed", "7", "--wait", "0.3"]
    status, out, _ = run(*words)
    found = json.loads(out)
    assert (status, found["verdict"], found["cases"], found["seed"]) == (0, "healthy", 120, 7)
    assert found["frames"]["right calls all at once"]["OK"] > 2
    assert found["frames"]["a length above the limit"] == {"closed": 3}
    assert found["requests"]["StartContainer"]
    # A server that is a process of this machine's is not asked to change it.
    assert not methods.CHANGES_MACHINE & set(found["requests"])
    assert "DestroySandbox" not in found["requests"]


def test_fuzz_for_a_time(server: tuple[str, AgentDouble], run: Run) -> None:
    found = json.loads(run("-s", server[0], "fuzz", "--only", "requests", "--seconds", "0.3")[1])
    assert found["verdict"] == "healthy"
    assert found["cases"] > 0


def requests_on_a_port(data: bytes) -> list[int]:
    """The streams of the requests that an agent finds which looks for the next header after what is none."""
    something = re.compile(rb"[^\0]")
    found, at = [], 0
    while len(data) - at >= frame.HEADER_SIZE:
        length, stream, kind, flags = struct.unpack_from(">IIBB", data, at)
        if length > frame.MAX_DATA or not 1 <= kind <= 3 or flags > 7:
            # Nine zeros and what follows may be one, ten are none: over all but nine of them at once.
            ahead = something.search(data, at)
            at = max(at + 1, (ahead.start() if ahead else len(data)) - 9)
            continue
        if at + frame.HEADER_SIZE + length > len(data):
            break
        if kind == frame.REQUEST and stream % 2:
            found.append(stream)
        at += frame.HEADER_SIZE + length
    return found


@pytest.mark.parametrize("length", [1, 100, 65536, frame.MAX_DATA])
@pytest.mark.parametrize("stream", [1, 3, 0x0203, 0x02E66F, 0x010103, 0x03010001])
def test_a_stream_is_brought_into_step_whatever_was_on_it(length: int, stream: int) -> None:
    half = struct.pack(">IIBB", length, 7, 1, 0) + b"x" * (length // 2)
    sent = half + fuzz_cases.check(5) + fuzz._FLUSH + fuzz_cases.check(stream)
    assert requests_on_a_port(sent)[-1] == stream
    for noise in (b"", b"\0" * 9, b"\0\0\0\1" * 5):
        assert requests_on_a_port(noise + fuzz._FLUSH + fuzz_cases.check(stream))[-1] == stream


class Wrong:
    """An agent that answers health checks until a case of a sort comes, and then does something else."""

    def __init__(self, path: Path, act: str) -> None:
        self.act = act
        self.broken = False
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        parser = frame.Parser()
        with sock:
            try:
                while data := sock.recv(1 << 16):
                    for item in parser.feed(data):
                        self._answer(sock, item)
            except (OSError, ProtocolError):
                self.broken = self.broken or self.act in ("hang", "die")
                if self.broken and self.act == "die":
                    self.listener.shutdown(socket.SHUT_RDWR)
                    self.listener.close()

    def _answer(self, sock: socket.socket, item: frame.Frame) -> None:
        if self.broken:
            return
        if self.act == "lie" and len(item.data) > 5000:
            sock.sendall(struct.pack(">IIBB", 1 << 30, 1, 2, 0))
        elif self.act != "drop" or len(item.data) < 5000:
            sock.sendall(frame.encode(item.stream, frame.RESPONSE, b""))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("hang", "hung: Health.Check was not answered"),
        ("die", "gone: "),
        ("lie", "it sent something that is no frame"),
        ("drop", "hung: 1 of 1 right calls were not answered"),
    ],
)
def test_fuzz_says_what_a_wrong_server_did(tmp_path: Path, run: Run, act: str, words: str) -> None:
    path = tmp_path / "s"
    wrong = Wrong(path, act)
    command = ["-s", f"unix://{path}", "fuzz", "--only", "frames", "--patience", "6", "--seed", "1"]
    status, out, _ = run(*command)
    found = json.loads(out)
    assert status == 1
    assert words in found["verdict"]
    assert bytes.fromhex(found["last_case"]["hex"])
    wrong.listener.close()
    path.unlink()


def test_a_seed_is_the_same_cases_again() -> None:
    import random

    method = methods.get("CreateContainer")

    def cases() -> list[bytes]:
        rngs = [random.Random(f"5/{number}") for number in range(25)]
        frames = [fuzz_cases.frame_case(rng, number, 1).data for number, rng in enumerate(rngs)]
        return frames + [fuzz_cases.payload(rng, method) for rng in rngs]

    found = cases()
    assert found == cases()
    assert len(set(found)) > 35
