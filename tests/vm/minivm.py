"""A guest for tests of the hypervisor and the network alone: a kernel, busybox, and a shell on the agent's port.

The shell's protocol: a line with a command goes in; ``<bytes> <exit status>`` and so many bytes of output come
out.
"""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

from waiting import PATIENCE

from kata.guest.cpio import Archive
from kata.hypervisor.qemu import process as qemu_process
from kata.hypervisor.qemu.settings import VMSettings
from kata.journal import Journal

BUSYBOX = "/usr/bin/busybox"

_INIT = """#!/bin/sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /tmp /mnt
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
if [ -f /etc/modules ]; then while read -r module; do busybox insmod "$module"; done </etc/modules; fi
busybox --install -s /bin
ip link set lo up
port=
while [ -z "$port" ]; do
    for p in /sys/class/virtio-ports/*; do
        [ "$(cat $p/name 2>/dev/null)" = agent.channel.0 ] && port=/dev/${p##*/}
    done
done
exec 3<>$port
echo ready >&3
while read -r line <&3; do
    ( eval "$line" ) >/tmp/out 2>&1 </dev/null
    status=$?
    echo "$(stat -c %s /tmp/out) $status" >&3
    cat /tmp/out >&3
done
"""


def build_initrd(path: Path, guest_initrd: Path | None = None) -> Path:
    """Write the guest's initrd.

    Args:
        path: Where to.
        guest_initrd: The project's own, which has the modules that its kernel needs; ours is unpacked over it.
    """
    archive = Archive()
    for directory in ("dev", "proc", "sys", "bin", "tmp", "mnt", "etc"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", Path(BUSYBOX).read_bytes(), 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", _INIT.encode(), 0o755)
    path.write_bytes((guest_initrd.read_bytes() if guest_initrd else b"") + archive.finish())
    return path


class Shell:
    """Our end of a guest's shell."""

    def __init__(self, fd: int, pidfd: int = -1) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.settimeout(PATIENCE)
        self._file = self._sock.makefile("rb")
        self._pidfd = pidfd

    def wait(self) -> None:
        """Wait until the guest is up; an end of the machine before that is a failure of the test."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        if self._pidfd >= 0:
            poller.register(self._pidfd, select.POLLIN)
        assert poller.poll(PATIENCE * 1000), "the guest did not come up"
        line = self._file.readline()
        assert line == b"ready\n", f"the guest did not come up: {line!r}"

    def run(self, command: str) -> tuple[int, str]:
        """Run a command; its exit status and its output, both streams together."""
        self._sock.sendall(command.replace("\n", ";").encode() + b"\n")
        head = self._file.readline()
        assert head, "the guest is gone"
        size, status = head.split()
        return int(status), self._file.read(int(size)).decode(errors="replace")

    def ok(self, command: str) -> str:
        """Run a command that must succeed; its output."""
        status, output = self.run(command)
        assert status == 0, f"{command}: {status}: {output}"
        return output.strip()

    def close(self) -> None:
        """Close the channel."""
        self._file.close()
        self._sock.close()


def sandbox_dir(base: Path, name: str = "vm") -> Journal:
    """A sandbox's directory and journal."""
    return Journal.create_dir(str(base / "sandboxes"), name, {"test": name})


def settings(journal: Journal, **changes: object) -> VMSettings:
    """A small machine; `changes`, which name at least kernel and initrd, go to the settings."""
    values: dict[str, object] = {
        "name": "kata-test",
        "run_dir": os.path.dirname(journal.path),
        "cmdline": "quiet panic=-1",
        "memory_mib": 256,
        **changes,
    }
    return VMSettings(**values)  # type: ignore[arg-type]


def start(vm: VMSettings, journal: Journal) -> tuple[qemu_process.QemuProcess, Shell]:
    """Start a machine and its shell; `Shell.wait` waits for the guest."""
    process = qemu_process.spawn(vm, journal)
    return process, Shell(process.detach_fd("agent"), process.pidfd)
