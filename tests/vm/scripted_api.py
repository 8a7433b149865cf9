"""The API of a scripted monitor: HTTP on a unix socket as those of rust-vmm's family speak it, and faults to order.

Programs that answer as a monitor was seen to answer (`scripted_cloud_hypervisor`, `scripted_firecracker`) serve with
this. Standard library alone: they are executed as the monitor is.
"""

from __future__ import annotations

import array
import json
import os
import selectors
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, Protocol

    class Monitor(Protocol):
        """What is scripted.

        Attributes:
            SERVER: Its name in answers.
            PREFIX: What every path begins with.
            LAST_WORDS: What it says on standard error when it dies to order,
            DIES: and its exit status then.
            listener: Listens for clients of its API.
            vsock: Stands for the guest's vsock.
            faults: What is wrong with the answers to which part of its API.
        """

        SERVER: str
        PREFIX: str
        LAST_WORDS: bytes
        DIES: int
        listener: socket.socket
        vsock: socket.socket
        faults: dict[str, str]

        def part_of(self, path: str) -> str:
            """The part of the API that a path belongs to."""

        def is_asked(self, part: str) -> None:
            """Is called before each answer; it may end."""

        def answer(self, method: str, path: str, body: dict[str, Any], fds: list[int]) -> Answer:
            """Status and document."""

        def refused(self, refusal: Refusal) -> Answer:
            """Status and document of an answer that is an error."""


Answer = tuple[int, object]


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: Of the answer.
        sentences: What it says.
    """

    def __init__(self, status: int, *sentences: str) -> None:
        super().__init__(*sentences)
        self.status = status


def faults_of(words: list[str]) -> dict[str, str]:
    """``scripted.fault=PART:KIND`` of a kernel's command line."""
    return dict(word.partition("=")[2].split(":", 1) for word in words if word.startswith("scripted.fault="))


def misbehave(monitor: Monitor, sock: socket.socket, kind: str) -> None:
    """Do what was ordered; ``hang`` does nothing."""
    if kind == "nonsense":
        sock.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n")
    elif kind == "half":
        sock.sendall(b"HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{")
        sock.shutdown(socket.SHUT_RDWR)
    elif kind == "huge":
        sock.sendall(b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n{")
    elif kind == "die":
        os.write(2, monitor.LAST_WORDS)
        os._exit(monitor.DIES)
    elif kind == "refuse":
        raise Refusal(400, "Error from API", "It was ordered to refuse")


class Connection:
    """One client of the API."""

    def __init__(self, monitor: Monitor, sock: socket.socket) -> None:
        self._monitor = monitor
        self._sock = sock
        self._data = b""
        self._fds: list[int] = []

    def read(self) -> bool:
        """Answer what has come; False at the end."""
        rights = array.array("i")
        data, told, _, _ = self._sock.recvmsg(65536, socket.CMSG_SPACE(16 * rights.itemsize))
        for _, _, content in told:
            rights.frombytes(content)
            self._fds += rights.tolist()
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
            length = int(fields.get(b"Content-Length", b"0"))
            if len(rest) < length:
                break
            self._data = rest[length:]
            method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
            self._answer(method, path.removeprefix(self._monitor.PREFIX), json.loads(rest[:length] or b"{}"))
        return bool(data)

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> None:
        monitor, fds = self._monitor, self._fds
        self._fds = []
        part = monitor.part_of(path)
        monitor.is_asked(part)
        try:
            if part in monitor.faults:
                misbehave(monitor, self._sock, monitor.faults[part])
                return
            status, content = monitor.answer(method, path, body, fds)
        except Refusal as refusal:
            status, content = monitor.refused(refusal)
        text = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
        head = f"HTTP/1.1 {status} \r\nServer: {monitor.SERVER}\r\nConnection: keep-alive\r\n{about}\r\n"
        self._sock.sendall(head.encode() + text)


def serve(monitor: Monitor) -> NoReturn:
    """Answer all clients; nobody listens in the guest."""
    selector = selectors.DefaultSelector()
    selector.register(monitor.listener, selectors.EVENT_READ)
    selector.register(monitor.vsock, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is monitor.vsock:
                monitor.vsock.accept()[0].close()
            elif key.fileobj is monitor.listener:
                sock = monitor.listener.accept()[0]
                selector.register(sock, selectors.EVENT_READ, Connection(monitor, sock))
            elif not key.data.read():
                selector.unregister(key.fileobj)
