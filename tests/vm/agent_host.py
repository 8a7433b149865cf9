"""The agent as an ordinary process on this machine, with a busybox tree for its containers."""

from __future__ import annotations

import _socket
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from agent_support import Container, Peer, mount, namespaces
from waiting import PATIENCE

from kata import paths
from kata.proto import oci_pb as oci
from kata.ttrpc.sync_client import Client

BUSYBOX = Path("/usr/bin/busybox")


class HostAgent:
    """As a context: started at its beginning, ended and checked at its end.

    Args:
        directory: For its socket and the tree.
        arguments: Further ones of its command line.

    Attributes:
        path: Its socket.
        tree: A root file system.
        complaints: Whether it may have logged something.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=directory, prefix="h"))
        self.path = self.directory / "agent.sock"
        self.tree = self.directory / "tree"
        for name in ("bin", "dev", "proc", "tmp"):
            (self.tree / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.tree / "bin/busybox")
        for name in ("sh", "cat", "echo", "sleep", "ls", "dd", "true", "ps"):
            (self.tree / "bin" / name).symlink_to("busybox")
        command = [paths.agent_binary(), "--server", f"unix://{self.path}", "--log", "error", *arguments]
        self.complaints = False
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def __enter__(self) -> HostAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode(errors="replace")
        self.process.stderr.close()
        shutil.rmtree(self.directory)
        if error is None:
            assert status == 0
            assert not said or self.complaints, said

    def connect(self, path: Path | None = None) -> Peer:
        """A new connection, waited for."""
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
            try:
                sock.connect(str(path or self.path))
            except OSError:
                sock.close()
                assert time.monotonic() < deadline, f"nobody listens on {path or self.path}"
                assert self.process.poll() is None, "the agent has ended"
                time.sleep(0.02)
            else:
                return Peer(Client(sock))

    def container(self, name: str, *argv: str) -> Container:
        """A container of the tree."""
        config = oci.Spec(
            Version="1.0.2",
            Process=oci.Process(Args=list(argv), Env=["PATH=/bin"], Cwd="/", User=oci.User()),
            Root=oci.Root(Path=str(self.tree)),
            Mounts=[mount("/proc", "proc", "proc"), mount("/dev", "tmpfs", "tmpfs", "mode=755")],
            Linux=oci.Linux(Namespaces=namespaces("pid", "mount", "ipc", "uts")),
        )
        return Container(self.connect(), name, config=config, disks=[])
