"""How fast and how small it is, beside what a user would have instead and beside another checkout, in one run.

Parts, of which ``--only`` chooses some. Within a part everything is done once in each round, in an order that is
shuffled anew; what changes with the hour changes all of it alike, so ratios are taken within a round.

* ``one``: a container that runs ``true`` and goes, from executing the command until it has ended: `kata run --rm`
  without and with a network, by the fastest path that is on and cold (templates are turned off), `ctr run --rm`, with
  this checkout and with the other one; beside them `ctr run` with runc, `runc run`, `crun run`, `podman run` with
  each runtime, and a bare QEMU (the same kernel with the same parameters until it powers off, `bareboot.py`). Then
  `exec true` in a container that sleeps, the removal of one that runs (`kata rm -f`; `runc delete -f`), and `state`,
  `kill` and `delete` of `kata-runtime` and runc.
* ``pool``: `ctr run --rm` and `kata run --rm` by a machine that waits, from a template, and `ctr run` with runc.
* ``many``: 20 and 50 `kata run -d` at once, from the first until each has said that its container runs.
* ``storm``: 20 at once for which as many machines wait, and 20 from a template.
* ``pods``: 30 pods by `crictl run` at once, through a containerd with CNI's bridge (`podlab.py`).
* ``files``: what the containers of three pods get of small files, and the work of `npm install` (`files.py`).
* ``memory``: 20 sandboxes that have nothing to do, with and without an engine parent: proportional set size of all
  their processes, and of the engines.

The table is printed as Markdown, with the machine, and put into a document (``--write``). Without CHECKOUT its rows are
left out. Needs root and what `make bench-beside` needs; podman and crun where they work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

import bareboot  # noqa: E402
import files  # noqa: E402
import podlab  # noqa: E402
import start  # noqa: E402
import warmpool  # noqa: E402
from beside import NAME, Tree, said, took_ms  # noqa: E402
from containerd_support import IMAGE  # noqa: E402
from overhead import descendants, field  # noqa: E402
from peers import Oci, Peers  # noqa: E402
from performance_table import Rounds, machine, median, p95, put, table  # noqa: E402

PARTS = ("one", "pool", "many", "storm", "pods", "files", "memory")
RUNC = "io.containerd.runc.v2"
MIB = 1 << 20
SETTLE_S = 3
TOO_LONG_MS = 10_000
"""Of a peer: podman waits 20 s for a conmon whose end it does not see on some machines."""


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


def one(
    trees: dict[str, Tree],
    peers: Peers,
    bare: list[str],
    podmans: dict[str, tuple[list[str], dict[str, str]]],
    rounds: int,
) -> Rounds:
    """Milliseconds of one container at a time."""
    this = trees["this"]
    contenders: dict[str, Callable[[], float]] = {}
    for which, tree in trees.items():
        for network in ("none", "user"):
            run = ("run", "--rm", "--network", network, tree.image, "true")
            contenders[f"kata run {network}, {which}"] = partial(took_ms, partial(tree.kata, *run))
            if which == "this":
                command = [*tree.program, *run]
                contenders[f"kata run {network}, cold"] = partial(start.timed, command, cold(tree))
        contenders[f"ctr run, {which}"] = partial(took_ms, tree.ctr_run)
        contenders[f"exec, {which}"] = partial(took_ms, partial(tree.kata, "exec", NAME, "true"))
        contenders[f"removal, {which}"] = partial(_removal, tree)
    forked = [*this.program, "run", "--rm", "--network", "none", this.image, "true"]
    contenders["kata run none, parent"] = partial(start.timed, forked, with_parent(this))
    others = {name: (command, peers.environment) for name, command in peers.commands().items()}
    for name, (command, environment) in (others | podmans).items():
        try:
            if (took := start.timed(command, environment)) > TOO_LONG_MS:
                raise SystemExit(f"{name} takes {took / 1e3:.0f} s: it does not work as it should here")
        except SystemExit as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        contenders[name] = partial(start.timed, command, environment)
    contenders["bare QEMU"] = partial(start.timed, bare)
    contenders["ctr run, runc"] = partial(_ctr_runc, this)
    runtimes = {"runc": peers.runc, "kata": peers.kata_runtime}
    try:
        for which, runtime in runtimes.items():
            runtime.sleeping("sleeps")
            contenders[f"state, {which}"] = partial(took_ms, partial(runtime, "state", "sleeps"))
            # URG changes nothing for a process that does not care for it.
            contenders[f"kill, {which}"] = partial(took_ms, partial(runtime, "kill", "sleeps", "URG"))
            contenders[f"delete, {which}"] = partial(_delete, runtime)
        contenders["exec, runc"] = partial(took_ms, partial(peers.runc, "exec", "sleeps", "true"))
        contenders["removal, runc"] = partial(_runc_removal, peers.runc)
        return rounds_of(contenders, rounds, "one at a time")
    finally:
        for runtime in runtimes.values():
            runtime("delete", "--force", "sleeps")


def cold(tree: Tree) -> dict[str, str]:
    """The environment in which a checkout's starts boot."""
    return start.configured(tree.directory, tree.environment, "cold", "enable_template = false")


