"""How fast and how small it is, beside what a user would have instead and beside another checkout, in one run.

Parts, of which ``--only`` chooses some. Within a part everything is done once in each round, in an order that is
shuffled anew; what changes with the hour changes all of it alike, so ratios are taken within a round.

* ``one``: a container that runs ``true`` and goes, from executing the command until it has ended: `kata run --rm`
  without and with a network, by the fastest path that is on and cold (templates are turned off), `ctr run --rm`, with
  this checkout and with the other one; beside them `ctr run` with runc, `runc run`, `crun run`, `podman run` and a
  bare QEMU (the same kernel with the same parameters until it powers off, `bareboot.py`). Then `exec true` in a
  container that sleeps, and the removal of one that runs (`kata rm -f`; `runc delete -f`).
* ``many``: 20 and 50 `kata run -d` at once, from the first until each has said that its container runs.
* ``pods``: 30 pods by `crictl run` at once, through a containerd with CNI's bridge (`podlab.py`).
* ``memory``: 20 sandboxes that have nothing to do: proportional set size of all their processes, and of the engines.

The table is printed as Markdown. Needs root and what `make bench-beside` needs; podman and crun where they work.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

import bareboot  # noqa: E402
import podlab  # noqa: E402
import start  # noqa: E402
from beside import NAME, Tree, said, took_ms  # noqa: E402
from containerd_support import IMAGE  # noqa: E402
from overhead import descendants, field  # noqa: E402

from kata.config.files import VARIABLE as CONFIG_VARIABLE  # noqa: E402

PARTS = ("one", "many", "pods", "memory")
RUNC = "io.containerd.runc.v2"
MIB = 1 << 20
SETTLE_S = 3
TOO_LONG_MS = 10_000
"""Of a peer: podman waits 20 s for a conmon whose end it does not see on some machines."""
Rounds = dict[str, list[float]]
"""What each contender took, by round."""


class Peers:
    """Runtimes without a machine, and what they run.

    Args:
        work: A directory of their own.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir()
        self.runc = start.runc_bundle(work)
        self.bundle = work / "bundle"
        conf = work / "containers.conf"
        conmon = shutil.which("conmon") or ""
        conf.write_text(f'[engine]\nconmon_path = ["{conmon}"]\nevents_logger = "file"\n')
        # podman has no journal to write to, and may not raise a hard limit.
        self.environment = {**os.environ, "CONTAINERS_CONF": str(conf)}
        self._libraries = self._with_libraries()
        self._sleeps = work / "sleeps"
        shutil.copytree(self.bundle, self._sleeps, symlinks=True)
        spec = json.loads((self._sleeps / "config.json").read_text())
        spec["process"]["args"] = ["sleep", "1000000"]
        (self._sleeps / "config.json").write_text(json.dumps(spec))

    def _with_libraries(self) -> subprocess.Popen[bytes] | None:
        """A process in whose mount namespace unpacked programs find their libraries, which podman's helpers have to."""
        unpacked = ROOT / f"build/peers/usr/lib/{os.uname().machine}-linux-gnu"
        if not unpacked.exists():
            return None
        system = f"/usr/lib/{unpacked.name}"
        mount = f"mount -t overlay -o lowerdir={unpacked}:{system} overlay {system} && echo && exec sleep 1000000"
        process = subprocess.Popen(["unshare", "-m", "sh", "-c", mount], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def commands(self) -> dict[str, list[str]]:
        """By the name of the contender: what runs ``true`` in a container."""
        found = {"runc run": self.runc}
        if shutil.which("crun"):
            bundle = ["--bundle", str(self.bundle)]
            found["crun run"] = ["crun", "--root", str(self.work / "crun"), "run", *bundle, "bench"]
        if shutil.which("podman"):
            places = {"--root": "ps", "--runroot": "pr", "--tmpdir": "pt"}
            options = [word for name, place in places.items() for word in (name, str(self.work / place))]
            limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
            run = [
                "run",
                "--rm",
                "--network",
                "none",
                *limits,
                "--rootfs",
                f"{self.bundle}/rootfs:O",
                "true",
            ]
            found["podman run"] = [
                "podman",
                *options,
                "--runtime",
                "runc",
                "--cgroup-manager",
                "cgroupfs",
                *run,
            ]
        return found

    def sleeping(self, name: str) -> None:
        """Have a container sleep, by runc."""
        command = [
            "runc",
            "--root",
            str(self.work / "runc"),
            "run",
            "-d",
            "--bundle",
            str(self._sleeps),
            name,
        ]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

    def on_sleeping(self, *words: str) -> None:
        """Run a command of runc's."""
        said(["runc", "--root", str(self.work / "runc"), *words], self.environment)

    def close(self) -> None:
        """Take away what podman has needed."""
        if self._libraries is not None:
            self._libraries.terminate()
            self._libraries.wait()
        subprocess.run(["umount", str(self.work / "ps/overlay")], stderr=subprocess.DEVNULL, check=False)


def progress(text: str) -> None:
    """Say on a terminal how far things are."""
    podlab.progress(text)


def rounds_of(contenders: dict[str, Callable[[], float]], rounds: int, what: str) -> Rounds:
    """Milliseconds of each in each round; a first round does not count."""
    took: Rounds = {name: [] for name in contenders}
    for number in range(-1, rounds):
        progress(f"{what}: round {max(number + 1, 0)} of {rounds}")
        for name in random.sample(list(contenders), len(contenders)):
            value = contenders[name]()
            if number >= 0:
                took[name].append(value)
    return took


def one(trees: dict[str, Tree], peers: Peers, bare: list[str], rounds: int) -> Rounds:
    """Milliseconds of one container at a time."""
    tree = trees["this"]
    conf = tree.directory / "cold.toml"
    conf.write_text("[factory]\nenable_template = false\n")
    cold = {**tree.environment, CONFIG_VARIABLE: str(conf)}
    contenders: dict[str, Callable[[], float]] = {}
    for which, tree in trees.items():
        for network in ("none", "user"):
            run = ("run", "--rm", "--network", network, tree.image, "true")
            contenders[f"kata run {network}, {which}"] = partial(took_ms, partial(tree.kata, *run))
            if which == "this":
                command = [*tree.program, *run]
                contenders[f"kata run {network}, cold"] = partial(start.timed, command, cold)
        contenders[f"ctr run, {which}"] = partial(took_ms, tree.ctr_run)
        contenders[f"exec, {which}"] = partial(took_ms, partial(tree.kata, "exec", NAME, "true"))
        contenders[f"removal, {which}"] = partial(_removal, tree)
    for name, command in peers.commands().items():
        try:
            if (took := start.timed(command, peers.environment)) > TOO_LONG_MS:
                raise SystemExit(f"{name} takes {took / 1e3:.0f} s: it does not work as it should here")
        except SystemExit as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        contenders[name] = partial(start.timed, command, peers.environment)
    contenders["bare QEMU"] = partial(start.timed, bare)
    contenders["ctr run, runc"] = partial(_ctr_runc, trees["this"])
    peers.sleeping("sleeps")
    contenders["exec, runc"] = partial(took_ms, partial(peers.on_sleeping, "exec", "sleeps", "true"))
    contenders["removal, runc"] = partial(_runc_removal, peers)
    try:
        return rounds_of(contenders, rounds, "one at a time")
    finally:
        peers.on_sleeping("delete", "-f", "sleeps")


def _removal(tree: Tree) -> float:
    tree.kata("run", "-d", "--name", "removed", "--network", "none", tree.image, "sleep", "1000000")
    return took_ms(partial(tree.kata, "rm", "-f", "removed"))


def _runc_removal(peers: Peers) -> float:
    peers.sleeping("removed")
    return took_ms(partial(peers.on_sleeping, "delete", "-f", "removed"))


def _ctr_runc(tree: Tree) -> float:
    began = time.perf_counter()
    name = f"runc{time.monotonic_ns()}"
    done = tree.containerd.ctr("run", "--rm", "--runtime", RUNC, IMAGE, name, "true")
    if done.returncode:
        raise SystemExit(f"error: ctr run with runc: {done.stderr.decode(errors='replace')}")
    return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def sandboxes(tree: Tree, number: int) -> Iterator[list[float]]:
    """So many sleeping containers, started at once; yields the seconds that each took."""
    found: list[float] = []
    failed: list[str] = []
    names = [f"many{index}" for index in range(number)]
    began = time.perf_counter()

    def start_one(name: str) -> None:
        try:
            tree.kata("run", "-d", "--name", name, "--network", "none", tree.image, "sleep", "1000000")
            found.append(time.perf_counter() - began)
        except SystemExit as error:
            failed.append(str(error))

    threads = [threading.Thread(target=start_one, args=(name,)) for name in names]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise SystemExit(f"error: {len(failed)} of {number} did not start, one because {failed[0]}")
        yield found
    finally:
        subprocess.run(
            [*tree.program, "rm", "-f", *names], env=tree.environment, capture_output=True, check=False
        )


def many(trees: dict[str, Tree], rounds: int, counts: Sequence[int]) -> Rounds:
    """Seconds of so many at once (20 and 50): until all run, and percentiles of them."""
    took: Rounds = {}
    for number in range(rounds):
        for which, count in random.sample(
            [(which, count) for which in trees for count in counts], len(counts) * len(trees)
        ):
            progress(f"{count} at once, {which}: round {number + 1} of {rounds}")
            with sandboxes(trees[which], count) as found:
                for name, value in (("all", max(found)), ("p50", median(found)), ("p95", p95(found))):
                    took.setdefault(f"{count} {name}, {which}", []).append(value)
    return took


def memory(trees: dict[str, Tree], count: int = 20) -> Rounds:
    """MiB of each of so many sandboxes that are idle."""
    took: Rounds = {}
    for which, tree in trees.items():
        progress(f"memory of {count}, {which}")
        with sandboxes(tree, count):
            time.sleep(SETTLE_S)
            for index in range(count):
                sandbox: dict[str, Any] = json.loads(tree.kata("inspect", f"many{index}"))[0]["sandbox"]
                engine, monitor = sandbox["engine_pid"], sandbox["hypervisor_pid"]
                held = {pid: pss(pid) for pid in {engine, monitor} | descendants(engine)}
                took.setdefault(f"sandbox, {which}", []).append(sum(held.values()) / MIB)
                took.setdefault(f"hypervisor, {which}", []).append(held[monitor] / MIB)
                took.setdefault(f"engine, {which}", []).append(held[engine] / MIB)
    return took


def pss(pid: int) -> int:
    """The proportional set size of a process, in bytes."""
    return field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")


def pods(trees: dict[str, Tree], count: int, rounds: int) -> Rounds:
    """Seconds of so many pods at once."""
    took: Rounds = {}
    for number in range(rounds):
        for which in random.sample([*trees, "runc"], len(trees) + 1):
            tree = trees.get(which, trees["this"])
            progress(f"{count} pods, {which}: round {number + 1} of {rounds}")
            os.environ["KATA_GUEST_DIR"] = str(tree.guest)
            with podlab.Lab() as lab:
                shim = lab.daemon.directory / "bin/containerd-shim-kata-v2"
                shim.unlink()
                shim.symlink_to(tree.root / "src/kata/__main__.py")
                found = _together(lab, "runc" if which == "runc" else "kata", count)
            took.setdefault(f"pods p50, {which}", []).append(median(found))
            took.setdefault(f"pods p95, {which}", []).append(p95(found))
    return took


def _together(lab: podlab.Lab, runtime: str, count: int) -> list[float]:
    import pods as pods_bench

    pods_bench.timed(lab, runtime)
    return pods_bench.together(lab, runtime, count)


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    """What 95 of 100 do not exceed."""
    return statistics.quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]


ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("`ctr run --rm` / with runc", "ctr run, this", "ctr run, runc", "ms"),
    ("`ctr run --rm` / other", "ctr run, this", "ctr run, other", "ms"),
    ("`kata run --network none` / cold", "kata run none, this", "kata run none, cold", "ms"),
    ("`kata run` with network / cold", "kata run user, this", "kata run user, cold", "ms"),
    ("`kata run --network none` / other", "kata run none, this", "kata run none, other", "ms"),
    ("`kata run` with network / other", "kata run user, this", "kata run user, other", "ms"),
    ("cold `kata run --network none` / bare QEMU", "kata run none, cold", "bare QEMU", "ms"),
    ("`kata run --network none` / `runc run`", "kata run none, this", "runc run", "ms"),
    ("`kata run --network none` / `crun run`", "kata run none, this", "crun run", "ms"),
    ("`kata run --network none` / `podman run`", "kata run none, this", "podman run", "ms"),
    ("20 at once, all run / other", "20 all, this", "20 all, other", "s"),
    ("50 at once, all run / other", "50 all, this", "50 all, other", "s"),
    ("50 at once, p95 / p50", "50 p95, this", "50 p50, this", "s"),
    ("30 pods by `crictl run`, p95 / other", "pods p95, this", "pods p95, other", "s"),
    ("30 pods by `crictl run`, p95 / runc", "pods p95, this", "pods p95, runc", "s"),
    ("host memory of an idle sandbox of 20 / other", "sandbox, this", "sandbox, other", "MiB"),
    ("of it the hypervisor / other", "hypervisor, this", "hypervisor, other", "MiB"),
    ("of it the engine / other", "engine, this", "engine, other", "MiB"),
    ("`kata exec NAME true` / other", "exec, this", "exec, other", "ms"),
    ("`kata exec NAME true` / `runc exec`", "exec, this", "exec, runc", "ms"),
    ("stop and removal of one / other", "removal, this", "removal, other", "ms"),
    ("stop and removal of one / runc", "removal, this", "removal, runc", "ms"),
)
"""Of the table: its name, the two whose ratio it is, unit."""


