"""Starting Cloud Hypervisor, and saying in words why it ended. Usable before asyncio is imported."""

from __future__ import annotations

import os

from kata import children, confinement, paths, sysio
from kata.errors import GuestAssetError, HostError, HypervisorError, KataError, ResourceExhaustedError
from kata.hypervisor.cloud_hypervisor import command, slots
from kata.hypervisor.process import MonitorProcess, available_memory, open_disks, open_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kata.hypervisor.base import Attachments, MachineShape
    from kata.hypervisor.channel import Channel
    from kata.journal import Entry, Journal

PROGRAM = "cloud-hypervisor"
VARIABLE = "KATA_CLOUD_HYPERVISOR"
"""Variable that names the program, where it is not on the PATH."""
INSTALL = (
    f"Take a release of https://github.com/cloud-hypervisor/cloud-hypervisor, and put {PROGRAM} on the PATH or its path"
    f" into {VARIABLE}."
)
_API_SOCKET = "api.sock"


class CloudHypervisorProcess(MonitorProcess):
    """A Cloud Hypervisor that was started. Its channels are ``api``, ``events`` and ``console``."""

    __slots__ = ("_channel", "attachments", "root", "shape", "vsock_path")

    def __init__(
        self,
        child: children.Child,
        shape: MachineShape,
        attachments: Attachments,
        fds: dict[str, int],
        stderr_tail: children.StderrTail,
        entries: list[Entry],
        *,
        vsock_path: str,
        root: str,
    ) -> None:
        super().__init__(
            child,
            fds,
            stderr_tail,
            entries,
            disk_addresses=[slots.path(slots.DISKS[index]) for index in range(len(shape.disks))],
            nic_addresses=[slots.path(slots.NICS[index]) for index in range(len(attachments.nics))],
            share_tag=slots.SHARE_TAG if attachments.share_server is not None else "",
        )
        self.shape = shape
        self.attachments = attachments
        self.vsock_path = vsock_path
        self.root = root
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        """How the agent is reached."""
        from kata.hypervisor.channel import HybridVsockChannel

        if self._channel is None:
            self._channel = HybridVsockChannel(self.vsock_path)
        return self._channel

    def explain(self, status: int) -> KataError:
        """See `explain`."""
        return explain(status, self.stderr_text(), self.shape)


def find(path: str = "") -> str:
    """Absolute path of the program: the configured one, the variable's, or the PATH's; empty if there is none."""
    return path or os.environ.get(VARIABLE, "") or children.find_program(PROGRAM) or ""


def spawn(
    program: str, shape: MachineShape, initrd: str, attachments: Attachments, journal: Journal, root: str
) -> CloudHypervisorProcess:
    """Start it. The machine is booting when this returns.

    Args:
        program: Its absolute path.
        shape: The machine.
        initrd: Path of its whole initial ramdisk.
        attachments: What it is connected to; its descriptors stay the caller's.
        journal: The sandbox's.
        root: Directory that becomes its root once its machine is built; empty leaves it the caller's.

    Raises:
        HostError: The program is missing, or may not be executed.
        GuestAssetError: The kernel or initrd is missing.
        HypervisorError: A disk image is missing, or the process could not be started.
    """
    made = _Made(program, shape, attachments, journal, root)
    return made.start(
        lambda: open_files(shape.kernel, initrd, attachments.disks),
        lambda vsock, fds: command.build(program, shape, attachments, vsock, fds),
    )


def restore(
    program: str, shape: MachineShape, directory: str, attachments: Attachments, journal: Journal, root: str
) -> CloudHypervisorProcess:
    """Start it with a machine that was saved, which goes on where it was.

    Args:
        program: Its absolute path.
        shape: The machine that was saved.
        directory: What it was saved into.
        attachments: See `spawn`.
        journal: See there.
        root: See there.

    Raises:
        HostError: The program is missing, or may not be executed.
        HypervisorError: What was saved cannot be used, or the process could not be started.
    """
    from kata.hypervisor.cloud_hypervisor import saved

    made = _Made(program, shape, attachments, journal, root, directory)
    return made.start(
        lambda: open_disks(attachments.disks),
        lambda vsock, fds: [
            program,
            *command.channels(fds),
            *("--restore", saved.prepare(directory, attachments, vsock, fds)),
        ],
    )