def with_parent(tree: Tree) -> dict[str, str]:
    """The environment in which a checkout's engines are forked off a process that has them loaded."""
    return start.configured(tree.directory, tree.environment, "parent", "enable_engine_parent = true")


def _delete(runtime: Oci) -> float:
    runtime.stopped("deleted")
    return took_ms(partial(runtime, "delete", "deleted"))


def _removal(tree: Tree) -> float:
    tree.kata("run", "-d", "--name", "removed", "--network", "none", tree.image, "sleep", "1000000")
    return took_ms(partial(tree.kata, "rm", "-f", "removed"))


def _runc_removal(runc: Oci) -> float:
    runc.sleeping("removed")
    return took_ms(partial(runc, "delete", "-f", "removed"))


def _ctr_runc(tree: Tree) -> float:
    began = time.perf_counter()
    name = f"runc{time.monotonic_ns()}"
    done = tree.containerd.ctr("run", "--rm", "--runtime", RUNC, IMAGE, name, "true")
    if done.returncode:
        raise SystemExit(f"error: ctr run with runc: {done.stderr.decode(errors='replace')}")
    return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def sandboxes(tree: Tree, number: int, environment: dict[str, str] | None = None) -> Iterator[list[float]]:
    """So many sleeping containers, started at once; yields the seconds that each took."""
    environment = environment or tree.environment
    found: list[float] = []
    failed: list[str] = []
    names = [f"many{index}" for index in range(number)]
    began = time.perf_counter()

    def start_one(name: str) -> None:
        try:
            run = ["run", "-d", "--name", name, "--network", "none", tree.image, "sleep", "1000000"]
            said([*tree.program, *run], environment)
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


def storm(tree: Tree, rounds: int, count: int = 20) -> Rounds:
    """Seconds of so many at once where as many machines wait, and from a template: until all run, and percentiles."""
    run = [*tree.program, "run", "--rm", "--network", "none", tree.image, "true"]
    _, pooled = warmpool.configured(tree, count)
    pool = warmpool.Pool(tree, pooled, partial(start.timed, run, pooled))
    took: Rounds = {}
    try:
        for number in range(rounds):
            for way in random.sample(("pool", "no pool"), 2):
                progress(f"{count} at once, {way}: round {number + 1} of {rounds}")
                if way == "pool":
                    pool.fill(count)
                else:
                    start.await_template(tree.program, tree.image, tree.environment)
                with sandboxes(tree, count, pooled if way == "pool" else tree.environment) as found:
                    for name, value in (("all", max(found)), ("p50", median(found)), ("p95", p95(found))):
                        took.setdefault(f"{count} {name}, {way}", []).append(value)
                pool.end()  # with the templates: those that come to wait now would be in the way of the next ones
    finally:
        pool.end()
    return took


def of_files(rounds: int) -> Rounds:
    """Files a second, of an image and of a root file system, and seconds of the work, in pods of each kind."""
    made, looked = "create and write a file of 4 KiB", files.OF_IMAGE
    tests = {
        "image": looked,
        "root file system": (made, *looked, "unlink"),
    }  # which makes room for the next round
    with podlab.Lab() as lab:
        found = files.measure(lab, {"count": 500}, rounds, tests)
    took: Rounds = {}
    for kind in files.KINDS:
        for place in tests:
            for test in looked:
                took[f"{place}, {test}, {kind}"] = found[place][test][kind]
        steps = [found["work"][step][kind] for step in files.WORK]
        took[f"work, {kind}"] = [sum(one) for one in zip(*steps, strict=True)]
    return took


def memory(trees: dict[str, Tree], count: int = 20) -> Rounds:
    """MiB of each of so many sandboxes that are idle; of an engine's parent, each has its share."""
    took: Rounds = {}
    ways = {which: (tree, tree.environment) for which, tree in trees.items()}
    ways["parent"] = (trees["this"], with_parent(trees["this"]))
    for which, (tree, environment) in ways.items():
        progress(f"memory of {count}, {which}")
        if which == "parent":  # the start that finds none leaves one behind
            with sandboxes(tree, 1, environment):
                time.sleep(SETTLE_S)
        with sandboxes(tree, count, environment):
            time.sleep(SETTLE_S)
            shared = sum(map(pss, _parents(tree))) / count if which == "parent" else 0
            for index in range(count):
                sandbox: dict[str, Any] = json.loads(tree.kata("inspect", f"many{index}"))[0]["sandbox"]
                engine, monitor = sandbox["engine_pid"], sandbox["hypervisor_pid"]
                held = {pid: pss(pid) for pid in {engine, monitor} | descendants(engine)}
                took.setdefault(f"sandbox, {which}", []).append((sum(held.values()) + shared) / MIB)
                took.setdefault(f"hypervisor, {which}", []).append(held[monitor] / MIB)
                took.setdefault(f"engine, {which}", []).append((held[engine] + shared) / MIB)
    return took


