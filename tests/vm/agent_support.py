"""The agent in a virtual machine of its own, spoken to without an engine: containers as the protocol sees them."""

from __future__ import annotations

import _socket
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from waiting import PATIENCE

from kata import journal_undo
from kata.guest import manifest
from kata.hypervisor import accel
from kata.hypervisor.base import Disk
from kata.hypervisor.qemu import process as qemu_process
from kata.hypervisor.qemu import slots
from kata.hypervisor.qemu.settings import VMSettings
from kata.images.resolve import resolve
from kata.journal import Journal
from kata.oci import capabilities
from kata.proto import agent_pb as agent
from kata.proto import health_pb as health
from kata.proto import oci_pb as oci
from kata.proto.codec import Message
from kata.proto.google_pb import Empty
from kata.ttrpc.status import TtrpcError
from kata.ttrpc.sync_client import Client

CAPABILITIES = list(capabilities.DEFAULT)
PRIVILEGED = [*CAPABILITIES, "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE"]
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
STATE = "/run/kata-containers"
KIB, MIB = 1 << 10, 1 << 20

R = TypeVar("R", bound=Message)


def caps(names: list[str]) -> oci.LinuxCapabilities:
    """The same set in all three places that count for root."""
    return oci.LinuxCapabilities(Bounding=names, Effective=names, Permitted=names)


def mount(destination: str, kind: str, source: str, *options: str) -> oci.Mount:
    """A mount of the spec."""
    return oci.Mount(destination=destination, type=kind, source=source, options=list(options))


def namespaces(*kinds: str) -> list[oci.LinuxNamespace]:
    """New namespaces of these types."""
    return [oci.LinuxNamespace(Type=kind) for kind in kinds]


def process(*argv: str, **fields: Any) -> oci.Process:
    """A process with Docker's capabilities, unless `fields` say otherwise."""
    values: dict[str, Any] = {
        "Args": list(argv),
        "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "Cwd": "/",
        "User": oci.User(),
        "Capabilities": caps(CAPABILITIES),
        **fields,
    }
    return oci.Process(**values)


def spec(
    name: str,
    *argv: str,
    linux: dict[str, Any] | None = None,
    mounts: list[oci.Mount] | None = None,
    readonly: bool = False,
    hooks: oci.Hooks | None = None,
    hostname: str = "box",
    annotations: dict[str, str] | None = None,
    **fields: Any,
) -> oci.Spec:
    """A spec with the usual mounts; `linux` goes over the usual section, `fields` over the process."""
    section: dict[str, Any] = {
        "Namespaces": namespaces("pid", "mount", "ipc", "uts", "cgroup"),
        "MaskedPaths": MASKED,
        "ReadonlyPaths": READONLY,
        **(linux or {}),
    }
    kernel = ("nosuid", "noexec", "nodev")
    usual = [
        mount("/proc", "proc", "proc", *kernel),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64m"),
        mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "gid=5"),
        mount("/sys", "sysfs", "sysfs", *kernel, "ro"),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", *kernel, "ro"),
        mount("/dev/shm", "tmpfs", "shm", *kernel, "mode=1777"),
    ]
    return oci.Spec(
        Version="1.0.2",
        Process=process(*argv, **fields),
        Root=oci.Root(Path=f"{STATE}/{name}/rootfs", Readonly=readonly),
        Hostname=hostname,
        Mounts=[*usual, *(mounts or [])],
        Hooks=hooks,
        Annotations=annotations or {},
        Linux=oci.Linux(**section),
    )


def storages(name: str, address: str = slots.disk_path(0)) -> list[agent.Storage]:
    """The image on the disk at this address, a tmpfs to write to, and the overlay of both."""
    base = f"{STATE}/{name}"
    create = "io.katacontainers.volume.overlayfs.create_directory="
    return [
        agent.Storage(
            driver="blk",
            source=address,
            fstype="erofs",
            options=["ro"],
            mount_point=f"{base}/lower",
        ),
        agent.Storage(
            driver="ephemeral",
            source="tmpfs",
            fstype="tmpfs",
            options=["size=64m"],
            mount_point=f"{base}/upper",
        ),
        agent.Storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            driver_options=[f"{create}{base}/upper/data", f"{create}{base}/upper/work"],
            options=[f"lowerdir={base}/lower", f"upperdir={base}/upper/data", f"workdir={base}/upper/work"],
            mount_point=f"{base}/rootfs",
        ),
    ]


