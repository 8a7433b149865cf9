"""ACPI for a machine that needs next to none of it: one table, which says where the HPET is.

QEMU describes its machine to the guest by ACPI tables and a program in AML, for hotplug, power and the routing of
interrupts. To load and run that program takes a guest in software emulation some 15 % of its boot. A machine with one
processor whose devices are all there from the start needs nothing of it: Linux finds PCI devices by itself, they
signal by messages (MSI-X), and the firmware has the interrupts of the rest in its MP table. What only ACPI tells is
the address of the HPET, without which the guest would wake up for the PIT forty times a second, idle or not.

So QEMU makes no tables (``-machine acpi=off``), and the firmware gets ours by the same way: fw_cfg files, and a
program of commands that says how to link them once they have addresses.

Sources: ACPI 6.5, 5.2.5.3 (RSDP), 5.2.6 (header), 5.2.7 (RSDT); IA-PC HPET 1.0a, 3.2.4; QEMU's
hw/acpi/bios-linker-loader.c (the commands' layout).
"""

from __future__ import annotations

import struct

HPET_ADDRESS = 0xFED00000
"""Where QEMU's PC machines have it."""
_HPET_ID = 0x8086A201
"""Its registers' first 32 bits: vendor, 64-bit counter, three timers, revision 1."""
_TABLES, _RSDP, _LOADER = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
_COMMAND_SIZE = 128
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_HIGH, _BELOW_1_MIB = 1, 2
_HEADER_SIZE, _RSDT_SIZE, _RSDP_SIZE = 36, 40, 20


def files() -> dict[str, bytes]:
    """The fw_cfg files, by name."""
    return {_TABLES: _rsdt() + _hpet(), _RSDP: _rsdp(), _LOADER: _loader()}


def _header(signature: bytes, size: int) -> bytes:
    """A table's header, with a checksum of 0."""
    return struct.pack("<4sIBB6s8sI4sI", signature, size, 1, 0, b"KATA  ", b"KATA    ", 1, b"KATA", 1)


def _rsdt() -> bytes:
    """The root table; its one pointer is an offset in the file until the firmware adds the file's address."""
    return _header(b"RSDT", _RSDT_SIZE) + struct.pack("<I", _RSDT_SIZE)


def _hpet() -> bytes:
    """The HPET's table: its id, and its address in memory (address space 0)."""
    body = struct.pack("<IBBBBQBHB", _HPET_ID, 0, 0, 0, 0, HPET_ADDRESS, 0, 0, 0)
    table = bytearray(_header(b"HPET", _HEADER_SIZE + len(body)) + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _rsdp() -> bytes:
    """The pointer that a guest looks for below 1 MiB, revision 0."""
    return struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"KATA  ", 0, 0)


def _loader() -> bytes:
    """What the firmware is to do: give both files a place, then fill in pointers and checksums."""
    return b"".join(
        (
            _command(_ALLOCATE, _name(_TABLES) + struct.pack("<IB", 64, _HIGH)),
            _command(_ALLOCATE, _name(_RSDP) + struct.pack("<IB", 16, _BELOW_1_MIB)),
            _command(_ADD_POINTER, _name(_TABLES) * 2 + struct.pack("<IB", _HEADER_SIZE, 4)),
            _command(_ADD_CHECKSUM, _name(_TABLES) + struct.pack("<III", 9, 0, _RSDT_SIZE)),
            _command(_ADD_POINTER, _name(_RSDP) + _name(_TABLES) + struct.pack("<IB", 16, 4)),
            _command(_ADD_CHECKSUM, _name(_RSDP) + struct.pack("<III", 8, 0, _RSDP_SIZE)),
        )
    )


def _name(name: str) -> bytes:
    return name.encode().ljust(56, b"\0")


def _command(number: int, operands: bytes) -> bytes:
    return (struct.pack("<I", number) + operands).ljust(_COMMAND_SIZE, b"\0")
