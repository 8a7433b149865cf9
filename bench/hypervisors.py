"""Start, stop and memory of the machines of each hypervisor, beside the bare monitor started by hand.

For every hypervisor that runs here, in rounds whose order is shuffled anew:

* ``bare``: the monitor executed with nothing but the guest's kernel, one serial console, and an initrd with one static
  ``/init`` that says so and sleeps. ``start`` is from executing it until the word is read: the boot to user space.
  ``stop`` is from TERM until it has ended.
* ``kata``: ``kata run -d IMAGE sleep`` without a network. ``start`` is from executing it until it has ended: the
  container runs. ``stop`` is ``kata rm -f``: nothing is left.

Then each is started once more and left alone for some seconds: ``memory`` is the proportional set size of all its
processes (monitor, and with kata engine and helpers) less what the guest has touched, which is one mapping of the
monitor's.

Printed are medians, the ratio of kata to the bare monitor, and that of each one's memory to QEMU's. A hypervisor whose
program is not installed, or that cannot run without KVM, is named and left out. Needs root, gcc and a guest. In the KVM
lab (see docs/testing.md)::

    tools/kvm-lab --timeout 900 -- bench/hypervisors --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path.append(str(ROOT / "src"))

import bareboot  # noqa: E402
import overhead  # noqa: E402

from kata import children  # noqa: E402
from kata.errors import KataError  # noqa: E402
from kata.guest import manifest  # noqa: E402
from kata.hypervisor import accel, registry  # noqa: E402

MIB = 1 << 20
WORD = b"up\n"
PATIENCE_S = 120
SAY_AND_SLEEP = """
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    static const char path[] = "/kmsg", word[] = "<0>up\\n";
    call(133, (long)path, 0020600, 1 << 8 | 11); /* mknod */
    call(1, call(2, (long)path, 1, 0), (long)word, sizeof(word) - 1); /* write, open */
    for (;;)
        call(34, 0, 0, 0); /* pause */
}
"""
"""By way of the kernel's log: it is written to a console at once, where the writes of programs wait for interrupts."""
PARAMETERS = "quiet panic=-1"
SERIAL = f"{PARAMETERS} console=ttyS0"


class Place:
    """What the commands are made of.

    Args:
        work: A directory for files.
        kernel: The guest's.
        initrd: With `SAY_AND_SLEEP`.
        accel: The accelerator.
        environment: Of everything that is run.
    """

    def __init__(
        self, work: Path, kernel: str, initrd: Path, accel: str, environment: dict[str, str]
    ) -> None:
        self.work = work
        self.kernel = kernel
        self.initrd = initrd
        self.accel = accel
        self.environment = environment


def qemu(place: Place, mib: int, machine: str = "") -> list[str]:
    """QEMU by hand: the machine that kata gives it, without its devices (`bareboot`)."""
    guest = Path(place.environment["KATA_GUEST_DIR"])
    command = bareboot.untuned(bareboot.prepare(guest, place.work, place.environment, machine))
    told = [word for word in command[command.index("-append") + 1].split() if word.startswith("tsc_")]
    parameters = " ".join([SERIAL, *told])
    for option, value in (("-initrd", str(place.initrd)), ("-m", f"{mib}M"), ("-append", parameters)):
        command[command.index(option) + 1] = value
    while "-device" in command:
        at = command.index("-device")
        del command[at : at + 2]
    while "-chardev" in command:
        at = command.index("-chardev")
        del command[at : at + 2]
    command = [word.replace("isa-serial=off", "isa-serial=on") for word in command]  # a microvm's
    return [*command, "-serial", "stdio", "-monitor", "none"]


def cloud_hypervisor(place: Place, mib: int) -> list[str]:
    """Cloud Hypervisor by hand."""
    return [
        program("cloud-hypervisor"),
        *(
            "--kernel",
            place.kernel,
            "--initramfs",
            str(place.initrd),
            "--cmdline",
            f"{PARAMETERS} console=hvc0",
        ),
        *("--cpus", "boot=1", "--memory", f"size={mib}M", "--serial", "off", "--console", "tty"),
    ]


def firecracker(place: Place, mib: int) -> list[str]:
    """Firecracker by hand. Its file wants a list of drives, also without any."""
    file = place.work / "firecracker.json"
    configuration = {
        "boot-source": {
            "kernel_image_path": place.kernel,
            "initrd_path": str(place.initrd),
            "boot_args": f"{SERIAL} pci=off",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mib},
        "drives": [],
    }
    file.write_text(json.dumps(configuration))
    return [program("firecracker"), "--no-api", "--config-file", str(file)]