class Peer:
    """Somebody who speaks the agent's protocol."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def ask(self, method: str, request: Message, response: type[R], timeout: float = PATIENCE) -> R:
        """One call of the agent service with an answer."""
        return self.client.call("grpc.AgentService", method, request, response, timeout=timeout)

    def tell(self, method: str, request: Message, timeout: float = PATIENCE) -> None:
        """One call of the agent service without."""
        self.ask(method, request, Empty, timeout)

    def health(self, timeout: float = PATIENCE) -> None:
        """The agent answers."""
        done = self.client.call(
            "grpc.Health", "Check", health.CheckRequest(), health.HealthCheckResponse, timeout=timeout
        )
        assert done.status == 1


class Guest(Peer):
    """A virtual machine with nothing but the agent in it, and the image on its first disk.

    Args:
        base: Where its directory is made.
        guest_dir: The built guest.
        image: What is on the first disk.
        cmdline: More words for the kernel's command line.
        vcpus: Number of processors.
        disks: Further disks.
        initrd: Another one than the guest's own.
        more: Further settings of the machine.
    """

    def __init__(
        self,
        base: Path,
        guest_dir: Path,
        image: str,
        cmdline: str = "",
        vcpus: int = 1,
        disks: Sequence[Disk] = (),
        initrd: str = "",
        **more: Any,
    ) -> None:
        guest = manifest.load(str(guest_dir))
        self._journal = Journal.create_dir(tempfile.mkdtemp(dir=base, prefix="a"), "vm", {"test": "agent"})
        self.settings = VMSettings(
            name="kata-test",
            run_dir=os.path.dirname(self._journal.path),
            kernel=guest.kernel,
            initrd=initrd or guest.initrd,
            cmdline=f"quiet panic=-1 agent.channel=serial {cmdline}",
            accel=accel.choose().accel,
            vcpus=vcpus,
            memory_mib=256,
            disks=[Disk(resolve(image).rootfs_path, readonly=True), *disks],
            **more,
        )
        self.qemu = qemu_process.spawn(self.settings, self._journal)
        self._console_fd = self.qemu.detach_fd("console")
        os.set_blocking(self._console_fd, False)
        self.console = bytearray()
        super().__init__(Client(_socket.socket(fileno=self.qemu.detach_fd("agent"))))

    def read_console(self) -> str:
        """Everything that kernel and agent have said so far."""
        while True:
            try:
                data = os.read(self._console_fd, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            self.console += data
        return self.console.decode(errors="replace")

    def health(self, timeout: float = PATIENCE) -> None:
        """The agent answers; else what the machine has said is in the error."""
        try:
            super().health(timeout)
        except TtrpcError as error:
            error.add_note(
                f"the machine (status {self.qemu.child.poll()}) has said: {self.read_console()[-3000:]}"
            )
            raise

    def wait_end(self) -> int:
        """Wait for the end of the machine; QEMU's exit status."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.qemu.child.poll()) is None:
            assert time.monotonic() < deadline, "the machine does not end"
            self.read_console()
            time.sleep(0.02)
        return status

    def close(self) -> None:
        """End the machine, however it is."""
        self.client.close()
        self.read_console()
        os.close(self._console_fd)
        assert journal_undo.undo(self._journal, PATIENCE) == []
        assert self.qemu.child.wait(PATIENCE) is not None
        self.qemu.close()


