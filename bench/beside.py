"""This checkout beside another one, an earlier commit's for example, in one run.

Each round does everything once with either, in an order that is shuffled anew:

* ``kata run``: ``kata run --rm IMAGE true``, from executing it until it has ended;
* ``ctr run``: the same with ``ctr run --rm`` and the checkout's shim, each with a containerd of its own;
* ``kata exec``: ``kata exec NAME true`` in a container that sleeps;
* ``engine PSS``: the proportional set size of that container's engine, after the last round.

Reported are medians, and the median of the rounds' ratios with its quartiles: what changes with the hour changes both.

Needs root, containerd, and the other checkout set up (``tools/setup test`` in it).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

from containerd_support import IMAGE, RUNTIME, Containerd  # noqa: E402
from overhead import field  # noqa: E402

IMAGE_DIR = "build/images/busybox"
NAME = "beside"
WHAT = ("kata run", "ctr run", "kata exec")


class Tree:
    """One checkout, with what it starts below one directory of its own.

    Args:
        root: The checkout.
        directory: A short path, which exists.
    """

    def __init__(self, root: Path, directory: Path) -> None:
        self.root = root
        self.directory = directory
        self.guest = root / "build/guest"
        self.program = ["/usr/bin/python3", "-I", "-S", str(root / "src/kata/__main__.py")]
        self.image = f"oci:{root / IMAGE_DIR}"
        self.environment = {
            **os.environ,
            "KATA_GUEST_DIR": str(self.guest),
            "KATA_RUN_DIR": str(directory / "r"),
            "KATA_STATE_DIR": str(directory / "s"),
        }
        daemon = directory / "d"
        daemon.mkdir()
        self.containerd = Containerd(daemon, self.guest)
        shim = daemon / "bin/containerd-shim-kata-v2"
        shim.unlink()
        shim.symlink_to(root / "src/kata/__main__.py")
        self._count = 0

    def kata(self, *arguments: str) -> str:
        """Run this checkout's `kata`; its standard output.

        Raises:
            SystemExit: It failed.
        """
        return said([*self.program, *arguments], self.environment)

    def ctr_run(self, *options: str) -> None:
        """Have containerd run ``true`` with this checkout's shim.

        Args:
            options: Of ``ctr run``.

        Raises:
            SystemExit: It failed.
        """
        self._count += 1
        words = ("--runtime", RUNTIME, *options, IMAGE, f"c{self._count}", "true")
        done = self.containerd.ctr("run", "--rm", *words)
        if done.returncode:
            raise SystemExit(f"error: ctr run with {self.root}: {done.stderr.decode(errors='replace')}")

    def engine_pss(self) -> int:
        """Bytes of memory of the sleeping container's engine."""
        pid = json.loads(self.kata("inspect", NAME))[0]["sandbox"]["engine_pid"]
        return field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """With the daemon and the sleeping container running, and the image converted."""
        try:
            self.containerd.start()
            self.containerd.import_image(self.root / IMAGE_DIR)
            self.kata("run", "-d", "--name", NAME, self.image, "sleep", "1000000")
            yield
        finally:
            subprocess.run([*self.program, "rm", "-f", NAME], env=self.environment, check=False)
            self.containerd.stop()


def said(command: list[str], environment: dict[str, str]) -> str:
    """Run a command; its standard output.

    Raises:
        SystemExit: It ended with something else than 0.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {done.stderr}")
    return done.stdout


def took_ms(work: Callable[[], object]) -> float:
    """Milliseconds that something takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def measure(trees: tuple[Tree, Tree], rounds: int, what: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of each thing in each round: (this checkout's, the other's). A first round does not count."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in what}
    for number in range(-1, rounds):
        for name in random.sample(what, len(what)):
            took: dict[Tree, float] = {}
            for tree in random.sample(trees, 2):
                work: dict[str, Callable[[], object]] = {
                    "kata run": partial(tree.kata, "run", "--rm", tree.image, "true"),
                    "ctr run": tree.ctr_run,
                    "kata exec": partial(tree.kata, "exec", NAME, "true"),
                }
                took[tree] = took_ms(work[name])
            if number >= 0:
                pairs[name].append((took[trees[0]], took[trees[1]]))
    return pairs


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="This checkout beside another one, in one run.")
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="the other one, set up")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is run (default %(default)s)")
    parser.add_argument("--only", choices=WHAT, action="append", help="not all of it")
    parser.add_argument("--json", action="store_true", help="print JSON, with every single time")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines and containerd need root")
    other = options.other.resolve()
    if not (other / "build/guest/guest.json").exists():
        raise SystemExit(f"error: {other} is not set up\nhint: run tools/setup test in it")
    work = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    try:
        for name in ("a", "b"):
            (work / name).mkdir()
        trees = (Tree(ROOT, work / "a"), Tree(other, work / "b"))
        with trees[0].up(), trees[1].up():
            pairs = measure(trees, options.rounds, options.only or list(WHAT))
            memory = (trees[0].engine_pss(), trees[1].engine_pss())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps({"times_ms": pairs, "engine_pss": memory}, indent=1))
        return 0
    print(
        f"{'':12}{'this, ms':>10}{'other, ms':>11}{'ratio':>8}{'quartiles':>16}   ({options.rounds} rounds)"
    )
    for name, rows in pairs.items():
        low, middle, high = statistics.quantiles([this / that for this, that in rows], n=4)
        mine, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:12}{mine:10.1f}{theirs:11.1f}{middle:8.3f}{f'{low:.3f} - {high:.3f}':>16}")
    print(
        f"engine PSS  {memory[0] >> 10} KiB, other {memory[1] >> 10} KiB, ratio {memory[0] / memory[1]:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
