"""`kata top` in a real terminal, with engines that say what they are told to say."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socketserver
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal_support import KATA, Terminal

from kata import events
from kata.cli import live, main, screen, top_view
from kata.cli.screen import Line, fit, width
from kata.errors import KataError

HOSTILE = "\x1b]0;evil\x07\x1b[2J\u202e\n"
WIDE = "\u5bb9\u5668"  # two characters of two columns each


class Node:
    """Sandboxes whose engines are threads."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory
        self.documents: dict[str, dict[str, Any]] = {}
        self.silent: set[str] = set()
        self.servers: list[socketserver.BaseServer] = []
        self.release = threading.Event()

    def add(self, name: str, cpu: float, memory_mib: int, **more: Any) -> str:
        """A sandbox that uses *cpu* processors. Returns its id."""
        identity = f"{len(self.documents):x}" * 32
        directory = self.run_dir / "sandboxes" / identity
        directory.mkdir(parents=True)
        (directory / "sandbox.json").write_text(json.dumps({"id": identity}))
        container = {
            "id": identity,
            "name": name,
            "image": "debian:12",
            "state": "running",
            "cpu_seconds": 0.0,
            "memory_bytes": memory_mib << 20,
            "memory_limit_bytes": 1 << 30,
            "pids": 3,
        }
        self.documents[identity] = {
            "id": identity,
            "client": "kata",
            "namespace": "",
            "state": "ready",
            "error": "",
            "created": time.time() - 3700,
            "name": name,
            "vcpus": 2,
            "host": {
                "cpu_seconds": 0.0,
                "memory_bytes": 300 << 20,
                "processes": [
                    {"role": role, "rss_bytes": mib << 20}
                    for role, mib in (("engine", 20), ("hypervisor", 250), ("virtiofsd", 4), ("passt", 3))
                ],
            },
            "guest": {
                "memory_total_bytes": 2 << 30,
                "memory_resident_bytes": 150 << 20,
                "memory_returned_bytes": 1 << 30,
            },
            "overhead": {"memory_bytes": 100 << 20},
            "hypervisor": {"name": "qemu", "version": "7.2", "accelerator": "tcg", "channel": "vsock"},
            "network": [{"interface": "eth0", "received_bytes": 0, "sent_bytes": 0}],
            "containers": [container],
            "timings": [
                {"name": "kernel", "start_seconds": 0.0, "duration_seconds": 0.5},
                {"name": "process", "start_seconds": 0.5, "duration_seconds": 0.5},
            ],
            **more,
        }
        node, began = self, time.time()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if identity in node.silent:
                    node.release.wait()
                now = time.time()
                found = node.documents[identity] | {"time": now}
                found["host"] = found["host"] | {"cpu_seconds": cpu * (now - began)}
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return ""

            def log_message(self, *_: Any) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        server = Server(str(directory / "shim-monitor.sock"), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.servers.append(server)
        return identity


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    with tempfile.TemporaryDirectory(prefix="kt") as run_dir:  # tmp_path is too long for a socket's
        monkeypatch.setenv("KATA_RUN_DIR", run_dir)
        made = Node(Path(run_dir))
        yield made
        made.release.set()
        for server in made.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def terminal(node: Node) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*arguments: str, columns: int = 150, rows: int = 24, **environment: str) -> Terminal:
        argv = [*KATA, "top", "--interval", "0.3", *arguments]
        made.append(Terminal(argv, environment, columns, rows))
        return made[-1]

    yield start
    for one in made:
        one.close()


def order(shown: Terminal, *names: str) -> list[str]:
    return sorted(names, key=shown.line_of)


def is_restored(shown: Terminal) -> bool:
    after = termios.tcgetattr(shown.slave)
    return after == shown.mode and shown.raw.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")