class Container:
    """A container in a guest; created, and started unless told otherwise."""

    def __init__(
        self,
        peer: Peer,
        name: str,
        *argv: str,
        start: bool = True,
        string_user: agent.StringUser | None = None,
        disks: list[agent.Storage] | None = None,
        more_disks: Sequence[agent.Storage] = (),
        config: oci.Spec | None = None,
        devices: list[agent.Device] | None = None,
        shared: list[agent.SharedMount] | None = None,
        **fields: Any,
    ) -> None:
        self.peer = peer
        self.name = name
        peer.tell(
            "CreateContainer",
            agent.CreateContainerRequest(
                container_id=name,
                storages=[*(storages(name) if disks is None else disks), *more_disks],
                OCI=config or spec(name, *argv, **fields),
                string_user=string_user,
                devices=devices or [],
                shared_mounts=shared or [],
            ),
        )
        if start:
            self.start()

    def start(self) -> None:
        """Let the prepared process go."""
        self.peer.tell("StartContainer", agent.StartContainerRequest(container_id=self.name))

    def exec(
        self, exec_id: str, *argv: str, string_user: agent.StringUser | None = None, **fields: Any
    ) -> str:
        """Start a further process; its id."""
        self.peer.tell(
            "ExecProcess",
            agent.ExecProcessRequest(
                container_id=self.name,
                exec_id=exec_id,
                process=process(*argv, **fields),
                string_user=string_user,
            ),
        )
        return exec_id

    def read_some(self, exec_id: str = "", *, errors: bool = False) -> bytes:
        """What is there, waited for; nothing is the end."""
        return self.peer.ask(
            "ReadStderr" if errors else "ReadStdout",
            agent.ReadStreamRequest(container_id=self.name, exec_id=exec_id, len=MIB),
            agent.ReadStreamResponse,
        ).data

    def read(self, exec_id: str = "", *, errors: bool = False) -> bytes:
        """An output to its end."""
        found = bytearray()
        while data := self.read_some(exec_id, errors=errors):
            found += data
        return bytes(found)

    def wait(self, exec_id: str = "", timeout: float = PATIENCE) -> int:
        """Exit code of a process, waited for."""
        request = agent.WaitProcessRequest(container_id=self.name, exec_id=exec_id)
        return self.peer.ask("WaitProcess", request, agent.WaitProcessResponse, timeout).status

    def run(self, exec_id: str, *argv: str, **fields: Any) -> tuple[int, str, str]:
        """A further process to its end: exit code, standard output, standard error."""
        self.exec(exec_id, *argv, **fields)
        output, errors = self.read(exec_id), self.read(exec_id, errors=True)
        return self.wait(exec_id), output.decode(), errors.decode()

    def sh(self, exec_id: str, script: str, **fields: Any) -> tuple[int, str, str]:
        """`run` of a shell."""
        return self.run(exec_id, "sh", "-c", script, **fields)

    def write(self, data: bytes, exec_id: str = "") -> int:
        """Standard input, until all of it is in the pipe."""
        request = agent.WriteStreamRequest(container_id=self.name, exec_id=exec_id, data=data)
        return self.peer.ask("WriteStdin", request, agent.WriteStreamResponse).len

    def close_stdin(self, exec_id: str = "") -> None:
        """End of standard input."""
        self.peer.tell("CloseStdin", agent.CloseStdinRequest(container_id=self.name, exec_id=exec_id))

    def kill(self, signal: int, exec_id: str = "") -> None:
        """A signal."""
        self.peer.tell(
            "SignalProcess",
            agent.SignalProcessRequest(container_id=self.name, exec_id=exec_id, signal=signal),
        )

    def remove(self) -> None:
        """Take the container down, whatever it does."""
        self.peer.tell("RemoveContainer", agent.RemoveContainerRequest(container_id=self.name))


def error(call: Callable[..., object], *arguments: Any, **fields: Any) -> tuple[int, str]:
    """Code and message of a call that has to fail."""
    try:
        call(*arguments, **fields)
    except TtrpcError as failed:
        return failed.code, failed.message
    raise AssertionError("the call has not failed")


class Background:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **fields: Any) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(call, arguments, fields))
        self._thread.start()

    def _run(self, call: Callable[..., Any], arguments: tuple[Any, ...], fields: dict[str, Any]) -> None:
        try:
            self._result.append(call(*arguments, **fields))
        except Exception as failed:
            self._result.append(failed)

    def result(self) -> Any:
        """What the call has returned; what it has raised is raised here."""
        self._thread.join(PATIENCE)
        assert self._result, "the call was never answered"
        if isinstance(self._result[0], Exception):
            raise self._result[0]
        return self._result[0]
