"""The agent's methods about the guest as a whole, its storages and devices: one machine with a device of each kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_support import MIB, PRIVILEGED, STATE, Background, Container, Guest, caps, error, mount, storages
from waiting import PATIENCE, until

from kata.guest import extension, manifest
from kata.guest.progress import Silent
from kata.hypervisor.base import Disk
from kata.proto import agent_pb as agent
from kata.proto import csi_pb as csi
from kata.proto import oci_pb as oci
from kata.proto import types_pb as types
from kata.ttrpc.status import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    PERMISSION_DENIED,
    UNIMPLEMENTED,
    TtrpcError,
)

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
        # A fixture may be set up once more, after a test that failed.
        directory = Path(tempfile.mkdtemp(prefix="methods", dir=base))
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
        initrd = directory / "initrd"
        built = extension.build("iptables", Silent())
        initrd.write_bytes(Path(manifest.load(str(guest_dir)).initrd).read_bytes() + built.image)
        super().__init__(
            base,
            guest_dir,
            image,
            cmdline="agent.hotplug_timeout=60",
            vcpus=2,
            disks=[Disk(str(self.ext4), False), Disk(str(swap), False), Disk(str(plain), False)],
            initrd=str(initrd),
            binary=str(qemu),
            share_dir=str(self.share),
        )
        self._qmp = socket.socket(fileno=self.qemu.detach_fd("qmp"))
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


def test_metrics_have_the_names_that_dashboards_ask_for(guest: Machine, box: Container) -> None:
    assert box.sh("fill", "dd if=/dev/zero of=/ext4/filled bs=1M count=4; sync")[0] == 0
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
    for spelling in ("cancelled_write_byte", "cancelled_write_bytes"):
        assert f'kata_agent_io_stat{{item="{spelling}"}}' in values
    rooms = {name: float(value) for name, value in values.items() if f'mount="{STATE}/volumes/ext4"' in name}
    used = next(value for name, value in rooms.items() if "bytes{" in name and 'item="used"' in name)
    assert 4 * MIB < used < max(rooms.values())
    assert box.sh("empty", "rm /ext4/filled")[0] == 0
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


def resized(guest: Machine, path: str, size: int) -> bool:
    """Ask for a volume's growth; false when the guest has not heard of its disk's yet: it waits only so long."""
    try:
        guest.resize(path, size)
    except TtrpcError as failed:
        if failed.code != FAILED_PRECONDITION:
            raise
        return False
    return True


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
    deadline = time.monotonic() + PATIENCE
    while not resized(guest, path, size):
        assert time.monotonic() < deadline
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


def watched(guest: Machine, source: Path, name: str) -> tuple[agent.Storage, oci.Mount]:
    """A storage with copies of a directory of the share, and its mount in the container."""
    point = f"{STATE}/watched/{name}"
    storage = agent.Storage(
        driver="watchable-bind",
        source=f"{VOLUMES}/{source.relative_to(guest.share)}",
        fstype="bind",
        options=["ro"],
        mount_point=point,
    )
    return storage, mount("/etc/conf", "bind", point, "rbind", "ro")


WATCH = r"""
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>
int main(int count, char **paths) {
    char buffer[4096] __attribute__((aligned(8)));
    int fd = inotify_init();
    for (int i = 1; i < count; i++)
        inotify_add_watch(fd, paths[i], IN_CLOSE_WRITE | IN_MOVED_TO);
    for (;;) {
        ssize_t got = read(fd, buffer, sizeof buffer);
        for (char *at = buffer; at < buffer + got;) {
            struct inotify_event *event = (struct inotify_event *)at;
            const char *what = event->mask & IN_MOVED_TO ? "moved" : "written";
            printf("%d %s %s\n", event->wd, what, event->len ? event->name : "");
            at += sizeof *event + event->len;
        }
        fflush(stdout);
    }
}
"""
"""Busybox is built without a program that says what inotify says."""


def test_changes_on_the_host_are_announced_in_the_container(guest: Machine) -> None:
    conf = guest.share / "conf"
    (conf / "..v1").mkdir(parents=True)
    (conf / "..v1" / "key").write_text("one")
    (conf / "plain").write_text("old")
    (conf / "..data").symlink_to("..v1")
    (conf / "key").symlink_to("..data/key")
    storage, bound = watched(guest, conf, "conf")
    argv = ["gcc", "-static", "-O1", "-x", "c", "-", "-o", str(guest.share / "watch")]
    subprocess.run(argv, input=WATCH.encode(), check=True)
    tool = mount("/watch", "bind", f"{VOLUMES}/watch", "bind")
    script = "cat /etc/conf/key /etc/conf/plain; exec /watch /etc/conf /etc/conf/plain"
    container = Container(guest, "watcher", "sh", "-c", script, more_disks=[storage], mounts=[bound, tool])
    said = b""
    while said != b"oneold":
        said += container.read_some()
        assert b"oneold".startswith(said)
    ready = 'until [ "$(cat /proc/1/fdinfo/* | grep -c "inotify wd")" = 2 ]; do sleep 0.1; done'
    assert container.sh("ready", ready)[0] == 0
    (conf / "plain").write_text("new content")
    (conf / "..v2").mkdir()
    (conf / "..v2" / "key").write_text("two")
    (conf / "..tmp").symlink_to("..v2")
    (conf / "..tmp").rename(conf / "..data")
    said = b""
    while not (b"2 written" in said and b"1 moved ..data" in said):
        more = container.read_some()
        assert more, said
        said += more
    assert container.sh("new", "cat /etc/conf/key /etc/conf/plain")[1] == "twonew content"
    container.remove()
    # Nothing of it stays in the guest's memory.
    owner = Container(
        guest,
        "looks",
        "sleep",
        "1000",
        mounts=[mount("/state", "bind", STATE, "bind")],
        disks=storages("looks"),
    )
    assert owner.sh("ls", "ls /state/watchable")[1] == ""
    owner.remove()


def test_a_large_directory_is_mounted_itself_and_that_is_said(guest: Machine) -> None:
    large = guest.share / "large"
    shutil.rmtree(large, ignore_errors=True)  # of a try that failed
    large.mkdir()
    for number in range(17):
        (large / str(number)).write_text("x")
    storage, bound = watched(guest, large, "large")
    container = Container(guest, "large", "sleep", "1000", more_disks=[storage], mounts=[bound])
    assert container.sh("ls", "ls /etc/conf | wc -l")[1] == "17\n"
    until(
        lambda: "mounted itself, no change is announced" in guest.read_console(),
        "the agent says so",
    )
    container.remove()


RULES = """*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport {port} -m comment --comment "of a test" -j DROP
COMMIT
"""


@pytest.mark.parametrize("ipv6", [False, True])
def test_the_packet_filter_is_read_and_replaced(guest: Machine, ipv6: bool) -> None:
    def read() -> str:
        request = agent.GetIPTablesRequest(is_ipv6=ipv6)
        return guest.ask("GetIPTables", request, agent.GetIPTablesResponse).data.decode()

    def write(rules: str) -> None:
        request = agent.SetIPTablesRequest(is_ipv6=ipv6, data=rules.encode())
        guest.ask("SetIPTables", request, agent.SetIPTablesResponse)

    port = 8106 if ipv6 else 8104
    write(RULES.format(port=port))
    assert f"--dport {port} " in read()
    code, words = error(write, "*filter\n-A NOWHERE -j DROP\nCOMMIT\n")
    assert (code, "restore ended with" in words) == (INVALID_ARGUMENT, True), words
    assert f"--dport {port} " in read()


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


def test_a_policy_is_enforced_and_can_be_final(guest: Machine) -> None:
    def say(document: object) -> None:
        guest.tell("SetPolicy", agent.SetPolicyRequest(policy=json.dumps(document)))

    assert error(say, {"allow": {"Fly": True}}) == (INVALID_ARGUMENT, "policy: Fly: there is no such method")
    arguments = {"OCI.Process.Args": {"exactly": ["echo", "*"]}}
    allow: dict[str, object] = {
        "*": True,
        "CreateContainer": [{"rule": "only echo", "where": arguments}],
        "WriteStdin": False,
    }
    say({"version": 1, "allow": allow})
    container = Container(guest, "good", "echo", "hello")
    assert container.read() == b"hello\n"
    code, words = error(container.write, b"x")
    assert (code, "refuses WriteStdin" in words) == (PERMISSION_DENIED, True)
    container.remove()
    refused = 'the policy refuses CreateContainer: rule "only echo": OCI.Process.Args[0] is "cat"'
    assert error(Container, guest, "bad", "cat", "/etc/passwd") == (PERMISSION_DENIED, refused)
    say({"allow": {"GetMetrics": True, "RemoveContainer": True}})
    assert guest.ask("GetMetrics", agent.GetMetricsRequest(), agent.Metrics).metrics
    guest.health()
    assert error(say, {"allow": {"*": True}})[0] == PERMISSION_DENIED
