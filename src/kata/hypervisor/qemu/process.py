"""Starting QEMU, and saying in words why it ended.

Usable before asyncio is imported: the machine boots while the rest of the engine loads. All channels are
socket pairs made here, so there is no socket file that anybody else could open, and they end with QEMU.
"""

from __future__ import annotations

import os

from kata import children, confinement, sysio
from kata.errors import (
    GuestAssetError,
    HostError,
    HypervisorError,
    KataError,
    ResourceExhaustedError,
    StateError,
)
from kata.hypervisor import tsc
from kata.hypervisor.process import NO_MEMORY, Launch, MonitorProcess, explained, open_files
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu import slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.hypervisor.channel import Channel
    from kata.hypervisor.qemu.saving import Filling
    from kata.hypervisor.qemu.settings import VMSettings
    from kata.journal import Journal

PROGRAM = "qemu-system-x86_64"
VARIABLE = "KATA_QEMU"
"""Variable of the environment that names a QEMU beside that on the PATH."""
VHOST_NET = "/dev/vhost-net"
END_S = 5.0
"""How long one that was killed is waited for."""
INSTALL = "apt-get install qemu-system-x86"
FIRMWARE_DIRS = ("/usr/share/qemu", "/usr/local/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu")
SHARE_CAPABILITIES = (
    *(sysio.CAP_CHOWN, sysio.CAP_DAC_OVERRIDE, sysio.CAP_FOWNER, sysio.CAP_FSETID),
    *(sysio.CAP_MKNOD, sysio.CAP_SETFCAP),
)
"""What QEMU needs to serve a share by 9p, where files have the guest's owners. Without one it has no capability."""


def find(path: str = "") -> str:
    """QEMU's path: the configured one, the variable's, or the PATH's; empty if there is none."""
    return path or os.environ.get(VARIABLE, "") or children.find_program(PROGRAM) or ""


class QemuProcess(MonitorProcess):
    """A QEMU that was started. Its channels are ``agent``, ``qmp`` and ``console``."""

    __slots__ = ("_channel", "_filling", "settings", "told")

    def __init__(
        self,
        child: children.Child,
        settings: VMSettings,
        launch: Launch,
        told: Sequence[str] = (),
        filling: Filling | None = None,
    ) -> None:
        super().__init__(
            child,
            launch,
            disk_addresses=[
                slots.disk_path(index, settings.machine) for index in range(len(settings.disks))
            ],
            nic_addresses=[slots.nic_path(index, settings.machine) for index in range(len(settings.nics()))],
            share_tag=slots.SHARE_TAG if settings.share_dir or settings.share_fd is not None else "",
            extra_memory_mib=settings.extra_memory_mib,
        )
        self.settings = settings
        self.told = told
        """Names of the commands that are in its control channel already."""
        self._filling = filling
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        """How the agent is reached: by vsock where the machine has it, otherwise by its virtio-serial port."""
        from kata.hypervisor.channel import SerialChannel, VsockChannel

        if self._channel is None:
            vsock = self.settings.vsock
            self._channel = (
                VsockChannel(vsock.cid)
                if vsock is not None
                else SerialChannel(lambda: self.detach_fd("agent"))
            )
        return self._channel

    def complete(self) -> None:
        """See `kata.hypervisor.protocols.Started.complete`."""
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.wait()

    def close(self) -> None:
        """See `kata.hypervisor.protocols.Started.close`."""
        if self._filling is not None:
            self._filling.abandon()
            self._filling = None
        super().close()

    def give_agent(self, words: bytes) -> bool:
        """See `kata.hypervisor.protocols.Started.give_agent`: they wait in the virtio-serial port."""
        if self.settings.vsock is not None or "agent" not in self.fds:
            return False
        try:
            sysio.write_all(self.fds["agent"], words)
        except OSError:
            return False  # it has ended, and says why
        return True

    def explain(self, status: int) -> KataError:
        """See `explain`."""
        return explain(status, self.stderr_text(), self.settings)


def spawn(settings: VMSettings, journal: Journal) -> QemuProcess:
    """Start QEMU. The machine is booting when this returns.

    The descriptors in `settings` (share, NIC, vsock) are QEMU's from here on: ours are closed, also on failure.

    Args:
        settings: The machine; an empty `binary` is filled in.
        journal: The sandbox's.

    Returns:
        The process. That QEMU accepts the command line shows in the next tens of milliseconds: watch its
        `pidfd`, and ask `failure`.

    Raises:
        HostError: QEMU or its firmware is missing, or may not be executed.
        GuestAssetError: The kernel or initrd is missing.
        HypervisorError: A disk image is missing, or the process could not be started.
    """
    passed = settings.descriptors()
    try:
        with Launch("QEMU", journal) as launch:
            told: list[str] = []
            child, filling = _start(settings, launch, told)
            return QemuProcess(child, settings, launch, told, filling)
    finally:
        for fd in {*passed, *settings.descriptors()}:
            fd.close()