def test_the_list_and_its_keys(node: Node, terminal: Callable[..., Terminal]) -> None:
    node.add("busy", 0.75, 10)
    node.add("idle", 0.01, 300)
    third = node.add("middle", 0.25, 20, state="failed", error="the machine went away")
    events.append("container.exited", {"sandbox": third, "container": third, "exit_code": 137})
    shown = terminal()
    shown.wait_for("busy", "idle", "middle", "3 sandboxes: 1 failed, 2 ready", "75.")
    shown.wait(lambda: order(shown, "busy", "idle", "middle") == ["busy", "middle", "idle"])
    assert "1 h 1 min" in shown.text()
    shown.type("m")
    shown.wait(lambda: order(shown, "busy", "idle", "middle") == ["idle", "middle", "busy"])
    shown.type("mn")
    shown.wait(lambda: order(shown, "busy", "idle", "middle") == ["busy", "idle", "middle"])
    shown.type("n")
    shown.wait(lambda: order(shown, "busy", "idle", "middle") == ["middle", "idle", "busy"])
    shown.type("/idlx\x7fe\r")
    shown.wait(lambda: "middle" not in shown.text())
    shown.wait_for("1 of 3 with 'idle'")
    shown.type("\x1b")
    shown.wait_for("middle")
    # The selection stays with its sandbox; it is on idle, the only one a moment ago.
    shown.type("\x1b[A")
    shown.wait(lambda: shown.screen.buffer[shown.line_of("middle")][0].reverse)
    shown.wait_for("the machine went away")
    shown.type("\r")
    text = shown.wait_for(
        "CONTAINERS", "START, 1.00 s", "EVENTS", "exit_code=137", "the machine went away", third
    )
    assert "qemu 7.2 tcg, agent by vsock" in text
    assert "guest 150 MiB, hypervisor 100 MiB, engine 20.0 MiB, helpers 7.00 MiB" in text
    assert text.index("kernel") < text.index("process")
    first, second = (shown.screen.display[shown.line_of(word)] for word in ("kernel", "process"))
    assert first.index("\u2588") < second.index("\u2588") == first.rindex("\u2588") + 1
    shown.type("\x1b[D")
    shown.wait_for("GIVEN BACK")
    shown.type("q")
    assert shown.end() == 0
    assert is_restored(shown)


def test_resizing_and_wide_characters(node: Node, terminal: Callable[..., Terminal]) -> None:
    node.add(WIDE + "-web", 0.1, 10)
    node.add("plain-web", 0.2, 10)
    shown = terminal(columns=120)
    shown.wait_for("plain-web", WIDE[0], "ready")
    lines = [shown.screen.display[shown.line_of(word)] for word in (WIDE[0], "plain-web")]
    # pyte has an empty cell behind a wide character, which `display` leaves out.
    assert lines[0].index("ready") + 2 == lines[1].index("ready")
    assert "DISK" not in shown.text()  # no room
    shown.resize(60, 10)
    shown.wait(
        lambda: "CLIENT" not in shown.text() and "MEMORY" in shown.text() and "q ends" in shown.text()
    )
    assert shown.screen.display[9].startswith("q ends")
    shown.resize(170, 30)
    shown.wait_for("DISK READ / WRITE", "GIVEN BACK")
    assert shown.screen.display[29].startswith("q ends")
    shown.resize(3, 2)
    time.sleep(0.3)
    shown.resize(100, 20)
    shown.wait_for("plain-web", "ready")
    shown.type("q")
    assert shown.end() == 0


def colours(shown: Terminal) -> set[str]:
    return {cell.fg for line in shown.screen.buffer.values() for cell in line.values()}


def test_colours_only_where_they_are_wanted(node: Node, terminal: Callable[..., Terminal]) -> None:
    node.add("one", 0.1, 10)
    node.add("two", 0.1, 10, state="failed", error="gone")
    coloured = terminal()
    coloured.wait_for("ready", "failed")
    assert colours(coloured) == {"default", "green", "red"}
    for plain in (terminal("--no-color"), terminal(NO_COLOR="1")):
        plain.wait_for("ready", "failed")
        plain.type("\r")
        plain.wait_for("START")
        assert colours(plain) == {"default"}


def test_names_cannot_send_escape_sequences(node: Node, terminal: Callable[..., Terminal]) -> None:
    node.add(HOSTILE, 0.1, 10, state="ready" + HOSTILE, error=HOSTILE, client=HOSTILE, namespace=HOSTILE)
    (document,) = node.documents.values()
    document["containers"][0] |= {"image": HOSTILE, "state": HOSTILE}
    document["timings"][0]["name"] = HOSTILE
    document["hypervisor"]["name"] = HOSTILE
    document["vcpus"] = HOSTILE
    document["containers"][0]["pids"] = HOSTILE
    events.append("container.exited" + HOSTILE, {"sandbox": document["id"], "error": HOSTILE})
    shown = terminal()
    shown.wait_for("\\u{1b}]0;evil\\u{7}")
    shown.type("\r")
    shown.wait_for("EVENTS", "container.exited\\u{1b}")
    for forbidden in (b"\x1b]", b"\x07", b"\xe2\x80\xae"):
        assert forbidden not in shown.raw
    assert shown.raw.count(b"\x1b[2J") == 1  # ours, at the beginning


