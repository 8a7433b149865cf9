"""Starting Firecracker, and saying in words why it ended. Usable before asyncio is imported."""

from __future__ import annotations

import json
import os

from kata import confinement
from kata.hypervisor import rust_vmm
from kata.hypervisor.firecracker import config
from kata.hypervisor.firecracker.taps import Taps
from kata.hypervisor.process import Launch, open_disks, open_files
from kata.hypervisor.rust_vmm import API_SOCKET, RustVmmProcess, file, vsock_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata import children
    from kata.errors import KataError
    from kata.hypervisor.base import Attachments, MachineShape
    from kata.journal import Journal

EMPTY_DISK = "empty-disk"
"""Name of the file behind the empty disk slots, in the sandbox's directory."""
_EMPTY_BYTES = 1 << 20


class FirecrackerProcess(RustVmmProcess):
    """A Firecracker that was started. Its channels are ``console`` and ``metrics``; it makes its API's socket."""

    __slots__ = ("api_path", "saved", "slots", "taps")

    def __init__(
        self,
        child: children.Child,
        launch: Launch,
        shape: MachineShape,
        slots: config.Slots,
        run_dir: str,
        root: str,
        taps: Taps,
        saved: str,
    ) -> None:
        super().__init__(
            child,
            launch,
            shape,
            run_dir,
            root,
            disk_addresses=slots.disk_addresses,
            nic_addresses=slots.nic_addresses,
        )
        self.slots = slots
        self.api_path = os.path.join(run_dir, API_SOCKET)
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
        lambda: open_files(shape.kernel, initrd, slots.disks),
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
    saved = os.path.abspath(directory)
    return _start(
        program, shape, slots, attachments, journal, root, lambda: open_disks(slots.disks), saved=saved
    )


def _start(
    program: str,
    shape: MachineShape,
    slots: config.Slots,
    attachments: Attachments,
    journal: Journal,
    root: str,
    open_theirs: Callable[[], dict[str, int]],
    *,
    saved: str = "",
) -> FirecrackerProcess:
    run_dir = attachments.run_dir
    vsock = vsock_path(run_dir)
    taps = Taps(journal)
    try:
        with Launch("Firecracker", journal) as launch:
            theirs = launch.theirs
            theirs |= open_theirs()
            theirs["null"] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            empty = os.path.join(run_dir, EMPTY_DISK)
            theirs["empty"] = os.open(empty, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.truncate(theirs["empty"], _EMPTY_BYTES)
            written = [
                "empty",
                *(f"disk{index}" for index, disk in enumerate(slots.disks) if disk and not disk.readonly),
            ]
            if shape.console != "none":
                launch.channel("console")
                launch.stdout = theirs["console"]
            api = os.path.join(run_dir, API_SOCKET)
            launch.socket(api)
            launch.socket(vsock)
            taps.take(attachments.nics)
            # What it has to say must not come among the guest's words.
            theirs["log"] = os.dup(launch.stderr.write_fd)
            launch.ours["metrics"], theirs["metrics"] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            argv = [
                program,
                *("--api-sock", api),
                *("--log-path", file(config.LOG_FD)),
                *("--level", "Warn"),
                *("--metrics-path", file(config.METRICS_FD)),
                "--enable-pci",
            ]
            if not saved:
                document = config.build(shape, attachments, slots, vsock=vsock, taps=taps.names)
                theirs["config"] = os.memfd_create("configuration")
                os.write(theirs["config"], json.dumps(document).encode())
                os.lseek(theirs["config"], 0, os.SEEK_SET)
                argv += ["--config-file", file(config.CONFIG_FD)]
            child = launch.spawn(
                argv,
                "firecracker",
                fds_from_3=[
                    *(theirs.get(name, theirs["null"]) for name in config.NAMES),
                    *(theirs.get(f"disk{index}", theirs["empty"]) for index in range(len(slots.disks))),
                ],
                capabilities=(),
                confinement=confinement.monitor(
                    program,
                    user=0,  # it opens disks by name, and those are root's
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
            return FirecrackerProcess(child, launch, shape, slots, run_dir, root, taps, saved)
    except BaseException:
        taps.remove()
        raise


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
