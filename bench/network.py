"""What the network between a pod and its host gives, beside runc on the same bridge.

Both pods are on the network of CNI's bridge, in network namespaces of the benchmark's own; the server is a process on
the host's side of the bridge (`bench/load.c`). In every round each test runs once with each runtime, in an order that
is shuffled anew. Reported are medians, and kata's share of what runc reaches (for latencies: how many times runc's).

Needs root, containerd, crictl, CNI's plugins, runc, gcc and a guest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from podlab import GATEWAY, RUNTIMES, TOOLS, Lab, progress, shuffled

PORT = 7007
TESTS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "to the host, one connection": (("send",), "MB/s", 1e6),
    "from the host, one connection": (("receive",), "MB/s", 1e6),
    "requests over 1 connection": (("requests", "1"), "1/s", 1),
    "requests over 16 connections": (("requests", "16"), "1/s", 1),
    "connections with a request": (("connect",), "1/s", 1),
    "one byte there and back, p50": (("echo",), "us", 1),
    "one byte there and back, p99": (("echo",), "us", 1),
}


def measure(lab: Lab, seconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Values by test and runtime."""
    tools = lab.build_load()
    lab.serve(PORT)
    containers = {runtime: lab.start(runtime, [(tools, TOOLS, True)]) for runtime in RUNTIMES}
    found: dict[str, dict[str, list[float]]] = {test: {name: [] for name in RUNTIMES} for test in TESTS}
    kinds = dict.fromkeys(command for command, _, _ in TESTS.values())
    for number in range(rounds):
        for kind, *more in kinds:
            progress(f"round {number + 1} of {rounds}: {kind}")
            for runtime in shuffled():
                said = lab.run(
                    containers[runtime], f"{TOOLS}/load", kind, GATEWAY, str(PORT), str(seconds), *more
                ).split()
                tests = [test for test, (command, _, _) in TESTS.items() if command == (kind, *more)]
                for test, value in zip(tests, said, strict=True):
                    found[test][runtime].append(float(value) / TESTS[test][2])
    progress("")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A pod's network to its host, beside runc's.")
    parser.add_argument("--seconds", type=float, default=3, help="of each test (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is run (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every single value")
    options = parser.parse_args()
    with Lab() as lab:
        found = measure(lab, options.seconds, options.rounds)
        about = lab.about
    if options.json:
        print(json.dumps({"about": about, "results": found}, indent=1))
        return
    print(f"{about}; medians of {options.rounds} rounds of {options.seconds:g} s")
    print(f"{'':32}{'':6}{'kata':>10}{'runc':>10}{'kata/runc':>11}")
    for test, values in found.items():
        kata, runc = (statistics.median(values[name]) for name in RUNTIMES)
        print(f"{test:32}{TESTS[test][1]:6}{kata:10.1f}{runc:10.1f}{kata / runc:11.3f}")


if __name__ == "__main__":
    main()