def table(took: Rounds) -> list[str]:
    """The table as lines of Markdown: medians, the 95th percentile, and the median of the rounds' ratios."""
    lines = ["| figure | | p95 | beside | ratio |", "|---|---|---|---|---|"]
    for title, left, right, unit in ROWS:
        this, that = took.get(left), took.get(right)
        if not this or not that:
            continue
        pairs = zip(this, that, strict=False)
        ratio = median([a / b for a, b in pairs])
        digits = 2 if unit == "s" else 1
        lines.append(
            f"| {title} | {median(this):.{digits}f} {unit} | {p95(this):.{digits}f} | {median(that):.{digits}f}"
            f" {unit} | {ratio:.2f} |"
        )
    return lines


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Starts, execs, ends and memory, beside peers.")
    parser.add_argument("other", type=Path, metavar="CHECKOUT", help="an earlier commit's, set up")
    parser.add_argument("--rounds", type=int, default=15, help="of one at a time (default %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=3, help="rounds of many at once (default %(default)s)"
    )
    parser.add_argument(
        "--many", type=int, choices=(20, 50), action="append", help="of the two, only this one"
    )
    parser.add_argument("--pods", type=int, default=30, help="how many pods (default %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="not all of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure, too")
    options = parser.parse_args()
    if options.rounds < 2 or options.at_once < 1 or options.pods < 2:
        parser.error("--rounds, --pods: at least 2; --at-once: at least 1")
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines and containerd need root")
    other = options.other.resolve()
    if not (other / "build/guest/guest.json").exists():
        raise SystemExit(f"error: {other} is not set up\nhint: run tools/setup test in it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
    parts = options.only or list(PARTS)
    work = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    load = os.getloadavg()
    took: Rounds = {}
    try:
        for name in ("a", "b"):
            (work / name).mkdir()
        trees = {"this": Tree(ROOT, work / "a"), "other": Tree(other, work / "b")}
        if {"one", "many", "memory"} & set(parts):
            peers = Peers(work / "p")
            try:
                with trees["this"].up(), trees["other"].up():
                    if "one" in parts:
                        (work / "q").mkdir()
                        bare = bareboot.prepare(trees["this"].guest, work / "q", trees["this"].environment)
                        took |= one(trees, peers, bare, options.rounds)
                    if "many" in parts:
                        took |= many(trees, options.at_once, options.many or (20, 50))
                    if "memory" in parts:
                        took |= memory(trees)
            finally:
                peers.close()
        if "pods" in parts:
            took |= pods(trees, options.pods, options.at_once)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress("")
    if options.json:
        options.json.write_text(json.dumps(took, indent=1))
    commit = subprocess.run(
        ["git", "-C", str(other), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(
        f"{os.cpu_count()} processors; load {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after", end="; "
    )
    print(f"{options.rounds} rounds of one, {options.at_once} of many; the other checkout is {commit}\n")
    print("\n".join(table(took)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
