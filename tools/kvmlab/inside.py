"""PID 1 of the lab: prepares the rest of the machine, runs one command, passes its streams, ends the machine.

Runs from the lab's initrd with the host's Python and only the standard library (imports are slow in an emulated
machine: few of them). If it fails the kernel panics, the machine ends and the host shows the console.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PORT = "kvmlab"
HERE = "/run/kvmlab"
BUSYBOX = f"{HERE}/busybox"
FROZEN = f"{HERE}/frozen"
_HIGH_WATER = 256 << 10
# Programs' own state, of which the host's is nobody's business here; and overlayfs takes no overlay as upper layer.
_FRESH = (
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
    "/var/lib/kata",
    "/var/lib/kubelet",
)


def say(text: str) -> None:
    """A line on the lab's console."""
    with contextlib.suppress(OSError), open("/dev/console", "w") as console:
        console.write(f"kvm-lab: {text}\n")


def open_port() -> int:
    """Open the virtio-serial port to the host, which may still be on its way."""
    base = "/sys/class/virtio-ports"
    for _ in range(600):
        for name in os.listdir(base) if os.path.isdir(base) else ():
            with open(f"{base}/{name}/name") as file:
                if file.read().strip() == PORT:
                    with contextlib.suppress(FileNotFoundError):
                        return os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        time.sleep(0.05)
    raise SystemExit("there is no port to the host")


def run(*argv: str) -> tuple[int, str]:
    """Run a program to its end; its exit status, and what it said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.execv(argv[0], argv)
        except OSError as error:
            os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)
    os.close(writer)
    said = b""
    while data := os.read(reader, 65536):
        said += data
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors="replace").strip()


def shell(script: str) -> str:
    """Run a script of busybox's shell; empty, or why it failed."""
    status, said = run(BUSYBOX, "sh", "-euc", f"PATH={HERE}:$PATH\n{script}")
    return "" if status == 0 else said or f"status {status}"


def quoted(path: str) -> str:
    """A word for the shell."""
    return "'" + path.replace("'", "'\\''") + "'"


def prepare(spec: dict[str, Any]) -> str:
    """Make the machine what commands expect of one. Returns empty, or what could not be done."""
    lines = ['m() { busybox mount "$@"; }', 'ip() { busybox ip "$@"; }', "ip link set lo up"]
    fresh = [path for path in (*_FRESH, *spec["fresh"]) if os.path.isdir(path)]
    lines += [f"m -t tmpfs -o mode=755 tmp {quoted(path)}" for path in fresh]
    lines += [f"m -o bind {FROZEN}/{index} {quoted(path)}" for index, path in enumerate(spec["frozen"])]
    lines += [
        "mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/hugepages /run/lock /run/netns",
        "m -t devpts -o mode=620,ptmxmode=666,gid=5 devpts /dev/pts",
        "ln -sf pts/ptmx /dev/ptmx; ln -sf /proc/self/fd /dev/fd",
        "ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr",
        "m -t tmpfs -o mode=1777 shm /dev/shm",
        "m -t mqueue mqueue /dev/mqueue || true",
        "m -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup",
        "for c in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$c >/sys/fs/cgroup/cgroup.subtree_control; done",
        "m -t securityfs securityfs /sys/kernel/security || true",
        "m -t bpf bpf /sys/fs/bpf || true",
        f"hostname {quoted(spec['hostname'])}",
        # As on a machine of one's own: who makes a mount that others shall see says so.
        "m --make-rshared /",
    ]
    if spec["network"]:
        # The addresses of QEMU's user network.
        lines.append(
            "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2"
        )
    lines += [f"modprobe {quoted(name)}" for name in spec["modules"]]
    wrong = shell("\n".join(lines))
    if not wrong and not os.path.exists("/dev/kvm"):
        wrong = "there is no /dev/kvm: is QEMU too old to emulate AMD-V?"
    return wrong


