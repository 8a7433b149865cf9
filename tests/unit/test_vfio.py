"""Which devices of the host a machine could be given, in a tree that is like sysfs.

A machine without an IOMMU has no such groups, so the tree is made, and `Kernel` does what the kernel does when somebody
writes to ``driver_override``, ``unbind`` and ``drivers_probe``.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from kata import journal_undo, mount_table, pci_driver, sysio
from kata.config import files
from kata.engine import machine
from kata.engine.containers import nodes
from kata.errors import HostError, KataError, NotFoundError, StateError, UnsupportedError
from kata.hypervisor import registry, vfio
from kata.hypervisor.base import Attachments, MachineShape
from kata.hypervisor.cloud_hypervisor import command as cloud_hypervisor
from kata.hypervisor.qemu import command
from kata.hypervisor.qemu.settings import VMSettings
from kata.journal import Journal, process_identity
from kata.json_text import dumps

NIC, SOUND, BRIDGE = "0000:3b:00.0", "0000:3b:00.1", "0000:3a:00.0"


class Kernel:
    """A tree with devices and drivers.

    Args:
        base: Where it is made.

    Attributes:
        refuses: Addresses of devices that no driver would have.
    """

    def __init__(self, base: Path) -> None:
        self.sys = base / "sys"
        self.pci = self.sys / "bus/pci"
        self.natural: dict[str, str] = {}
        self.refuses: set[str] = set()
        (self.sys / "kernel/iommu_groups").mkdir(parents=True)
        (self.pci / "devices").mkdir(parents=True)
        (self.pci / "drivers_probe").touch()

    def driver(self, name: str) -> None:
        (self.pci / "drivers" / name).mkdir(parents=True, exist_ok=True)
        (self.pci / "drivers" / name / "unbind").touch()

    def device(self, address: str, group: int | None, kind: str, driver: str) -> Path:
        place = self.pci / "devices" / address
        place.mkdir()
        (place / "class").write_text(kind + "\n")
        (place / "driver_override").write_text("(null)\n")
        if group is not None:
            members = self.sys / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(place)
            (place / "iommu_group").symlink_to(members.parent)
        self.natural[address] = driver
        if driver:
            self.driver(driver)
            (place / "driver").symlink_to(self.pci / "drivers" / driver)
        return place

    def write(self, path: str, text: str) -> None:
        """In place of `sysio.write_existing`."""
        address = text.strip()
        if not os.path.exists(path):
            raise FileNotFoundError(2, "No such file or directory", path)
        if path.endswith("/driver_override"):
            Path(path).write_text(text if address else "(null)\n")
        elif path.endswith("/unbind"):
            assert Path(path).parent.resolve() == (self.pci / "devices" / address / "driver").resolve()
            (self.pci / "devices" / address / "driver").unlink()
        else:
            assert path == str(self.pci / "drivers_probe")
            place = self.pci / "devices" / address
            wanted = pci_driver.override(str(place)) or self.natural[address]
            if wanted and address not in self.refuses and not (place / "driver").exists():
                (place / "driver").symlink_to(self.pci / "drivers" / wanted)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    made.driver("vfio-pci")
    made.device(BRIDGE, 7, "0x060400", "pcieport")
    made.device(NIC, 7, "0x020000", "igb")
    made.device(SOUND, 7, "0x040300", "")
    monkeypatch.setattr(sysio, "write_existing", made.write)
    return made


def driver(kernel: Kernel, address: str) -> str:
    return pci_driver.of(str(kernel.pci / "devices" / address))


def new(base: Path) -> Journal:
    return Journal.create_dir(str(base / "sandboxes"), "a", {"client": "test", "id": "a"})


def test_a_group_has_all_its_devices_and_bridges_stay_with_the_host(kernel: Kernel) -> None:
    found = vfio.group(7, str(kernel.sys))
    assert found.number == 7
    assert [one.address for one in found.members] == [BRIDGE, NIC, SOUND]
    assert [one.address for one in found.taken()] == [NIC, SOUND]
    assert found.obstacles() == []
    with pytest.raises(StateError) as info:
        vfio.require(found)
    assert f"{NIC} has the driver igb; {SOUND} has no driver" in info.value.message
    assert "vfio-pci" in info.value.hint


def test_what_is_not_there_is_named(kernel: Kernel) -> None:
    with pytest.raises(NotFoundError, match="no IOMMU group 8"):
        vfio.group(8, str(kernel.sys))


def test_what_the_host_uses_is_an_obstacle(kernel: Kernel, tmp_path: Path) -> None:
    """A network interface that is up; the disk that the host's files are on, by SATA, NVMe and virtio."""
    nic = kernel.pci / "devices" / NIC
    for name, flags in (("eth0", "0x1003"), ("eth1", "0x1002")):
        (nic / "net" / name).mkdir(parents=True)
        (nic / "net" / name / "flags").write_text(flags + "\n")
    mounted = next(one for one in mount_table.mounts(1) if one.target == "/").device
    held = {}
    for number, where in enumerate(
        ("ata1/host0/target0:0:0/0:0:0:0/block/sdx", "nvme/nvme9/nvme9n1", "virtio3/block/vdx")
    ):
        address = f"0000:0{number}:00.0"
        disk = kernel.device(address, 20 + number, "0x010802", "some") / where
        (disk / "queue").mkdir(parents=True)
        (disk / "dev").write_text("250:0\n")
        part = disk / f"{disk.name}p1"
        (part / "holders" / "dm-7").mkdir(parents=True)
        (part / "partition").write_text("1\n")
        (part / "dev").write_text(mounted + "\n")
        held[address] = disk.name
    with pytest.raises(StateError) as info:
        vfio.require(vfio.group(7, str(kernel.sys)))
    assert f"{NIC} is the network interface eth0, which is up" in info.value.message
    assert "eth1" not in info.value.message
    for number, (address, name) in enumerate(held.items()):
        obstacles = vfio.group(20 + number, str(kernel.sys)).obstacles()
        assert f"{address} is the disk {name}, which is mounted at /" in obstacles
        assert f"{address} is the disk {name}, which belongs to dm-7" in obstacles
    journal = new(tmp_path)
    with pytest.raises(StateError, match="eth0"):
        vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    assert journal.entries == []
    assert driver(kernel, NIC) == "igb"
    journal_undo.undo(journal)


