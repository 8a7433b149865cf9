"""How long a pod takes to start when many are started at once, as a node does after a reboot.

A pod is one container beside its pause container, on the network of CNI's bridge: `crictl run` from executing it until
the container runs, through a containerd of the benchmark's own. Measured are, for kata and for runc, single pods one
after the other (`alone`), and then all at once. All have to run: each answers an exec afterwards.

Needs root, containerd, crictl, CNI's plugins, runc and a guest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from podlab import KATA, RUNTIMES, Lab, progress

AIM = 15
"""What the 95th percentile of many may be, in times of one alone."""


def timed(lab: Lab, runtime: str) -> tuple[float, str]:
    """Seconds that one pod takes, and its container."""
    began = time.perf_counter()
    container = lab.start(runtime)
    return time.perf_counter() - began, container


def alone(lab: Lab, runtime: str, rounds: int) -> list[float]:
    """Seconds of so many, one after the other."""
    found = []
    for number in range(rounds):
        progress(f"{runtime} alone: {number + 1} of {rounds}")
        found.append(timed(lab, runtime)[0])
        lab.remove_all()
    return found


def together(lab: Lab, runtime: str, number: int) -> list[float]:
    """Seconds of so many at once; all of them answer afterwards.

    Raises:
        SystemExit: One did not start, or does not answer.
    """
    progress(f"{runtime}: {number} at once")
    found: list[tuple[float, str]] = []
    failed: list[str] = []

    def one() -> None:
        try:
            found.append(timed(lab, runtime))
        except Exception as error:
            failed.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"error: {len(failed)} of {number} pods did not start, one because {failed[0]}")
    for _, container in found:
        said = lab.run(container, "echo", "runs")
        if said.strip() != "runs":  # crictl adds empty lines
            raise SystemExit(f"error: the container {container} does not answer: {said!r}")
    lab.remove_all()
    return [took for took, _ in found]


def row(took: list[float], one: float) -> dict[str, float]:
    """Percentiles, and their ratios to one alone."""
    p50 = statistics.median(took)
    p95 = statistics.quantiles(took, n=20, method="inclusive")[18]
    return {
        "p50_s": round(p50, 2),
        "p95_s": round(p95, 2),
        "least_s": round(min(took), 2),
        "most_s": round(max(took), 2),
        "p50_to_alone": round(p50 / one, 2),
        "p95_to_alone": round(p95 / one, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Many pods at once, beside one alone and beside runc.")
    parser.add_argument("--pods", type=int, default=30, help="how many at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how many alone (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.pods < 2 or options.rounds < 2:
        parser.error("--pods, --rounds: at least 2")
    rows = {}
    with Lab() as lab:
        for runtime in RUNTIMES:
            alone(lab, runtime, 1)
            if runtime == "kata":
                lab.await_template(KATA)
            single = alone(lab, runtime, options.rounds)
            median = statistics.median(single)
            rows[f"{runtime}, alone"] = row(single, median)
            rows[f"{runtime}, {options.pods} at once"] = row(together(lab, runtime, options.pods), median)
        about = lab.about
    progress("")
    if options.json:
        print(json.dumps({"about": about, "results": rows}, indent=1))
        return
    columns = ("p50", "p95", "least", "most", "p50/alone", "p95/alone")
    print(f"{about}; seconds")
    print(f"{'':22}" + "".join(f"{column:>11}" for column in columns))
    for name, values in rows.items():
        print(f"{name:22}" + "".join(f"{value:11.2f}" for value in values.values()))
    ratio = rows[f"kata, {options.pods} at once"]["p95_to_alone"]
    print(f"p95 of kata at once to one alone: {ratio:.1f} (aim: {AIM} at most)")


if __name__ == "__main__":
    main()
