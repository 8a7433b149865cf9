"""A program between the engine and the API of a real monitor, which answers some requests itself, wrongly, to order.

It is executed as the monitor is (`write` makes the program), executes the real one, and passes on everything else:
requests with their descriptors, answers, signals, the end. What is ordered is in a file that it keeps open, since it
loses the host's files as the monitor does: ``PART KIND``, where PART is the beginning of a path of the API, and KIND
``nonsense`` (no HTTP) or ``refuse`` (an error). Standard library alone.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn

NONSENSE, REFUSE = KINDS = ("nonsense", "refuse")
SAID = "It was ordered to refuse"
SAYS = {NONSENSE: "with nonsense", REFUSE: SAID}
"""What a client has to be told of each."""
_CONNECT_S = 60.0


def write(program: Path, real: str, orders: Path) -> None:
    """Make the program.

    Args:
        program: Its path.
        real: That of the monitor's.
        orders: The file with what is ordered.
    """
    orders.write_text("")
    program.write_text(
        "#!/usr/bin/python3 -IS\n"
        "import sys\n"
        f"sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\n"
        "import answers\n"
        f"answers.main({real!r}, {os.fspath(orders)!r})\n"
    )
    program.chmod(0o755)


class Between:
    """One client of the API, and our connection to the monitor for it."""

    def __init__(self, client: socket.socket, monitor: socket.socket, orders: int) -> None:
        self.client = client
        self.monitor = monitor
        self._orders = orders
        self._data = b""
        self._fds: list[int] = []

    def requests(self) -> bool:
        """Pass on what the client has sent, request by request; False at the end."""
        rights = array.array("i")
        data, told, _, _ = self.client.recvmsg(65536, socket.CMSG_SPACE(16 * rights.itemsize))
        for _, _, content in told:
            rights.frombytes(content)
            self._fds += rights.tolist()
        self._data += data
        while b"\r\n\r\n" in self._data:
            head, _, rest = self._data.partition(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            length = int(fields.get(b"content-length", b"0"))
            if len(rest) < length:
                break
            request, self._data = head + b"\r\n\r\n" + rest[:length], rest[length:]
            path = head.split(b" ")[1].decode().removeprefix("/api/v1").removeprefix("/")
            part, _, kind = os.pread(self._orders, 256, 0).decode().strip().partition(" ")
            if kind and (path.startswith(part) if part != "/" else not path):
                self._answer(kind, head)
            else:
                self._pass(request)
        return bool(data)

    def _pass(self, request: bytes) -> None:
        sent = socket.send_fds(self.monitor, [request], self._fds)
        self.monitor.sendall(request[sent:])
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _answer(self, kind: str, head: bytes) -> None:
        if kind == NONSENSE:
            self.client.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n")
            return
        of_cloud_hypervisor = b"/api/v1/" in head
        document = ["Error from API", SAID] if of_cloud_hypervisor else {"fault_message": SAID}
        text = json.dumps(document).encode()
        about = f"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self.client.sendall(about.encode() + text)

    def answers(self) -> bool:
        """Pass on what the monitor has said; False at the end."""
        data = self.monitor.recv(65536)
        with contextlib.suppress(BrokenPipeError):
            self.client.sendall(data)
        return bool(data)


def main(real: str, orders: str) -> NoReturn:
    """Be the monitor.

    Args:
        real: Path of the program.
        orders: The file with what is ordered.
    """
    argv = sys.argv[1:]
    if argv == ["--version"]:
        os.execv(real, [real, *argv])
    ordered = os.open(orders, os.O_RDONLY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX)
    inherited: list[socket.socket] = []
    if "--api-sock" in argv:
        at = argv.index("--api-sock") + 1
        behind = argv[at] + ".real"
        listener.bind(argv[at])
        listener.listen(8)
        argv[at] = behind
    else:
        at = argv.index("--api-socket") + 1
        listener = socket.socket(fileno=int(argv[at].removeprefix("fd=")))
        behind = f"\0kata-faults-{os.urandom(8).hex()}"
        inner = socket.socket(socket.AF_UNIX)
        inner.bind(behind)
        inner.listen(8)
        inner.set_inheritable(True)
        inherited.append(inner)
        argv[at] = f"fd={inner.fileno()}"
    pid = os.fork()
    if pid == 0:
        os.execv(real, [real, *argv])
    for one in inherited:
        one.close()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _frame: os.kill(pid, number))
    selector = selectors.DefaultSelector()
    ended = os.pidfd_open(pid)
    selector.register(ended, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == ended:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os._exit(code if code >= 0 else 128 - code)
            elif key.fileobj is listener:
                client = listener.accept()[0]
                between = Between(client, _connected(behind, ended), ordered)
                selector.register(client, selectors.EVENT_READ, between.requests)
                selector.register(between.monitor, selectors.EVENT_READ, between.answers)
            elif not key.data():
                between = key.data.__self__
                for sock in (between.client, between.monitor):
                    selector.unregister(sock)
                    sock.close()
                break  # the other one's event may be among those that are left


def _connected(behind: str, ended: int) -> socket.socket:
    deadline = time.monotonic() + _CONNECT_S
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(behind)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > deadline or _is_readable(ended):
                os._exit(1)
            time.sleep(0.01)
            continue
        if not behind.startswith("\0"):
            os.unlink(behind)
        return sock


def _is_readable(fd: int) -> bool:
    selector = selectors.DefaultSelector()
    selector.register(fd, selectors.EVENT_READ)
    return bool(selector.select(0))
