"""QEMU for real: boot, plugs, pausing, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import minivm
import pytest
from waiting import PATIENCE

from kata import journal_undo, sysio
from kata.errors import (
    GuestAssetError,
    HostError,
    HypervisorError,
    ResourceExhaustedError,
    StateError,
    VMLostError,
)
from kata.guest import manifest
from kata.hypervisor import accel
from kata.hypervisor import root as monitor_root
from kata.hypervisor.base import Attachments, Disk, MachineShape, Nic
from kata.hypervisor.qemu import process as qemu_process
from kata.hypervisor.qemu import slots
from kata.hypervisor.qemu.machine import Qemu
from kata.hypervisor.qemu.monitor import MONITOR
from kata.hypervisor.qemu.settings import VMSettings
from kata.journal import Journal
from kata.resources import sizing

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


class Lab:
    """A kernel, an initrd, an accelerator and a place for sandboxes."""

    def __init__(self, base: Path, guest: manifest.Guest, initrd: Path) -> None:
        self.base = base
        self.guest = guest
        self.initrd = initrd
        self.accel = accel.choose().accel
        self._count = 0

    def journal(self) -> Journal:
        self._count += 1
        return minivm.sandbox_dir(self.base, f"vm{self._count}")

    def settings(self, journal: Journal, **changes: object) -> VMSettings:
        values = {"kernel": self.guest.kernel, "initrd": str(self.initrd), "accel": self.accel, **changes}
        return minivm.settings(journal, **values)

    @contextlib.contextmanager
    def machine(self, **changes: object) -> Iterator[tuple[qemu_process.QemuProcess, minivm.Shell, Journal]]:
        """A machine that has come up; undone afterwards, which must leave nothing."""
        journal = self.journal()
        share = os.path.join(os.path.dirname(journal.path), "share")
        os.mkdir(share)
        if changes.get("root"):
            root = monitor_root.prepare(os.path.dirname(journal.path), journal, serves_files=False)
            changes = {**changes, "root": root}
        process, shell = minivm.start(self.settings(journal, **{"share_dir": share, **changes}), journal)
        try:
            shell.wait()
            yield process, shell, journal
        finally:
            shell.close()
            assert journal_undo.undo(journal, 30) == []
            assert process.child.wait(30) is not None
            process.close()
            assert not os.path.exists(os.path.dirname(journal.path))

    @contextlib.asynccontextmanager
    async def engine(
        self, console_path: str = "", **changes: object
    ) -> AsyncIterator[tuple[Qemu, minivm.Shell]]:
        """The same as an engine sees it."""
        with self.machine(**changes) as (process, shell, journal):
            vm = Qemu(process, journal, console_path)
            try:
                yield vm, shell
            finally:
                await vm.stop()
                vm.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, guest_assets: Path) -> Lab:
    guest = manifest.load(str(guest_assets))
    base = tmp_path_factory.mktemp("hv")
    return Lab(base, guest, minivm.build_initrd(base / "initrd", Path(guest.initrd)))


def erofs(base: Path, text: str) -> Path:
    tree = base / f"tree-{text}"
    tree.mkdir()
    (tree / "file").write_text(text)
    image = base / f"{text}.erofs"
    subprocess.run(["mkfs.erofs", str(image), str(tree)], check=True, capture_output=True)
    return image


def test_devices_are_where_the_slots_say(lab: Lab, tmp_path: Path) -> None:
    image, writable = erofs(tmp_path, "lower"), tmp_path / "rw.img"
    writable.touch()
    os.truncate(writable, 64 << 20)
    disks = [Disk(str(image), True, "lower"), Disk(str(writable), False, "upper", True)]
    with lab.machine(disks=disks, disk_slots=len(slots.DISKS), nic=Nic("02:00:00:00:00:07")) as (
        _,
        shell,
        _,
    ):
        found = dict(
            line.split()
            for line in shell.ok(
                "for d in /sys/bus/pci/devices/*; do echo ${d##*/} $(cat $d/device); done"
            ).splitlines()
        )
        for slot, device in {
            slots.SERIAL: "0x1043",
            slots.SHARE: "0x1049",
            slots.NIC: "0x1041",
            slots.RNG: "0x1044",
            slots.BALLOON: "0x1045",
            **dict.fromkeys(slots.DISKS, "0x1042"),
        }.items():
            assert found[f"0000:00:{slot:02x}.0"] == device
        disk = {
            i: shell.ok(f"ls /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block")
            for i, slot in enumerate(slots.DISKS)
        }
        assert [shell.ok(f"cat /sys/block/{disk[i]}/ro") for i in range(4)] == ["1", "0", "1", "0"]
        assert [shell.ok(f"cat /sys/block/{disk[i]}/serial") for i in range(2)] == ["lower", "upper"]
        shell.ok(f"mount -t erofs /dev/{disk[0]} /mnt")
        assert shell.ok("cat /mnt/file") == "lower"
        shell.ok(f"echo written >/dev/{disk[1]}; sync")
        assert shell.ok("cat /sys/class/net/*/address | grep 02:00") == "02:00:00:00:00:07"
    assert writable.read_bytes()[:8] == b"written\n"


_CHIP_SET = {
    *(
        "hpet",
        "ioapic",
        "fw_cfg_io",
        "port92",
        "i8042",
        "ps2-kbd",
        "ps2-mouse",
        "isa-pcspk",
        "isa-pit",
        "kvmvapic",
    ),
    *("mc146818rtc", "isa-i8259", "i8257", "kvm-pit", "kvm-i8259", "kvm-ioapic", "kvmclock"),
}
"""What QEMU's PCs have on board and cannot leave out."""
_BOARDS = {
    "q35": {"q35-pcihost", "mch", "ICH9-LPC"},
    "microvm": {"acpi-ged-x86", "isabus-bridge", "virtio-mmio"},
    "pc": {"i440FX-pcihost", "i440FX", "PIIX3", "PIIX4_PM", "piix3-ide", "isa-fdc", "smbus-eeprom"},
}