def test_the_terminal_is_given_back_whatever_happens(node: Node, terminal: Callable[..., Terminal]) -> None:
    node.add("one", 0.1, 10)
    for number in (signal.SIGTERM, signal.SIGHUP):
        shown = terminal()
        shown.wait_for("ready")
        assert termios.tcgetattr(shown.slave) != shown.mode
        os.kill(shown.pid, number)
        assert os.WTERMSIG(shown.end()) == number
        assert is_restored(shown)
    interrupted = terminal()
    interrupted.wait_for("ready")
    interrupted.type("\x03")
    assert os.waitstatus_to_exitcode(interrupted.end()) == 130
    assert is_restored(interrupted)
    stopped = terminal()
    stopped.wait_for("ready")
    stopped.type("\x1a")
    assert os.WIFSTOPPED(stopped.change())
    assert is_restored(stopped)
    stopped.screen.reset()
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.wait_for("one", "ready", "q ends")
    assert termios.tcgetattr(stopped.slave) != stopped.mode
    # An error of the host's: the list of sandboxes cannot be read any more.
    os.rename(node.run_dir / "sandboxes", node.run_dir / "elsewhere")
    (node.run_dir / "sandboxes").touch()
    assert os.waitstatus_to_exitcode(stopped.end()) == 125
    assert termios.tcgetattr(stopped.slave) == stopped.mode
    assert stopped.raw.index(b"error:") > stopped.raw.rindex(b"\x1b[?1049l")


def test_one_that_does_not_answer_delays_no_other(node: Node, terminal: Callable[..., Terminal]) -> None:
    stuck = node.add("stuck", 0.5, 10)
    node.silent.add(stuck)
    node.add("fine", 0.5, 10)
    began = time.monotonic()
    shown = terminal()
    shown.wait_for("fine", "50.")
    assert "stuck" not in shown.text()  # nothing is known of it yet
    shown.type("q")
    assert shown.end() == 0
    assert time.monotonic() - began < live.ASK_S


