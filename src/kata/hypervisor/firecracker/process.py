"""Starting Firecracker, and saying in words why it ended. Usable before asyncio is imported."""

from __future__ import annotations

import json
import os

from kata import acl
from kata.hypervisor import rust_vmm
from kata.hypervisor.access import disk_files
from kata.hypervisor.firecracker import config
from kata.hypervisor.firecracker.taps import Taps
from kata.hypervisor.process import Launch, open_disks, open_files
from kata.hypervisor.rust_vmm import API_SOCKET, VSOCK_SOCKET, MonitorUser, RustVmmProcess, file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata import children
    from kata.errors import KataError
    from kata.hypervisor.access import File
    from kata.hypervisor.base import Attachments, MachineShape
    from kata.journal import Journal

EMPTY_DISK = "empty-disk"
"""Name of the file behind the empty disk slots, in the monitor's directory."""
_EMPTY_BYTES = 1 << 20


class FirecrackerProcess(RustVmmProcess):
    """A Firecracker that was started. Its channels are ``console`` and ``metrics``; it makes its API's socket."""

    __slots__ = ("api_path", "empty_disk", "saved", "slots", "taps", "vsock_seen")

    def __init__(
        self,
        child: children.Child,
        launch: Launch,
        shape: MachineShape,
        slots: config.Slots,
        own: MonitorUser,
        taps: Taps,
        saved: str,
    ) -> None:
        super().__init__(
            child,
            launch,
            shape,
            own,
            disk_addresses=slots.disk_addresses,
            nic_addresses=slots.nic_addresses,
        )
        self.slots = slots
        self.api_path = os.path.join(own.directory, API_SOCKET)
        self.vsock_seen = f"{own.seen}/{VSOCK_SOCKET}"
        """Path of the vsock's socket, as the monitor has it."""
        self.empty_disk = os.path.join(own.directory, EMPTY_DISK)
        self.taps = taps
        self.saved = saved
        """Directory of the saved machine that it is to load; empty if it has one of its own."""

    def explain(self, status: int) -> KataError:
        """See `explain`."""
        return explain(status, self.stderr_text(), self.shape)


def spawn(
    program: str, shape: MachineShape, initrd: str, attachments: Attachments, journal: Journal, root: str
) -> FirecrackerProcess:
    """Start it. The machine is booting when this returns.

    Args:
        program: Its path.
        shape: The machine.
        initrd: Path of its whole initial ramdisk.
        attachments: What it is connected to; its descriptors stay the caller's, but for taps, which are closed.
        journal: The sandbox's.
        root: Directory that becomes its root once its machine is built; empty leaves it the caller's.

    Raises:
        HostError: The path of its vsock would be too long.
        GuestAssetError: The kernel or initrd is missing.
        UnsupportedError: A network interface is of no kind that it can have.
        HypervisorError: A disk image is missing, or the process could not be started.
    """
    slots = config.Slots(shape, attachments)
    return _start(
        program,
        shape,
        slots,
        attachments,
        journal,
        root,
        [lambda: open_files(shape.kernel, initrd, slots.disks)],
    )


def restore(
    program: str, shape: MachineShape, directory: str, attachments: Attachments, journal: Journal, root: str
) -> FirecrackerProcess:
    """Start it with no machine; the saved one is loaded once its API is there.

    Args:
        program: Its path.
        shape: The machine that was saved.
        directory: What it was saved into.
        attachments: What it is connected to from now on; as for `spawn`.
        journal: The sandbox's.
        root: As for `spawn`.

    Raises:
        KataError: As for `spawn`.
    """
    slots = config.Slots(shape, attachments)
    from kata.hypervisor import saved

    return _start(
        program,
        shape,
        slots,
        attachments,
        journal,
        root,
        [lambda: open_disks(slots.disks), lambda: saved.open_files(directory, config.SAVED_FILES)],
        saved.files(directory, config.SAVED_FILES),
        saved=os.path.abspath(directory),
    )


