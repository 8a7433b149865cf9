"""Starting Firecracker, and saying in words why it ended. Usable before asyncio is imported."""

from __future__ import annotations

import json
import os

from kata import children, confinement, paths
from kata.errors import GuestAssetError, HostError, HypervisorError, KataError, ResourceExhaustedError
from kata.hypervisor.firecracker import config
from kata.hypervisor.firecracker.taps import Taps
from kata.hypervisor.process import MonitorProcess, available_memory, open_disks, open_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.base import Attachments, MachineShape
    from kata.hypervisor.channel import Channel
    from kata.journal import Entry, Journal

PROGRAM = "firecracker"
VARIABLE = "KATA_FIRECRACKER"
"""Variable that names the program, where it is not on the PATH."""
INSTALL = (
    f"Take a release of https://github.com/firecracker-microvm/firecracker, and put {PROGRAM} on the PATH or its path"
    f" into {VARIABLE}."
)
EMPTY_DISK = "empty-disk"
"""Name of the file behind the empty disk slots, in the sandbox's directory."""
_EMPTY_BYTES = 1 << 20


class FirecrackerProcess(MonitorProcess):
    """A Firecracker that was started. Its channels are ``console`` and ``metrics``; it makes its API's socket."""

    __slots__ = ("_channel", "api_path", "root", "saved", "shape", "slots", "taps", "vsock_path")

    def __init__(
        self,
        child: children.Child,
        shape: MachineShape,
        slots: config.Slots,
        fds: dict[str, int],
        stderr_tail: children.StderrTail,
        entries: list[Entry],
        *,
        run_dir: str,
        root: str,
        taps: Taps,
        saved: str,
    ) -> None:
        super().__init__(
            child,
            fds,
            stderr_tail,
            entries,
            disk_addresses=slots.disk_addresses,
            nic_addresses=slots.nic_addresses,
            share_tag="",
        )
        self.shape = shape
        self.slots = slots
        self.api_path = os.path.join(run_dir, config.API_SOCKET)
        self.vsock_path = os.path.join(run_dir, config.VSOCK_SOCKET)
        self.root = root
        self.taps = taps
        self.saved = saved
        """Directory of the saved machine that it is to load; empty if it has one of its own."""
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
) -> FirecrackerProcess:
    """Start it. The machine is booting when this returns.

    Args:
        program: Its absolute path.
        shape: The machine.
        initrd: Path of its whole initial ramdisk.
        attachments: What it is connected to; its descriptors stay the caller's, but for taps, which are closed.
        journal: The sandbox's.
        root: Directory that becomes its root once its machine is built; empty leaves it the caller's.

    Raises:
        HostError: The program is missing, or may not be executed.
        GuestAssetError: The kernel or initrd is missing.
        UnsupportedError: A network interface is of no kind that it can have.
        HypervisorError: A disk image is missing, or the process could not be started.
    """
    slots = config.Slots(shape, attachments)
    _check(program, attachments.run_dir)
    files = open_files(shape.kernel, initrd, slots.disks)
    return _start(program, shape, slots, files, attachments, journal, root, saved="")


def restore(
    program: str, shape: MachineShape, directory: str, attachments: Attachments, journal: Journal, root: str
) -> FirecrackerProcess:
    """Start it with no machine; the saved one is loaded once its API is there.

    Args:
        program: Its absolute path.
        shape: The machine that was saved.
        directory: What it was saved into.
        attachments: What it is connected to from now on; as for `spawn`.
        journal: The sandbox's.
        root: As for `spawn`.

    Raises:
        KataError: As for `spawn`.
    """
    slots = config.Slots(shape, attachments)
    _check(program, attachments.run_dir)
    files = open_disks(slots.disks)
    return _start(program, shape, slots, files, attachments, journal, root, saved=os.path.abspath(directory))


def _check(program: str, run_dir: str) -> None:
    if not program or not os.path.exists(program):
        raise HostError(f"Firecracker is not installed: there is no {program or PROGRAM}", INSTALL)
    path = os.path.join(run_dir, config.VSOCK_SOCKET)
    if len(os.fsencode(path)) > paths.MAX_SOCKET_PATH:
        # By a descriptor of the directory it would be short; but who has that can go up from there.
        raise HostError(
            f"the path of the machine's vsock is too long for a socket: {path}",
            "Name a shorter directory with KATA_RUN_DIR.",
        )


