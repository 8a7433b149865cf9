"""The guest's kernel booted with nothing else: what no start of a container in a VM can be quicker than.

The machine is the engine's (same QEMU, machine type, accelerator, processor, memory, firmware, kernel, command
line and console) without its disks, network, share and channels, and the initrd holds one static program that
powers off as the first thing it does.

Run by itself it prints the command line and the time from executing QEMU until it has ended::

    bench/bareboot.py [--rounds N] [--plain]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))

from kata import paths  # noqa: E402
from kata.cli.session import client_policy  # noqa: E402
from kata.engine.lifecycle.boot import shape_of  # noqa: E402
from kata.errors import KataError  # noqa: E402
from kata.guest import initrd, manifest  # noqa: E402
from kata.hypervisor import accel, tsc  # noqa: E402
from kata.hypervisor.base import Attachments, Nic, random_mac  # noqa: E402
from kata.hypervisor.qemu import acpi, slots  # noqa: E402
from kata.hypervisor.qemu import command as qemu_command  # noqa: E402
from kata.hypervisor.qemu.monitor import MONITOR  # noqa: E402
from kata.hypervisor.qemu.monitor import settings as qemu_settings  # noqa: E402
from kata.resources import sizing  # noqa: E402
from kata.settings import (  # noqa: E402
    GuestSettings,
    HypervisorSettings,
    MachineSettings,
    SandboxSettings,
    SizeSettings,
)

POWER_OFF = """
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    call(169, 0xfee1dead, 0x28121969, 0x4321fedc); /* reboot: power off */
    call(169, 0xfee1dead, 0x28121969, 0x01234567); /* without ACPI: a reset ends the machine as well */
    for (;;)
        call(34, 0, 0, 0); /* pause */
}
"""

KEPT = ("-no-user-config", "-nodefaults", "-no-reboot")
KEPT_WITH_VALUE = (
    "-display",
    "-machine",
    "-accel",
    "-cpu",
    "-smp",
    "-m",
    "-bios",
    "-kernel",
    "-initrd",
    "-append",
)


def make_initrd(work: Path, name: str, program: str) -> Path:
    """Build an initrd with one program.

    Args:
        work: Where it is put, with what it is made of.
        name: Its name there.
        program: The source of ``/init``, in C without a library.
    """
    source, binary, image = work / f"{name}.c", work / f"{name}.init", work / f"{name}.cpio"
    source.write_text(program)
    flags = ["-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-s"]
    subprocess.run(["gcc", *flags, "-o", binary, source], check=True)
    image.write_bytes(initrd.build(binary.read_bytes(), []))
    return image


def prepare(guest: Path, work: Path, environment: dict[str, str], machine: str = "") -> list[str]:
    """Make the initrd and put the command together.

    Args:
        guest: The guest directory.
        work: Where the initrd is put.
        environment: Of the runs that this is compared with; KATA_ACCEL is looked at.
        machine: QEMU's machine type; empty is kata's usual one.

    Returns:
        The command; it ends with 0 when the machine has powered off.
    """
    image = make_initrd(work, "bare", POWER_OFF)
    size = sizing.plan(sizing.ResourceRequest())
    sandbox = SandboxSettings(
        id="bare",
        client=client_policy(),
        machine=MachineSettings(
            hypervisor=HypervisorSettings(
                accel=accel.choose(environment.get(accel.VARIABLE, "")).accel,
                options={"machine": machine} if machine else {},
            ),
            guest=GuestSettings(kernel=manifest.load(str(guest)).kernel, initrd=str(image)),
            size=SizeSettings(vcpus=size.vcpus, memory_mib=size.memory_mib),
        ),
    )
    shape = shape_of(sandbox, MONITOR.capabilities("tcg", {}), nics=1)
    settings = qemu_settings(
        shape, Attachments(sandbox_id="bare", run_dir=str(work), nics=[Nic(random_mac())])
    )
    if settings.accel == "tcg":
        settings.tsc_khz = tsc.khz()
    full = qemu_command.build(settings, qemu_command.Fds(-1, -1, -1, kernel=-1, initrd=-1, disks={}, nic=-1))
    tables: list[str] = []
    if qemu_command.has_small_acpi(settings):
        for name, content in acpi.files().items():
            (work / name.replace("/", "-")).write_bytes(content)
            tables += ["-fw_cfg", f"name={name},file={work / name.replace('/', '-')}"]
    for option, path in (("-kernel", settings.kernel), ("-initrd", settings.initrd)):
        full[full.index(option) + 1] = path  # there is nobody to hand it over
    bare, position = [full[0]], 1
    while position < len(full):
        if full[position] in KEPT:
            bare.append(full[position])
        elif full[position] in KEPT_WITH_VALUE:
            bare += full[position : position + 2]
        position += 1
    if settings.console == "serial":
        bare += ["-chardev", "null,id=console", "-device", "isa-serial,chardev=console"]
    elif settings.console == "virtio":
        bus = "device" if machine == slots.MICROVM else "pci"
        bare += ["-device", f"virtio-serial-{bus},id=serial", "-chardev", "null,id=console"]
        bare += ["-device", "virtconsole,bus=serial.0,chardev=console"]
    return bare + tables


def untuned(command: list[str]) -> list[str]:
    """*command* with QEMU's own ACPI tables, and a kernel that is told its console, and to end with its first panic,
    but nothing else. A microvm has no timer by which to measure how fast its processor is, and is told.
    """
    command = [word.replace(",acpi=off", "") for word in command]
    while "-fw_cfg" in command:
        at = command.index("-fw_cfg")
        del command[at : at + 2]
    position = command.index("-append") + 1
    machine = command[command.index("-machine") + 1]
    needed = ("console=", "tsc_early_khz=") if machine.startswith(slots.MICROVM) else ("console=",)
    kept = [word for word in command[position].split() if word.startswith(needed)]
    return [*command[:position], " ".join(["quiet", "panic=-1", *kept]), *command[position + 1 :]]


def main() -> None:
    """Boot a few times and print how long it took."""
    parser = argparse.ArgumentParser(description="The guest's kernel booted with nothing else.")
    parser.add_argument("--rounds", type=int, default=11, help="how often (default %(default)s)")
    parser.add_argument("--plain", action="store_true", help="without the kernel parameters that kata gives")
    parser.add_argument("--machine", default="", help="QEMU's machine type (default: kata's usual one)")
    arguments = parser.parse_args()
    rounds: int = arguments.rounds
    with tempfile.TemporaryDirectory(prefix="kb-") as work:
        command = prepare(Path(paths.guest_dir()), Path(work), dict(os.environ), arguments.machine)
        if arguments.plain:
            command = untuned(command)
        print(" ".join(f"'{word}'" if " " in word else word for word in command))
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=120
            )
            took.append((time.perf_counter() - began) * 1e3)
    print(f"median {statistics.median(took):.0f} ms, least {min(took):.0f} ms, {rounds} rounds")


if __name__ == "__main__":
    try:
        main()
    except KataError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from None