class Lab:
    """The talk with the host around one command."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.decoder = frames.Decoder()
        self.out: deque[bytes] = deque()
        self.queued = 0
        self.stdin: deque[bytes] = deque()
        self.stdin_fd = -1
        self.stdin_ends = False
        self.sources: dict[int, int] = {}
        self.pid = -1
        self.tty = False
        self.status: int | None = None

    # ---- the port ----

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Queue a frame for the host."""
        data = frames.frame(kind, payload)
        self.out.append(data)
        self.queued += len(data)

    def send_json(self, kind: int, value: object) -> None:
        """Queue a frame with a JSON value."""
        self.send(kind, json.dumps(value).encode())

    def flush(self, wait: bool = False) -> None:
        """Write what the port takes; with *wait*, everything."""
        while self.out:
            data = self.out.popleft()
            try:
                count = os.write(self.port, data[: 32 << 10])
            except BlockingIOError:
                self.out.appendleft(data)
                if not wait:
                    return
                select.select([], [self.port], [], 1)
                continue
            self.queued -= count
            if count < len(data):
                self.out.appendleft(data[count:])

    def receive(self, wait: bool = False) -> Iterator[tuple[int, bytes]]:
        """Frames that have arrived."""
        if wait:
            select.select([self.port], [], [])
        try:
            data = os.read(self.port, frames.CHUNK)
        except BlockingIOError:
            return
        if not data:
            time.sleep(
                0.1
            )  # nobody is there: the host's end closed, and with it this machine is about to end
        yield from self.decoder.feed(data)

    # ---- the command ----

    def start(self, spec: dict[str, Any]) -> None:
        """Fork the command off, its streams connected."""
        self.tty = bool(spec["tty"])
        wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.wakeup = wakeup_read
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, where: None)
        theirs: tuple[int, int, int]
        if self.tty:
            master, slave = os.openpty()
            if spec["size"]:
                set_size(slave, spec["size"])
            theirs = (slave, slave, slave)
            self.sources = {master: frames.STDOUT}
            self.stdin_fd = os.dup(master)
        else:
            out_read, out_write = os.pipe()
            err_read, err_write = os.pipe()
            if spec["stdin"]:
                in_read, self.stdin_fd = os.pipe()
            else:
                in_read = os.open("/dev/null", os.O_RDONLY)
            theirs = (in_read, out_write, err_write)
            self.sources = {out_read: frames.STDOUT, err_read: frames.STDERR}
        self.send(frames.STARTED)
        if self.stdin_fd >= 0:
            self.send(frames.WANT)
        self.flush(wait=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._become(spec, theirs)
        for fd in set(theirs):
            os.close(fd)
        for fd in (*self.sources, self.stdin_fd):
            if fd >= 0:
                os.set_blocking(fd, False)

    def _become(self, spec: dict[str, Any], streams: tuple[int, int, int]) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for changed in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
                signal.signal(changed, signal.SIG_DFL)
            os.setsid()
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            if self.tty:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.closerange(3, 64)
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1 << 20))
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
            os.chdir(spec["cwd"])
            argv = spec["argv"]
            os.execvpe(argv[0], argv, spec["env"])
        except OSError as error:
            name = os.fsdecode(error.filename or spec["argv"][0])
            os.write(2, f"kvm-lab: {name}: {error.strerror}\n".encode())
            os._exit(127 if error.errno == errno.ENOENT else 126)
        except BaseException as error:
            os.write(2, f"kvm-lab: cannot start the command: {error!r}\n".encode())
        os._exit(126)

    def loop(self) -> None:
        """Pass streams and signals until the command has ended and what it wrote is on its way."""
        while self.status is None:
            watched = {
                self.port: select.POLLIN | (select.POLLOUT if self.out else 0),
                self.wakeup: select.POLLIN,
            }
            if self.queued < _HIGH_WATER:
                watched |= dict.fromkeys(self.sources, select.POLLIN)
            if self.stdin_fd >= 0 and (self.stdin or self.stdin_ends):
                watched[self.stdin_fd] = watched.get(self.stdin_fd, 0) | select.POLLOUT
            poller = select.poll()
            for fd, events in watched.items():
                poller.register(fd, events)
            ready = dict(poller.poll())
            if self.wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wakeup, 4096)
                self.reap()
            if ready.get(self.port, 0) & select.POLLIN:
                for kind, payload in self.receive():
                    self.told(kind, payload)
            for fd in [fd for fd in ready if fd in self.sources]:
                self.pump(fd)
            if self.stdin_fd in ready:
                self.feed()
            self.flush()
        for fd in list(self.sources):
            while fd in self.sources and self.pump(fd):
                self.flush(wait=True)
        self.flush(wait=True)

    def told(self, kind: int, payload: bytes) -> None:
        """Do what the host says."""
        if kind == frames.STDIN:
            if payload:
                self.stdin.append(payload)
            else:
                self.stdin_ends = True
        elif kind == frames.SIGNAL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, int(json.loads(payload)))
        elif kind == frames.SIZE and self.tty:
            for fd in self.sources:
                set_size(fd, json.loads(payload))

    def pump(self, fd: int) -> bool:
        """Take one piece of the command's output; False when there is none now."""
        try:
            data = os.read(fd, frames.CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""  # a terminal that nobody has open any more
        if data:
            self.send(self.sources[fd], data)
            return True
        del self.sources[fd]
        os.close(fd)
        return False

    def feed(self) -> None:
        """Give the command what its standard input takes."""
        try:
            if self.stdin:
                data = self.stdin.popleft()
                count = os.write(self.stdin_fd, data)
                if count < len(data):
                    self.stdin.appendleft(data[count:])
                elif not self.stdin:
                    self.send(frames.WANT)
        except BlockingIOError:
            self.stdin.appendleft(data)
        except OSError:
            self.stdin.clear()
            self.stdin_ends = True
        if self.stdin_ends and not self.stdin:
            os.close(self.stdin_fd)
            self.stdin_fd = -1

    def reap(self) -> None:
        """Take in every child that has ended: the command, and orphans that fell to PID 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    # ---- files to bring back ----

    def bring(self, wanted: list[str], cwd: str) -> None:
        """Send files and directories as one tar stream, members named 0/..., 1/... in the order of *wanted*."""
        import tarfile

        wrong = []
        with tarfile.open(fileobj=_Stream(self), mode="w|") as archive:  # type: ignore[call-overload]
            for index, path in enumerate(wanted):
                try:
                    archive.add(os.path.join(cwd, path), str(index))
                except OSError as error:
                    wrong.append(f"{path}: {error.strerror}")
        self.send_json(frames.DONE, wrong)
        self.flush(wait=True)


class _Stream:
    """What tarfile writes to."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def write(self, data: bytes) -> int:
        for start in range(0, len(data), frames.CHUNK):
            self.lab.send(frames.ARCHIVE, data[start : start + frames.CHUNK])
            self.lab.flush(wait=True)
        return len(data)


def set_size(fd: int, size: list[int]) -> None:
    """Tell a terminal its size: rows, columns."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))


def listen(lab: Lab) -> dict[str, Any]:
    """Hear what shall run, and take in the frozen files."""
    spec: dict[str, Any] | None = None
    tar = -1
    while True:
        for kind, payload in lab.receive(wait=True):
            if kind == frames.SPEC:
                spec = dict(json.loads(payload))
                if not spec["frozen"]:
                    return spec
                os.mkdir(FROZEN)
                reader, tar = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.dup2(reader, 0)
                    os.close(tar)
                    os.execv(BUSYBOX, ["busybox", "tar", "-x", "-f", "-", "-C", FROZEN])
                os.close(reader)
            elif kind == frames.FROZEN and payload:
                while payload:
                    payload = payload[os.write(tar, payload) :]
            elif kind == frames.FROZEN and spec is not None:
                os.close(tar)
                os.waitpid(pid, 0)
                return spec


def main() -> None:
    """Everything, in order; does not return."""
    lab = Lab(open_port())
    lab.send(frames.HELLO)
    lab.flush(wait=True)
    spec = listen(lab)
    wrong = prepare(spec)
    if wrong:
        lab.send(frames.FAILED, wrong.encode())
        lab.flush(wait=True)
    else:
        lab.start(spec)
        lab.loop()
        lab.send_json(frames.EXIT, {"code": lab.status})
        lab.bring(spec["get"], spec["cwd"])
    while True:  # the host ends this machine
        time.sleep(60)


if __name__ == "__main__":
    main()