@pytest.mark.parametrize("machine", sorted(_BOARDS))
def test_a_machine_has_no_device_that_was_not_asked_for(lab: Lab, machine: str) -> None:
    asked: set[str] = set()

    async def work() -> None:
        async with lab.engine(machine=machine, nic=Nic("02:00:00:00:00:07")) as (vm, shell):
            words = Path(f"/proc/{vm.pid}/cmdline").read_text().split("\0")
            for option, word in itertools.pairwise(words):
                if option == "-device":
                    asked.add(word.partition(",")[0])
            said = await vm.command("human-monitor-command", {"command-line": "info qtree"})
            found = set(re.findall(r"dev: ([^,]+),", said))
            assert asked <= found
            # On the bus of a virtio transport is the device itself.
            inner = {name.replace("-pci", "-device") for name in asked} - asked
            assert found - asked - inner <= _CHIP_SET | _BOARDS[machine]
            if machine == "microvm":
                # There is no PCI bus, and the machine has places for virtio devices.
                assert await asyncio.to_thread(shell.ok, "ls /sys/bus/pci/devices") == ""
                number = slots.transport(slots.NIC)
                assert f"feb0{number * 2:02x}00" in await asyncio.to_thread(shell.ok, "cat /proc/iomem")
                return
            buses = await vm.command("query-pci")
            ours = {
                one["slot"] for bus in buses for one in bus["devices"] if one["qdev_id"] or one["slot"] > 1
            }
            places = {slots.SERIAL, slots.SHARE, slots.NIC, slots.RNG, slots.BALLOON}
            assert ours - {0x1F} == {*places, *slots.DISKS[: slots.MIN_DISK_SLOTS]}
            seen = await asyncio.to_thread(shell.ok, "cat /sys/bus/pci/devices/0000:00:09.0/device")
            assert seen == "0x1041"

    asyncio.run(work())
    bus = "device" if machine == "microvm" else "pci"
    assert {f"virtio-blk-{bus}", f"virtio-net-{bus}"} <= asked