def test_scripts(node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "ASK_S", 2.0)
    node.add("one", 0.5, 10)
    node.add("two", 0.25, 20)
    assert main.main(["top", "--once", "--interval", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "one", "two"]
    assert main.main(["top", "--json", "--interval", "0.3", "--sort", "memory", "--filter", "two"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == ["two"]
    assert 0.2 < found[0]["rates"]["cpu_per_second"] < 0.3
    for wrong in (["--sort", "x"], ["--interval", "0"], ["--interval", "x"], ["c", "--sort", "cpu"]):
        assert main.main(["top", *wrong]) == 125
        assert "hint" in (error := capsys.readouterr().err) or "--interval" in error
    assert main.main(["top"]) == 125  # no terminal here
    assert "--once" in capsys.readouterr().err


def test_stats_of_all_clients(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kata stats`, from the same documents."""
    monkeypatch.setattr(live, "ASK_S", 1.0)
    node.add("one", 0.5, 10)
    pod = node.add("pause", 0.0, 1, client="containerd", namespace="k8s.io")
    second = {
        **node.documents[pod]["containers"][0],
        "id": "c" * 32,
        "name": HOSTILE,
        "memory_bytes": 5 << 20,
    }
    ended = {**second, "id": "d" * 32, "state": "stopped"}
    node.documents[pod]["containers"] += [second, ended]
    stuck = node.add("stuck", 0.5, 10)
    node.silent.add(stuck)
    assert main.main(["stats", "--json", "--interval", "0.1"]) == 0
    told = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(told.out)}
    assert set(rows) == {"one", "pause", HOSTILE}
    assert rows[HOSTILE] | {"cpu_percent": 0} == {
        "id": "c" * 32,
        "name": HOSTILE,
        "sandbox": pod,
        "client": "containerd",
        "namespace": "k8s.io",
        "cpu_percent": 0,
        "memory_bytes": 5 << 20,
        "memory_limit_bytes": 1 << 30,
        "network_received_bytes": 0,
        "network_sent_bytes": 0,
        "block_read_bytes": 0,
        "block_written_bytes": 0,
        "pids": 3,
        "overhead_bytes": 100 << 20,
        "memory_returned_bytes": 1 << 30,
        "memory_parts": {
            "guest": 150 << 20,
            "hypervisor": 100 << 20,
            "engine": 20 << 20,
            "helpers": 7 << 20,
        },
    }
    assert "warning: no statistics of " in told.err
    assert main.main(["stats", "--json", "--interval", "0.1", stuck]) == 125  # it was asked for
    told = capsys.readouterr()
    assert json.loads(told.out) == []
    assert "warning: no statistics of " in told.err
    node.silent.clear()
    assert main.main(["stats", "--no-stream", "--interval", "0.1", pod[:8]]) == 0
    heading, first, other = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "CONTAINER"
    assert first.split()[-2:] == ["100MiB", "1GiB"]
    assert other.split()[-2:] == ["-", "-"]  # of the sandbox, not once more
    assert "\x1b" not in other
    assert main.main(["stats", "nobody"]) == 125
    assert "no container named 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "guest", "parts"),
    [
        ([], 5, (None, None, None, None)),
        ([("engine", 3)], 5, (None, None, 3, 0)),  # the machine has gone
        ([("engine", 3), ("hypervisor", 9), ("logger", 1)], None, (None, 9, 3, 1)),
        ([("engine", 3), ("hypervisor", 9)], 10, (10, 0, 3, 0)),  # of two moments
    ],
)
def test_memory_of_the_parts(
    processes: list[tuple[str, int]], guest: int | None, parts: tuple[int | None, ...]
) -> None:
    told = [{"role": role, "rss_bytes": size} for role, size in processes]
    row = live.Row("d", {"host": {"processes": told}, "guest": {"memory_resident_bytes": guest}})
    assert tuple(row.parts[name] for name in live.PARTS) == parts


def test_one_that_is_silent_is_waited_for_once(tmp_path: Path) -> None:
    """A command that reads twice, for rates, does not wait twice for an engine that hangs."""
    waits = threading.Event()
    hangs, well = str(tmp_path), str(tmp_path / "well")

    def ask(directory: str) -> dict[str, Any]:
        if directory == hangs:
            waits.wait(0.5)
            raise KataError("it did not answer")
        return {"time": time.time()}

    sampler = live.Sampler(ask, lambda: [hangs, well])
    sampler.sample()
    assert (sampler.rows[hangs].problem, sampler.rows[well].problem) == ("it did not answer", "")
    before, first = time.monotonic(), sampler.rows[well]
    sampler.sample()
    assert time.monotonic() - before < 0.45
    assert sampler.rows[well] is not first
    assert sampler.rows[hangs].status == "silent"
    waits.set()


def test_the_help_names_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["top", "--help"]) == 0
    assert ", ".join(top_view.COLUMNS) in " ".join(capsys.readouterr().out.split())


def test_nothing_runs(node: Node, terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    shown.wait_for("no sandbox", "0 sandboxes")
    shown.type("\r\x1b[Bx/\x1bq")
    assert shown.end() == 0


# ---- without a terminal ----


def test_columns_of_texts() -> None:
    assert width("a" + WIDE) == 5
    assert width("e\u0301") == 1
    assert fit(WIDE, 3) == WIDE[0] + "\u2026"
    assert fit("abc", 5, right=True) == "  abc"
    assert width(fit(WIDE * 10, 8)) == 8
    assert fit("abc", 0) == ""
    line = Line("abc", screen.RED, screen.BOLD).add(WIDE)
    assert line.render(80, colour=False) == f"\x1b[1mabc\x1b[0m{WIDE}"
    assert line.render(4, colour=True) == "\x1b[31;1mabc\x1b[0m\u2026"


def test_every_size_of_a_terminal_is_filled_and_not_more() -> None:
    view = top_view.View()
    rows = [
        live.Row(f"/r/{number}", {"id": str(number) * 32, "name": WIDE * 9, "state": "ready", "time": 1.0})
        for number in range(30)
    ]
    view.take(rows)
    for columns in (1, 5, 20, 79, 80, 150, 300):
        for height in (1, 2, 3, 10, 50):
            lines, selected = view.draw(columns, height)
            assert len(lines) == height
            assert selected < max(height, 4)
            for line in lines:
                assert width(re.sub("\x1b\\[[0-9;]*m", "", line.render(columns, colour=True))) <= columns


def test_documents_may_be_anything() -> None:
    values: tuple[Any, ...] = (None, [], "x", 5, {"containers": [None, {}]}, True)
    for value in values:
        document = dict.fromkeys(
            ("host", "guest", "overhead", "network", "containers", "timings", "state"), value
        )
        document |= {"created": value, "vcpus": value, "hypervisor": value, "name": value, "id": "a"}
        row = live.Row("/r/a", document, live.Row("/r/a", {"time": 1.0}))
        view = top_view.View()
        view.take([row])
        view.draw(100, 30)
        view.press("enter")
        view.draw(100, 30)
        assert isinstance(json.dumps(row.to_json()), str)


def test_a_signal_in_the_middle_of_a_draw_has_all_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that comes between the writing and the noting down of what was written."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.fileno", lambda: 0, raising=False)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = screen.Screen(colour=False)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            shown._on_resize(signal.SIGWINCH, None)

    monkeypatch.setattr(shown, "_write", write)
    lines = [screen.Line(text) for text in ("head", "row", "foot")]
    shown.draw(lines)
    shown.draw([screen.Line("head 2"), *lines[1:]])
    assert "row" not in written[1]
    shown.draw([screen.Line("head 2"), *lines[1:]])
    assert all(word in written[2] for word in ("head 2", "row", "foot"))
    shown.draw([screen.Line("head 2"), *lines[1:]])
    assert len(written) == 3
