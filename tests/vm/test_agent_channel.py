"""How the agent is reached: a port whose other end goes and comes, hostile frames, an ordinary process on a host."""

from __future__ import annotations

import _socket
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_support import MIB, Background, Container, Peer, error, mount, namespaces
from waiting import PATIENCE

from kata import paths
from kata.guest import manifest
from kata.hypervisor.qemu import slots
from kata.proto import agent_pb as agent
from kata.proto import oci_pb as oci
from kata.proto.google_pb import Empty
from kata.ttrpc.status import INVALID_ARGUMENT, UNIMPLEMENTED, TtrpcError
from kata.ttrpc.sync_client import Client

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

BUSYBOX = Path("/usr/bin/busybox")


def connect(path: Path) -> Peer:
    """A new connection, waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            assert time.monotonic() < deadline, f"nobody listens on {path}"
            time.sleep(0.02)
        else:
            return Peer(Client(sock))


def raw(path: Path) -> socket.socket:
    """A connection without a client."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- a process on a host ----


@pytest.fixture
def host(run_directory: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The agent as an ordinary process: its socket and itself."""
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="h"))
    path = directory / "agent.sock"
    process = subprocess.Popen(
        [paths.agent_binary(), "--server", f"unix://{path}", "--log", "error"], stderr=subprocess.PIPE
    )
    yield path, process
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert process.stderr is not None
    process.stderr.close()
    assert not path.exists()
    shutil.rmtree(directory)


@pytest.fixture
def tree(run_directory: Path) -> Iterator[Path]:
    """A root file system with busybox."""
    root = Path(tempfile.mkdtemp(dir=run_directory, prefix="root"))
    for name in ("bin", "proc", "dev", "tmp"):
        (root / name).mkdir()
    root.chmod(0o755)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "cat", "sleep", "id", "echo"):
        (root / "bin" / name).symlink_to("busybox")
    yield root
    shutil.rmtree(root)


def host_spec(root: Path, *argv: str) -> oci.Spec:
    """What an agent without control groups can do."""
    return oci.Spec(
        Version="1.0.2",
        Process=oci.Process(Args=list(argv), Env=["PATH=/bin"], Cwd="/", User=oci.User(UID=7, GID=8)),
        Root=oci.Root(Path=str(root)),
        Mounts=[mount("/proc", "proc", "proc"), mount("/dev", "tmpfs", "tmpfs")],
        Linux=oci.Linux(Namespaces=namespaces("pid", "mount", "ipc", "uts")),
    )


def mounts_of_an_agent(tree: Path) -> set[str]:
    """The mounts of this namespace where an agent makes some; tests that run beside make others elsewhere."""
    places = ("/run/kata", "/proc", "/dev", "/sys", "/etc")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if str(tree) in line or line.split()[4].startswith(places)}


def test_containers_on_a_host_leave_it_alone(host: tuple[Path, subprocess.Popen[bytes]], tree: Path) -> None:
    mounts = mounts_of_an_agent(tree)
    name = socket.gethostname()
    peer = connect(host[0])
    peer.tell(
        "CreateSandbox", agent.CreateSandboxRequest(hostname="elsewhere", dns=["nameserver 192.0.2.1"])
    )
    box = Container(peer, "one", config=host_spec(tree, "sh", "-c", "id -u; echo $$; cat"), disks=[])
    reading = Background(box.read)
    piece = os.urandom(MIB)
    for _ in range(8):
        assert box.write(piece) == MIB
    box.close_stdin()
    assert reading.result() == b"7\n1\n" + 8 * piece
    assert box.wait() == 0
    box.remove()
    # One that still runs ends with the agent.
    Container(peer, "two", config=host_spec(tree, "sleep", "1000"), disks=[])
    assert mounts_of_an_agent(tree) == mounts
    assert socket.gethostname() == name


def test_the_end_of_the_sandbox_is_the_end_of_the_process(run_directory: Path) -> None:
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="h"))
    path = directory / "s"
    process = subprocess.Popen([paths.agent_binary(), f"--server=unix://{path}", "--log=error"])
    connect(path).tell("DestroySandbox", agent.DestroySandboxRequest())
    assert process.wait(PATIENCE) == 0
    assert list(directory.iterdir()) == []


def test_the_command_line_is_checked() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [paths.agent_binary(), *arguments], check=False, capture_output=True, text=True
        )

    assert run("--version").stdout.startswith("kata-agent ")
    wrong = run("--server", "tcp://1")
    assert wrong.returncode == 1
    assert "tcp://1" in wrong.stderr
    assert "usage" in run().stderr


# ---- frames ----


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">IIBB", (4 << 20) + 1, 1, 1, 0),
        struct.pack(">IIBB", 0, 1, 9, 0),
        struct.pack(">IIBB", 10, 1, 1, 0) + b"\xff" * 10,
        struct.pack(">IIBB", 4, 1, 1, 0) + b"\x0a\xff\xff\x7f",
        struct.pack(">IIBB", 0, 2, 1, 0),
        struct.pack(">IIBB", 0, 1, 3, 4),
        struct.pack(">IIBB", 100, 1, 1, 0) + b"half",
        os.urandom(4096),
    ],
)
def test_junk_hurts_nobody_else(host: tuple[Path, subprocess.Popen[bytes]], junk: bytes) -> None:
    peer = connect(host[0])
    peer.health()
    with raw(host[0]) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(junk)
        peer.health()
    peer.health()
    assert host[1].poll() is None


def test_wrong_calls_are_told_apart(host: tuple[Path, subprocess.Popen[bytes]]) -> None:
    client = connect(host[0]).client
    empty = agent.GetOOMEventRequest()
    assert error(client.call, "no.Such", "Method", empty, Empty)[0] == UNIMPLEMENTED
    assert error(client.call, "grpc.AgentService", "NoMethod", empty, Empty)[0] == UNIMPLEMENTED
    assert "NoMethod" in error(client.call, "grpc.AgentService", "NoMethod", empty, Empty)[1]
    wrong = agent.ReadStreamRequest(container_id="x")
    assert error(client.call, "grpc.AgentService", "ReadStdout", wrong, Empty)[0] == INVALID_ARGUMENT


def test_one_who_does_not_read_stops_only_himself(
    host: tuple[Path, subprocess.Popen[bytes]], tree: Path
) -> None:
    peer = connect(host[0])
    box = Container(peer, "loud", config=host_spec(tree, "cat", "/dev/zero"), disks=[])
    with raw(host[0]) as sock:
        request = agent.ReadStreamRequest(container_id="loud", len=MIB).encode()
        method = b"\x0a\x11grpc.AgentService\x12\x0aReadStdout\x1a" + bytes([len(request)]) + request
        # In one piece: each of its own would fill the socket's buffer, which counts more than bytes, and once the
        # answers have piled up nobody reads any more.
        sock.sendall(
            b"".join(struct.pack(">IIBB", len(method), stream, 1, 0) + method for stream in range(1, 401, 2))
        )
        # The answers would be up to 200 MiB; the agent keeps about one, and answers others meanwhile.
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            peer.health()
        status = Path(f"/proc/{host[1].pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])
        assert resident < 8 << 10
    assert len(box.read_some()) > 0
    box.remove()


# ---- a port ----


@pytest.fixture
def port(run_directory: Path, guest_assets: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A machine whose agent port is a socket that can be connected to again and again."""
    guest = manifest.load(str(guest_assets))
    directory = Path(tempfile.mkdtemp(dir=run_directory, prefix="p"))
    path = directory / "port"
    arguments = (
        "-M q35 -nodefaults -no-user-config -display none -no-reboot -bios qboot.rom -m 256 -accel tcg"
    )
    process = subprocess.Popen(
        [
            "qemu-system-x86_64",
            *arguments.split(),
            *("-cpu", "max,-erms", "-kernel", guest.kernel, "-initrd", guest.initrd),
            *("-append", "quiet panic=-1 agent.log=error agent.channel=serial"),
            *("-device", f"virtio-serial-pci,addr={slots.SERIAL}"),
            *("-chardev", f"socket,id=agent,path={path},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=agent,name={slots.AGENT_CHANNEL}"),
        ]
    )
    yield path, process
    process.kill()
    process.wait(PATIENCE)
    shutil.rmtree(directory)


def test_a_port_survives_its_other_end(port: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, machine = port
    peer = connect(path)
    peer.health()
    for half in (0, 5, 10, 200):
        peer.client.close()
        with raw(path) as sock:
            sock.sendall((struct.pack(">IIBB", 1000, 1, 1, 0) + bytes(200))[:half])
        # Nobody is there: the agent must sleep, not spin on the hang-up.
        before = cpu_seconds(machine.pid)
        time.sleep(1)
        assert cpu_seconds(machine.pid) - before < 0.5
        peer = connect(path)
        peer.health()
    peer.client.close()
    with raw(path) as sock:
        sock.sendall(os.urandom(3000) + b"\xff" * 30)
        time.sleep(0.2)
    peer = connect(path)
    deadline = time.monotonic() + PATIENCE
    while True:
        # Random bytes may look like the head of a frame; what follows is then its payload.
        with contextlib.suppress(TtrpcError):
            peer.health(timeout=2)
            break
        assert time.monotonic() < deadline
    peer.tell("DestroySandbox", agent.DestroySandboxRequest())
    assert machine.wait(PATIENCE) == 0
