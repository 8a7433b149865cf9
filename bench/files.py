"""What files in a pod give: its root file system (containerd's overlay, shared live) and a volume, beside runc.

The same program (`bench/load.c`) does the same in both, in a pod each; both file systems lie on the host's disk at
``/tmp``. What is read was written just before, so it comes from the host's memory: this is about the way of a file into
the container, not about disks; only what is synced goes there. In every round each test runs once with each runtime and
at each place, in an order that is shuffled anew. Reported are medians, and kata's share of what runc reaches.

Needs root, containerd, crictl, CNI's plugins, runc, gcc and a guest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from podlab import RUNTIMES, TOOLS, Lab, progress, shuffled

TESTS: dict[str, tuple[str, str, str, float]] = {
    "sequential write and fsync, 1 MiB": ("write", "mib", "MB/s", 1e6),
    "sequential read, 1 MiB": ("read", "mib", "MB/s", 1e6),
    "random write and one fsync, 4 KiB": ("random-write", "count", "1/s", 1),
    "random read, 4 KiB": ("random-read", "count", "1/s", 1),
    "write and fsync each, 4 KiB": ("fsync", "syncs", "1/s", 1),
    "create and write a file of 4 KiB": ("create", "count", "1/s", 1),
    "open and read a file of 4 KiB": ("open-read", "count", "1/s", 1),
    "stat": ("stat", "count", "1/s", 1),
    "unlink": ("unlink", "count", "1/s", 1),
}
PLACES = {"root file system": "/bench", "volume": "/volume"}

Values = dict[str, dict[str, dict[str, list[float]]]]


def measure(lab: Lab, amounts: dict[str, int], rounds: int) -> Values:
    """Values by place, test and runtime."""
    tools = lab.build_load()
    containers = {}
    for runtime in RUNTIMES:
        volume = lab.directory / f"volume-{runtime}"
        volume.mkdir()
        mounts = [(tools, TOOLS, True), (volume, PLACES["volume"], False)]
        containers[runtime] = lab.start(runtime, mounts)
        lab.run(containers[runtime], "mkdir", PLACES["root file system"])
    found: Values = {place: {test: {name: [] for name in RUNTIMES} for test in TESTS} for place in PLACES}
    for number in range(rounds):
        for place, directory in PLACES.items():
            for test, (kind, amount, _, unit) in TESTS.items():
                progress(f"round {number + 1} of {rounds}: {place}: {test}")
                for runtime in shuffled():
                    said = lab.run(
                        containers[runtime], f"{TOOLS}/load", "files", directory, kind, str(amounts[amount])
                    )
                    found[place][test][runtime].append(float(said) / unit)
    progress("")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="File I/O in a pod, beside runc's.")
    parser.add_argument("--mib", type=int, default=128, help="size of the big file (default %(default)s)")
    parser.add_argument(
        "--count", type=int, default=1000, help="small files, small accesses (default %(default)s)"
    )
    parser.add_argument("--syncs", type=int, default=50, help="synced writes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is run (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every single value")
    options = parser.parse_args()
    amounts = {"mib": options.mib, "count": options.count, "syncs": options.syncs}
    with Lab() as lab:
        found = measure(lab, amounts, options.rounds)
        about = lab.about
    if options.json:
        print(json.dumps({"about": about, "amounts": amounts, "results": found}, indent=1))
        return
    print(f"{about}; medians of {options.rounds} rounds; {amounts}")
    for place, tests in found.items():
        print(f"\n{place:36}{'':6}{'kata':>10}{'runc':>10}{'kata/runc':>11}")
        for test, values in tests.items():
            kata, runc = (statistics.median(values[name]) for name in RUNTIMES)
            print(f"{test:36}{TESTS[test][2]:6}{kata:10.1f}{runc:10.1f}{kata / runc:11.3f}")


if __name__ == "__main__":
    main()
