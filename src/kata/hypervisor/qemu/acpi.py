"""ACPI for a machine that needs little of it: where the HPET is, and how to switch the machine off.

QEMU describes its machine to the guest by ACPI tables and a program in AML, for hotplug, power and the routing of
interrupts. To load and run that program takes a guest in software emulation some 15 % of its boot. A machine with one
processor whose devices are all there from the start needs next to nothing of it: Linux finds PCI devices by itself,
and they signal by messages (MSI-X). What only ACPI tells is the address of the HPET, without which the guest would
wake up for the PIT forty times a second, idle or not; and the sleep state S5, without which it can halt, but not end.

So QEMU makes no tables (``-machine acpi=off``), and the firmware gets ours by the same way: fw_cfg files, and a
program of commands that says how to link them once they have addresses.

Sources: ACPI 6.5, 5.2.5.3 (RSDP), 5.2.6 (header), 5.2.7 (RSDT), 5.2.9 (FADT; its form of ACPI 1.0 is enough), 5.2.10
(FACS), 7.4.2 (_S5) and 20.2 (AML); IA-PC HPET 1.0a, 3.2.4; QEMU's hw/acpi/bios-linker-loader.c (the commands'
layout), hw/i386/acpi-build.c (PM registers) and hw/acpi/core.c (sleep type 0 ends the machine).
"""

from __future__ import annotations

import struct

HPET_ADDRESS = 0xFED00000
"""Where QEMU's PC machines have it."""
_HPET_ID = 0x8086A201
"""Its registers' first 32 bits: vendor, 64-bit counter, three timers, revision 1."""
_PM_BASE = 0x600
"""I/O ports of the ICH9's power management, where qboot puts them."""
_SCI = 9
_TABLES, _RSDP, _LOADER = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
_COMMAND_SIZE = 128
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_HIGH, _BELOW_1_MIB = 1, 2
_HEADER_SIZE, _RSDP_SIZE = 36, 20
_S5_BY_SLEEP_TYPE_0 = b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00"
"""AML: ``Name (_S5, Package (4) {0, 0, 0, 0})``."""


def files() -> dict[str, bytes]:
    """The fw_cfg files, by name.

    The tables' file has FACS, DSDT, FADT, HPET and RSDT one after the other. Pointers are offsets in it until the
    firmware adds its address.
    """
    facs = struct.pack("<4sI", b"FACS", 64).ljust(64, b"\0")
    dsdt = _table(b"DSDT", _S5_BY_SLEEP_TYPE_0)
    fadt_at = len(facs) + len(dsdt)
    fadt = _header(b"FACP", _HEADER_SIZE + 80) + struct.pack("<IIBBH", 0, len(facs), 0, 0, _SCI)
    # No SMI command: ACPI is on from the start. PM1a event and control registers, the timer; no GPE.
    ports = struct.pack("<IIIIIIII", _PM_BASE, 0, _PM_BASE + 4, 0, 0, _PM_BASE + 8, 0, 0)
    fadt += bytes(8) + ports + struct.pack("<BBBB", 4, 2, 0, 4)
    # No C2 and C3; WBINVD works, C1 too, no buttons, no wake by the clock.
    fadt = (fadt + bytes(4) + struct.pack("<HH", 0xFFF, 0xFFF)).ljust(_HEADER_SIZE + 76, b"\0")
    fadt += struct.pack("<I", 0b0111_0101)
    hpet_at = fadt_at + len(fadt)
    hpet = _table(b"HPET", struct.pack("<IBBBBQBHB", _HPET_ID, 0, 0, 0, 0, HPET_ADDRESS, 0, 0, 0))
    rsdt_at = hpet_at + len(hpet)
    rsdt = _header(b"RSDT", _HEADER_SIZE + 8) + struct.pack("<II", fadt_at, hpet_at)
    pointers = (fadt_at + 36, fadt_at + 40, rsdt_at + 36, rsdt_at + 40)
    steps = [
        _command(_ALLOCATE, _name(_TABLES) + struct.pack("<IB", 64, _HIGH)),
        _command(_ALLOCATE, _name(_RSDP) + struct.pack("<IB", 16, _BELOW_1_MIB)),
        *(_command(_ADD_POINTER, _name(_TABLES) * 2 + struct.pack("<IB", at, 4)) for at in pointers),
        *(
            _command(_ADD_CHECKSUM, _name(_TABLES) + struct.pack("<III", at + 9, at, size))
            for at, size in ((fadt_at, len(fadt)), (rsdt_at, len(rsdt)))
        ),
        _command(_ADD_POINTER, _name(_RSDP) + _name(_TABLES) + struct.pack("<IB", 16, 4)),
        _command(_ADD_CHECKSUM, _name(_RSDP) + struct.pack("<III", 8, 0, _RSDP_SIZE)),
    ]
    rsdp = struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"KATA  ", 0, rsdt_at)
    return {_TABLES: facs + dsdt + fadt + hpet + rsdt, _RSDP: rsdp, _LOADER: b"".join(steps)}


def _header(signature: bytes, size: int) -> bytes:
    """A table's header, with a checksum of 0."""
    return struct.pack("<4sIBB6s8sI4sI", signature, size, 1, 0, b"KATA  ", b"KATA    ", 1, b"KATA", 1)


def _table(signature: bytes, body: bytes) -> bytes:
    """A table that has no pointers, with its checksum."""
    table = bytearray(_header(signature, _HEADER_SIZE + len(body)) + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _name(name: str) -> bytes:
    return name.encode().ljust(56, b"\0")


def _command(number: int, operands: bytes) -> bytes:
    return (struct.pack("<I", number) + operands).ljust(_COMMAND_SIZE, b"\0")
