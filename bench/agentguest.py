"""A guest for measurements of the agent: ours, with one more process in it that measures from the inside.

The initrd is the guest's own with a second archive behind it, which puts a script in the place of ``/init``: it
starts a shell of busybox in a file system of its own and then becomes the agent, which so is PID 1 as ever and knows
nothing of it. The shell takes commands from a second port of the same virtio-serial device; a third port is the raw
channel that the agent's is compared with. So what is measured is not disturbed by a container or a call that does
the measuring.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from kata.engine.lifecycle.boot import KERNEL_PARAMETERS
from kata.guest import manifest
from kata.guest.cpio import Archive
from kata.hypervisor import process as hypervisor_process
from kata.hypervisor import tsc
from kata.hypervisor.base import Disk, Nic, random_mac
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu.settings import VMSettings

BUSYBOX = Path("/usr/bin/busybox")
PATIENCE_S = float(os.environ.get("KATA_TEST_PATIENCE", "120"))
SHELL_PORT, RAW_PORT = "bench.shell", "bench.raw"
_DIRECTORY = "bench"
_PR_SET_PDEATHSIG = 1

# The agent throws everything out of the initial root file system, but does not touch what is mounted in it.
_INIT = f"""#!/{_DIRECTORY}0/busybox sh
b=/{_DIRECTORY}0/busybox
$b mkdir -p /{_DIRECTORY}
$b mount -t tmpfs tmpfs /{_DIRECTORY}
$b mkdir /{_DIRECTORY}/bin /{_DIRECTORY}/proc /{_DIRECTORY}/sys /{_DIRECTORY}/dev /{_DIRECTORY}/tmp
$b cp $b /{_DIRECTORY}0/shell /{_DIRECTORY}/bin/
$b mount -t devtmpfs dev /{_DIRECTORY}/dev
$b chroot /{_DIRECTORY} /bin/busybox sh /bin/shell </{_DIRECTORY}/dev/null >/{_DIRECTORY}/dev/null 2>&1 &
exec /agent
"""
_SHELL = f"""export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
port() {{
    while :; do
        for p in /sys/class/virtio-ports/*; do
            [ "$(cat $p/name 2>/dev/null)" = $1 ] && {{ echo /dev/${{p##*/}}; return; }}
        done
        sleep 0.1
    done
}}
raw=$(port {RAW_PORT})
exec 3<>$(port {SHELL_PORT})
echo ready >&3
while read -r line <&3; do
    ( eval "$line" ) >/tmp/out 2>&1 3>&- </dev/null
    status=$?
    echo "$(stat -c %s /tmp/out) $status" >&3
    cat /tmp/out >&3
