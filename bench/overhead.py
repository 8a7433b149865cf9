"""What running a machine takes on the host besides the memory that its guest uses.

For machines of several sizes, started by ``kata run`` with a network and a volume: the memory of engine, hypervisor and
helpers (proportional set size: shared pages are divided among who shares them), without the guest's own memory, which
is one mapping of the hypervisor's; page tables; and what the kernel charges to the sandbox's cgroup, which has page
cache and the kernel's own memory in it. Once when the guest does nothing, and once when it has read and written files,
packed, sorted and run programs. Beside it stands what the sizing formula allows (`kata.resources.sizing`).

Needs root and a guest. In the KVM lab (see docs/testing.md): ``tools/kvm-lab -- bench/overhead``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))

from kata.resources import sizing  # noqa: E402

KATA = ["/usr/bin/python3", "-I", "-S", str(ROOT / "src/kata/__main__.py")]
IMAGE = ROOT / "build/images/busybox"
MIB = 1 << 20
SETTLE_S = 3
WORK = """
for place in / /volume; do
    dd if=/dev/zero of=$place/file bs=1M count=64 && md5sum $place/file && gzip -1 <$place/file | sha512sum
    rm $place/file
done
for name in $(busybox --list); do echo $name; done | sort -r | awk '{ print length($0), $0 }' | sort -n | tail -n 1
for i in 1 2 3 4 5; do ls -lR /bin /etc /proc/sys | wc -l; done
"""
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
COLUMNS = ("qemu", "engine", "helpers", "page tables", "in all", "charged", "of it cache", "allowed")


def kata(environment: dict[str, str], *arguments: str) -> str:
    """Run `kata`; its standard output.

    Raises:
        SystemExit: It failed.
    """
    done = subprocess.run([*KATA, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: kata {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def field(text: str, name: str) -> int:
    """Bytes of a line ``Name:   123 kB``; 0 where there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


MORE_MIB = 24


def guest_memory(pid: int, memory_mib: int) -> int:
    """Bytes that the hypervisor holds of the guest's memory: the mapping that is as large as that, or by a few MiB
    larger, for bounce pages and the queues of devices.

    Raises:
        SystemExit: There is no such mapping, or several.
    """
    sizes: list[tuple[int, int]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = _MAPPING.match(line)
        if head:
            sizes.append((int(head[2], 16) - int(head[1], 16), 0))
        elif line.startswith("Pss:"):
            sizes[-1] = (sizes[-1][0], int(line.split()[1]) << 10)
    found = [held for size, held in sizes if 0 <= size - memory_mib * MIB <= MORE_MIB * MIB]
    if len(found) != 1:
        raise SystemExit(
            f"error: process {pid} has {len(found)} mappings of {memory_mib} MiB, and one was expected"
        )
    return found[0]


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and theirs."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | descendants(child)
    return found


def charged(directory: Path) -> tuple[int, int]:
    """Bytes charged to a cgroup, and how many of them are page cache."""
    stat = dict(line.split()[:2] for line in (directory / "memory.stat").read_text().splitlines())
    for name in ("memory.current", "memory.usage_in_bytes"):
        if (directory / name).exists():
            return int((directory / name).read_text()), int(stat.get("file") or stat.get("total_cache") or 0)
    raise SystemExit(f"error: {directory} tells nothing of memory")


def look(environment: dict[str, str], name: str) -> tuple[str, dict[str, int]]:
    """The accelerator of a sandbox, and what it takes, in MiB."""
    sandbox: dict[str, Any] = json.loads(kata(environment, "inspect", name))[0]["sandbox"]
    engine, qemu = sandbox["engine_pid"], sandbox["hypervisor_pid"]
    helpers = descendants(engine) - {qemu}
    held = {
        pid: field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss") for pid in {engine, qemu} | helpers
    }
    guest = guest_memory(qemu, sandbox["sizing"]["first_memory_mib"])
    tables = sum(field(Path(f"/proc/{pid}/status").read_text(), "VmPTE") for pid in held)
    used, cache = charged(Path(sandbox["host_cgroups"]["memory"]))
    found = {
        "guest": guest,
        "qemu": held[qemu] - guest,
        "engine": held[engine],
        "helpers": sum(held[pid] for pid in helpers),
        "page tables": tables,
        "in all": sum(held.values()) - guest + tables,
        "charged": used - guest,
        "of it cache": cache,
        "allowed": sizing.host_memory(sandbox["memory_mib"], sandbox["sizing"]["host_overhead_mib"])
        - sandbox["memory_mib"] * MIB,
    }
    return sandbox["accelerator"], {key: round(value / MIB) for key, value in found.items()}


def measure(environment: dict[str, str], mib: int, volume: Path, *, works: bool) -> dict[str, Any]:
    """One machine, idle and, if it *works*, after that."""
    name = f"overhead{mib}"
    options = ("-d", "--name", name, "-m", f"{mib}m", "-v", f"{volume}:/volume")
    kata(environment, "run", *options, f"oci:{IMAGE}", "sleep", "1000000")
    try:
        time.sleep(SETTLE_S)
        accelerator, idle = look(environment, name)
        found = {"accelerator": accelerator, "mib": mib, "idle": idle}
        if works:
            kata(environment, "exec", name, "sh", "-c", WORK)
            time.sleep(SETTLE_S)
            found["worked"] = look(environment, name)[1]
        return found
    finally:
        kata(environment, "rm", "-f", name)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description="What a machine takes on the host besides its guest's memory."
    )
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 2048], help="sizes asked for (256 2048)")
    parser.add_argument("--idle", action="store_true", help="leave out the work")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: it needs root")
    with tempfile.TemporaryDirectory(prefix="kata-overhead-") as base:
        environment = {**os.environ, "KATA_RUN_DIR": f"{base}/r", "KATA_STATE_DIR": f"{base}/s"}
        volume = Path(base, "volume")
        volume.mkdir()
        found = [measure(environment, mib, volume, works=not chosen.idle) for mib in chosen.mib]
    if chosen.json:
        print(json.dumps(found))
        return 0
    print("MiB      machine        guest  " + "".join(f"{name:>13}" for name in COLUMNS))
    for one in found:
        for state in [state for state in ("idle", "worked") if state in one]:
            values = one[state]
            print(
                f"{one['accelerator']:<4}{one['mib']:>8}  {state:<8}{values['guest']:>6}  "
                + "".join(f"{values[name]:>13}" for name in COLUMNS)
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