def _start(settings: VMSettings, launch: Launch, told: list[str]) -> tuple[children.Child, Filling | None]:
    """Start it; what it is told before it runs is added to `told`. Returns it, and who fills its memory."""
    _check(settings)
    if settings.accel == "tcg" and not settings.tsc_khz and settings.incoming is None:
        settings.tsc_khz = tsc.khz()
        if not settings.tsc_khz and settings.machine == slots.MICROVM:
            # It has no timer to measure that by, and would wait for ever.
            raise HostError(
                "how fast this host's time-stamp counter runs is not known, and an emulated microvm has to be told",
                "Set machine_type to q35.",
            )
    theirs = launch.theirs
    opened = open_files(settings.kernel, settings.initrd, settings.disks)
    theirs |= opened
    if settings.mapped_mib and "disk0" not in theirs:
        theirs["disk0"] = _empty_image(settings.mapped_mib)
    for name in ("agent", "qmp", "console"):
        if name != "console" or settings.console != "none":
            launch.channel(name)
    source = settings.memory if settings.late_share and settings.incoming is not None else None
    words = b""
    filling: Filling | None = None
    if settings.incoming is not None:
        from kata.hypervisor.qemu import saving

        uri = saving.incoming_uri(settings.incoming.raw, in_set=settings.incoming_in_set)
        words, names = saving.restoring(uri, has_memory=settings.memory is not None)
        told += names
        if source is not None:
            # Its file server writes to it, so it is one of its own, and filled while QEMU starts.
            settings.memory, settings.owns_memory = saving.file_like(source), True
            filling = saving.Filling(settings.memory, source, launch.ours["qmp"], words)
    try:
        child = _execute(settings, launch)
    except BaseException:
        if filling is not None:
            filling.abandon()
        raise
    if words and filling is None:
        try:
            os.write(launch.ours["qmp"], words)
        except BaseException:
            child.kill()
            child.wait(END_S)
            child.close()
            raise
    return child, filling


def _execute(settings: VMSettings, launch: Launch) -> children.Child:
    """Execute QEMU, whose channels and files are opened."""
    theirs = launch.theirs
    if settings.nic is not None and not settings.nic.backend:
        launch.socket(qemu_command.nic_socket(settings.run_dir))
        theirs["nic"] = _listen(qemu_command.nic_socket(settings.run_dir))
    kept = SHARE_CAPABILITIES if settings.serves_files else ()
    user = _prepare(settings, theirs, kept)
    tables = _acpi_files() if qemu_command.has_small_acpi(settings) else {}
    theirs |= tables
    image = ("disk0",) if settings.mapped_mib else ()
    reopened = [theirs[name] for name in ("kernel", "initrd", "share", *tables, *image) if name in theirs]
    vhost = _vhost_net(settings) if settings.vhost_net else {}
    theirs |= {f"vhost{index}": fd for index, fd in vhost.items()}
    fds = qemu_command.Fds(
        theirs["agent"],
        theirs["qmp"],
        theirs.get("console"),
        kernel=theirs["kernel"],
        initrd=theirs["initrd"],
        vhost=vhost,
        disks={
            index: theirs[f"disk{index}"] for index in range(len(settings.disks)) if f"disk{index}" in theirs
        },
        nic=theirs.get("nic"),
        share=theirs.get("share"),
        acpi=tables,
    )
    return launch.spawn(
        qemu_command.build(settings, fds),
        "qemu",
        pass_fds=qemu_command.inherited_fds(settings, fds),
        # A start touches a little of many huge pages, and clearing those is most of what the kernel does for
        # an emulated machine: the more so where this host is a guest itself, whose own host has to find the
        # memory (thirteen microseconds for each 4 KiB, measured, beside four in small pages). What translated
        # code gains from them is hardly measurable.
        disable_thp=settings.accel == "tcg",
        capabilities=kept,
        confinement=_confinement(settings, user, kept, reopened),
    )


def _vhost_net(settings: VMSettings) -> dict[int, int]:
    """An open /dev/vhost-net for each interface that is connected to a tap, by its number. None where the host has no
    such device: QEMU moves the packets itself then. Source: the kernel's ``drivers/vhost/net.c``.
    """
    found: dict[int, int] = {}
    for index, nic in enumerate(settings.nics()):
        if nic.tap_fd is not None:
            try:
                found[index] = os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                break
    return found


