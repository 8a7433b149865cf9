"""`kata inspect-image` beside syft on the same image, in one run.

Each round does both, in an order that takes turns: ``kata inspect-image --json``, with its machine from boot to
end, and ``syft scan dir:`` on the same layers unpacked. Reported are the medians, and the median of
the rounds' ratios: what else the machine does changes both.

Needs syft (``tools/setup conformance``) and a machine for containers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("src", "tests", "tests/vm", "tests/conformance")]

import inspect_ordinary  # noqa: E402
from conftest import Kata  # noqa: E402

SYFT = ROOT / "build/programs/syft"


def unpack(layout: Path, tree: Path) -> int:
    """Unpack an image without whiteouts; the bytes of its files."""
    for path in inspect_ordinary.stored_layers(layout):
        subprocess.run(["tar", "-C", tree, "--exclude=./dev/*", "-xf", path], check=True)
    with tarfile.open(inspect_ordinary.stored_layers(layout)[-1]) as tar:
        return sum(one.size for one in tar)


def timed(command: list[str | Path], environment: dict[str, str]) -> float:
    """Run a command to its end; seconds."""
    began = time.monotonic()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def main() -> int:
    """Measure; 1 if the ratio is larger than what is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--layout", type=Path, help="an OCI layout of one layer; a Debian of some 300 MB if not given"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=3.0, help="the ratio that is still right")
    options = parser.parse_args()
    layout = (
        options.layout
        or inspect_ordinary.ordinary("debian-large", ROOT / "build/conformance/inspect-images").layout
    )
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ki") as directory:
        tree = Path(directory) / "tree"
        tree.mkdir()
        size = unpack(layout, tree)
        kata = Kata(Path(directory), Path(os.environ["KATA_GUEST_DIR"]))
        calm = {**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"}
        inspect: list[str | Path] = [
            *kata.command("inspect-image", "--json", "-q", f"oci:{layout.resolve()}")
        ]
        scan: list[str | Path] = [SYFT, "scan", f"dir:{tree}", "-q", "-o", "json"]
        for number in range(options.rounds):
            for mine in (True, False) if number % 2 else (False, True):
                seconds = timed(inspect, kata.env) if mine else timed(scan, calm)
                (ours if mine else theirs).append(seconds)
            print(f"round {number + 1}: kata {ours[-1]:.1f} s, syft {theirs[-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    medians = statistics.median(ours), statistics.median(theirs)
    print(
        f"{size / 1e6:.0f} MB: kata inspect-image {medians[0]:.1f} s, syft {medians[1]:.1f} s,"
        f" ratio {ratio:.2f} (at most {options.most})"
    )
    return int(ratio > options.most)


if __name__ == "__main__":
    sys.exit(main())