BARE: dict[str, Callable[[Place, int], list[str]]] = {
    "qemu": qemu,
    "cloud-hypervisor": cloud_hypervisor,
    "firecracker": firecracker,
}


def program(name: str) -> str:
    """The path of a monitor; empty if it is not installed."""
    return os.environ.get(f"KATA_{name.upper().replace('-', '_')}", "") or children.find_program(name) or ""


class Contender:
    """One hypervisor.

    Args:
        name: Its name in the registry; of QEMU with a machine type, behind a colon.
        place: See `Place`.
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.times: dict[str, list[float]] = {
            key: [] for key in ("bare start", "bare stop", "kata start", "kata stop")
        }
        self.memory: dict[str, dict[str, float]] = {}
        self._place = place
        hypervisor, _, machine = name.partition(":")
        file = place.work / f"{name}.toml"
        chosen = f"[hypervisor.{hypervisor}]\nmachine_type = '{machine}'\n" if machine else ""
        file.write_text(f"[runtime]\nhypervisor_name = '{hypervisor}'\n{chosen}")
        self._environment = {**place.environment, "KATA_CONF_FILE": str(file)}
        with self._container() as container:  # converts the image, and tells the size
            self.mib = int(self._sandbox(container)["sizing"]["first_memory_mib"])
        self._command = qemu(place, self.mib, machine) if machine else BARE[hypervisor](place, self.mib)

    @contextlib.contextmanager
    def _container(self) -> Iterator[str]:
        container = f"h{random.getrandbits(32):x}"
        options = ("-d", "--name", container, "--network", "none")
        overhead.kata(self._environment, "run", *options, f"oci:{overhead.IMAGE}", "sleep", "1000000")
        try:
            yield container
        finally:
            overhead.kata(self._environment, "rm", "-f", container)

    def _sandbox(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(overhead.kata(self._environment, "inspect", container))[0][
            "sandbox"
        ]
        return found

    @contextlib.contextmanager
    def _bare(self) -> Iterator[subprocess.Popen[bytes]]:
        """The bare monitor once its guest is in user space; it has ended afterwards.

        Raises:
            SystemExit: It ended before, or did not get there.
        """
        with (
            (self._place.work / "stderr").open("w+b") as stderr,
            subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            ) as process,
        ):
            assert process.stdout is not None
            watch = subprocess.Popen(
                ["sh", "-c", f"sleep {PATIENCE_S}; kill -9 {process.pid}"], start_new_session=True
            )
            try:
                said = b""
                while WORD not in said.replace(b"\r", b""):
                    data = os.read(process.stdout.fileno(), 4096)
                    if not data:
                        stderr.seek(0)
                        raise SystemExit(
                            f"error: {self.name} by hand did not come up: {said!r} {stderr.read()!r}\n"
                            f"hint: it was {self._command}"
                        )
                    said += data
                yield process
            finally:
                os.killpg(watch.pid, signal.SIGKILL)
                watch.wait()
                process.kill()
                process.wait()

    def bare(self) -> None:
        """One start and stop of the bare monitor."""
        began = time.perf_counter()
        with self._bare() as process:
            self.times["bare start"].append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
            process.terminate()
            process.wait()
            self.times["bare stop"].append((time.perf_counter() - began) * 1e3)

    def kata(self) -> None:
        """One start and stop of a container."""
        began = time.perf_counter()
        with self._container():
            self.times["kata start"].append((time.perf_counter() - began) * 1e3)
            began = time.perf_counter()
        self.times["kata stop"].append((time.perf_counter() - began) * 1e3)

    def weigh(self, settle_s: float) -> None:
        """What each takes besides the guest's memory."""
        with self._bare() as process:
            time.sleep(settle_s)
            self.memory["bare"] = self._taken(process.pid, {process.pid})
        with self._container() as container:
            time.sleep(settle_s)
            sandbox = self._sandbox(container)
            engine, monitor = sandbox["engine_pid"], sandbox["hypervisor_pid"]
            self.memory["kata"] = self._taken(monitor, {engine} | overhead.descendants(engine))

    def _taken(self, monitor: int, pids: set[int]) -> dict[str, float]:
        """MiB of all processes without the guest's memory, of the monitor alone, and the guest's."""
        guest = overhead.guest_memory(monitor, self.mib)
        held = {
            pid: overhead.field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")
            for pid in pids | {monitor}
        }
        return {
            "in all": (sum(held.values()) - guest) / MIB,
            "monitor": (held[monitor] - guest) / MIB,
            "guest": guest / MIB,
        }

    def result(self) -> dict[str, Any]:
        """Medians and memory."""
        return {
            "mib": self.mib,
            "median_ms": {name: round(statistics.median(values), 1) for name, values in self.times.items()},
            "memory_mib": self.memory,
            "times_ms": self.times,
            "command": self._command,
        }


