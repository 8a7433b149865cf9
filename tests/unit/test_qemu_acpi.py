"""ACPI tables of a machine that needs only its HPET: as firmware links them, and which machines get them."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kata.hypervisor.base import MachineShape
from kata.hypervisor.qemu import acpi, command, process, slots
from kata.hypervisor.qemu.settings import VMSettings

TABLES_AT, RSDP_AT = 0x7FFE0000, 0xF3000


def link(files: dict[str, bytes]) -> dict[str, bytearray]:
    """Carry out the linker's commands, as firmware does, with places of our own choosing."""
    linked = {name: bytearray(content) for name, content in files.items()}
    places = {"etc/acpi/tables": TABLES_AT, "etc/acpi/rsdp": RSDP_AT}
    allocated = set()
    program = files["etc/table-loader"]
    assert len(program) % 128 == 0
    for start in range(0, len(program), 128):
        number, first, second = struct.unpack_from("<I56s56s", program, start)
        name = first.rstrip(b"\0").decode()
        if number == 1:
            align, zone = struct.unpack_from("<IB", program, start + 60)
            assert places[name] % align == 0
            assert (places[name] < 1 << 20) == (zone == 2)
            allocated.add(name)
        elif number == 2:
            source = second.rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", program, start + 116)
            assert size == 4
            assert {name, source} <= allocated
            value = struct.unpack_from("<I", linked[name], offset)[0] + places[source]
            struct.pack_into("<I", linked[name], offset, value)
        else:
            assert number == 3
            offset, begin, length = struct.unpack_from("<III", program, start + 60)
            linked[name][offset] = -sum(linked[name][begin : begin + length]) & 0xFF
    return linked


def test_the_guest_finds_the_hpet_and_a_way_to_switch_off_by_sound_tables() -> None:
    linked = link(acpi.files())
    rsdp, tables = linked["etc/acpi/rsdp"], linked["etc/acpi/tables"]
    assert rsdp[:8] == b"RSD PTR "
    assert len(rsdp) == 20
    assert sum(rsdp) % 256 == 0

    def table(address: int) -> tuple[bytes, bytes]:
        start = address - TABLES_AT
        signature, length = struct.unpack_from("<4sI", tables, start)
        assert signature == b"FACS" or sum(tables[start : start + length]) % 256 == 0, signature
        return signature, bytes(tables[start : start + length])

    root, pointers = table(struct.unpack_from("<I", rsdp, 16)[0])
    assert root == b"RSDT"
    found = dict(map(table, struct.unpack_from("<II", pointers, 36)))
    assert set(found) == {b"FACP", b"HPET"}
    assert struct.unpack_from("<BBBBQ", found[b"HPET"], 40) == (0, 0, 0, 0, 0xFED00000)
    facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
    assert facs % 64 == 0
    assert [table(facs)[0], len(table(facs)[1])] == [b"FACS", 64]
    assert table(dsdt)[0] == b"DSDT"
    assert table(dsdt)[1][36:] == b"\x08_S5_\x12\x06\x04" + bytes(4)
    assert len(found[b"FACP"]) == 116
    # PM1a event and control, and how long they are.
    assert struct.unpack_from("<I4xI", found[b"FACP"], 56) == (0x600, 0x604)
    assert struct.unpack_from("<BB", found[b"FACP"], 88) == (4, 2)


def settings(**changed: Any) -> VMSettings:
    given: dict[str, Any] = {
        "name": "x",
        "run_dir": "/r",
        "kernel": "/k",
        "initrd": "/i",
        "binary": "/q",
        "max_vcpus": 1,
    }
    return VMSettings(**given | changed)


def test_a_small_machine_has_these_tables_alone() -> None:
    fds = command.Fds(3, 4, 5, kernel=6, initrd=7, disks={}, acpi={"etc/acpi/rsdp": 9})
    argv = command.build(settings(), fds)
    assert "acpi=off" in argv[argv.index("-machine") + 1].split(",")
    assert argv[argv.index("-fw_cfg") + 1] == "name=etc/acpi/rsdp,file=/proc/self/fd/9"
    assert "pci=noacpi" in argv[argv.index("-append") + 1].split()
    assert 9 in command.inherited_fds(settings(), fds)


@pytest.mark.parametrize("scans", [True, False])
def test_where_nothing_announces_the_share_the_agent_is_told_where_it_will_be(scans: bool) -> None:
    """An agent that cannot look for it needs ACPI, by which QEMU announces it."""
    vm = settings()
    vm.shape = MachineShape(kernel="/k", initrd="/i", share="virtio-fs", scans_ports=scans)
    vm.late_share = True
    argv = command.build(vm, command.Fds(3, 4, 5, kernel=6, initrd=7, disks={}))
    words = argv[argv.index("-append") + 1].split()
    assert ("acpi=off" in argv[argv.index("-machine") + 1].split(",")) is scans
    assert (f"agent.pci_scan={slots.SHARE:02x}/00" in words) is scans
    # Nor does the kernel manage the port: it would switch off what it takes for an empty slot.
    assert ("pcie_ports=compat" in words) is scans
    assert f"pcie-root-port,id=lateshare,addr=0x{slots.SHARE:02x}" in " ".join(argv)


@pytest.mark.parametrize(
    "changed",
    [
        {"accel": "kvm"},
        {"vcpus": 2, "max_vcpus": 2},
        {"max_vcpus": 2},
        {"hotplug_nics": 1},
        {"memory_mib": 512, "max_memory_mib": 1024},
        {"machine": "pc"},
        {"firmware": "bios-256k.bin"},
        {"machine_options": "acpi=on"},
        {"machine_options": "hpet=off"},
    ],
)
def test_any_other_machine_has_those_of_qemu(changed: dict[str, Any]) -> None:
    fds = command.Fds(3, 4, 5, kernel=6, initrd=7, disks={})
    argv = command.build(settings(**changed), fds)
    assert "acpi=off" not in argv[argv.index("-machine") + 1].split(",")
    assert "pci=noacpi" not in argv[argv.index("-append") + 1].split()


def test_the_warning_about_our_files_is_nobodys_error() -> None:
    warning = 'qemu: warning: externally provided fw_cfg item names should be prefixed with "opt/"\n'
    assert "opt/" not in process.explain(-9, warning, settings()).message