def _prepare(settings: VMSettings, opened: dict[str, int], kept: Sequence[int]) -> int:
    """Choose QEMU's user, and have what it opens once more by its descriptor be such that this user can.

    Returns:
        The user id.
    """
    firmware = [settings.firmware] if os.path.isabs(settings.firmware) else []
    user = confinement.user_for(settings.binary, kept, firmware)
    for name in ("kernel", "initrd"):
        opened[name] = confinement.for_user(opened[name], user)
    if settings.share_dir and not settings.serves_files and settings.share_fd is None:
        opened["share"] = os.open(settings.share_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return user


def _confinement(
    settings: VMSettings, user: int, kept: Sequence[int], reopened: Sequence[int]
) -> confinement.Confinement:
    """What QEMU opens by name until it has its root directory, beside what all programs read."""
    devices = [path for path in (settings.entropy,) if path]
    if settings.accel == "kvm":
        devices.append("/dev/kvm")
    devices += settings.host_nodes
    memory = settings.memory
    made = confinement.monitor(
        settings.binary,
        user=user,
        keeps=kept,
        readable=[
            *reopened,
            *(path for path in (settings.firmware,) if os.path.isabs(path)),
            *(FIRMWARE_DIRS if not settings.binary.startswith("/usr/") else ()),
        ],
        writable=[memory.raw] if memory is not None and settings.owns_memory else [],
        devices=devices,
        shares=settings.share_dir,
    )
    made.locks_memory = bool(settings.host_nodes)
    if memory is not None:
        if settings.owns_memory:
            os.fchown(memory.raw, user, user)
        else:
            from kata.hypervisor.qemu import template_memory

            made.handover = template_memory.Handover(memory, qemu_command.opened(memory.raw))
    return made


def _empty_image(mib: int) -> int:
    """A file in memory, in the place of the image that a machine to be saved will map.

    Raises:
        HypervisorError: There is no room.
    """
    fd = os.memfd_create("image")
    try:
        os.truncate(fd, mib << 20)
    except OSError as error:
        os.close(fd)
        raise HypervisorError(f"cannot make an empty image: {error.strerror}") from error
    return fd


def _acpi_files() -> dict[str, int]:
    """The files of `kata.hypervisor.qemu.acpi` in memory, by name; QEMU may not read those of anybody's directories."""
    from kata.hypervisor.qemu import acpi

    found: dict[str, int] = {}
    try:
        for name, content in acpi.files().items():
            found[name] = os.memfd_create(name)
            os.write(found[name], content)
    except OSError as error:
        for fd in found.values():
            os.close(fd)
        raise HypervisorError(f"cannot make the machine's ACPI tables: {error.strerror}") from error
    return found


def _check(settings: VMSettings) -> None:
    """Say at once, and better than QEMU would, what cannot work."""
    if not settings.binary:
        settings.binary = find()
        if not settings.binary:
            raise HostError(f"{PROGRAM} is not installed", "apt-get install qemu-system-x86")
    elif not os.path.exists(settings.binary):
        raise HostError(f"the hypervisor {settings.binary} does not exist", INSTALL)
    if os.path.isabs(settings.firmware):
        found = os.path.exists(settings.firmware)
    else:
        found = any(os.path.exists(os.path.join(d, settings.firmware)) for d in FIRMWARE_DIRS)
        # QEMU also looks beside its own binary: only a look there can tell for a QEMU from elsewhere.
        found = found or not settings.binary.startswith("/usr/")
    if not found:
        raise HostError(
            f"QEMU's firmware {settings.firmware} is missing", "apt-get install qemu-system-data"
        )


def _listen(path: str) -> int:
    import _socket

    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    try:
        with sysio.SocketName(path) as name:
            listener.bind(name)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise HypervisorError(f"cannot make the socket {path}: {error.strerror}") from error
    return listener.detach()


# What QEMU says (lower case), and what to say instead: (pattern, error class, sentence, hint).
_KNOWN: tuple[tuple[str, type[KataError], str, str], ...] = (
    ("cannot allocate memory", ResourceExhaustedError, *NO_MEMORY),
    ("cannot set up guest memory", ResourceExhaustedError, *NO_MEMORY),
    (
        'failed to get "write" lock',
        StateError,
        "a disk image of the virtual machine is in use by another one",
        "Stop the container that uses it, or run `kata gc`.",
    ),
    (
        "failed to initialize kvm",
        HostError,
        "QEMU cannot use KVM although it was asked to",
        "Run `kata doctor`; the variable KATA_ACCEL=tcg forces software emulation.",
    ),
    (
        "could not access kvm",
        HostError,
        "QEMU cannot use KVM although it was asked to",
        "Run `kata doctor`; the variable KATA_ACCEL=tcg forces software emulation.",
    ),
    (
        "pvh elf note",
        GuestAssetError,
        "the guest's kernel {kernel} has no PVH entry point",
        "kata guest build",
    ),
    (
        "could not load kernel",
        GuestAssetError,
        "QEMU cannot load the guest's kernel {kernel}",
        "kata guest build",
    ),
    ("kernel too old", GuestAssetError, "{kernel} is not a kernel that QEMU can start", "kata guest build"),
    ("invalid kernel header", GuestAssetError, "{kernel} is not a kernel", "kata guest build"),
    ("could not load initrd", GuestAssetError, "QEMU cannot load the initrd {initrd}", "kata guest build"),
    ("error reading initrd", GuestAssetError, "QEMU cannot load the initrd {initrd}", "kata guest build"),
)


_OF_FILE_NAMES = "externally provided fw_cfg item names"
"""Is in QEMU's warning that the names of `_acpi_files` are the firmware's, which is meant."""


def explain(status: int, said: str, settings: VMSettings) -> KataError:
    """The error for a QEMU that ended with this exit status and this end of its standard error (already escaped)."""
    lines = [line for line in said.strip().splitlines() if _OF_FILE_NAMES not in line]
    values = {"memory": settings.memory_mib, "kernel": settings.kernel, "initrd": settings.initrd}
    return explained("QEMU", status, lines[-1] if lines else "", _KNOWN, said, values)