class _Made:
    """A process that is made."""

    def __init__(
        self,
        program: str,
        shape: MachineShape,
        attachments: Attachments,
        journal: Journal,
        root: str,
        saved: str = "",
    ) -> None:
        self._saved = saved
        self._program = program
        self._shape = shape
        self._attachments = attachments
        self._journal = journal
        self._root = root

    def start(
        self,
        open_theirs: Callable[[], dict[str, int]],
        arguments: Callable[[str, Mapping[str, int]], list[str]],
    ) -> CloudHypervisorProcess:
        """Start it.

        Args:
            open_theirs: Opens the files that it inherits.
            arguments: The argument vector, for the path of its vsock's socket and what it inherits.
        """
        if not self._program or not os.path.exists(self._program):
            missing = self._program or PROGRAM
            raise HostError(f"Cloud Hypervisor is not installed: there is no {missing}", INSTALL)
        run_dir = self._attachments.run_dir
        vsock_path = os.path.join(run_dir, command.VSOCK_SOCKET)
        if len(os.fsencode(vsock_path)) > paths.MAX_SOCKET_PATH:
            # By a descriptor of the directory it would be short; but who has that can go up from there.
            raise HostError(
                f"the path of the machine's vsock is too long for a socket: {vsock_path}",
                "Name a shorter directory with KATA_RUN_DIR.",
            )
        ours: dict[str, int] = {}
        theirs: dict[str, int] = {}
        stderr_tail = children.StderrTail()
        entries: list[Entry] = []
        try:
            theirs |= open_theirs()
            theirs["api"], ours["api"] = _api_socket(run_dir, self._journal)
            ours["events"], theirs["events"] = children.socketpair()
            stdout = stderr_tail.write_fd
            if self._shape.console != "none":
                ours["console"], stdout = children.socketpair()
                theirs["console"] = stdout
            argv = arguments(vsock_path, theirs)
            entries.append(self._journal.begin("socket", path=vsock_path))
            taps = [nic.tap_fd.raw for nic in self._attachments.nics if nic.tap_fd is not None]
            try:
                child = children.spawn(
                    argv,
                    self._journal,
                    "cloud-hypervisor",
                    pass_fds=[*(fd for key, fd in theirs.items() if key != "console"), *taps],
                    stdout=stdout,
                    stderr=stderr_tail.write_fd,
                    capabilities=(),
                    namespaces=confinement.NAMESPACES,
                    confinement=self._confinement(theirs),
                )
            except OSError as error:
                raise HypervisorError(
                    f"cannot start Cloud Hypervisor: {error.strerror}",
                    "Run `kata doctor` to check this host.",
                ) from error
        except BaseException:
            stderr_tail.close()
            for fd in ours.values():
                os.close(fd)
            for entry in entries:
                self._journal.mark_gone(entry)
            raise
        finally:
            stderr_tail.started()
            for fd in theirs.values():
                os.close(fd)
        return CloudHypervisorProcess(
            child,
            self._shape,
            self._attachments,
            ours,
            stderr_tail,
            entries,
            vsock_path=vsock_path,
            root=self._root,
        )

    def _confinement(self, theirs: Mapping[str, int]) -> confinement.Confinement:
        run_dir, disks = self._attachments.run_dir, self._attachments.disks
        written = [f"disk{index}" for index, disk in enumerate(disks) if disk and not disk.readonly]
        restored = [os.path.join(run_dir, "restored"), self._saved] if self._saved else []
        return confinement.monitor(
            self._program,
            user=0,  # it opens disks by name, and those are root's
            readable=[*(fd for key, fd in theirs.items() if key not in written), *restored],
            writable=[*(theirs[key] for key in written), *([self._root] if self._root else [])],
            devices=["/dev/kvm"],
            sockets_in=run_dir,
            any_file=not self._root,
        )


def _api_socket(run_dir: str, journal: Journal) -> tuple[int, int]:
    """A socket that listens and a connection to it, and no name by which anybody else could connect.

    Returns:
        The listening socket, and the connection.
    """
    import _socket

    path = os.path.join(run_dir, _API_SOCKET)
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


# What it says (lower case), and what to say instead: (patterns, error class, sentence, hint).
_KNOWN: tuple[tuple[tuple[str, ...], type[KataError], str, str], ...] = (
    (
        ("cannot allocate memory", "code: 12"),
        ResourceExhaustedError,
        "the host cannot give the virtual machine its {memory} MiB of memory{available}",
        "Ask for less with -m, or free memory on the host.",
    ),
    (
        ("kvm",),
        HypervisorError,
        "Cloud Hypervisor cannot use KVM",
        "Run `kata doctor`.",
    ),
    (
        ("load the kernel", "kernel loader", "kernel file"),
        GuestAssetError,
        "Cloud Hypervisor cannot load the guest's kernel {kernel}",
        "kata guest build",
    ),
    (
        ("initramfs",),
        GuestAssetError,
        "Cloud Hypervisor cannot load the initrd {initrd}",
        "kata guest build",
    ),
)


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
    last = _reason(said)[:300]
    if status > 0:
        for patterns, kind, sentence, hint in _KNOWN:
            if any(pattern in last.lower() for pattern in patterns):
                text = sentence.format(
                    memory=shape.memory_mib,
                    available=available_memory(),
                    kernel=shape.kernel,
                    initrd=shape.initrd,
                )
                return kind(f"{text} (Cloud Hypervisor: {last})", hint)
    hint = "Run `kata doctor` to check this host."
    if status == -9:
        hint = "If nobody killed it, the host was out of memory: see its kernel log (dmesg)."
    return HypervisorError(
        f"Cloud Hypervisor {children.ending(status)}" + (f": {last}" if last else ""), hint
    )