def test_empty_plugs_are_filled_while_it_runs(lab: Lab, tmp_path: Path) -> None:
    first, second = erofs(tmp_path, "one"), erofs(tmp_path, "two")
    writable = tmp_path / "rw.img"
    writable.touch()
    os.truncate(writable, 96 << 20)

    # As its engine has it: none of the host's files can be reached by name any more.
    async def work() -> None:
        async with lab.engine(share_dir="", root="own") as (vm, shell):
            await vm.confined()
            assert os.listdir(f"/proc/{vm.pid}/root") == []

            async def run(command: str) -> str:
                return await asyncio.to_thread(shell.ok, command)

            def block(address: str) -> str:
                return f"$(ls /sys/bus/pci/devices/0000:00:{address}.0/virtio*/block)"

            addresses = [await vm.attach_disk(Disk(str(image), True)) for image in (first, second)]
            assert addresses == [slots.disk_path(0), slots.disk_path(2)]
            for address, text in zip(addresses, ("one", "two"), strict=True):
                await run(f"mount -t erofs /dev/{block(address)} /mnt")
                assert await run("cat /mnt/file") == text
                await run("umount /mnt")
            with pytest.raises(HypervisorError, match="no free slot for another read-only disk"):
                await vm.attach_disk(Disk(str(first), True))

            address = await vm.attach_disk(Disk(str(writable), False))
            assert address == slots.disk_path(1)
            assert await run(f"cat /sys/block/{block(address)}/size") == str((96 << 20) // 512)
            await run(f"echo hello >/dev/{block(address)}; sync")
            assert writable.read_bytes()[:6] == b"hello\n"
            # Two machines cannot write to one image: it is locked, in the way that belongs to the open file.
            locks = Path("/proc/locks").read_text().splitlines()
            assert [line for line in locks if f":{writable.stat().st_ino} " in line and "OFDLCK" in line]

            # A slot that was emptied takes another image; what was there is nobody's any more.
            await vm.detach_disk(addresses[0])
            with pytest.raises(HypervisorError, match="no disk at 05"):
                await vm.detach_disk(addresses[0])
            await run("echo 3 >/proc/sys/vm/drop_caches")
            assert await vm.attach_disk(Disk(str(second), True)) == addresses[0]
            await run(f"mount -t erofs /dev/{block(addresses[0])} /mnt")
            assert await run("cat /mnt/file") == "two"

    asyncio.run(work())


def test_a_disk_that_cannot_be_inserted_leaves_its_slot_free(lab: Lab, tmp_path: Path) -> None:
    image = erofs(tmp_path, "good")

    async def work() -> None:
        async with lab.engine() as (vm, _):
            for _ in range(3):
                with pytest.raises(HypervisorError, match="No such file"):
                    await vm.attach_disk(Disk(str(tmp_path / "missing"), True))
            assert await vm.attach_disk(Disk(str(image), True)) == slots.disk_path(0)

    asyncio.run(work())


def test_the_spare_interface_comes_to_life(lab: Lab) -> None:
    async def work() -> None:
        async with lab.engine(nic=Nic("02:00:00:00:00:08")) as (vm, shell):
            eth = await asyncio.to_thread(
                shell.ok, f"ls /sys/bus/pci/devices/0000:00:{slots.nic_path()}.0/virtio*/net"
            )
            await vm.command("query-status")  # by now the cable is out
            await asyncio.to_thread(shell.ok, f"ip link set {eth} up")
            assert await asyncio.to_thread(shell.ok, f"cat /sys/class/net/{eth}/carrier") == "0"
            fd, address = await vm.insert_nic()
            assert address == slots.nic_path()
            assert await asyncio.to_thread(
                shell.ok,
                f"for i in 1 2 3 4 5 6 7 8 9; do grep 1 /sys/class/net/{eth}/carrier && exit; sleep 1; done; false",
            )
            with pytest.raises(HypervisorError, match="no free network interface"):
                await vm.insert_nic()
            # What the guest sends arrives, after its length.
            await asyncio.to_thread(
                shell.ok, f"ip addr add 10.0.0.1/24 dev {eth}; ping -c 1 -W 1 10.0.0.2 || true"
            )
            assert len(await asyncio.to_thread(os.read, fd, 4096)) > 18
            os.close(fd)

    asyncio.run(work())


def test_the_share_shows_a_directory_of_the_host(lab: Lab, tmp_path: Path) -> None:
    share = tmp_path / "s,hare"
    share.mkdir()
    (share / "from-host").write_text("hello")
    with lab.machine(share_dir=str(share)) as (_, shell, _):
        shell.ok(f"mount -t 9p -o trans=virtio,version=9p2000.L,nosuid,nodev {slots.SHARE_TAG} /mnt")
        assert shell.ok("cat /mnt/from-host") == "hello"
        shell.ok(
            "echo hi >/mnt/from-guest; chown 1234:1235 /mnt/from-guest; chmod 4711 /mnt/from-guest; "
            "mkdir /mnt/d; ln -s d /mnt/l"
        )
    status = (share / "from-guest").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 1235, 0o4711)
    assert os.readlink(share / "l") == "d"


