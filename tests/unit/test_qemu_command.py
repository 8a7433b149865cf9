"""QEMU's command line, from plain settings; and the sentences for what QEMU says when it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kata.errors import (
    GuestAssetError,
    HostError,
    HypervisorError,
    KataError,
    ResourceExhaustedError,
    StateError,
)
from kata.hypervisor import tsc
from kata.hypervisor.base import Disk, Nic
from kata.hypervisor.qemu import command as qemu_command
from kata.hypervisor.qemu import options as qemu_options
from kata.hypervisor.qemu import queues, saving, slots
from kata.hypervisor.qemu.process import explain, spawn
from kata.hypervisor.qemu.settings import VMSettings
from kata.hypervisor.vsock import Vsock
from kata.journal import Journal
from kata.sysio import Fd

DISK_FDS = {slot: 20 + slot for slot in range(len(slots.DISKS))}
FDS = qemu_command.Fds(agent=10, qmp=11, console=12, kernel=13, initrd=14, disks=DISK_FDS, nic=30)


def settings(**changes: Any) -> VMSettings:
    values = {
        "name": "kata-x",
        "run_dir": "/run/kata/sandboxes/x",
        "kernel": "/guest/vmlinux",
        "initrd": "/guest/initrd",
        "cmdline": "quiet",
        "binary": "/usr/bin/qemu-system-x86_64",
        **changes,
    }
    return VMSettings(**values)


def options(argv: list[str], name: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word == name]


def devices(argv: list[str]) -> dict[str, dict[str, str]]:
    """Devices by address."""
    found = {}
    for text in options(argv, "-device"):
        driver, *rest = text.split(",")
        properties = dict(part.split("=", 1) for part in rest)
        if "addr" in properties:
            found[properties["addr"]] = {"driver": driver, **properties}
    return found


def blocks(argv: list[str]) -> dict[str, dict[str, Any]]:
    return {node["node-name"]: node for node in map(json.loads, options(argv, "-blockdev"))}


def test_every_plug_is_there_at_its_place() -> None:
    argv = qemu_command.build(settings(nic=Nic("02:00:00:00:00:01"), share_dir="/s"), FDS)
    by_address = {address: device["driver"] for address, device in devices(argv).items()}
    assert by_address == {
        "02.0": "virtio-serial-pci",
        "04.0": "virtio-9p-pci",
        "05.0": "virtio-blk-pci",
        "06.0": "virtio-blk-pci",
        "07.0": "virtio-blk-pci",
        "08.0": "virtio-blk-pci",
        "09.0": "virtio-net-pci",
        "0a.0": "virtio-balloon-pci",
        "0b.0": "virtio-rng-pci",
    }
    assert slots.disk_path(1) == "06"
    assert slots.nic_path() == "09"


def test_a_microvm_has_every_device_in_memory() -> None:
    vsock = Vsock(5, Fd(40))
    share = Fd(9)
    nics = [Nic(f"02:00:00:00:00:0{index}", tap_fd=Fd(50 + index)) for index in range(4)]
    made = settings(
        machine="microvm",
        accel="kvm",
        vsock=vsock,
        share_fd=share,
        nic=nics[0],
        extra_nics=nics[1:],
        disk_slots=len(slots.DISKS),
    )
    argv = qemu_command.build(made, FDS)
    found = {}
    for text in options(argv, "-device"):
        driver, *rest = text.split(",")
        properties = dict(part.split("=", 1) for part in rest)
        if "virtio-mmio-bus" in properties.get("bus", ""):
            assert not {"addr", "romfile", "disable-legacy"} & set(properties)
            found[int(properties["bus"].removeprefix("virtio-mmio-bus."))] = driver
    assert found == {
        1: "virtio-serial-device",
        2: "vhost-vsock-device",
        3: "vhost-user-fs-device",
        **dict.fromkeys((4, 5, 6, 7, 14, 15, 16, 17), "virtio-blk-device"),
        **dict.fromkeys((8, 11, 12, 13), "virtio-net-device"),
        9: "virtio-balloon-device",
        10: "virtio-rng-device",
    }
    assert not any("-pci" in text for text in options(argv, "-device"))
    # Where the registers of place 5 are: those of the second disk.
    assert slots.disk_path(1, "microvm") == "mmio:feb00a00"
    assert slots.nic_path(0, "microvm") == "mmio:feb01000"
    assert "virtio-mmio.force-legacy=off" in options(argv, "-global")
    [machine] = options(argv, "-machine")
    assert machine.startswith("microvm,pcie=off")
    assert "pit=off,pic=off" in machine


def test_an_emulated_microvm_has_its_local_timer_only() -> None:
    argv = qemu_command.build(settings(machine="microvm", tsc_khz=2_000_000), FDS)
    assert options(argv, "-cpu") == ["max,-erms"]
    assert "nolapic_timer" not in options(argv, "-append")[0]
    assert not any("hpet" in text for text in options(argv, "-global"))
    assert "tsc_early_khz=2000000" in options(argv, "-append")[0].split()


def test_an_emulated_microvm_without_a_clock_to_go_by_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tsc, "khz", lambda: 0)
    journal = Journal.create_dir(str(tmp_path), "x", {})
    with pytest.raises(HostError, match="time-stamp counter"):
        spawn(settings(machine="microvm", binary=sys.executable, firmware="/dev/null"), journal)


def test_what_a_machine_goes_on_from_is_a_file_to_newer_versions() -> None:
    assert [
        version
        for version in ("7.2.22", "10.0.13", "11.1.3", "", "unknown")
        if saving.has_file_uris(version)
    ] == [
        "10.0.13",
        "11.1.3",
    ]
    made = settings()
    made.incoming = Fd(77)
    assert saving.incoming_uri(77, in_set=made.incoming_in_set) == "fd:77"
    assert not any("fd=77" in text for text in options(qemu_command.build(made, FDS), "-add-fd"))
    made.incoming_in_set = True
    assert "fd=77,set=100" in options(qemu_command.build(made, FDS), "-add-fd")
    uri = saving.incoming_uri(77, in_set=True)
    said, names = saving.restoring(uri, has_memory=False)
    assert json.loads(said.splitlines()[names.index("migrate-incoming")])["arguments"] == {
        "uri": "file:/dev/fdset/100"
    }


def test_a_file_server_of_an_emulated_machine_writes_into_bounce_pages() -> None:
    def swiotlb(**changes: Any) -> str:
        [line] = options(qemu_command.build(settings(**changes), FDS), "-append")
        [word] = [word for word in line.split() if word.startswith("swiotlb=")]
        return word

    assert swiotlb(accel="tcg", share_fd=Fd(9)) == "swiotlb=1024,force"
    assert swiotlb(accel="tcg", share_dir="/s") == "swiotlb=noforce"
    assert swiotlb(accel="kvm", share_fd=Fd(9)) == "swiotlb=noforce"


def test_a_machine_that_may_grow_has_its_room_from_the_start() -> None:
    still = qemu_command.build(settings(vcpus=2, memory_mib=512), FDS)
    assert (options(still, "-smp"), options(still, "-m")) == (["2"], ["size=512M"])
    assert "maxcpus" not in options(still, "-append")[0]
    grows = settings(vcpus=2, memory_mib=512, max_vcpus=8, max_memory_mib=2049)
    argv = qemu_command.build(grows, FDS)
    assert (options(argv, "-smp"), options(argv, "-m")) == (["8"], ["size=512M,maxmem=2048M"])
    assert "maxcpus=2" in options(argv, "-append")[0].split()
    assert "memory-backend-ram,id=plug-ram,size=1536M,reserve=off" in options(argv, "-object")
    assert devices(argv)["13.0"] == {
        **devices(argv)["13.0"],
        "driver": "virtio-mem-pci",
        "id": "plug",
        "memdev": "plug-ram",
    }
    # A file server of its own has to see that memory, too.
    shared = qemu_command.build(settings(memory_mib=512, max_memory_mib=1024, share_fd=Fd(9)), FDS)
    assert "memory-backend-memfd,share=on,id=plug-ram,size=512M,reserve=off" in options(shared, "-object")
    assert "memory-backend-memfd,share=on,id=ram,size=512M" in options(shared, "-object")


def test_what_the_configuration_adds() -> None:
    argv = qemu_command.build(
        settings(
            machine="pc-q35-7.2",
            machine_options="hpet=off",
            cpu_features="pmu=off",
            entropy="/dev/hw,rng",
            prealloc=True,
            reclaim=False,
            sandbox="on",
        ),
        FDS,
    )
    [machine] = options(argv, "-machine")
    assert machine.startswith("pc-q35-7.2,usb=off")
    assert machine.endswith("memory-backend=ram,hpet=off")
    assert options(argv, "-cpu")[0].endswith(",pmu=off")
    objects = options(argv, "-object")
    assert "memory-backend-ram,id=ram,size=2048M,prealloc=on" in objects
    assert "rng-random,id=rng,filename=/dev/hw,,rng" in objects
    assert devices(argv)["0a.0"]["free-page-reporting"] == "off"
    assert options(argv, "-sandbox") == ["on"]


def test_empty_slots_hold_typed_placeholders() -> None:
    nodes = blocks(qemu_command.build(settings(disk_slots=len(slots.DISKS)), FDS))
    for index, readonly in enumerate(slots.PLACEHOLDER_READONLY):
        assert nodes[f"file{index}"]["driver"] == "null-co"
        assert nodes[f"slot{index}"]["file"] == f"file{index}"
        assert nodes[f"file{index}"]["read-only"] is nodes[f"slot{index}"]["read-only"] is readonly


def test_disks_keep_awkward_names_and_their_types() -> None:
    disks = [
        Disk('/odd, "name"\\é', True, "lower"),
        Disk("/rw.img", False, ephemeral=True),
        None,
        Disk("/dev/sdx", True),
    ]
    argv = qemu_command.build(settings(disks=disks), FDS)
    nodes = blocks(argv)
    assert nodes["file0"]["read-only"] is True
    assert nodes["file1"]["cache"] == {"direct": False, "no-flush": True}
    assert nodes["file1"]["discard"] == "unmap"
    assert nodes["file3"]["driver"] == "host_device"
    disk = devices(argv)["05.0"]
    assert (disk["serial"], disk["werror"], disk["rerror"]) == ("lower", "report", "report")
    assert "serial" not in devices(argv)["06.0"]


def test_commas_in_paths_are_quoted() -> None:
    argv = qemu_command.build(settings(share_dir="/a,b"), FDS)
    assert "path=/a,,b," in options(argv, "-fsdev")[0]


def test_accelerators() -> None:
    emulated = qemu_command.build(settings(tsc_khz=2000000, vcpus=1), FDS)
    assert options(emulated, "-cpu") == ["max,-erms,-arat"]
    assert options(emulated, "-accel") == ["tcg,thread=multi,tb-size=128"]
    line = options(emulated, "-append")[0].split()
    assert {
        "quiet",
        "nolapic_timer",
        "tsc_early_khz=2000000",
        "agent.channel=serial",
        "console=ttyS0",
    } <= set(line)
    real = qemu_command.build(settings(accel="kvm", tsc_khz=2000000), FDS)
    assert options(real, "-cpu") == ["host"]
    assert options(real, "-accel") == ["kvm"]
    own = " ".join(qemu_command.PARAMETERS)
    said = f"{own} quiet reboot=t swiotlb=noforce console=ttyS0 agent.channel=serial"
    assert options(real, "-append") == [said]


@pytest.mark.parametrize(
    ("changes", "timers", "local"),
    [
        ({}, "3", False),
        ({"vcpus": 1, "max_vcpus": 4}, "6", False),
        ({"vcpus": 2}, "", True),
        ({"vcpus": 1, "max_vcpus": 30}, "32", False),
        ({"vcpus": 1, "max_vcpus": 31}, "", True),
        ({"vcpus": 2, "machine_options": "hpet=off"}, "", True),
        ({"machine_options": "hpet=off"}, "", False),
        ({"vcpus": 2, "accel": "kvm"}, "", True),
    ],
)
def test_what_emulated_processors_tick_by(changes: dict[str, Any], timers: str, local: bool) -> None:
    argv = qemu_command.build(settings(**{"vcpus": 1, **changes}), FDS)
    found = [one for one in options(argv, "-global") if one.startswith("hpet.")]
    assert found == (["hpet.msi=on", f"hpet.timers={timers}"] if timers else [])
    assert ("nolapic_timer" not in options(argv, "-append")[0].split()) is local
    # Without HPET timers that it can use, a guest is to trust the local ones.
    assert ("-arat" in options(argv, "-cpu")[0].split(",")) is bool(timers)


def test_descriptors() -> None:
    vm = settings(nic=Nic("02:00:00:00:00:01", Fd(40)), vsock=Vsock(77, Fd(41)))
    fds = qemu_command.Fds(10, 11, None, kernel=13, initrd=14, disks={1: 21})
    assert qemu_command.inherited_fds(vm, fds) == [10, 11, 13, 14, 21, 41, 40]
    argv = qemu_command.build(vm, FDS)
    assert options(argv, "-chardev")[0] == "socket,id=qmp,fd=11"
    assert options(argv, "-netdev") == ["stream,id=net0,server=off,addr.type=fd,addr.str=40"]
    vsock = devices(argv)["03.0"]
    assert (vsock["guest-cid"], vsock["vhostfd"]) == ("77", "41")
    assert "agent.channel=vsock" in options(argv, "-append")[0]


def test_nothing_is_opened_to_others() -> None:
    argv = qemu_command.build(settings(nic=Nic("02:00:00:00:00:01", Fd(20)), share_dir="/s"), FDS)
    text = " ".join(argv)
    assert "-nodefaults" in argv
    assert "-no-user-config" in argv
    assert "server=on" not in text
    assert "spawn=deny" in options(argv, "-sandbox")[0]


@pytest.mark.parametrize("console", ["serial", "virtio", "none"])
def test_consoles(console: str) -> None:
    argv = qemu_command.build(
        settings(console=console),
        qemu_command.Fds(10, 11, None if console == "none" else 12, kernel=13, initrd=14, disks={}),
    )
    line = options(argv, "-append")[0]
    drivers = {text.split(",")[0] for text in options(argv, "-device")}
    assert ("console=" in line) == (console != "none")
    assert ("isa-serial" in drivers) == (console == "serial")
    assert ("virtconsole" in drivers) == (console == "virtio")


def test_settings_that_make_no_sense() -> None:
    for changes in ({"accel": "xen"}, {"console": "vga"}, {"disks": [None] * 5}, {"disk_slots": 99}):
        with pytest.raises(ValueError, match=r"no such|disk slots"):
            settings(**changes)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            "qemu: cannot set up guest memory 'pc.ram': Cannot allocate memory",
            ResourceExhaustedError,
            "2048 MiB",
        ),
        ("qemu: Error loading uncompressed kernel without PVH ELF Note", GuestAssetError, "/guest/vmlinux"),
        ('qemu: Failed to get "write" lock\nIs another process using the image?', StateError, "in use"),
        ("qemu: could not access KVM kernel module: No such file", HostError, "KVM"),
        ("something new", HypervisorError, "ended with status 1: something new"),
        ("", HypervisorError, "ended with status 1"),
    ],
)
def test_what_qemu_says_becomes_a_sentence(said: str, kind: type[KataError], words: str) -> None:
    error = explain(1, said, settings())
    assert type(error) is kind
    assert words in error.message
    assert error.hint


def test_what_a_qemu_with_a_root_of_its_own_has_to_open_before() -> None:
    # With no image of its own it has to open one file, lest it cannot lock those that come later.
    bare = blocks(qemu_command.build(settings(root="/r"), FDS))
    assert bare["first"]["filename"] == "/proc/self/fd/13"
    disks: list[Disk | None] = [Disk("/d", True)]
    assert "first" not in blocks(qemu_command.build(settings(root="/r", disks=disks), FDS))
    assert "first" not in blocks(qemu_command.build(settings(), FDS))


def test_how_long_a_qemus_queues_are_is_found_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "run"))
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho x >>{tmp_path}/asked\necho 'QEMU emulator version 10.0.13 (x)'\n")
    qemu.chmod(0o755)
    assert [queues.queues_mib(str(qemu)) for _ in range(3)] == [queues.LONG_QUEUES_MIB] * 3
    assert (tmp_path / "asked").read_text() == "x\n"
    # Another program at that place is asked anew.
    qemu.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2)'\n")
    assert queues.queues_mib(str(qemu)) == 0
    qemu.write_text("#!/bin/sh\necho nonsense\n")
    assert queues.queues_mib(str(qemu)) == 0
    assert queues.queues_mib(str(tmp_path / "missing")) == 0


def test_nothing_of_the_sandboxs_is_opened_by_its_path() -> None:
    changes = {
        "disks": [Disk("/d/lower", True), None, Disk("/dev/x", False)],
        "nic": Nic("02:00:00:00:00:01"),
    }
    argv = qemu_command.build(settings(**changes), FDS)
    assert not any(
        "/d/lower" in word or "/dev/x" in word or "/guest" in word or "/run" in word for word in argv
    )
    assert options(argv, "-add-fd") == ["fd=20,set=0", "fd=22,set=2"]
    nodes = blocks(argv)
    assert (nodes["file0"]["filename"], nodes["file0"]["driver"]) == ("/dev/fdset/0", "file")
    assert (nodes["file2"]["filename"], nodes["file2"]["driver"]) == ("/dev/fdset/2", "host_device")
    assert (options(argv, "-kernel"), options(argv, "-initrd")) == (
        ["/proc/self/fd/13"],
        ["/proc/self/fd/14"],
    )
    assert options(argv, "-netdev") == ["stream,id=net0,server=on,addr.type=fd,addr.str=30"]


def test_the_hosts_kernel_moves_the_packets_of_taps_where_it_can() -> None:
    with Fd(os.open("/dev/null", os.O_RDWR)) as first, Fd(os.open("/dev/null", os.O_RDWR)) as second:
        vm = settings(accel="kvm", nic=Nic("02::1", tap_fd=first), extra_nics=[Nic("02::2", tap_fd=second)])
        fds = qemu_command.Fds(10, 11, 12, kernel=13, initrd=14, disks=DISK_FDS, vhost={0: 90})
        backends = options(qemu_command.build(vm, fds), "-netdev")
        assert backends == [
            f"tap,id=net0,fd={first.raw},vhost=on,vhostfd=90",
            f"tap,id=net1,fd={second.raw}",
        ]
        assert 90 in qemu_command.inherited_fds(vm, fds)
    assert qemu_options.read({"disable_vhost_net": True}, str) == {"vhost_net": False}
    assert qemu_options.read({"disable_vhost_net": False}, str) == {}