def _start(
    program: str,
    shape: MachineShape,
    slots: config.Slots,
    files: dict[str, int],
    attachments: Attachments,
    journal: Journal,
    root: str,
    *,
    saved: str,
) -> FirecrackerProcess:
    """Execute it with these files, which are closed here."""
    run_dir = attachments.run_dir
    sockets = [os.path.join(run_dir, name) for name in (config.API_SOCKET, config.VSOCK_SOCKET)]
    ours: dict[str, int] = {}
    theirs = files
    stderr_tail = children.StderrTail()
    entries: list[Entry] = []
    taps = Taps(journal)
    try:
        theirs["null"] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        empty = os.path.join(run_dir, EMPTY_DISK)
        theirs["empty"] = os.open(empty, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.truncate(theirs["empty"], _EMPTY_BYTES)
        written = [f"disk{index}" for index, disk in enumerate(slots.disks) if disk and not disk.readonly]
        written.append("empty")
        stdout = stderr_tail.write_fd
        if shape.console != "none":
            ours["console"], stdout = children.socketpair()
            theirs["console"] = stdout
        entries += [journal.begin("socket", path=path) for path in sockets]
        taps.take(attachments.nics)
        # What it has to say must not come among the guest's words.
        theirs["log"] = os.dup(stderr_tail.write_fd)
        ours["metrics"], theirs["metrics"] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        argv = [
            program,
            *("--api-sock", sockets[0]),
            *("--log-path", config.file(config.LOG_FD)),
            *("--level", "Warn"),
            *("--metrics-path", config.file(config.METRICS_FD)),
            "--enable-pci",
        ]
        if not saved:
            document = config.build(shape, attachments, slots, vsock=sockets[1], taps=taps.names)
            theirs["config"] = os.memfd_create("configuration")
            os.write(theirs["config"], json.dumps(document).encode())
            os.lseek(theirs["config"], 0, os.SEEK_SET)
            argv += ["--config-file", config.file(config.CONFIG_FD)]
        try:
            child = children.spawn(
                argv,
                journal,
                "firecracker",
                fds_from_3=[
                    *(theirs.get(name, theirs["null"]) for name in config.NAMES),
                    *(theirs.get(f"disk{index}", theirs["empty"]) for index in range(len(slots.disks))),
                ],
                stdout=stdout,
                stderr=stderr_tail.write_fd,
                capabilities=(),
                namespaces=confinement.NAMESPACES,
                # It opens disks by name, and those are root's.
                confinement=confinement.monitor(
                    program,
                    user=0,
                    readable=[
                        *(fd for key, fd in theirs.items() if key not in written),
                        *([saved] if saved else []),
                    ],
                    writable=[*(theirs[key] for key in written), *([root] if root else [])],
                    devices=["/dev/kvm", "/dev/net/tun"],
                    sockets_in=run_dir,
                    any_file=not root,
                ),
            )
        except OSError as error:
            raise HypervisorError(
                f"cannot start Firecracker: {error.strerror}", "Run `kata doctor` to check this host."
            ) from error
    except BaseException:
        stderr_tail.close()
        for fd in ours.values():
            os.close(fd)
        for entry in entries:
            journal.mark_gone(entry)
        taps.remove()
        raise
    finally:
        stderr_tail.started()
        for fd in theirs.values():
            os.close(fd)
    return FirecrackerProcess(
        child, shape, slots, ours, stderr_tail, entries, run_dir=run_dir, root=root, taps=taps, saved=saved
    )


# What it says (lower case), and what to say instead: (patterns, error class, sentence, hint).
_KNOWN: tuple[tuple[tuple[str, ...], type[KataError], str, str], ...] = (
    (
        ("cannot allocate memory", "guest memory error", "memory error"),
        ResourceExhaustedError,
        "the host cannot give the virtual machine its {memory} MiB of memory{available}",
        "Ask for less with -m, or free memory on the host.",
    ),
    (
        ("kernel loader", "kernel load", "invalid elf", "elf"),
        GuestAssetError,
        "Firecracker cannot load the guest's kernel {kernel}",
        "kata guest build",
    ),
    (("initrd",), GuestAssetError, "Firecracker cannot load the initrd {initrd}", "kata guest build"),
    (("kvm",), HypervisorError, "Firecracker cannot use KVM", "Run `kata doctor`."),
)


_ERROR = " error: "


def explain(status: int, said: str, shape: MachineShape) -> KataError:
    """The error for one that ended with this exit status and this end of its standard error (already escaped)."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    # Its log has the sentence, behind time and place; what it says on its way out are internal names.
    errors = [line.partition("] ")[2] or line for line in lines if _ERROR in line]
    errors = errors or [line for line in lines if "error" in line.lower()] or lines
    last = errors[-1].strip()[:300] if errors else ""
    if status > 0:
        for patterns, kind, sentence, hint in _KNOWN:
            if any(pattern in last.lower() for pattern in patterns):
                text = sentence.format(
                    memory=shape.memory_mib,
                    available=available_memory(),
                    kernel=shape.kernel,
                    initrd=shape.initrd,
                )
                return kind(f"{text} (Firecracker: {last})", hint)
    hint = "Run `kata doctor` to check this host."
    if status == -9:
        hint = "If nobody killed it, the host was out of memory: see its kernel log (dmesg)."
    return HypervisorError(f"Firecracker {children.ending(status)}" + (f": {last}" if last else ""), hint)
