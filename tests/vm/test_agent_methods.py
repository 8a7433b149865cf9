"""The agent's methods about the guest as a whole, its storages and devices: one machine with a device of each kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_support import (
    MIB,
    PATIENCE,
    PRIVILEGED,
    STATE,
    Background,
    Container,
    Guest,
    caps,
    error,
    mount,
)

from kata.hypervisor.settings import Disk
from kata.proto import agent_pb as agent
from kata.proto import csi_pb as csi
from kata.proto import oci_pb as oci
from kata.proto import types_pb as types
from kata.ttrpc.status import FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(1200)]

VOLUMES = f"{STATE}/shared/containers"
SWAP, PLAIN = 0x07, 0x08
"""The slots of a disk with a swap header and of one with nothing on it."""

DEVICES = [
    *("-m", "slots=2,maxmem=1G"),
    *("-device", "virtio-scsi-pci,id=scsi,addr=0x10,disable-legacy=on"),
    *("-blockdev", "driver=file,node-name=xfs,filename={xfs}"),
    *("-device", "scsi-hd,drive=xfs,bus=scsi.0,scsi-id=3,lun=1"),
    *("-device", "pcie-root-port,id=plug,addr=0x11,chassis=1,slot=1"),
    # As large as a block of memory: what is plugged in behind it must lie at such a boundary.
    *("-object", "memory-backend-file,id=pmem,share=on,mem-path={pmem},size=128M"),
    *("-device", "virtio-pmem-pci,addr=0x12,memdev=pmem"),
    *("-netdev", "user,id=net,restrict=on"),
    *("-device", "virtio-net-pci,addr=0x13,netdev=net,romfile=,mac=52:54:00:00:00:09"),
]
"""What this machine has beyond those that the engine makes."""


def program(name: str) -> str:
    """Path of a program that makes a file system."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    assert found, f"{name} is missing"
    return found