def _parents(tree: Tree) -> list[int]:
    """The processes that fork engines below a checkout's run directory.

    Raises:
        SystemExit: There is none.
    """
    wanted = f"KATA_RUN_DIR={tree.environment['KATA_RUN_DIR']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"engine-parent" in words and wanted in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    if not found:
        raise SystemExit("error: no engine parent runs, although it is configured")
    return found


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
                found = _together(lab, None if which == "runc" else tree, count)
            took.setdefault(f"pods p50, {which}", []).append(median(found))
            took.setdefault(f"pods p95, {which}", []).append(p95(found))
    return took


def _together(lab: podlab.Lab, tree: Tree | None, count: int) -> list[float]:
    """Seconds of each of so many pods by that checkout's shim, from a template where it has them; None is runc."""
    import pods as pods_bench

    runtime = "kata" if tree else "runc"
    pods_bench.timed(lab, runtime)
    if tree:
        lab.await_template(tree.program)
    return pods_bench.together(lab, runtime, count)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Starts, execs, ends and memory, beside peers.")
    parser.add_argument(
        "other", type=Path, metavar="CHECKOUT", nargs="?", help="an earlier commit's, set up; rows need it"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of one at a time (default %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=2, help="rounds of many at once (default %(default)s)"
    )
    parser.add_argument(
        "--many", type=int, choices=(20, 50), action="append", help="of the two, only this one"
    )
    parser.add_argument("--pods", type=int, default=30, help="how many pods (default %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="not all of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure, too")
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="add what --json wrote of other parts, and make one table",
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the table into a document (docs/performance.md)"
    )
    options = parser.parse_args()
    if options.rounds < 2 or options.at_once < 1 or options.pods < 2:
        parser.error("--rounds, --pods: at least 2; --at-once: at least 1")
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines and containerd need root")
    other = options.other.resolve() if options.other else None
    if other and not (other / "build/guest/guest.json").exists():
        raise SystemExit(f"error: {other} is not set up\nhint: run tools/setup test in it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
    load, began = os.getloadavg(), time.monotonic()
    took: Rounds = json.loads(options.from_json.read_text()) if options.from_json else {}
    work = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    try:
        measure(work, other, options, took)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        progress("")
        if options.json:  # what there is when a part fails, too: --from-json --only goes on from there
            options.json.write_text(json.dumps(took, indent=1))
    minutes = (time.monotonic() - began) / 60
    method = (
        f"{machine()}. Commit {_commit(ROOT)}"
        + (f", the other checkout is {_commit(other)}" if other else "")
        + f"; {options.rounds} rounds of one, {options.at_once} of many, in {minutes:.0f} minutes; load average"
        f" {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after."
    )
    text = "\n".join([*textwrap.wrap(method, 160), "", *table(took)])
    print(text)
    if options.write:
        put(options.write, text)
    return 0


def measure(work: Path, other: Path | None, options: argparse.Namespace, took: Rounds) -> None:
    """Measure every part that was asked for.

    Args:
        work: A directory of its own.
        other: The other checkout.
        options: Of the command line.
        took: Gets the figures of each part as soon as it is done.
    """
    parts = options.only or list(PARTS)
    trees = {}
    for which, root in {"this": ROOT, "other": other}.items():
        if root is not None:
            (work / which[0]).mkdir()
            trees[which] = Tree(root, work / which[0])
    with contextlib.ExitStack() as stack:
        if {"one", "pool", "many", "storm", "memory"} & set(parts):
            for tree in trees.values():
                stack.enter_context(tree.up())
        if "one" in parts:
            (work / "q").mkdir()
            bare = bareboot.prepare(trees["this"].guest, work / "q", trees["this"].environment)
            podmans = stack.enter_context(start.podmans(trees["this"].guest))
            took |= one(trees, Peers(work / "p", trees["this"]), bare, podmans, options.rounds)
        _measure_templates(trees, parts, options, took)
    if "pods" in parts:
        took |= pods(trees, options.pods, options.at_once)
    if "files" in parts:
        took |= of_files(max(options.at_once, 2))


def _measure_templates(
    trees: dict[str, Tree], parts: Sequence[str], options: argparse.Namespace, took: Rounds
) -> None:
    this = trees["this"]
    if {"many", "storm", "memory"} & set(parts):
        start.await_template(this.program, this.image, this.environment)
    if "pool" in parts:
        took |= warmpool.measure(this, partial(_ctr_runc, this), options.rounds)
    if "many" in parts:
        took |= many(trees, options.at_once, options.many or (20, 50))
    if "storm" in parts:
        took |= storm(this, options.at_once)
    if "memory" in parts:
        took |= memory(trees)


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
