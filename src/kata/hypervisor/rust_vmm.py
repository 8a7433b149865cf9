"""What Cloud Hypervisor and Firecracker have in common, which are of rust-vmm's family: a program that has to be found,
a hybrid vsock, an API by HTTP, and disks that are opened by name while the machine runs.

Usable before asyncio is imported.
"""

from __future__ import annotations

import os

from kata import children, confinement, paths
from kata.errors import (
    ConfigError,
    GuestAssetError,
    HostError,
    HypervisorError,
    KataError,
    ResourceExhaustedError,
)
from kata.hypervisor import access
from kata.hypervisor.base import MonitorBase
from kata.hypervisor.process import NO_MEMORY, Launch, MonitorProcess, explained

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from kata.hypervisor.base import Attachments, Check, MachineShape
    from kata.hypervisor.channel import Channel
    from kata.journal import Journal

MONITOR_DIR = "monitor"
"""Name of the directory in the sandbox's that is the monitor's: it makes its sockets there."""
VSOCK_SOCKET = "vsock.sock"
"""Name of the socket that stands for the guest's vsock, in that directory."""
API_SOCKET = "api.sock"
CID = 3
"""Of every guest: the socket that stands for its vsock is that machine's alone, and no device of the host's has it."""


class Program:
    """The program of a monitor, which no package of Debian has.

    Args:
        title: The monitor's name in sentences.
        name: Of the program on the PATH.
        variable: Variable of the environment that names it elsewhere.
        source: Where its releases are.
    """

    __slots__ = ("install", "name", "title", "variable")

    def __init__(self, title: str, name: str, variable: str, source: str) -> None:
        self.title = title
        self.name = name
        self.variable = variable
        self.install = f"Take a release of {source}, and put {name} on the PATH or its path into {variable}."

    def find(self, path: str = "") -> str:
        """Its path: the configured one, the variable's, or the PATH's; empty if there is none."""
        return path or os.environ.get(self.variable, "") or children.find_program(self.name) or ""

    def of(self, shape: MachineShape) -> str:
        """Its path for a machine.

        Raises:
            HostError: It is not there.
        """
        path = self.find(str(dict(shape.options).get("path", "")))
        if not path or not os.path.exists(path):
            raise HostError(f"{self.title} is not installed: there is no {path or self.name}", self.install)
        return path


def file(fd: int) -> str:
    """A descriptor as a file's name."""
    return f"/proc/self/fd/{fd}"


def parameters(shape: MachineShape, *own: str) -> str:
    """The guest's kernel's parameters: the monitor's own, those for its processors, and those of the shape last, so
    that the configuration's prevail."""
    # All processors that it may have are there, and the guest brings up the others when it is told to.
    more = (f"maxcpus={shape.vcpus}",) if shape.max_vcpus > shape.vcpus else ()
    return " ".join(filter(None, (*own, *more, shape.parameters)))


