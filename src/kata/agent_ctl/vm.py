"""A temporary virtual machine that runs nothing but an agent (``--vm``)."""

from __future__ import annotations

import os
import socket
import sys
import threading

from kata import journal_undo, paths
from kata.agent.client import Encoded
from kata.agent.text import last_lines
from kata.agent_ctl import address
from kata.agent_ctl.links import Link, SocketLink, healthy, lost_error
from kata.config.files import canonical
from kata.engine.lifecycle.boot import KERNEL_PARAMETERS
from kata.errors import HostError, HypervisorError, KataError, VMLostError
from kata.guest import manifest
from kata.hypervisor import accel, registry
from kata.hypervisor.base import Attachments, MachineShape
from kata.hypervisor.channel import Channel, SerialChannel
from kata.journal import Journal
from kata.sysio import Fd
from kata.ttrpc.status import ConnectionLost, TtrpcError
from kata.ttrpc.sync_client import Client

MEMORY_MIB = 256
READY_S = 60.0
_TAIL = 1 << 16


class VMLink(Link):
    """Boots the machine and waits until its agent answers.

    Its directory is among those of sandboxes and has a journal, so that ``kata gc`` removes it if this process is
    killed; the hypervisor ends with this process.

    Args:
        memory_mib: Memory of the machine, in MiB.
        hypervisor: The hypervisor; empty for the default one.

    Raises:
        KataError: It did not boot; the message has the end of its console output.
    """

    def __init__(self, memory_mib: int = MEMORY_MIB, hypervisor: str = "") -> None:
        if os.geteuid() != 0:
            raise HostError("--vm has to run as root: it makes a virtual machine", "run it with sudo")
        guest = manifest.installed()
        choice = accel.choose()
        monitor = registry.find(canonical(hypervisor))
        if choice.accel not in monitor.accelerators:
            raise HostError(f"{monitor.title} needs KVM, which does not work on this host", "kata doctor")
        self.label = f"a temporary virtual machine ({choice.accel})"
        self._tail = bytearray()
        name = f"agent-ctl-{os.getpid()}-{os.urandom(3).hex()}"
        self._journal = Journal.create_dir(
            os.path.join(paths.run_dir(), "sandboxes"), name, {"client": "agent-ctl", "id": name}
        )
        shape = MachineShape(
            kernel=guest.kernel,
            initrd=guest.initrd,
            parameters=" ".join(KERNEL_PARAMETERS),
            accel=choice.accel,
            memory_mib=memory_mib,
        )
        attachments = Attachments(
            sandbox_id=name, run_dir=os.path.dirname(self._journal.path), confines=False
        )
        try:
            self._machine = monitor.start(shape, attachments, self._journal)
        except BaseException:
            journal_undo.undo(self._journal)
            raise
        self._link: Link | None = None
        try:
            self._console = threading.Thread(
                target=self._read_console, args=(self._machine.take_console(),), daemon=True
            )
            self._console.start()
            self._link = self._reach(self._machine.channel)
            healthy(self._link, READY_S)
        except (KataError, TtrpcError) as error:
            raise self._failed(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _reach(self, channel: Channel) -> Link:
        if isinstance(channel, SerialChannel):
            return _PortLink(self.label, channel.take())
        where = address.parse(channel.url)
        return SocketLink(self.label, lambda: address.connect(where, READY_S))

    def _failed(self, words: str) -> KataError:
        ended = self._machine.failure()
        lines = last_lines(bytes(self._tail))
        self.close()
        text = f"the temporary virtual machine did not boot: {ended.message if ended else words}"
        if lines:
            text += "\nits console ends with:\n" + "\n".join(f"  {line}" for line in lines)
        return HypervisorError(text, ended.hint if ended else "kata doctor checks this host")

    def _read_console(self, console: Fd | None) -> None:
        """Read the guest's console: otherwise the machine would stop when its buffer is full."""
        if console is None:
            return
        try:
            while data := os.read(console.raw, 1 << 14):
                self._tail += data
                del self._tail[:-_TAIL]
        except OSError:
            pass
        finally:
            console.close()

    # ---- what a link does ----

    def call(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        """See `Link.call`."""
        assert self._link is not None
        try:
            return self._link.call(service, method, payload, timeout_s)
        except VMLostError as error:
            self._machine.status(2.0)
            raise VMLostError(self.lost() or error.message) from None

    def raw(self) -> socket.socket | None:
        return self._link.raw() if self._link is not None else None

    @property
    def shared(self) -> bool:
        return self._link is not None and self._link.shared

    def lost(self) -> str:
        status = self._machine.status()
        if status is None:
            return ""
        lines = last_lines(bytes(self._tail), 1)
        said = f"; its console ends with: {lines[-1]}" if lines else ""
        return f"the virtual machine has ended (the hypervisor's status is {status}){said}"

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        problems = journal_undo.undo(self._journal, 10.0)  # the machine, then its directory
        self._machine.status(10.0)
        self._console.join(5.0)
        self._machine.close()
        for problem in problems:
            sys.stderr.write(f"warning: {problem}\n")


class _PortLink(Link):
    """A link over a virtio-serial port: a single stream, which stays open after bytes that are not calls.

    Args:
        label: Description of the agent.
        sock: Our end.
    """

    def __init__(self, label: str, sock: socket.socket) -> None:
        self.label = label
        self._sock = sock
        self._client: Client | None = None
        self._clients: list[Client] = []

    def call(self, service: str, method: str, payload: bytes, timeout_s: float | None) -> bytes:
        if self._client is None:
            self._client = Client(self._sock.dup())
            self._clients.append(self._client)
        try:
            return self._client.call(service, method, Encoded(payload), Encoded, timeout_s).payload
        except ConnectionLost as error:
            self._client = None
            raise lost_error(self.label, error) from None

    def raw(self) -> socket.socket:
        # A client treats an answer to a call that it has not made as a protocol violation, so the next call uses a new
        # client. The old one is not closed, since that would close the stream.
        self._client = None
        return self._sock.dup()

    @property
    def shared(self) -> bool:
        return True

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._sock.close()