def make(path: Path, size: int, *argv: str) -> Path:
    """A file of a size, made into what `argv` makes of it."""
    with path.open("wb") as file:
        file.truncate(size)
    if argv:
        done = subprocess.run(
            [program(argv[0]), *argv[1:], path], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return path


class Machine(Guest):
    """A guest with more devices, and QEMU's control channel in our hands."""

    def __init__(self, base: Path, guest_dir: Path, image: str) -> None:
        directory = base / "agent-methods"
        directory.mkdir()
        self.ext4 = make(directory / "ext4.img", 32 * MIB, "mkfs.ext4", "-q")
        self.xfs = make(directory / "xfs.img", 320 * MIB, "mkfs.xfs", "-q")
        self.hot = make(directory / "hot.img", MIB)
        self.hot.write_bytes(b"hot".ljust(512) + bytes(MIB - 512))
        swap = make(directory / "swap.img", 16 * MIB, "mkswap")
        plain = make(directory / "plain.img", MIB)
        pmem = make(directory / "pmem.img", 128 * MIB)
        with pmem.open("r+b") as file:
            file.write(b"pmem")
        self.share = directory / "share"
        self.share.mkdir()
        # The command builder knows none of these devices: they come behind what it says.
        more = " ".join(f"'{word.format(xfs=self.xfs, pmem=pmem)}'" for word in DEVICES)
        qemu = directory / "qemu"
        qemu.write_text(f'#!/bin/sh\nexec {program("qemu-system-x86_64")} "$@" {more}\n')
        qemu.chmod(0o755)
        super().__init__(
            base,
            guest_dir,
            image,
            cmdline="agent.hotplug_timeout=6",
            vcpus=2,
            disks=[Disk(str(self.ext4), False), Disk(str(swap), False), Disk(str(plain), False)],
            binary=str(qemu),
            share_dir=str(self.share),
        )
        self._qmp = socket.socket(fileno=self.qemu.take("qmp"))
        self._qmp.settimeout(PATIENCE)
        self._lines = self._qmp.makefile("rb")

    def qmp(self, command: str, **arguments: Any) -> None:
        """One command to QEMU."""
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            line = self._lines.readline()
            assert line, f"QEMU has ended: {self.qemu.stderr_text()}"
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return

    def close(self) -> None:
        self._lines.close()
        self._qmp.close()
        super().close()

    def volume(self, path: str) -> csi.VolumeUsage:
        """How full a volume is, in bytes."""
        request = agent.VolumeStatsRequest(volume_guest_path=path)
        found = self.ask("GetVolumeStats", request, csi.VolumeStatsResponse)
        assert [usage.unit for usage in found.usage] == [1, 2]
        assert found.usage[1].available
        return found.usage[0]

    def resize(self, path: str, size: int) -> None:
        """Grow a volume's file system."""
        self.tell("ResizeVolume", agent.ResizeVolumeRequest(volume_guest_path=path, size=size))


@pytest.fixture(scope="module")
def guest(run_directory: Path, guest_assets: Path, busybox_image: str) -> Iterator[Machine]:
    guest = Machine(run_directory, guest_assets, busybox_image)
    try:
        guest.qmp("qmp_capabilities")
        guest.health()
        share = agent.Storage(
            driver="9p", source="kataShared", fstype="9p", options=["nodev"], mount_point=VOLUMES
        )
        guest.tell("CreateSandbox", agent.CreateSandboxRequest(sandbox_id="s", storages=[share]))
        yield guest
    finally:
        guest.close()


@pytest.fixture(scope="module")
def box(guest: Machine) -> Iterator[Container]:
    """A container with a volume on an ext4 disk and one on an XFS disk, that runs until it is removed."""
    disks = [
        agent.Storage(driver="blk", source="06", fstype="ext4", mount_point=f"{STATE}/volumes/ext4"),
        agent.Storage(driver="scsi", source="3:1", fstype="xfs", mount_point=f"{STATE}/volumes/xfs"),
    ]
    bound = [mount(f"/{kind}", "bind", f"{STATE}/volumes/{kind}", "rbind") for kind in ("ext4", "xfs")]
    tmp = mount("/tmp", "tmpfs", "tmpfs", "mode=1777")
    box = Container(guest, "box", "sleep", "100000", more_disks=disks, mounts=[*bound, tmp])
    yield box
    box.remove()


def test_metrics_have_the_names_that_dashboards_ask_for(guest: Machine) -> None:
    text = guest.ask("GetMetrics", agent.GetMetricsRequest(), agent.Metrics).metrics
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    families = {name.split("{")[0] for name in values}
    wanted = [
        "io_stat",
        "proc_stat",
        "proc_status",
        "scrape_count",
        "threads",
        "total_rss",
        "total_time",
        "total_vm",
    ]
    assert {f"kata_agent_{name}" for name in wanted} <= families
    wanted = ["cpu_time", "diskstat", "load", "meminfo", "netdev_stat", "tasks", "vm_stat"]
    assert {f"kata_guest_{name}" for name in wanted} <= families
    assert float(values['kata_guest_meminfo{item="mem_total"}']) > 100 * MIB
    assert float(values['kata_guest_diskstat{disk="vda",item="sectors_read"}']) > 0
    assert float(values["kata_agent_total_rss"]) > 100_000
    assert values["kata_agent_threads"] == "1"
    scrapes = int(values["kata_agent_scrape_count"])
    again = guest.ask("GetMetrics", agent.GetMetricsRequest(), agent.Metrics).metrics
    assert f"kata_agent_scrape_count {scrapes + 1}\n" in again


def test_swap_comes_from_a_disk_with_a_header(guest: Machine, box: Container) -> None:
    guest.tell("AddSwap", agent.AddSwapRequest(PCIPath=[SWAP]))
    swaps = box.sh("swaps", "cat /proc/swaps")[1]
    node = re.search(r"^(/\S+) .*partition", swaps, re.M)
    assert node, swaps
    code, words = error(guest.tell, "AddSwapPath", agent.AddSwapPathRequest(path=node[1]))
    assert "in use already" in words
    code, words = error(guest.tell, "AddSwap", agent.AddSwapRequest(PCIPath=[PLAIN]))
    assert (code, "mkswap" in words) == (FAILED_PRECONDITION, True)
    assert error(guest.tell, "AddSwapPath", agent.AddSwapPathRequest(path="/etc/x"))[0] == INVALID_ARGUMENT


@pytest.mark.parametrize(("kind", "size"), [("ext4", 96 * MIB), ("xfs", 512 * MIB)])
def test_a_volume_grows_while_it_is_used(guest: Machine, box: Container, kind: str, size: int) -> None:
    path = f"{STATE}/volumes/{kind}"
    assert box.sh(f"w-{kind}", f"echo kept >/{kind}/file && df /{kind}")[0] == 0
    before = guest.volume(path)
    image: Path = getattr(guest, kind)
    code, words = error(guest.resize, path, size)
    assert (code, "enlarge it on the host" in words) == (FAILED_PRECONDITION, True), words
    os.truncate(image, size)
    guest.qmp("block_resize", **{"node-name": {"ext4": "slot1", "xfs": "xfs"}[kind]}, size=size)
    guest.resize(path, size)
    after = guest.volume(path)
    assert after.total > size * 0.8 > before.total
    assert after.available > before.available
    assert box.sh(f"r-{kind}", f"cat /{kind}/file && df -m /{kind}")[1].startswith("kept")
    guest.resize(path, 0)
    assert error(guest.resize, path, size // 2)[0] == INVALID_ARGUMENT


def test_volumes_that_cannot_grow_say_why(guest: Machine) -> None:
    assert error(guest.volume, "/nonexistent")[0] == NOT_FOUND
    code, words = error(guest.resize, VOLUMES, MIB)
    assert (code, "no disk of its own" in words) == (FAILED_PRECONDITION, True)
    code, words = error(guest.resize, f"{STATE}/box/lower", 0)
    assert (code, "ext4 and XFS" in words) == (UNIMPLEMENTED, True)


def test_the_network_is_set_up_and_counted(guest: Machine, box: Container) -> None:
    wanted = types.Interface(
        name="eth7",
        hwAddr="52:54:00:00:00:09",
        mtu=1400,
        IPAddresses=[types.IPAddress(address="10.0.2.15", mask="24")],
    )
    made = guest.ask("UpdateInterface", agent.UpdateInterfaceRequest(interface=wanted), types.Interface)
    assert (made.name, made.mtu) == ("eth7", 1400)
    neighbor = types.ARPNeighbor(
        toIPAddress=types.IPAddress(address="10.0.2.77"), device="eth7", lladdr="02:00:00:00:00:77"
    )
    neighbors = agent.ARPNeighbors(ARPNeighbors=[neighbor])
    guest.tell("AddARPNeighbors", agent.AddARPNeighborsRequest(neighbors=neighbors))
    assert "02:00:00:00:00:77" in box.sh("arp", "cat /proc/net/arp")[1]
    routes = guest.ask("ListRoutes", agent.ListRoutesRequest(), agent.Routes)
    assert ("10.0.2.0/24", "eth7") in [(route.dest, route.device) for route in routes.Routes]
    # Nobody answers, but the packet leaves.
    box.sh("ping", "ping -c 1 -w 1 10.0.2.77")
    request = agent.StatsContainerRequest(container_id="box")
    found = guest.ask("StatsContainer", request, agent.StatsContainerResponse)
    counted = {stats.name: stats for stats in found.network_stats}["eth7"]
    assert counted.tx_packets
    assert counted.tx_bytes >= 98


def test_statistics_name_every_disk(guest: Machine, box: Container) -> None:
    assert box.sh("io", "echo x >/ext4/a; echo x >/xfs/a; sync")[0] == 0
    request = agent.StatsContainerRequest(container_id="box")
    found = guest.ask("StatsContainer", request, agent.StatsContainerResponse)
    assert found.cgroup_stats
    assert found.cgroup_stats.blkio_stats
    disks = {(e.major, e.minor) for e in found.cgroup_stats.blkio_stats.io_service_bytes_recursive}
    for kind in ("ext4", "xfs"):
        number = int(box.sh(f"dev-{kind}", f"stat -c %d /{kind}")[1])
        assert (os.major(number), os.minor(number)) in disks


def device(path: str) -> oci.LinuxDevice:
    """A disk of a spec, under a number that only the host knows."""
    return oci.LinuxDevice(Path=path, Type="b", Major=259, Minor=77, FileMode=0o600)


def test_devices_are_found_by_where_they_are(guest: Machine) -> None:
    devices = [
        agent.Device(type="blk", id=f"{PLAIN:02x}", container_path="/dev/by-slot"),
        agent.Device(type="scsi", id="3:1", container_path="/dev/by-scsi"),
        agent.Device(type="nvdimm", vm_path="/dev/pmem0", container_path="/dev/by-node"),
        # Plugged in only while the call waits for it.
        agent.Device(type="blk", id="11/00", container_path="/dev/hot"),
    ]
    paths = [device.container_path for device in devices]
    allowed = [oci.LinuxDeviceCgroup(Allow=False, Access="rwm")]
    linux = {
        "Devices": [device(path) for path in paths],
        "Resources": oci.LinuxResources(Devices=allowed),
    }
    waiting = Background(
        Container,
        guest,
        "plugged",
        "sh",
        "-c",
        "head -c 4 /dev/hot /dev/by-node",
        devices=devices,
        linux=linux,
    )
    guest.qmp("blockdev-add", **{"driver": "file", "node-name": "hot", "filename": str(guest.hot)})
    guest.qmp("device_add", driver="virtio-blk-pci", id="hot", bus="plug", drive="hot")
    plugged = waiting.result()
    assert plugged.read() == b"==> /dev/hot <==\nhot \n==> /dev/by-node <==\npmem"
    assert plugged.wait() == 0
    plugged.remove()
    code, words = error(Container, guest, "none", "true", devices=[agent.Device(type="vfio-pci")])
    assert (code, "vfio-pci" in words) == (UNIMPLEMENTED, True)


def test_a_device_that_never_comes_is_an_error_that_names_it(guest: Machine) -> None:
    wanted = [agent.Device(type="blk", id="1e", container_path="/dev/x")]
    code, words = error(
        Container, guest, "none", "true", devices=wanted, linux={"Devices": [device("/dev/x")]}
    )
    assert (code, "PCI path 1e" in words) == (NOT_FOUND, True), words


def test_a_containers_directory_is_seen_by_another(guest: Machine, box: Container) -> None:
    assert box.sh("share", "mkdir /tmp/d; echo one >/tmp/d/file; ln -s /etc /tmp/out")[0] == 0
    shared = [
        agent.SharedMount(name="d", src_ctr="box", src_path="/tmp/d", dst_ctr="other", dst_path="/from/box"),
        agent.SharedMount(name="l", src_ctr="box", src_path="/tmp/out", dst_ctr="", dst_path="/link"),
    ]
    other = Container(guest, "other", "sleep", "1000", shared=shared)
    assert other.sh("a", "cat /from/box/file; echo two >/from/box/file; cat /link/passwd")[:2] == (
        0,
        "one\n" + box.sh("h", "cat /etc/passwd")[1],
    )
    assert box.sh("b", "cat /tmp/d/file")[1] == "two\n"
    other.remove()
    assert box.sh("c", "cat /tmp/d/file")[1] == "two\n"
    for wrong, words in [
        (agent.SharedMount(name="n", src_ctr="nobody", src_path="/", dst_path="/x"), "nobody"),
        (agent.SharedMount(name="n", src_ctr="box", src_path="/none", dst_path="/x"), "no such file"),
        (
            agent.SharedMount(name="n", src_ctr="box", src_path="/tmp", dst_ctr="q", dst_path="/x"),
            "not this",
        ),
    ]:
        assert words in error(Container, guest, "bad", "true", shared=[wrong])[1]


@pytest.mark.parametrize("bound", [True, False])
def test_last_words_can_be_read(guest: Machine, bound: bool) -> None:
    log = guest.share / "termination"
    log.write_text("")
    annotation = {"io.kubernetes.container.terminationMessagePath": "/tmp/last"}
    mounts = [mount("/tmp/last", "bind", f"{VOLUMES}/termination", "bind")] if bound else []
    container = Container(
        guest, "ends", "sh", "-c", "echo goodbye >/tmp/last", mounts=mounts, annotations=annotation
    )
    assert container.wait() == 0

    def ask(kind: str, name: str) -> str:
        request = agent.GetDiagnosticDataRequest(log_type=kind, container_id=name)
        return guest.ask("GetDiagnosticData", request, agent.GetDiagnosticDataResponse).data

    assert ask("termination_log", "ends") == "goodbye\n"
    assert error(ask, "everything", "ends")[0] == INVALID_ARGUMENT
    container.remove()


def test_processors_and_memory_are_brought_into_use(guest: Machine, box: Container) -> None:
    assert box.sh("n", "nproc")[1] == "2\n"
    waiting = Background(guest.tell, "OnlineCPUMem", agent.OnlineCPUMemRequest(wait=True, nb_cpus=1))
    # Without KVM the guest's kernel keeps no place for further processors: one of its own is taken away.
    hardware = mount("/hardware", "bind", "/sys", "bind")
    owner = Container(guest, "owner", "sleep", "1000", mounts=[hardware], Capabilities=caps(PRIVILEGED))
    assert owner.sh("off", "echo 0 >/hardware/devices/system/cpu/cpu1/online")[0] == 0
    waiting.result()
    assert box.sh("n2", "nproc")[1] == "2\n"
    owner.remove()
    memory = "sed -n 's/^MemTotal: *//p' /proc/meminfo"
    before = int(box.sh("m", memory)[1].split()[0])
    guest.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "more", "size": 128 * MIB})
    guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    guest.tell("OnlineCPUMem", agent.OnlineCPUMemRequest())
    grown = f"until [ $({memory} | cut -d' ' -f1) -gt {before + 100_000} ]; do sleep 0.1; done"
    assert box.sh("m2", grown)[0] == 0


def test_what_there_is_not_is_said(guest: Machine) -> None:
    for method, request in [
        ("MemAgentMemcgSet", agent.MemAgentMemcgConfig()),
        ("MemAgentCompactSet", agent.MemAgentCompactConfig()),
    ]:
        code, words = error(guest.tell, method, request)
        assert (code, "no memory agent" in words) == (UNIMPLEMENTED, True)
    guest.tell("RemoveStaleVirtiofsShareMounts", agent.RemoveStaleVirtiofsShareMountsRequest())
    details = guest.ask("GetGuestDetails", agent.GuestDetailsRequest(), agent.GuestDetailsResponse)
    assert details.agent_details
    assert "scsi" in details.agent_details.storage_handlers
    assert "blk" in details.agent_details.device_handlers