def _start(
    program: str,
    shape: MachineShape,
    slots: config.Slots,
    attachments: Attachments,
    journal: Journal,
    root: str,
    openers: Sequence[Callable[[], dict[str, int]]],
    more: Sequence[File] = (),
    *,
    saved: str = "",
) -> FirecrackerProcess:
    files = [*disk_files(slots.disks), *more]
    taps = Taps(journal)
    try:
        with Launch("Firecracker", journal) as launch:
            theirs = launch.theirs
            for opens in openers:
                theirs |= opens()
            with MonitorUser(program, attachments, files, theirs, journal, root) as own:
                _open_own(launch, shape, own)
                taps.take(attachments.nics, own.access.user)
                argv = _arguments(program, own)
                if not saved:
                    document = config.build(
                        shape, attachments, slots, vsock=f"{own.seen}/{VSOCK_SOCKET}", taps=taps.names
                    )
                    theirs["config"] = os.memfd_create("configuration")
                    os.write(theirs["config"], json.dumps(document).encode())
                    os.lseek(theirs["config"], 0, os.SEEK_SET)
                    argv += ["--config-file", file(config.CONFIG_FD)]
                written = ["empty", *(one.name for one in files if one.rights & acl.WRITE)]
                first = dict(zip(config.NAMES, config.SAVED_FILES, strict=False)) if saved else {}
                child = launch.spawn(
                    argv,
                    "firecracker",
                    fds_from_3=[
                        *(theirs.get(first.get(name, name), theirs["null"]) for name in config.NAMES),
                        *(theirs.get(f"disk{index}", theirs["empty"]) for index in range(len(slots.disks))),
                    ],
                    capabilities=(),
                    confinement=own.confinement(
                        [fd for key, fd in theirs.items() if key not in written],
                        [theirs[key] for key in written],
                        ["/dev/kvm", "/dev/net/tun"],
                    ),
                )
                return FirecrackerProcess(child, launch, shape, slots, own, taps, saved)
    except BaseException:
        taps.remove()
        raise


def _open_own(launch: Launch, shape: MachineShape, own: MonitorUser) -> None:
    """Open for it what is its own: the empty disk, its console, its log, its metrics."""
    theirs = launch.theirs
    theirs["null"] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    empty = os.path.join(own.directory, EMPTY_DISK)
    theirs["empty"] = os.open(empty, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.truncate(theirs["empty"], _EMPTY_BYTES)
    if shape.console != "none":
        launch.channel("console")
        launch.stdout = theirs["console"]
    launch.socket(os.path.join(own.directory, API_SOCKET))
    launch.socket(own.vsock_path)
    # What it has to say must not come among the guest's words.
    theirs["log"] = os.dup(launch.stderr.write_fd)
    launch.ours["metrics"], theirs["metrics"] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for name in ("empty", "log", "metrics"):
        own.access.give(theirs[name])


def _arguments(program: str, own: MonitorUser) -> list[str]:
    return [
        program,
        *("--api-sock", f"{own.seen}/{API_SOCKET}"),
        *("--log-path", file(config.LOG_FD)),
        *("--level", "Warn"),
        *("--metrics-path", file(config.METRICS_FD)),
        "--enable-pci",
    ]


_ERROR = " error: "


def _reason(said: str) -> str:
    """What it died of, of this end of its standard error (already escaped); empty if it said nothing."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    # Its log has the sentence, behind time and place; what it says on its way out are internal names.
    errors = [line.partition("] ")[2] or line for line in lines if _ERROR in line]
    errors = errors or [line for line in lines if "error" in line.lower()] or lines
    return errors[-1].strip() if errors else ""


def explain(status: int, said: str, shape: MachineShape) -> KataError:
    """The error for one that ended with this exit status and this end of its standard error (already escaped)."""
    return rust_vmm.explain(
        "Firecracker",
        status,
        _reason(said),
        shape,
        memory=("cannot allocate memory", "memory error"),
        kernel=("kernel loader", "kernel load", "elf"),
        initrd=("initrd",),
    )