def chosen(names: list[str], accelerator: str) -> list[str]:
    """Those that can run here; the others are named on standard error."""
    found = []
    for one in names or [name for name in BARE if name in registry.names()]:
        name, _, machine = one.partition(":")
        if machine and name != "qemu":
            raise SystemExit("error: machine types are QEMU's\nhint: --hypervisor qemu:microvm")
        if name not in registry.names() or name not in BARE:
            raise SystemExit(
                f"error: there is no hypervisor {name!r}\nhint: one of {', '.join(registry.names())}"
            )
        if accelerator not in registry.find(name).accelerators:
            print(f"{name}: left out, it needs KVM (tools/kvm-lab has it)", file=sys.stderr)
        elif name != "qemu" and not program(name):
            print(f"{name}: left out, it is not installed", file=sys.stderr)
        else:
            found.append(one)
    return found


def show(results: dict[str, dict[str, Any]], accelerator: str, rounds: int) -> None:
    """Print the tables."""
    print(f"{accelerator}, {rounds} rounds; ms, MiB")
    columns: tuple[str, ...] = ("bare start", "kata start", "ratio", "bare stop", "kata stop")
    print(f"{'':18}" + "".join(f"{column:>12}" for column in columns))
    for name, row in results.items():
        median = row["median_ms"]
        ratio = f"{median['kata start'] / median['bare start']:.2f}"
        print(
            f"{name:18}{median['bare start']:12.0f}{median['kata start']:12.0f}{ratio:>12}"
            f"{median['bare stop']:12.0f}{median['kata stop']:12.0f}"
        )
    columns = ("bare", "kata", "its monitor", "ratio", "to QEMU's", "monitors'")
    print(f"\n{'memory besides':18}" + "".join(f"{column:>12}" for column in columns))
    for name, row in results.items():
        bare, kata = row["memory_mib"]["bare"], row["memory_mib"]["kata"]
        base = results.get("qemu", row)["memory_mib"]["kata"]
        print(
            f"{name:18}{bare['in all']:12.1f}{kata['in all']:12.1f}{kata['monitor']:12.1f}"
            f"{kata['in all'] / bare['in all']:12.2f}{kata['in all'] / base['in all']:12.2f}"
            f"{kata['monitor'] / base['monitor']:12.2f}"
        )


def main() -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description="Start, stop and memory of each hypervisor's machines, beside the bare monitor."
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="how often each is started (default %(default)s)"
    )
    parser.add_argument("--settle", type=float, default=5.0, help="seconds before memory is looked at (5)")
    parser.add_argument(
        "--hypervisor",
        action="append",
        default=[],
        help="only this one (qemu:MACHINE for a machine type); may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every single time")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines need root for now\nhint: sudo make bench-hypervisors")
    work = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    try:
        environment = {**os.environ, "KATA_RUN_DIR": str(work / "r"), "KATA_STATE_DIR": str(work / "s")}
        accelerator = accel.choose(environment.get(accel.VARIABLE, "")).accel
        kernel = manifest.load(environment["KATA_GUEST_DIR"]).kernel
        initrd = bareboot.make_initrd(work, "sleeps", SAY_AND_SLEEP)
        place = Place(work, kernel, initrd, accelerator, environment)
        contenders = [Contender(name, place) for name in chosen(options.hypervisor, accelerator)]
        if not contenders:
            raise SystemExit("error: none of them can run here")
        runs = [run for one in contenders for run in (one.bare, one.kata)]
        for _ in range(options.rounds):
            for run in random.sample(runs, len(runs)):
                run()
        for one in contenders:
            one.weigh(options.settle)
        results = {one.name: one.result() for one in contenders}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(
            json.dumps({"accelerator": accelerator, "rounds": options.rounds, "results": results}, indent=1)
        )
    else:
        show(results, accelerator, options.rounds)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KataError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from None
