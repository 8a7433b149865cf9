"""The lab's QEMU: its command line, starting it, and whether this machine can do it at all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

from kata import sysio
from kata.errors import HostError
from kata.hypervisor import tsc
from kata.hypervisor.console import ConsoleRing
from kata.hypervisor.qemu.command import comma
from kata.hypervisor.qemu.process import FIRMWARE_DIRS
from kvmlab.assets import Assets
from kvmlab.inside import PORT

PROGRAM = "qemu-system-x86_64"
FIRMWARE = "qboot.rom"
# Emulated AMD-V comes with "max". "erms" off: TCG runs `rep movsb` byte by byte, and kernels that see it use
# nothing else. "la57" off: a fifth level of page tables is walked in software, with nested paging many times.
CPU = "max,-erms,-la57"
# Warnings of the kernel go to the console, and with it into the log of a failed run.
CMDLINE = "console=ttyS0 loglevel=5 panic=-1 mitigations=off no_timer_check cgroup_no_v1=all"
ACCEL = "tcg,thread=multi,tb-size=512"
# One processor, unless more are asked for. QEMU translates code without locking out the other processors' writes to
# it: a kernel that patches itself there (it does whenever a static key changes: the first memory cgroup, the first
# network filter) can meet the breakpoint of its own patching for ever. QEMU 7.2 hung so in one run out of a dozen. Its
# `thread=single` has no such race, but there a guest under KVM now and then sleeps over its interrupts.
CPUS = 1


class Size:
    """How large the lab is.

    Args:
        memory_mib: Its memory; the files that commands write are in it.
        cpus: Its processors.
    """

    __slots__ = ("cpus", "memory_mib")

    def __init__(self, memory_mib: int, cpus: int) -> None:
        self.memory_mib = memory_mib
        self.cpus = cpus


def default_size() -> Size:
    """One processor; 6 GiB, or half of the memory that is available."""
    available = 1 << 33
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    return Size(min(6144, max(1024, available >> 21)), CPUS)


def obstacle() -> str:
    """Empty when a lab can run on this machine, else why not."""
    if os.uname().machine != "x86_64":
        return (
            f"the lab runs this machine's programs on an emulated x86-64, and this is {os.uname().machine}"
        )
    program = shutil.which(PROGRAM)
    if program is None:
        return f"{PROGRAM} is not installed (apt-get install qemu-system-x86)"
    if not any(os.path.exists(os.path.join(place, FIRMWARE)) for place in FIRMWARE_DIRS):
        return f"QEMU's firmware {FIRMWARE} is missing (apt-get install qemu-system-data)"
    if not os.path.exists("/usr/bin/python3"):
        return "there is no /usr/bin/python3, which runs the lab's inside"
    answer = subprocess.run(
        [program, "-cpu", "help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return f"{program} -cpu help failed: {answer.stderr.strip() or f'status {answer.returncode}'}"
    if " svm" not in answer.stdout.replace("\n", " "):
        return f"{program} does not emulate AMD-V"
    return ""


def kernel_parameters() -> str:
    """The lab's kernel command line.

    An emulated processor's time-stamp counter is this machine's, at its rate. A kernel that measures that
    rate while this machine is busy gets it wrong, and with it the length of a second.
    """
    rate = tsc.khz()
    return f"{CMDLINE} tsc=reliable tsc_early_khz={rate}" if rate else f"{CMDLINE} tsc=unstable"


def command_line(assets: Assets, size: Size, network: str, console_fd: int, port_fd: int) -> list[str]:
    """QEMU's arguments.

    Args:
        assets: Kernel and initrd.
        size: Memory and processors.
        network: ``"none"``, ``"isolated"`` (an interface that leads nowhere) or ``"open"``.
        console_fd: Its end of the console.
        port_fd: Its end of the talk with the lab.
    """
    argv = [
        shutil.which(PROGRAM) or PROGRAM,
        *("-name", "kvm-lab"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "q35,usb=off,vmport=off,smbus=off"),
        *("-accel", ACCEL, "-cpu", CPU),
        *("-smp", str(size.cpus), "-m", f"{size.memory_mib}M"),
        *(
            "-bios",
            FIRMWARE,
            "-kernel",
            str(assets.kernel),
            "-initrd",
            str(assets.initrd),
            "-append",
            kernel_parameters(),
        ),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-device", "isa-serial,chardev=console"),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=port,fd={port_fd}"),
        *("-device", f"virtserialport,chardev=port,name={PORT}"),
        # Several of the host's file systems appear below one: "remap" keeps their inode numbers apart.
        *("-fsdev", f"local,id=root,path={comma('/')},security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"),
        *("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"),
    ]
    if network != "none":
        argv += ["-netdev", "user,id=net" + (",restrict=on" if network == "isolated" else "")]
        argv += ["-device", "virtio-net-pci,netdev=net,romfile="]
    return argv


class Machine:
    """A lab's QEMU. Use as a context manager: it is gone afterwards, however the block is left.

    Args:
        assets: Kernel and initrd.
        size: Memory and processors.
        network: As for `command_line`.
        console_path: File for the console's newest megabyte; empty keeps it in memory.

    Attributes:
        port: Our end of the talk with the lab.
        console: Our end of its console.
        ring: What the console said; who reads `console` feeds it.
        pidfd: Readable when QEMU has ended.

    Raises:
        HostError: QEMU cannot be executed.
    """

    def __init__(self, assets: Assets, size: Size, network: str, console_path: str = "") -> None:
        self.port, port_theirs = socket.socketpair()
        self.console, console_theirs = socket.socketpair()
        self.ring = ConsoleRing(console_path)
        sysio.preload()
        parent = os.getpid()
        fds = (console_theirs.fileno(), port_theirs.fileno())
        try:
            # In a session of its own: Ctrl-C is for the command in the lab, not for the lab.
            self.process = subprocess.Popen(
                command_line(assets, size, network, *fds),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,
                preexec_fn=lambda: sysio.die_with_parent(parent),
            )
        except OSError as error:
            raise HostError(
                f"cannot execute {PROGRAM}: {error.strerror}", "apt-get install qemu-system-x86"
            ) from error
        finally:
            port_theirs.close()
            console_theirs.close()
        self.pidfd = os.pidfd_open(self.process.pid)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        self.drain_console()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.pidfd)
        self.port.close()
        self.console.close()
        self.ring.close()

    def drain_console(self) -> None:
        """Take in what is left of the console's last words."""
        self.console.setblocking(False)
        try:
            while data := self.console.recv(65536):
                self.ring.feed(data)
        except OSError:
            pass

    def last_words(self) -> str:
        """What QEMU itself said, once it has ended; it says nothing unless something is wrong."""
        assert self.process.stderr is not None
        return self.process.stderr.read(4096).decode(errors="replace").strip()

    def report(self, lines: int = 60) -> None:
        """Print the end of the console to standard error."""
        text = self.ring.tail(16384, lines)
        what = "ends with:" if text else "is empty"
        print(f"kvm-lab: the lab's console {what}", file=sys.stderr)
        for line in text.splitlines():
            print(f"  | {line}", file=sys.stderr)