done
"""


class Guest:
    """A running guest.

    Args:
        guest: The directory with kernel and initrd.
        rootfs: An erofs image for the first disk.
        accelerator: ``kvm`` or ``tcg``.
        memory_mib: Memory of the machine.

    Attributes:
        agent: Our end of the agent's port.
        raw: Our end of the port that has nobody behind it but what `sh` starts there.
    """

    def __init__(self, guest: Path, rootfs: str, accelerator: str, memory_mib: int) -> None:
        self._work = tempfile.TemporaryDirectory(prefix="kb-", dir="/tmp")
        work = Path(self._work.name)
        assets = manifest.load(str(guest))
        initrd = work / "initrd"
        initrd.write_bytes(Path(assets.initrd).read_bytes() + self._second_archive(Path(assets.initrd)))
        settings = VMSettings(
            name="kata-bench",
            run_dir=str(work),
            kernel=assets.kernel,
            initrd=str(initrd),
            cmdline=" ".join((*KERNEL_PARAMETERS, "agent.log=error")),
            accel=accelerator,
            binary="/usr/bin/qemu-system-x86_64",
            memory_mib=memory_mib,
            disks=[Disk(rootfs, readonly=True)],
            nic=Nic(random_mac()),
            machine_options="acpi=on",  # the tables that a sandbox's machine gets in their place are not passed on here
        )
        if accelerator == "tcg":
            settings.tsc_khz = tsc.khz()
        pairs = {name: socket.socketpair() for name in ("agent", "qmp", "console", "shell", "raw")}
        opened = hypervisor_process.open_files(settings.kernel, settings.initrd, settings.disks)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        opened["nic"] = listener.detach()
        fds = qemu_command.Fds(
            *(pairs[name][1].fileno() for name in ("agent", "qmp", "console")),
            kernel=opened["kernel"],
            initrd=opened["initrd"],
            disks={0: opened["disk0"]},
            nic=opened["nic"],
        )
        argv = [word.replace("max_ports=2", "max_ports=4") for word in qemu_command.build(settings, fds)]
        for number, name, port in ((2, "shell", SHELL_PORT), (3, "raw", RAW_PORT)):
            argv += ["-chardev", f"socket,id={name},fd={pairs[name][1].fileno()}"]
            argv += ["-device", f"virtserialport,bus=serial.0,nr={number},chardev={name},name={port}"]
        passed = [*(pair[1].fileno() for pair in pairs.values()), *opened.values()]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=passed,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 9),
        )
        for pair in pairs.values():
            pair[1].close()
        for fd in opened.values():
            os.close(fd)
        self.agent, self.raw = pairs["agent"][0], pairs["raw"][0]
        self._console, self._qmp = pairs["console"][0], pairs["qmp"][0]
        self._shell = pairs["shell"][0]
        self._shell.settimeout(PATIENCE_S)
        self._answers = self._shell.makefile("rb")
        poller = select.poll()
        poller.register(self._shell, select.POLLIN)
        if not poller.poll(PATIENCE_S * 1000) or self._answers.readline() != b"ready\n":
            self._console.settimeout(1)
            said = self._console.recv(1 << 16).decode(errors="replace")
            self.close()
            raise SystemExit(f"error: the guest did not come up; its console:\n{said}")

    @staticmethod
    def _second_archive(initrd: Path) -> bytes:
        if not BUSYBOX.exists():
            raise SystemExit(f"error: {BUSYBOX} is missing\nhint: apt-get install busybox-static")
        archive = Archive()
        archive.directory("dev")
        archive.character_device("dev/null", 1, 3, 0o666)
        archive.directory(f"{_DIRECTORY}0")
        archive.file(f"{_DIRECTORY}0/busybox", BUSYBOX.read_bytes(), 0o755)
        archive.file(f"{_DIRECTORY}0/shell", _SHELL.encode(), 0o755)
        archive.file("agent", _member(initrd.read_bytes(), b"init"), 0o755)
        archive.file("init", _INIT.encode(), 0o755)
        return archive.finish()

    def sh(self, script: str) -> str:
        """Run a command in the guest, outside of any container; what it has printed.

        Raises:
            SystemExit: It failed.
        """
        self.begin(script)
        return self.end(script)

    def begin(self, script: str) -> None:
        """As `sh`, without waiting for its end: `end` does that."""
        self._shell.sendall(script.strip().replace("\n", "; ").encode() + b"\n")

    def end(self, script: str = "") -> str:
        """The output of what `begin` has begun, waited for."""
        size, status = self._answers.readline().split()
        said = self._answers.read(int(size)).decode(errors="replace")
        if status != b"0":
            raise SystemExit(f"error: in the guest, {script!r} ended with {int(status)}:\n{said}")
        return said

    def footprint(self) -> dict[str, int]:
        """KiB of all processes of the agent's binary together, from smaps_rollup, and how many there are."""
        said = self.sh(
            "me=$(readlink /proc/1/exe); n=0; for p in /proc/[0-9]*; do"
            ' if [ "$(readlink $p/exe)" = "$me" ]; then n=$((n+1)); cat $p/smaps_rollup; fi; done; echo processes: $n'
        )
        sums = {"processes": 0, "Rss": 0, "Pss": 0, "Anonymous": 0, "Private_Dirty": 0}
        for name, value in re.findall(r"^(\w+):\s+(\d+)", said, re.MULTILINE):
            if name in sums:
                sums[name] += int(value)
        return sums

    def memory(self) -> dict[str, int]:
        """KiB from the guest's /proc/meminfo."""
        wanted = ("MemTotal", "MemFree", "MemAvailable", "AnonPages", "Shmem", "Slab", "Cached")
        said = self.sh("cat /proc/meminfo")
        return {
            name: int(value)
            for name, value in re.findall(r"^(\w+):\s+(\d+)", said, re.MULTILINE)
            if name in wanted
        }

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for sock in (self.agent, self.raw, self._shell, self._console, self._qmp):
            sock.close()
        self._work.cleanup()


def wait_for(condition: object, what: str) -> None:
    """Wait until *condition*, a function, is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {what} did not happen")
        time.sleep(0.05)


def _member(archive: bytes, name: bytes) -> bytes:
    """The content of a file of a newc archive."""
    at = 0
    while at < len(archive):
        if archive[at : at + 6] != b"070701":
            at += 1
            continue
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, length = fields[6], fields[11]
        start = (at + 110 + length + 3) & ~3
        if archive[at + 110 : at + 110 + length - 1] == name:
            return archive[start : start + size]
        at = (start + size + 3) & ~3
    raise SystemExit(f"error: the guest's initrd has no {name.decode()}")
