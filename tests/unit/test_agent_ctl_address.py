"""kata-agent-ctl: addresses, and the handshake of a hybrid vsock."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kata.agent_ctl import address, links
from kata.errors import HostError, UsageError
from kata.proto import health_pb
from kata.ttrpc import envelope, frame


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("vsock://3:1024", "vsock://3:1024"),
        ("vsock://7", "vsock://7:1024"),
        ("unix:///run/a.sock", "unix:///run/a.sock"),
        ("unix://@name", "unix://@name"),
        ("hvsock:///run/clh.sock:99", "hvsock:///run/clh.sock:99"),
        ("hvsock:///run/clh.sock", "hvsock:///run/clh.sock:1024"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(address.parse(text)) == shown


def test_the_original_tools_way_to_say_hybrid() -> None:
    assert str(address.parse("unix:///a", hybrid=True, hybrid_port=5)) == "hvsock:///a:5"


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("/run/a.sock", "not an agent's address", "did you mean unix:///run/a.sock?"),
        ("", "not an agent's address", "vsock://CID:PORT"),
        ("vsokc://3:1", "no scheme 'vsokc'", "did you mean vsock?"),
        ("tcp://3:1", "no scheme 'tcp'", "unix://PATH"),
        ("vsock://-1:1024", "-1 is only for listening", "vsock://3:1024"),
        ("vsock://x:1024", "'x' is not a context id", "number"),
        ("vsock://3:x", "'x' is not a port", "1024"),
        ("vsock://3:99999999999", "not a port", ""),
        ("unix://", "has no path", "unix:///run/agent.sock"),
        ("unix:///" + "x" * 120, "at most 107 bytes", ""),
        ("hvsock://:5", "has no path", ""),
        ("hvsock:///a:b", "'b' is not a port", ""),
    ],
)
def test_wrong_addresses_are_one_sentence(text: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        address.parse(text)
    assert words in caught.value.message
    assert hint in caught.value.hint


class Monitor:
    """A virtual machine monitor's socket: what it does with each connection, in turn; the last one for ever."""

    def __init__(self, path: Path, *acts: Callable[[socket.socket, bytes], None]) -> None:
        self.lines: list[bytes] = []
        self._acts = list(acts)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                line = b""
                while not line.endswith(b"\n") and (byte := sock.recv(1)):
                    line += byte
                self.lines.append(line)
                act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
                try:
                    act(sock, line)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Callable[..., str]]:
    made: list[Monitor] = []

    def make(*acts: Callable[[socket.socket, bytes], None]) -> str:
        path = tmp_path / "vm.sock"
        made.append(Monitor(path, *acts))
        return str(path)

    make.__dict__["made"] = made
    yield make
    for one in made:
        one.close()


def hang_up(sock: socket.socket, line: bytes) -> None:
    """What a monitor does while the guest does not listen."""


def agent(sock: socket.socket, line: bytes) -> None:
    """OK and, in the same piece as the line, the beginning of nothing else; then an agent that is healthy."""
    sock.sendall(b"OK 1073741824\n")
    parser = frame.Parser()
    while data := sock.recv(4096):
        for item in parser.feed(data):
            payload = health_pb.HealthCheckResponse(status=1).encode()
            sock.sendall(frame.encode(item.stream, frame.RESPONSE, envelope.Response(payload).encode()))


def test_a_hybrid_vsock_is_asked_for_its_port(monitor: Callable[..., str]) -> None:
    path = monitor(agent)
    link = links.to_server(address.parse(f"hvsock://{path}:4242"), 10)
    links.healthy(link, 10)
    links.healthy(link, 10)
    link.close()
    assert monitor.__dict__["made"][0].lines == [b"CONNECT 4242\n"]


def test_a_hybrid_vsock_without_a_listener_is_asked_again(monitor: Callable[..., str]) -> None:
    path = monitor(hang_up, hang_up, agent)
    link = links.to_server(address.parse(f"hvsock://{path}"), 30)
    links.healthy(link, 10)
    link.close()
    assert monitor.__dict__["made"][0].lines == [b"CONNECT 1024\n"] * 3


def test_what_follows_the_handshake_is_the_agents(monitor: Callable[..., str]) -> None:
    path = monitor(lambda sock, line: sock.sendall(b"OK 1\nrest"))
    sock = address.connect(address.parse(f"hvsock://{path}"), 10)
    assert sock.recv(4, socket.MSG_WAITALL) == b"rest"
    sock.close()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"NO\n", "it answered 'NO' instead"),
        (b"\x1b[31m\n", r"it answered '\\x1b\[31m' instead"),
        (b"x" * 500, "it answered 'xxx"),
        (b"OKAY 5\n", "instead of OK, as a hybrid vsock does"),
    ],
)
def test_a_wrong_answer_to_the_handshake_is_told(
    monitor: Callable[..., str], reply: bytes, words: str
) -> None:
    path = monitor(lambda sock, line: sock.sendall(reply))
    with pytest.raises(HostError, match=words):
        address.connect(address.parse(f"hvsock://{path}"), 10)


def test_nobody_there_is_told(monitor: Callable[..., str], tmp_path: Path) -> None:
    path = monitor(hang_up)
    with pytest.raises(HostError, match="closed without an answer: nobody listens"):
        address.connect(address.parse(f"hvsock://{path}"), 0.2)
    with pytest.raises(HostError, match="there is no such socket"):
        address.connect(address.parse(f"unix://{tmp_path}/none"), 10)
    with pytest.raises(HostError, match="refused"):
        address.connect(address.parse("unix://@kata-test-nobody"), 10)


def test_a_monitor_that_says_nothing_is_given_up(monitor: Callable[..., str]) -> None:
    end = threading.Event()
    path = monitor(lambda sock, line: end.wait(30) and None)
    with pytest.raises(HostError, match="it did not answer in time"):
        address.connect(address.parse(f"hvsock://{path}"), 0.2)
    end.set()