def test_a_file_system_that_does_not_tell_its_disk_is_an_obstacle(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Btrfs, where a mount has another number than the disk below it."""
    mounted = next(one for one in mount_table.mounts(1) if one.target == "/").device
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{mounted}"))
    if not os.path.exists(f"/dev/{name}"):
        pytest.skip("the root file system of this machine is on no disk that can be seen")
    monkeypatch.setattr(vfio, "_host_mounts", list)
    really = os.open

    def opened(path: str, flags: int, *rest: int, **more: int) -> int:
        if path == f"/dev/{name}" and flags & os.O_EXCL:  # it may be that nobody may open it here
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    place = kernel.device("0000:05:00.0", 25, "0x010802", "some") / "block" / name
    (place / "queue").mkdir(parents=True)
    (place / "dev").write_text(mounted + "\n")
    assert vfio.group(25, str(kernel.sys)).obstacles() == [
        f"0000:05:00.0 is the disk {name}, which is in use (/dev/{name})"
    ]
    (place / "dev").write_text("250:9\n")  # a disk of the same name that is another one
    assert vfio.group(25, str(kernel.sys)).obstacles() == []


def test_a_device_with_more_below_it_than_can_be_looked_at_stays(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfio, "_MOST_PATHS", 20)
    for number in range(30):
        (kernel.pci / "devices" / NIC / f"target{number}").mkdir()
    [why] = vfio.group(7, str(kernel.sys)).obstacles()
    assert "too many directories" in why


def test_taken_and_given_back(kernel: Kernel, tmp_path: Path) -> None:
    journal = new(tmp_path)
    vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    assert [driver(kernel, one) for one in (BRIDGE, NIC, SOUND)] == ["pcieport", "vfio-pci", "vfio-pci"]
    vfio.require(vfio.group(7, str(kernel.sys)))
    # A second time there is nothing to do, and nothing to undo.
    before = len(journal.entries)
    vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    assert len(journal.entries) == before == 2
    assert journal_undo.undo(journal) == []
    assert [driver(kernel, one) for one in (BRIDGE, NIC, SOUND)] == ["pcieport", "igb", ""]
    assert pci_driver.override(str(kernel.pci / "devices" / NIC)) == ""


@pytest.mark.parametrize("steps", range(5))
def test_given_back_after_its_maker_was_killed_at_any_step(
    steps: int, kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so many writes to sysfs done: of the network interface three, of the other device two."""

    class Killed(BaseException):
        pass

    left = [steps]

    def write(path: str, text: str) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        kernel.write(path, text)

    journal = new(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sysio, "write_existing", write)
        with pytest.raises(Killed):
            vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    ended = subprocess.Popen(["true"])
    identity = process_identity(ended.pid)
    ended.wait()
    with open(journal.path, "a", encoding="ascii") as file:
        file.write(dumps({"owner": identity}) + "\n")
    path = journal.path
    journal.close()
    report = journal_undo.reconcile_sandboxes(str(tmp_path / "sandboxes"), "test")
    assert report.failures == []
    assert not os.path.exists(path)
    assert [driver(kernel, one) for one in (NIC, SOUND)] == ["igb", ""]
    assert pci_driver.override(str(kernel.pci / "devices" / NIC)) == ""


def test_a_device_that_somebody_else_has_given_another_driver_is_left_alone(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.driver("uio_pci_generic")
    journal = new(tmp_path)
    vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    pci_driver.give(str(kernel.pci / "devices" / NIC), "uio_pci_generic")
    assert journal_undo.undo(journal) == []
    assert driver(kernel, NIC) == "uio_pci_generic"


def test_what_goes_wrong_is_said_and_undone(kernel: Kernel, tmp_path: Path) -> None:
    kernel.refuses.add(SOUND)
    journal = new(tmp_path)
    with pytest.raises(HostError, match=f"vfio-pci would not have the device {SOUND}"):
        vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    assert journal_undo.undo(journal) == []
    assert [driver(kernel, one) for one in (NIC, SOUND)] == ["igb", ""]


def test_without_the_driver_nothing_is_changed(kernel: Kernel, tmp_path: Path) -> None:
    (kernel.pci / "drivers/vfio-pci/unbind").unlink()
    (kernel.pci / "drivers/vfio-pci").rmdir()
    journal = new(tmp_path)
    with pytest.raises(HostError, match="no driver vfio-pci") as info:
        vfio.take(vfio.group(7, str(kernel.sys)), journal, str(kernel.sys))
    assert info.value.hint == "modprobe vfio-pci"
    assert journal.entries == []
    journal_undo.undo(journal)


# ---- this machine ----


@pytest.mark.parametrize("name", ["vfio", "999999"])
def test_a_container_that_wants_a_group_is_told_what_is_in_the_way(name: str) -> None:
    device = {"path": f"/dev/vfio/{name}", "type": "c", "major": 511, "minor": 0}
    with pytest.raises(UnsupportedError, match=f"cannot pass /dev/vfio/{name} through") as info:
        nodes.of_guest({"linux": {"devices": [device]}})
    try:
        vfio.group(999999)
    except KataError as error:
        if isinstance(error, HostError):
            assert "no IOMMU" in info.value.message
            assert "intel_iommu=on" in info.value.hint
    assert info.value.hint


def test_real_devices_are_looked_at() -> None:
    if not os.path.isdir("/sys/kernel/iommu_groups") or not os.listdir("/sys/kernel/iommu_groups"):
        with pytest.raises(HostError, match="has no IOMMU"):
            vfio.groups()
        return
    for number in vfio.groups():
        assert vfio.group(number).members


def test_groups_for_a_machine(kernel: Kernel, tmp_path: Path) -> None:
    """All devices of the groups, set aside; what they had before comes back with the journal."""
    journal = new(tmp_path)
    with pytest.raises(NotFoundError):
        vfio.give([7, 8], journal, str(kernel.sys))
    assert driver(kernel, NIC) == "igb"
    given = vfio.give([7], journal, str(kernel.sys))
    assert given.addresses == [NIC, SOUND]
    assert given.nodes == ["/dev/vfio/vfio", "/dev/vfio/7"]
    assert [driver(kernel, one) for one in (NIC, SOUND, BRIDGE)] == [vfio.DRIVER, vfio.DRIVER, "pcieport"]
    assert journal_undo.undo(journal) == []
    assert [driver(kernel, one) for one in (NIC, SOUND, BRIDGE)] == ["igb", "", "pcieport"]


def test_more_devices_than_a_machine_has_ports_for(kernel: Kernel, tmp_path: Path) -> None:
    for number in range(5):
        kernel.device(f"0000:5e:00.{number}", 9, "0x020000", "igc")
    with pytest.raises(UnsupportedError, match=r"a machine can be given 4 devices of the host, .* have 5"):
        vfio.give([9], new(tmp_path), str(kernel.sys))
    assert driver(kernel, "0000:5e:00.0") == "igc"


def test_which_groups_a_container_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "configuration.toml"
    config = {
        "linux": {
            "devices": [
                {"path": path, "type": "c", "major": 240, "minor": minor}
                for minor, path in enumerate(
                    ("/dev/vfio/vfio", "/dev/vfio/12", "/dev/vfio/7", "/dev/vfio/7")
                )
            ]
        }
    }
    for port, wanted in (("no-port", []), ("root-port", [7, 12])):
        file.write_text(f'[hypervisor.qemu]\ncold_plug_vfio = "{port}"\n')
        assert machine.host_devices(files.load(str(file)), config) == wanted
    # The nodes of what the machine has are the host's; those of other groups are refused.
    found, _ = nodes.of_guest(config, [7, 12])
    assert found["linux"]["devices"] == []
    with pytest.raises(UnsupportedError, match="cannot pass /dev/vfio/12 through to the machine"):
        nodes.of_guest(config, [7])


def test_what_each_hypervisor_is_told() -> None:
    vm = VMSettings(
        name="x",
        run_dir="/r",
        kernel="/k",
        initrd="/i",
        accel="kvm",
        host_devices=[NIC, SOUND],
        host_nodes=["/dev/vfio/7"],
    )
    argv = " ".join(command.build(vm, command.Fds(5, 6, None, kernel=7, initrd=8, disks={}, nic=9)))
    assert (
        f"-device pcie-root-port,id=host0,addr=0x18,chassis=24,slot=24 -device vfio-pci,host={NIC},bus=host0"
        in argv
    )
    assert f"-device vfio-pci,host={SOUND},bus=host1" in argv
    attachments = Attachments(sandbox_id="x", run_dir="/r", host_devices=[NIC, SOUND])
    shape = MachineShape(kernel="/k", initrd="/i", accel="kvm", host_devices=2)
    told = cloud_hypervisor.build(
        "/ch", shape, attachments, "/d", {"kernel": 3, "initrd": 4, "api": 5, "events": 6}
    )
    at = told.index("--device")
    assert told[at + 1 : at + 3] == [
        f"path=/sys/bus/pci/devices/{NIC}/,id=host0",
        f"path=/sys/bus/pci/devices/{SOUND}/,id=host1",
    ]
    can = {name: registry.find(name).capabilities("kvm", {}).host_devices for name in registry.names()}
    assert can == {"qemu": True, "cloud-hypervisor": True, "firecracker": False}
    assert not registry.find("qemu").capabilities("tcg", {}).host_devices
    assert not registry.find("qemu").capabilities("kvm", {"machine": "pc"}).host_devices
