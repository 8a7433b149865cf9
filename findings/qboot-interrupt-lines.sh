#!/bin/bash
# What: on QEMU's q35 machine, qboot writes a wrong interrupt line into PCI devices of every second slot: a guest without ACPI and
#   without an MP table waits on a line that never comes. Right would be the line to which the ICH9 routes the slot's pin.
# Version: qemu-system-x86 1:7.2+dfsg-7+deb12u18+b3 with the qboot.rom of qemu-system-data 1:7.2+dfsg-7+deb12u18 (Debian 12).
# Source: qboot's pci.c counts lines as the PIIX3 does, (slot - 1 + pin) modulo 4; QEMU's hw/isa/lpc_ich9.c wires slots 0 to 24 to
#   PIRQE-H by (slot + pin) modulo 4. Worked round by the slot of the balloon (src/kata/hypervisor/qemu/slots.py).
#
# Each slot from 5 to 12 gets QEMU's "edu" device, which is told to raise its interrupt. Seen:
#   slot  5: configuration says 11, raised 10    slot  6: configuration says 11, raised 11
#   slot  7: configuration says 10, raised 11    slot  8: configuration says 10, raised 10    ... and so on
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/archives/partial" "$work/root"
if ! apt-get -qq -o Dir::Cache::archives="$work/archives" -o Debug::NoLocking=1 --download-only --reinstall -y \
    install qemu-system-{x86,common}=1:7.2+dfsg-7+deb12u18+b3 qemu-system-data=1:7.2+dfsg-7+deb12u18 >"$work/apt.log" 2>&1; then
    echo "cannot be tried here: these packages of Debian 12 are not to be had: $(tail -n 1 "$work/apt.log")"
    exit 77
fi
for package in "$work"/archives/*.deb; do dpkg-deb -x "$package" "$work/root"; done
export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu QEMU_MODULE_DIR=$work/root/usr/lib/x86_64-linux-gnu/qemu
python3 - "$work" <<'PYTHON'
import socket, subprocess, sys, time

work = sys.argv[1]
slots = range(5, 13)
command = [f"{work}/root/usr/bin/qemu-system-x86_64", "-L", f"{work}/root/usr/share/qemu", "-L", f"{work}/root/usr/share/seabios"]
command += ["-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-bios", f"{work}/root/usr/share/qemu/qboot.rom"]
for slot in slots:
    command += ["-device", f"edu,addr={slot:#x}"]
command += ["-qtest", f"unix:{work}/qtest,server=on,wait=off", "-qtest-log", "/dev/null"]
command += ["-monitor", f"unix:{work}/hmp,server=on,wait=off"]
qemu = subprocess.Popen(command)


def connect(name):
    for _ in range(300):
        try:
            channel = socket.socket(socket.AF_UNIX)
            channel.connect(f"{work}/{name}")
            return channel.makefile("rw"), channel
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"QEMU does not answer on {name}")


try:
    qtest, _ = connect("qtest")
    _, hmp = connect("hmp")
    time.sleep(3)  # qboot has set up the devices, and found no kernel

    def ask(text):
        qtest.write(text + "\n")
        qtest.flush()
        while not (line := qtest.readline()).startswith("OK"):
            pass
        return int((line.split() + ["0"])[1], 16) if len(line.split()) > 1 else 0

    def config(slot, register, value=None):
        ask(f"outl 0xcf8 {0x80000000 | slot << 11 | register:#x}")
        return ask("inl 0xcfc") if value is None else ask(f"outl 0xcfc {value:#x}")

    def pending():
        hmp.sendall(b"info pic\n")
        text = b""
        while b"pic1" not in text or not text.rstrip().endswith(b"(qemu)"):
            text += hmp.recv(65536)
        rows = {row.split(":")[0].strip(): row for row in text.decode().replace("\r", "").split("\n") if "irr=" in row}
        slave = next(row for name, row in rows.items() if name.endswith("pic1"))
        return int(slave.split("irr=")[1][:2], 16)

    wrong = []
    for slot in slots:
        line = config(slot, 0x3C) & 0xFF
        config(slot, 0x10, 0xFEA00000 + (slot << 20) % 0x1000000)
        config(slot, 0x04, 0x2)
        base = config(slot, 0x10) & 0xFFFFFFF0
        ask(f"writel {base + 0x60:#x} 0x1")
        time.sleep(0.1)
        raised = [8 + bit for bit in range(8) if pending() >> bit & 1 and bit in (2, 3)]
        ask(f"writel {base + 0x64:#x} 0x1")
        print(f"slot {slot:2}: configuration says {line}, raised {' '.join(map(str, raised))}")
        if [line] != raised:
            wrong.append(slot)
finally:
    qemu.kill()
    qemu.wait()
print("wrong in slots", *wrong)
raise SystemExit(0 if wrong == [5, 7, 9, 11] else 1)
PYTHON
