"""The host's side of a lab run: streams, signals, the deadline, files brought back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

from kata.errors import KataError
from kvmlab import frames
from kvmlab.machine import Machine

GRACE_S = 20.0
"""How long a command may take to end after the deadline's TERM, or after a TERM from outside."""
BOOT_S = 300.0
"""How long the lab may take to be up; it takes seconds, but this machine may be busy."""
EXIT_TIMEOUT = 124
EXIT_LAB = 125
_PIPE_BUF = 4096
_FORWARDED = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH),
)
_PATIENCE = 3
"""The third Ctrl-C ends a lab whose command ignores them."""


class LabError(KataError):
    """The lab itself failed; the command may not even have started."""


class Request:
    """What shall run in a lab.

    Args:
        argv: The command.
        cwd: Its working directory, as on the host.
        env: Its environment.
        frozen: Files and directories of which the lab gets a copy as they are now. The rest of the host it
            sees as it is when it first looks, and what is edited after that it may see in part.
        fresh: Directories that are empty in the lab.
        modules: Kernel modules to load besides the usual ones.
        get: (path in the lab, path on the host) of what to bring back.
        terminal: Give the command a terminal, which is ours.
        stdin: Pass our standard input on.
        network: Whether the lab has a network interface.
        timeout_s: Seconds from the start of the command to its end by force; 0 for no deadline.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: dict[str, str],
        frozen: Sequence[str] = (),
        fresh: Sequence[str] = (),
        modules: Sequence[str] = (),
        get: Sequence[tuple[str, str]] = (),
        terminal: bool = False,
        stdin: bool = False,
        network: bool = True,
        timeout_s: float = 0.0,
    ) -> None:
        self.argv = list(argv)
        self.cwd = cwd
        self.env = env
        self.frozen = list(frozen)
        self.fresh = list(fresh)
        self.modules = list(modules)
        self.get = list(get)
        self.terminal = terminal
        self.stdin = stdin
        self.network = network
        self.timeout_s = timeout_s

    def spec(self) -> dict[str, object]:
        """What the lab is told; see `inside`."""
        return {
            "argv": self.argv,
            "cwd": self.cwd,
            "env": self.env,
            "fresh": self.fresh,
            "frozen": self.frozen,
            "get": [path for path, _target in self.get],
            "hostname": "kvm-lab",
            "modules": self.modules,
            "network": self.network,
            "size": _terminal_size() if self.terminal else None,
            "stdin": self.stdin and not self.terminal,
            "tty": self.terminal,
        }


class Session:
    """Runs one command in one lab.

    Args:
        machine: The lab, booting.
        request: What shall run.

    Attributes:
        started_after_s: Seconds from the making of this object to the start of the command; 0 before that.
    """

    def __init__(self, machine: Machine, request: Request) -> None:
        self.machine = machine
        self.request = request
        self.started_after_s = 0.0
        self._began = time.monotonic()
        self._deadline = self._began + BOOT_S
        self._decoder = frames.Decoder()
        self._to_lab = bytearray()
        self._to_us: deque[tuple[int, bytes]] = deque()
        self._copies = _freeze(request.frozen)
        self._sending = False
        self._hung_up = False
        self._archive: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _extract
        self._code: int | None = None
        self._done = False
        self._whole = False
        self._timed_out = False
        self._killed_by = 0
        self._asked_to_end = 0
        self._asked = 0
        self._wants_stdin = False
        self._stdin_open = request.stdin or request.terminal
        self.missing: list[str] = []

    def run(self) -> int:
        """Run the command.

        Returns:
            Its exit code; 128 + n when signal n ended it; 124 after the deadline.

        Raises:
            LabError: The lab did not come up, or died.
        """
        with _signals() as wakeup, _raw_terminal() if self.request.terminal else contextlib.nullcontext():
            self._wakeup = wakeup
            while not self._done and not self._killed_by:
                self._turn()
        if self._killed_by:
            return 128 + self._killed_by
        if self._whole:
            self._extract()
        else:
            self.missing = [path for path, _target in self.request.get]
        assert self._code is not None
        return EXIT_TIMEOUT if self._timed_out else self._code

    # ---- one turn of the loop ----

    def _turn(self) -> None:  # noqa: C901, PLR0912
        machine = self.machine
        watched = {
            machine.pidfd: select.POLLIN,
            machine.console.fileno(): select.POLLIN,
            self._wakeup: select.POLLIN,
        }
        port = machine.port.fileno()
        if self._sending and not self._to_lab:
            assert self._copies is not None
            data = self._copies.read(frames.CHUNK)
            self._send(frames.FROZEN, data)
            self._sending = bool(data)
        if not self._hung_up:
            watched[port] = select.POLLOUT if self._to_lab else 0
        if self._to_us:
            watched[self._to_us[0][0]] = watched.get(self._to_us[0][0], 0) | select.POLLOUT
        elif not self._hung_up:
            watched[port] |= select.POLLIN
        if self._wants_stdin and self._stdin_open:
            watched[0] = watched.get(0, 0) | select.POLLIN
        poller = select.poll()
        for fd, events in watched.items():
            poller.register(fd, events)
        left_s = min(60.0, max(0.0, self._deadline - time.monotonic()))
        ready = dict(poller.poll(left_s * 1000 + 1))
        if self._wakeup in ready:
            for number in os.read(self._wakeup, 64):
                self._signalled(number)
        if machine.console.fileno() in ready:
            machine.ring.feed(machine.console.recv(65536))
        if self._to_us and self._to_us[0][0] in ready:
            self._write_out()
        if self._wants_stdin and ready.get(0, 0):
            self._read_stdin()
        if self._to_lab and ready.get(port, 0) & select.POLLOUT:
            with contextlib.suppress(OSError):
                count = machine.port.send(self._to_lab, socket.MSG_DONTWAIT)
                del self._to_lab[:count]
        if ready.get(port, 0) & (select.POLLIN | select.POLLHUP):
            # With a QEMU that was killed went what it had not read; its socket then says so instead of an end.
            try:
                data = machine.port.recv(65536)
            except ConnectionResetError:
                data = b""
            self._hung_up = not data
            for kind, payload in self._decoder.feed(data):
                self._told(kind, payload)
        elif machine.pidfd in ready and not self._to_us:
            self._lab_died()
        if time.monotonic() >= self._deadline:
            self._late()

    def _lab_died(self) -> None:
        if self._code is not None and not self.request.get:
            self._done = True
            return
        words = self.machine.last_words()
        status = self.machine.process.wait()
        what = (
            "ended while the command ran" if self.started_after_s else "ended before the command was started"
        )
        raise LabError(f"the lab {what} (QEMU's status {status})" + (f": {words}" if words else ""))

    def _late(self) -> None:
        if not self.started_after_s:
            raise LabError(f"the lab was not up after {BOOT_S:g} s")
        if self._code is not None:
            raise LabError("the files did not come back in time")
        if self._timed_out or self._asked_to_end:
            self._killed_by = 0
            self._code = 128 + (self._asked_to_end or signal.SIGKILL)
            self._done = True
            return
        print(f"kvm-lab: the command has not ended after {self.request.timeout_s:g} s", file=sys.stderr)
        self._timed_out = True
        self._signal(signal.SIGTERM)
        self._deadline = time.monotonic() + GRACE_S

    def _told(self, kind: int, payload: bytes) -> None:
        if kind == frames.HELLO:
            self._send(frames.SPEC, json.dumps(self.request.spec()).encode())
            self._sending = self._copies is not None
        elif kind == frames.STARTED:
            now = time.monotonic()
            self.started_after_s = now - self._began
            self._deadline = now + (self.request.timeout_s or 1e9)
        elif kind == frames.STDOUT:
            self._to_us.append((1, payload))
        elif kind == frames.STDERR:
            self._to_us.append((2, payload))
        elif kind == frames.WANT:
            self._wants_stdin = True
        elif kind == frames.EXIT:
            self._code = int(json.loads(payload)["code"])
            self._wants_stdin = False
            self._deadline = time.monotonic() + BOOT_S
        elif kind == frames.ARCHIVE:
            self._archive.write(payload)
        elif kind == frames.DONE:
            self.missing = [str(text) for text in json.loads(payload)]
            while self._to_us:
                self._write_out()
            self._done = self._whole = True
        elif kind == frames.FAILED:
            raise LabError(f"the lab could not be prepared: {payload.decode(errors='replace')}")

    # ---- streams ----

    def _send(self, kind: int, payload: bytes) -> None:
        self._to_lab += frames.frame(kind, payload)

    def _write_out(self) -> None:
        # A pipe that poll calls writable takes this much without blocking.
        fd, data = self._to_us[0]
        try:
            count = os.write(fd, data[:_PIPE_BUF])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            # As on the host: who reads no longer ends the writer.
            self._to_us.popleft()
            self._signal(signal.SIGPIPE)
            return
        if count == len(data):
            self._to_us.popleft()
        else:
            self._to_us[0] = (fd, data[count:])

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, frames.CHUNK)
        except OSError:
            data = b""
        self._send(frames.STDIN, data)
        self._wants_stdin = self.request.terminal
        self._stdin_open = bool(data)

    # ---- signals ----

    def _signal(self, number: int) -> None:
        self._send(frames.SIGNAL, json.dumps(int(number)).encode())

    def _signalled(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self.request.terminal:
                self._send(frames.SIZE, json.dumps(_terminal_size()).encode())
            return
        self._asked += number in (signal.SIGINT, signal.SIGTERM)
        if not self.started_after_s or self._asked_to_end or self._asked == _PATIENCE:
            # Before there is a command, or when it does not listen: end the lab itself.
            self._killed_by = number
            return
        self._signal(number)
        if number in (signal.SIGTERM, signal.SIGHUP):
            self._asked_to_end = number
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)

    # ---- files ----

    def _extract(self) -> None:
        self._archive.seek(0)
        with self._archive, tarfile.open(fileobj=self._archive, mode="r:") as archive:
            for member in archive:
                index, _slash, rest = member.name.partition("/")
                if ".." in rest.split("/"):
                    raise LabError(f"the lab sent a file with the name {member.name!r}")
                target = os.path.normpath(os.path.join(self.request.get[int(index)][1], rest))
                if member.isdir():
                    os.makedirs(target, exist_ok=True)
                elif member.isfile():
                    source = archive.extractfile(member)
                    assert source is not None
                    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
                    with open(target, "wb") as file:
                        while data := source.read(1 << 20):
                            file.write(data)
                else:
                    self.missing.append(
                        f"{os.path.join(self.request.get[int(index)][0], rest)}: not a regular file"
                    )


_NOT_COPIED = (".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "target")


def _freeze(paths: Sequence[str]) -> IO[bytes] | None:
    """A tar archive with these files and directories, named by their index; None for none."""
    if not paths:
        return None

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if os.path.basename(member.name) in _NOT_COPIED else member

    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it has been sent
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for index, path in enumerate(paths):
            for _ in range(5):
                try:
                    archive.add(path, str(index), filter=wanted)
                    break
                except FileNotFoundError:
                    if not os.path.lexists(path):
                        raise LabError(f"{path} cannot be frozen: it does not exist") from None
                    # Something in it went away meanwhile. What was added before is added again, and that counts.
            else:
                raise LabError(f"{path} cannot be frozen: its files come and go")
    file.seek(0)
    return file


def _terminal_size() -> list[int]:
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            rows, columns, _x, _y = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
            if rows:
                return [rows, columns]
    return [24, 80]


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Have the signals that are meant for the command arrive on a descriptor instead."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda number, frame: None) for number in _FORWARDED}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Our terminal passes every key on."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSAFLUSH, before)
