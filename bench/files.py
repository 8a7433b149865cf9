"""What files in a pod give: its image, its root file system, a volume, and work with many small files, beside runc.

Kata is there twice: as it is by default, with the root file system on disks (``kata``), and with the root shared live
(``live``); docs/storage.md has the difference. The same program (`bench/load.c`) does the same in all of them, in a pod
each; all file systems lie on the host's disk at ``/tmp``. What is read was written just before, so it comes from the
host's memory: this is about the way of a file into the container, not about disks; only what is synced goes there. The
image's files are on the host from the start, and the first round is the first time that the pods look at them. In every
round each test runs once with each, in an order that is shuffled anew. Reported are medians, and what share of runc's
kata and live reach.

The last table is work as ``npm install`` does it, in seconds: an archive of 5 000 files of 2 KiB is unpacked in the
root file system, all are read, and all are removed.

Needs root, containerd, crictl, CNI's plugins, runc, gcc and a guest.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from podlab import TOOLS, Lab, progress

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
OF_IMAGE = ("open and read a file of 4 KiB", "stat")
"""The tests that change nothing."""
PLACES = {"image": "/image", "root file system": "/bench", "volume": "/volume"}
UPPER = "io.katacontainers.config.runtime.rootfs_upper_layer"
KINDS = {"kata": ("kata", {}), "live": ("kata", {UPPER: "live"}), "runc": ("runc", {})}
"""Name in the tables -> runtime, and annotations of its pod."""
WORK = {
    "unpack": f"mkdir /work && tar -x -C /work -f {TOOLS}/many.tar",
    "read": "tar -c -f - /work 2>/dev/null | wc -c",
    "remove": "rm -r /work",
}
WORK_FILES = 5000
FILES_IMAGE = "docker.io/local/files:latest"

Values = dict[str, dict[str, dict[str, list[float]]]]
CHOICE = {place: tuple(TESTS) if place != "image" else OF_IMAGE for place in PLACES}
"""Place -> its tests."""


def start(lab: Lab, count: int) -> dict[str, str]:
    """A container of each kind."""
    tools = lab.build_load()
    with tarfile.open(tools / "many.tar", "w") as tar:
        for number in range(WORK_FILES):
            member = tarfile.TarInfo(f"node_modules/p{number // 25}/f{number}.js")
            member.size, member.mode = 2048, 0o644
            tar.addfile(member, io.BytesIO(bytes(2048)))
    lab.import_files(count, 4096, FILES_IMAGE)
    containers = {}
    for name, (runtime, of_pod) in KINDS.items():
        volume = lab.directory / f"volume-{name}"
        volume.mkdir()
        mounts = [(tools, TOOLS, True), (volume, PLACES["volume"], False)]
        containers[name] = lab.start(runtime, mounts, image=FILES_IMAGE, annotations=dict(of_pod))
        lab.run(containers[name], "mkdir", PLACES["root file system"])
    return containers


def measure(
    lab: Lab, amounts: dict[str, int], rounds: int, tests: Mapping[str, Sequence[str]] = CHOICE
) -> Values:
    """Values by place, test and kind; the work is a place of its own.

    Args:
        lab: Where the pods are.
        amounts: MiB, ``count`` of files and accesses, and ``syncs``.
        rounds: How often each is measured.
        tests: Place -> its tests, in their order: who reads files that it has made makes them before.
    """
    containers = start(lab, amounts["count"])
    found: Values = {place: {test: {name: [] for name in KINDS} for test in tests[place]} for place in tests}
    found["work"] = {step: {name: [] for name in KINDS} for step in WORK}
    for number in range(rounds):
        for place in tests:
            directory = PLACES[place]
            for test in tests[place]:
                kind, amount, _, unit = TESTS[test]
                progress(f"round {number + 1} of {rounds}: {place}: {test}")
                for name in random.sample(list(KINDS), len(KINDS)):
                    said = lab.run(
                        containers[name], f"{TOOLS}/load", "files", directory, kind, str(amounts[amount])
                    )
                    found[place][test][name].append(float(said) / unit)
        for step, script in WORK.items():
            progress(f"round {number + 1} of {rounds}: {step}")
            for name in random.sample(list(KINDS), len(KINDS)):
                began = time.monotonic()
                lab.run(containers[name], "sh", "-ec", script)
                found["work"][step][name].append(time.monotonic() - began)
    progress("")
    return found


def show(found: Values) -> None:
    """Print the tables."""
    for place, tests in found.items():
        heads = ("kata", "live", "runc", "kata/runc", "live/runc")
        print(f"\n{place:36}{'':6}" + "".join(f"{head:>11}" for head in heads))
        sums = dict.fromkeys(KINDS, 0.0)
        for test, values in tests.items():
            medians = {name: statistics.median(values[name]) for name in KINDS}
            for name in KINDS:
                sums[name] += medians[name]
            _line(test, TESTS[test][2] if test in TESTS else "s", medians)
        if place == "work":
            _line("in all", "s", sums)


def _line(test: str, unit: str, medians: dict[str, float]) -> None:
    shown = "".join(f"{medians[name]:11.2f}" if unit == "s" else f"{medians[name]:11.1f}" for name in KINDS)
    print(
        f"{test:36}{unit:6}{shown}"
        + "".join(f"{medians[name] / medians['runc']:11.3f}" for name in ("kata", "live"))
    )


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
    show(found)


if __name__ == "__main__":
    main()