def test_without_a_share_there_is_an_empty_directory_that_cannot_be_written(lab: Lab) -> None:
    """Its device is there all the same, and a hostile guest may mount it."""
    journal = lab.journal()
    shape = MachineShape(kernel=lab.guest.kernel, initrd=str(lab.initrd), accel=lab.accel, memory_mib=256)
    attachments = Attachments(sandbox_id="x", run_dir=os.path.dirname(journal.path))

    async def main() -> None:
        started = MONITOR.start(shape, attachments, journal)
        shell = minivm.Shell(started.detach_fd("agent"), started.pidfd)
        vm = MONITOR.adopt(started, journal)
        try:
            await asyncio.to_thread(shell.wait)
            await vm.confined()
            mount = f"mount -t 9p -o trans=virtio,version=9p2000.L {started.share_tag} /mnt"
            assert await asyncio.to_thread(shell.ok, f"{mount}; ls -A /mnt") == ""
            status, said = await asyncio.to_thread(shell.run, "echo x >/mnt/x")
            assert status
            assert "Read-only file system" in said
            assert os.listdir(os.path.join(attachments.run_dir, monitor_root.NAME)) == []
        finally:
            shell.close()
            await vm.stop()
            vm.close()
            assert journal_undo.undo(journal, 30) == []

    asyncio.run(main())


def test_pause_and_resume(lab: Lab) -> None:
    async def work() -> None:
        async with lab.engine() as (vm, shell):
            events: list[str] = []
            vm.on_event(lambda name, data: events.append(name))
            await vm.pause()
            answer = asyncio.create_task(asyncio.to_thread(shell.run, "echo awake"))
            _, pending = await asyncio.wait([answer], timeout=1)
            assert pending, "a paused machine answered"
            await vm.resume()
            assert await answer == (0, "awake\n")
            assert events[:2] == ["STOP", "RESUME"]
            figures = await vm.metrics()
            assert figures["rss_bytes"] > 10 << 20
            memory_bytes = vm.settings.memory_mib << 20
            assert 10 << 20 < figures["guest_resident_bytes"] < min(memory_bytes, figures["rss_bytes"])
            assert figures["cpu_ns"] > 0

    asyncio.run(work())


