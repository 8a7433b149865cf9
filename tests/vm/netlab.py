"""Two network namespaces: one plays the host of a sandbox, the other the internet. No packet leaves the machine.

::

    host namespace                       internet namespace
    lo   127.0.0.1, ::1                  198.51.100.1/24, 2001:db8::1/64 (veth)
    veth 198.51.100.2/24, 2001:db8::2/64     servers of the test
    default routes to the internet

A test runs its sandbox in a child process inside the host namespace, with a mount namespace of its own so that
``/etc/resolv.conf`` can be another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from kata import sysio, threads

HOST4, INTERNET4 = "198.51.100.2", "198.51.100.1"
HOST6, INTERNET6 = "2001:db8::2", "2001:db8::1"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def lab(default_routes: bool = True) -> Iterator[tuple[str, str]]:
    """Make the two namespaces; yields their names (paths below /run/netns)."""
    number = os.urandom(3).hex()
    host, internet = f"ktest-{number}-h", f"ktest-{number}-i"
    made = []
    try:
        for name in (host, internet):
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", host, "link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", internet)
        for name, device, ipv4, ipv6 in (
            (host, "up0", HOST4, HOST6),
            (internet, "down0", INTERNET4, INTERNET6),
        ):
            _ip("-n", name, "address", "add", f"{ipv4}/24", "dev", device)
            _ip("-n", name, "-6", "address", "add", f"{ipv6}/64", "dev", device, "nodad")
            _ip("-n", name, "link", "set", device, "up")
        if default_routes:
            _ip("-n", host, "route", "add", "default", "via", INTERNET4)
            _ip("-n", host, "-6", "route", "add", "default", "via", INTERNET6)
        yield host, internet
    finally:
        for name in made:
            _ip("netns", "del", name)


def within(namespace: str, work: Callable[[], Any], resolv_conf: str | None = None) -> Any:
    """Run a function in a child process inside a namespace; its result (JSON values) comes back."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            try:
                _enter(namespace, resolv_conf)
                result = {"result": work()}
            except BaseException:
                result = {"error": traceback.format_exc()}
            data = json.dumps(result).encode()
            while data:
                data = data[os.write(write_end, data) :]
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    answer = json.loads(data)
    assert "error" not in answer, answer["error"]
    return answer["result"]


def _enter_network(namespace: str) -> None:
    with sysio.Fd(os.open(f"/run/netns/{namespace}", os.O_RDONLY)) as fd:
        sysio.setns(fd.raw, sysio.CLONE_NEWNET)


def _enter(namespace: str, resolv_conf: str | None) -> None:
    _enter_network(namespace)
    sysio.unshare(sysio.CLONE_NEWNS)
    sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
    if resolv_conf is not None:
        with tempfile.NamedTemporaryFile("w", suffix="resolv.conf") as file:
            file.write(resolv_conf)
            file.flush()
            os.chmod(file.name, 0o644)
            sysio.mount(file.name, os.path.realpath("/etc/resolv.conf"), None, sysio.MS_BIND)


class Server:
    """A TCP or UDP server in a thread; whom it heard from is in `peers`, what in `heard`.

    Args:
        address: Where it listens; port 0 is any.
        answer: Bytes sent to whoever connects, or a function from a datagram to its answer.
    """

    def __init__(
        self,
        address: tuple[str, int],
        answer: bytes | Callable[[bytes], bytes],
        kind: socket.SocketKind = socket.SOCK_STREAM,
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sock = socket.socket(family, kind)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind(address)
        self.port = self.sock.getsockname()[1]
        self.peers: list[str] = []
        self.heard: list[bytes] = []
        self._answer = answer
        self._stream = kind == socket.SOCK_STREAM
        if self._stream:
            self.sock.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                if self._stream:
                    connection, peer = self.sock.accept()
                    self.peers.append(peer[0])
                    with connection:
                        connection.settimeout(0.5)
                        with contextlib.suppress(TimeoutError):
                            self.heard.append(connection.recv(4096))
                        connection.sendall(self._answer(b"") if callable(self._answer) else self._answer)
                else:
                    data, peer = self.sock.recvfrom(4096)
                    self.peers.append(peer[0])
                    self.heard.append(data)
                    self.sock.sendto(self._answer(data) if callable(self._answer) else self._answer, peer)


def serve_in(namespace: str, *arguments: Any) -> Server:
    """A server whose socket belongs to another namespace than ours (a socket stays where it was made)."""

    def there() -> Server:
        _enter_network(namespace)
        return Server(*arguments)

    return threads.aside(there)


def connect_in(namespace: str, address: tuple[str, int], say: bytes = b"", timeout_s: float = 10.0) -> bytes:
    """Connect from a namespace, say something and read all that the server sends."""

    def there() -> bytes:
        _enter_network(namespace)
        data = b""
        with contextlib.suppress(OSError), socket.create_connection(address, timeout_s) as sock:
            sock.sendall(say)
            while part := sock.recv(4096):
                data += part
            return data
        return b""

    return threads.aside(there)


def send_in(namespace: str, address: tuple[str, int], say: bytes) -> None:
    """Send a datagram from a network namespace of the lab."""

    def there() -> None:
        with socket.socket(
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM
        ) as sock:
            sock.sendto(say, address)

    within(namespace, there)


def answer_a(question: bytes) -> bytes:
    """A DNS answer (RFC 1035): whatever the name, its address is 192.0.2.77."""
    end = question.index(b"\0", 12) + 5
    head = question[:2] + b"\x81\x80\0\x01\0\x01\0\0\0\0"
    return head + question[12:end] + b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04" + bytes((192, 0, 2, 77))