def read_path(configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """The option ``path``; see `kata.hypervisor.protocols.Monitor.options`.

    Raises:
        ConfigError: It does not exist.
    """
    path = configuration.get("path", "")
    if path and not os.path.exists(path):
        raise ConfigError(f"{origin('path')}: path {path} does not exist")
    return {"path": path} if path else {}


class RustVmmMonitor(MonitorBase):
    """A monitor of that family: what is not its machines.

    Attributes:
        PROGRAM: Its program.
        disks: How many disks its machines can have.
    """

    name: str
    accelerators: tuple[str, ...] = ("kvm",)
    PROGRAM: Program
    disks: int

    def program(self, options: Mapping[str, Any]) -> str:
        """See `kata.hypervisor.protocols.Monitor.program`."""
        return self.PROGRAM.find(str(options.get("path", "")))

    def version(self, options: Mapping[str, Any]) -> str:
        """See `kata.hypervisor.protocols.Monitor.version`."""
        program = self.program(options)
        return children.version_of(program) if program else ""

    def checks(self, options: Mapping[str, Any]) -> list[Check]:
        """See `kata.hypervisor.protocols.Monitor.checks`."""
        from kata.hypervisor.base import program_check

        found = self.program(options)
        return [program_check(self.name, found, self.PROGRAM.name, self.PROGRAM.install)]

    def arguments(self, run_dir: str) -> list[tuple[str, str]]:
        """See `kata.hypervisor.protocols.Monitor.arguments`. They are in the process list, and not written down."""
        return []

    def root(self, attachments: Attachments, journal: Journal) -> str:
        """The directory that becomes the monitor's root; empty where it is to keep the caller's."""
        from kata.hypervisor import root

        return root.prepare(attachments.run_dir, journal, disks=self.disks) if attachments.confines else ""

    def initrd(self, shape: MachineShape, attachments: Attachments) -> str:
        """Path of a machine's whole initial ramdisk, once it is known that the host has room for the machine.

        Raises:
            ResourceExhaustedError: Too few huge pages are free.
            GuestAssetError: It cannot be put together.
        """
        if shape.huge_pages:
            from kata.hypervisor import huge_pages

            huge_pages.check(shape.memory_mib)
        if not shape.extensions:
            return shape.initrd
        from kata.hypervisor import initrd

        return initrd.whole(shape, attachments.run_dir)


class RustVmmProcess(MonitorProcess):
    """A monitor of that family that was started.

    Args:
        child: See `MonitorProcess`.
        launch: See there.
        shape: The machine.
        own: As whom it runs.
        disk_addresses: See `MonitorProcess`.
        nic_addresses: See there.
        share_tag: See there.
    """

    __slots__ = ("_channel", "access", "root", "shape", "vsock_path")

    def __init__(
        self,
        child: children.Child,
        launch: Launch,
        shape: MachineShape,
        own: MonitorUser,
        *,
        disk_addresses: Sequence[str],
        nic_addresses: Sequence[str],
        share_tag: str = "",
    ) -> None:
        super().__init__(
            child, launch, disk_addresses=disk_addresses, nic_addresses=nic_addresses, share_tag=share_tag
        )
        self.shape = shape
        self.root = own.root
        self.access = own.access
        self.vsock_path = own.vsock_path
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        """How the agent is reached."""
        from kata.hypervisor.channel import HybridVsockChannel

        if self._channel is None:
            self._channel = HybridVsockChannel(self.vsock_path)
        return self._channel

    def close(self) -> None:
        """See `MonitorProcess.close`."""
        self.access.revoke()
        super().close()


class MonitorUser:
    """As whom a monitor runs, and what that user may open: the same for one that is started and one that is restored.
    Used as a context: when that fails, its user may open nothing any more.

    It has a user of its own where it gets a root directory of its own, and no wrapper nor a file system without access
    control lists is in the way.

    Args:
        program: Path of the monitor.
        attachments: What its machine is connected to.
        files: The files of others that it opens once more by our descriptors: disks, or a machine that was saved.
        opened: Our descriptors by name. ``kernel`` and ``initrd`` may be replaced, by copies that it can open.
        journal: The sandbox's.
        root: The directory that becomes its root once its machine is built; empty leaves it the caller's.

    Attributes:
        access: What it may open for the moment.
        directory: Its directory in the sandbox's.
        seen: The same, as the monitor has it.
        root: See above.
        vsock_path: Path of the socket that stands for the guest's vsock.

    Raises:
        HostError: That path would be too long.
        HypervisorError: Its directory cannot be made.
    """

    __slots__ = ("_program", "access", "directory", "root", "seen", "vsock_path")

    def __init__(
        self,
        program: str,
        attachments: Attachments,
        files: Iterable[access.File],
        opened: dict[str, int],
        journal: Journal,
        root: str,
    ) -> None:
        self._program = program
        self.root = root
        self.vsock_path = vsock_path(attachments.run_dir)
        self.directory = os.path.dirname(self.vsock_path)
        self.access = access.for_monitor(program, files, opened, journal) if root else access.Access(journal)
        user = self.access.user
        try:
            for name in ("kernel", "initrd"):
                if name in opened:
                    opened[name] = confinement.for_user(opened[name], user)
            access.make_directory(self.directory, user)
        except BaseException:
            self.access.revoke()
            raise
        self.seen = confinement.OWN_DIRECTORY if user else self.directory

    def __enter__(self) -> MonitorUser:
        """Returns itself."""
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if kind is not None:
            self.access.revoke()

    def confinement(
        self, readable: Iterable[str | int], writable: Iterable[str | int], devices: Sequence[str]
    ) -> confinement.Confinement:
        """What it is left with, together with no capability and namespaces of its own.

        Args:
            readable: What it reads by name besides its program: paths, and descriptors that it opens once more.
            writable: The same of what it writes.
            devices: Devices that it opens by name.
        """
        return confinement.monitor(
            self._program,
            user=self.access.user,
            readable=[*readable, self.directory],
            writable=[*writable, *([self.root] if self.root else [])],
            devices=devices,
            sockets_in=self.directory,
            any_file=not self.root,
        )


def vsock_path(run_dir: str) -> str:
    """Where a monitor makes the socket that stands for the guest's vsock.

    Raises:
        HostError: It would be too long for a socket.
    """
    path = os.path.join(run_dir, MONITOR_DIR, VSOCK_SOCKET)
    if len(os.fsencode(path)) > paths.MAX_SOCKET_PATH:
        # By a descriptor of the directory it would be short; but who has that can go up from there.
        raise HostError(
            f"the path of the machine's vsock is too long for a socket: {path}",
            "Name a shorter directory with KATA_RUN_DIR.",
        )
    return path


def explain(
    title: str,
    status: int,
    last: str,
    shape: MachineShape,
    *,
    memory: Iterable[str],
    kernel: Iterable[str],
    initrd: Iterable[str],
) -> KataError:
    """The error for a monitor that ended.

    Args:
        title: Its name in sentences.
        status: Its exit status.
        last: The sentence that says why, as it said it; may be empty.
        shape: The machine.
        memory: What it says (lower case) when there is no memory,
        kernel: when it cannot load the guest's kernel,
        initrd: or its initial ramdisk.
    """
    known: list[tuple[str, type[KataError], str, str]] = [
        *((text, ResourceExhaustedError, *NO_MEMORY) for text in memory),
        *(
            (text, GuestAssetError, f"{title} cannot load the guest's kernel {{kernel}}", "kata guest build")
            for text in kernel
        ),
        *(
            (text, GuestAssetError, f"{title} cannot load the initrd {{initrd}}", "kata guest build")
            for text in initrd
        ),
        ("kvm", HypervisorError, f"{title} cannot use KVM", "Run `kata doctor`."),
    ]
    values = {"memory": shape.memory_mib, "kernel": shape.kernel, "initrd": shape.initrd}
    last = last[:300]
    return explained(title, status, last, known if status > 0 else (), last, values)