def test_every_end_is_told_apart(lab: Lab) -> None:
    async def end_by(command: str) -> tuple[str, str]:
        async with lab.engine() as (vm, shell):
            await vm.command("query-status")  # from now on it tells what happens
            sock = shell._sock
            sock.sendall(command.encode() + b"\n")
            ended = await asyncio.wait_for(vm.wait(), PATIENCE)
            assert isinstance(ended.error, VMLostError)
            with pytest.raises(VMLostError):
                await vm.pause()
            return ended.reason, ended.error.message

    inside = "the virtual machine was switched off from inside"
    assert asyncio.run(end_by("poweroff -f")) == ("poweroff", f"{inside} (poweroff)")
    assert asyncio.run(end_by("reboot -f")) == ("reboot", f"{inside} (reboot)")
    reason, words = asyncio.run(end_by("echo c >/proc/sysrq-trigger"))
    assert reason == "panic"
    assert "sysrq" in words


def test_a_killed_hypervisor_is_noticed_at_once(lab: Lab) -> None:
    async def work() -> None:
        async with lab.engine() as (vm, _):
            waiting = asyncio.create_task(
                vm.command("human-monitor-command", {"command-line": "info version"})
            )
            await waiting
            # Process 1 of its namespace: a signal without a handler passes by, whoever sends it; a fault of its own
            # would not.
            os.kill(vm.pid, signal.SIGSEGV)
            os.kill(vm.pid, signal.SIGKILL)
            ended = await asyncio.wait_for(vm.wait(), PATIENCE)
            assert ended.reason == "crashed"
            assert ended.status == -signal.SIGKILL
            assert isinstance(ended.error, VMLostError)
            assert "signal 9" in ended.error.message
            with pytest.raises(VMLostError):
                await vm.attach_disk(Disk("/dev/null", True))
            assert (await vm.stop()).reason == "crashed"
            assert await vm.metrics() == {}

    asyncio.run(work())


def test_a_hypervisor_that_somebody_ends_is_no_guest_that_switched_itself_off(lab: Lab) -> None:
    async def work() -> None:
        async with lab.engine() as (vm, _):
            await vm.command("query-status")  # from now on it tells what happens
            os.kill(vm.pid, signal.SIGTERM)
            ended = await asyncio.wait_for(vm.wait(), PATIENCE)
            assert (ended.reason, ended.status) == ("ended", 0)
            assert "by a signal to QEMU" in str(ended.error)

    asyncio.run(work())


def test_stop_is_orderly_and_no_surprise(lab: Lab) -> None:
    async def work() -> None:
        async with lab.engine() as (vm, _):
            ended = await vm.stop(grace_s=20)
            assert (ended.reason, ended.status, ended.error) == ("stopped", 0, None)
            assert await vm.stop() is ended

    asyncio.run(work())


