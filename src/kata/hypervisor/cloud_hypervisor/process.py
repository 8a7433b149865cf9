"""Starting Cloud Hypervisor, and saying in words why it ended. Usable before asyncio is imported."""

from __future__ import annotations

import os

from kata import acl, sysio
from kata.errors import HypervisorError
from kata.hypervisor import rust_vmm
from kata.hypervisor.access import disk_files
from kata.hypervisor.cloud_hypervisor import command, slots
from kata.hypervisor.process import Launch, open_disks, open_files
from kata.hypervisor.rust_vmm import API_SOCKET, MonitorUser, RustVmmProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kata import children
    from kata.errors import KataError
    from kata.hypervisor.access import File
    from kata.hypervisor.base import Attachments, MachineShape
    from kata.journal import Journal


class CloudHypervisorProcess(RustVmmProcess):
    """A Cloud Hypervisor that was started. Its channels are ``api``, ``events`` and ``console``."""

    __slots__ = ("attachments", "late")

    def __init__(
        self,
        child: children.Child,
        launch: Launch,
        shape: MachineShape,
        attachments: Attachments,
        own: MonitorUser,
    ) -> None:
        super().__init__(
            child,
            launch,
            shape,
            own,
            disk_addresses=[slots.path(slots.DISKS[index]) for index in range(len(shape.disks))],
            nic_addresses=[slots.path(slots.NICS[index]) for index in range(len(attachments.nics))],
            share_tag=slots.SHARE_TAG if attachments.share_server is not None else "",
        )
        self.attachments = attachments
        self.late: Sequence[tuple[str, dict[str, object]]] = ()
        """Requests that plug in what a machine that goes on did not have when it was saved."""

    def explain(self, status: int) -> KataError:
        """See `explain`."""
        return explain(status, self.stderr_text(), self.shape)


def spawn(
    program: str, shape: MachineShape, initrd: str, attachments: Attachments, journal: Journal, root: str
) -> CloudHypervisorProcess:
    """Start it. The machine is booting when this returns.

    Args:
        program: Its path.
        shape: The machine.
        initrd: Path of its whole initial ramdisk.
        attachments: What it is connected to; its descriptors stay the caller's.
        journal: The sandbox's.
        root: Directory that becomes its root once its machine is built; empty leaves it the caller's.

    Raises:
        HostError: The path of its vsock would be too long.
        GuestAssetError: The kernel or initrd is missing.
        HypervisorError: A disk image is missing, or the process could not be started.
    """
    return _start(
        program,
        shape,
        attachments,
        journal,
        root,
        [lambda: open_files(shape.kernel, initrd, attachments.disks)],
        lambda own, fds: command.build(program, shape, attachments, own.seen, fds),
    )


def restore(
    program: str, shape: MachineShape, directory: str, attachments: Attachments, journal: Journal, root: str
) -> CloudHypervisorProcess:
    """Start it with a machine that was saved, which goes on where it was.

    Args:
        program: Its path.
        shape: The machine that was saved.
        directory: What it was saved into.
        attachments: See `spawn`.
        journal: See there.
        root: See there.

    Raises:
        HostError: The path of its vsock would be too long.
        HypervisorError: What was saved cannot be used, or the process could not be started.
    """
    from kata.hypervisor import saved as saved_machines
    from kata.hypervisor.cloud_hypervisor import saved

    late: list[tuple[str, dict[str, object]]] = []

    def arguments(own: MonitorUser, fds: Mapping[str, int]) -> list[str]:
        option, plugged = saved.prepare(directory, shape, attachments, own, fds)
        late.extend(plugged)
        return [program, *command.channels(fds), "--restore", option]

    started = _start(
        program,
        shape,
        attachments,
        journal,
        root,
        [lambda: open_disks(attachments.disks), lambda: saved_machines.open_files(directory, saved.LARGE)],
        arguments,
        saved_machines.files(directory, saved.LARGE),
    )
    started.late = late
    return started


def _start(
    program: str,
    shape: MachineShape,
    attachments: Attachments,
    journal: Journal,
    root: str,
    openers: Sequence[Callable[[], dict[str, int]]],
    arguments: Callable[[MonitorUser, Mapping[str, int]], list[str]],
    more: Sequence[File] = (),
) -> CloudHypervisorProcess:
    """Start it.

    Args:
        program: See `spawn`.
        shape: See there.
        attachments: See there.
        journal: See there.
        root: See there.
        openers: Open the files that it inherits.
        arguments: The argument vector, for as whom it runs and what it inherits.
        more: Those of the files that are no disks and others'.
    """
    with Launch("Cloud Hypervisor", journal) as launch:
        theirs = launch.theirs
        for opens in openers:
            theirs |= opens()
        files = [*disk_files(attachments.disks), *more]
        with MonitorUser(program, attachments, files, theirs, journal, root) as own:
            theirs["api"], launch.ours["api"] = _api_socket(attachments.run_dir, journal)
            launch.channel("events")
            if shape.console != "none":
                launch.channel("console")
                launch.stdout = theirs["console"]
            if attachments.share_server is not None:
                attachments.share_server.move(own.directory, own.access.user)
            argv = arguments(own, theirs)
            launch.socket(own.vsock_path)
            taps = [nic.tap_fd.raw for nic in attachments.nics if nic.tap_fd is not None]
            written = [file.name for file in files if file.rights & acl.WRITE]
            confined = own.confinement(
                [fd for key, fd in theirs.items() if key not in written],
                [theirs[key] for key in written],
                ["/dev/kvm", *attachments.host_nodes],
            )
            confined.locks_memory = bool(attachments.host_nodes)
            child = launch.spawn(
                argv,
                "cloud-hypervisor",
                pass_fds=[*(fd for key, fd in theirs.items() if key != "console"), *taps],
                capabilities=(),
                confinement=confined,
            )
            return CloudHypervisorProcess(child, launch, shape, attachments, own)


def _api_socket(run_dir: str, journal: Journal) -> tuple[int, int]:
    """A socket that listens and a connection to it, and no name by which anybody else could connect.

    Returns:
        The listening socket, and the connection.
    """
    import _socket

    path = os.path.join(run_dir, API_SOCKET)
    entry = journal.begin("socket", path=path)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    try:
        with sysio.SocketName(path) as name:
            listener.bind(name)
            listener.listen(1)
            client.connect(name)
        os.unlink(path)
    except OSError as error:
        listener.close()
        client.close()
        raise HypervisorError(f"cannot make the socket of the monitor's API: {error.strerror}") from error
    finally:
        journal.mark_gone(entry)
    return listener.detach(), client.detach()


_CHAIN = "chain of errors:"


def _reason(said: str) -> str:
    """What it died of: the sentences behind its last word, from the outermost error to the cause; else the last error
    in its log, else the last line.

    Without this the last line would be "No such file or directory (os error 2)", and the log's words are Rust's.
    """
    _, found, chain = said.rpartition(_CHAIN)
    if found:
        sentences = [line.partition(": ")[2].strip() for line in chain.splitlines() if line.startswith("  ")]
        reason = ": ".join(dict.fromkeys(filter(None, sentences)))
        if reason:
            return reason
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return errors[-1] if errors else ""


def explain(status: int, said: str, shape: MachineShape) -> KataError:
    """The error for one that ended with this exit status and this end of its standard error (already escaped)."""
    return rust_vmm.explain(
        "Cloud Hypervisor",
        status,
        _reason(said),
        shape,
        memory=("cannot allocate memory", "code: 12"),
        kernel=("load the kernel", "kernel loader", "kernel file"),
        initrd=("initramfs",),
    )