def test_the_hypervisor_dies_with_its_engine(lab: Lab, tmp_path: Path) -> None:
    journal = lab.journal()
    vm = lab.settings(journal)
    journal.close()
    script = tmp_path / "engine.py"
    script.write_text(
        f"import sys, os, time; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "import minivm\n"
        "from kata.journal import Journal\n"
        f"journal = Journal.open({journal.path!r}); journal.set_owner(os.getpid())\n"
        f"vm = minivm.settings(journal, kernel={vm.kernel!r}, initrd={vm.initrd!r}, accel={vm.accel!r})\n"
        "process, shell = minivm.start(vm, journal)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    engine = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    pidfd = os.pidfd_open(int(engine.stdout.readline()))
    engine.kill()
    engine.wait()
    engine.stdout.close()
    assert sysio.pidfd_wait(pidfd, 30)
    os.close(pidfd)
    left = Journal.open(journal.path)
    assert not left.owner_alive()
    assert journal_undo.undo(left) == []


def _failure(lab: Lab, journal: Journal, **changes: object) -> Exception | None:
    """How a start fails, in the words of `spawn` or of QEMU's end."""
    try:
        process, shell = minivm.start(lab.settings(journal, **changes), journal)
    except Exception as raised:
        return raised
    assert process.child.wait(30) is not None, "it did not fail"
    error = process.failure()
    shell.close()
    process.close()
    return error


def test_failures_are_sentences_and_leave_nothing(lab: Lab, tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken", tmp_path / "empty"
    broken.write_bytes(os.urandom(4096))
    empty.touch()
    journal = lab.journal()
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"kernel": str(tmp_path / "no")}, GuestAssetError, "No such file"),
        ({"kernel": str(empty)}, GuestAssetError, "is empty"),
        ({"kernel": str(broken)}, GuestAssetError, str(broken)),
        ({"initrd": str(tmp_path / "no")}, GuestAssetError, "No such file"),
        ({"binary": "/no/qemu"}, HostError, "does not exist"),
        ({"binary": str(broken)}, HypervisorError, "cannot start QEMU"),
        ({"firmware": "no.rom"}, HostError, "firmware no.rom is missing"),
        ({"disks": [Disk(str(tmp_path / "no"), True)]}, HypervisorError, "No such file"),
        ({"memory_mib": 64 << 20}, ResourceExhaustedError, str(64 << 20)),
    ]
    for changes, kind, words in cases:
        error = _failure(lab, journal, **changes)
        assert type(error) is kind, (changes, error)
        assert words in str(error)
        assert getattr(error, "hint", "") or kind is HypervisorError, changes
    assert [entry for entry in journal.entries if not entry.gone] == []
    assert journal_undo.undo(journal) == []


def test_a_disk_is_used_by_one_machine(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "rw.img"
    image.touch()
    os.truncate(image, 1 << 20)
    with lab.machine(disks=[None, Disk(str(image), False)]):
        journal = lab.journal()
        error = _failure(lab, journal, disks=[None, Disk(str(image), False)])
        assert type(error) is StateError
        assert "in use by another" in str(error)
        assert journal_undo.undo(journal) == []


def test_the_console_is_kept_and_bounded(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "console.log"

    async def work() -> None:
        async with lab.engine(str(path), console="serial") as (vm, shell):
            await asyncio.to_thread(
                shell.ok, "echo to the console >/dev/ttyS0; echo '\033[31mred' >/dev/ttyS0"
            )
            deadline = time.monotonic() + PATIENCE
            while "red" not in vm.console_tail() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            tail = vm.console_tail()
            assert "to the console" in tail
            assert "\x1b" not in tail
            assert "\\x1b[31mred" in tail
            for _ in range(3):
                vm.console.feed(b"x" * 700_000)
            assert vm.console_tail() == "x" * 4096

    asyncio.run(work())
    assert path.stat().st_size + Path(f"{path}.1").stat().st_size <= 1 << 20


@pytest.mark.parametrize("mib", [64, 512, 3000])
def test_the_guest_has_the_memory_that_was_asked_for(lab: Lab, mib: int) -> None:
    size = sizing.plan(sizing.ResourceRequest(None, mib << 20), lab.guest.kernel_kind)
    with lab.machine(memory_mib=size.memory_mib) as (_, shell, _):
        total = int(re.findall(r"\d+", shell.ok("grep MemTotal /proc/meminfo"))[0])
    least = sizing.total_of(mib << 20, lab.guest.kernel_kind) >> 10
    assert least <= total <= least * 1.05


def test_processors(lab: Lab) -> None:
    with lab.machine(vcpus=2) as (_, shell, _):
        assert shell.ok("nproc") == "2"


def test_it_tells_where_processors_stand(lab: Lab) -> None:
    async def work() -> list[str]:
        async with lab.engine() as (vm, _):
            return await vm.processors()

    first, *controller = asyncio.run(work())
    assert re.fullmatch(r"0: RIP=[0-9a-f]{16} RFL=[0-9a-f]{8} CPL=[03] HLT=[01]", first)
    assert {line.split()[0] for line in controller} >= {"LVTT", "ISR", "IRR"}
