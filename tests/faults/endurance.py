"""``tools/endurance``: many short `podman run` and `podman exec`, and containers started and removed; what has grown.

Every status and every byte has to be right, in all three streams. What lives long (a container that is there all the
time, with its engine, its monitor, its conmon) may not get more descriptors or memory, the host no more processes,
mounts, cgroups, namespaces or files. Resumable: each thing done is a line of a file under ``build/faults``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

from waiting import PATIENCE  # noqa: E402

from faults.host import Snapshot, difference  # noqa: E402
from faults.podman import IMAGE, PodmanTarget  # noqa: E402
from faults.target import Failure  # noqa: E402

STATE = ROOT / "build/faults"
PARTS = ("run", "exec", "container")
"""Short runs; short execs in one container; containers that are started in the background and removed."""
_LONG = "long-lived"
_WARM = 5
"""Things done before the first look at the host: they make what stays (a bridge, caches)."""
_SETTLE_S = 60.0
_GROWTH_KIB = 1024
"""How much more memory a process may have in the end: allocators keep what they got."""
_SIZES = (0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 200_003)
"""Of a stream, in bytes: around pages and pipes."""
_SCRIPT = "cat; seq 1 100000 | head -c $0 >&2; exit $1"


class Record:
    """What was done so far, in a file.

    Args:
        path: The file.
        resume: Whether to go on with what it has.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        self.lines: list[tuple[str, int, float, str]] = []
        if path.exists():
            self.lines = [tuple(json.loads(line)) for line in path.read_text().splitlines()]

    def add(self, part: str, number: int, seconds: float, fault: str) -> None:
        """Take one down: how long it took, and what was wrong; empty if nothing was."""
        self.lines.append((part, number, seconds, fault))
        with open(self._path, "a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def has(self, part: str, number: int) -> bool:
        """Whether one was done and was right."""
        return any(line[:2] == (part, number) and not line[3] for line in self.lines)

    def of(self, part: str) -> list[tuple[str, int, float, str]]:
        """What was done last of each number of a part."""
        return list({line[1]: line for line in self.lines if line[0] == part}.values())


class Endurance:
    """The parts, with one podman.

    Args:
        target: It.
        record: What was done so far.
    """

    def __init__(self, target: PodmanTarget, record: Record) -> None:
        self._target = target
        self._record = record

    @contextmanager
    def long_lived(self) -> Iterator[None]:
        """Have a container that is there all the time."""
        self._start(_LONG)
        try:
            yield
        finally:
            self._target.run("rm", "-f", "-t", "0", _LONG, check=False)

    def part(self, name: str, count: int, say: Callable[[str], None]) -> list[str]:
        """Do what has not been done of a part.

        Args:
            name: One of `PARTS`.
            count: How many there are to be.
            say: Is told how far it is.

        Returns:
            A line for each fault, and for all that has grown.
        """
        todo = [number for number in range(count) if not self._record.has(name, number)]
        for number in todo[:_WARM]:
            self._one(name, number)
        host, own = self._settled(), self._processes()
        for done, number in enumerate(todo[_WARM:], _WARM + 1):
            self._one(name, number)
            if done % max(1, len(todo) // 10) == 0:
                say(f"  {name}: {done} of {len(todo)}")
        grown = self._grown(host)
        after = self._processes()
        for what, before in own.items():
            files, memory = (after[what][i] - before[i] for i in range(2))
            say(
                f"  {what}: {before[0]} -> {after[what][0]} files, {before[1]} -> {after[what][1]} KiB of its own"
            )
            if files > 0 or (memory > _GROWTH_KIB and what != "hypervisor"):  # a guest uses its memory
                grown.append(f"{what}: {files} more files, {memory} KiB more")
        faults = [f"{name} {number}: {fault}" for _, number, _, fault in self._record.of(name) if fault]
        return faults + [f"{name}: grown: {line}" for line in grown]

    def _one(self, part: str, number: int) -> None:
        began = time.monotonic()
        try:
            way = self._container if part == "container" else self._streams
            fault = way(part, number)
        except (Failure, subprocess.TimeoutExpired) as failure:
            fault = str(failure)
        self._record.add(part, number, round(time.monotonic() - began, 3), fault)

    def _start(self, name: str) -> None:
        self._target.run("--runtime", "kata", "run", "-d", "--name", name, IMAGE, "sleep", "1000000")
        self._target.look()

    def _container(self, _part: str, number: int) -> str:
        name = f"c{number}"
        try:
            self._start(name)
        finally:
            self._target.run("rm", "-f", "-t", "0", name)
        return ""

    def _streams(self, part: str, number: int) -> str:
        """A run or an exec; what was wrong with its streams and status."""
        given, said = _SIZES[number % len(_SIZES)], _SIZES[number // len(_SIZES) % len(_SIZES)]
        words = (
            ("exec", "-i", _LONG) if part == "exec" else ("--runtime", "kata", "run", "--rm", "-i", IMAGE)
        )
        status = number % 120
        done = subprocess.run(
            [*self._target.podman.command, *words, "sh", "-c", _SCRIPT, str(said), str(status)],
            input=counted(given),
            capture_output=True,
            env=self._target.env,
            cwd=self._target.directory,
            timeout=PATIENCE,
            check=False,
        )
        wrong = [
            f"{name}: {len(found)} bytes of {len(wanted)}, the first {_same(found, wanted)} of them right"
            for name, found, wanted in (
                ("standard output", done.stdout, counted(given)),
                ("standard error", done.stderr, counted(said)),
            )
            if found != wanted
        ]
        if done.returncode != status:
            wrong.append(
                f"status {done.returncode} instead of {status}: {done.stderr[-300:].decode(errors='replace')}"
            )
        return "; ".join(wrong)

    # ---- the host ----

    def _settled(self) -> Snapshot:
        place = self._target.place
        last = place.snapshot()
        while (now := place.snapshot()) != last:
            time.sleep(0.5)
            last = now
        return now

    def _grown(self, before: Snapshot) -> list[str]:
        """What the host has more than before, once it has settled."""
        deadline = time.monotonic() + _SETTLE_S
        while found := difference(before, self._target.place.snapshot()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return found

    def _processes(self) -> dict[str, tuple[int, int]]:
        """Those of the long-lived container: descriptors, and KiB of memory that nobody shares with them."""
        target = self._target
        [sandbox] = target.sandboxes()
        found = {}
        for what in ("engine", "hypervisor", "standing", "conmon", "virtiofsd"):
            if pid := target.find(what, sandbox):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                memory = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
                found[what] = (len(os.listdir(f"/proc/{pid}/fd")), memory)
        return found


def counted(size: int) -> bytes:
    """The first bytes of ``seq 1 100000``: each place has bytes that no other has."""
    lines = itertools.islice((b"%d\n" % number for number in itertools.count(1)), size // 2 + 1)
    return b"".join(lines)[:size]


def _same(found: bytes, wanted: bytes) -> int:
    pairs = zip(found, wanted, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))


def main() -> int:
    """Run the command line.

    Returns:
        1 when something was wrong, or has grown.
    """
    parser = argparse.ArgumentParser(prog="tools/endurance", description=__doc__)
    parser.add_argument("--runs", type=int, default=500, help="short `podman run` (default %(default)s)")
    parser.add_argument("--execs", type=int, default=500, help="short `podman exec` (default %(default)s)")
    parser.add_argument(
        "--containers", type=int, default=200, help="started and removed (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--base", type=Path, metavar="DIRECTORY", help="podman's packages (tools/debian-podman unpacks them)"
    )
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("virtual machines need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
    guest = Path(os.environ.get("KATA_GUEST_DIR") or ROOT / "build/guest")
    directory = Path(tempfile.mkdtemp(prefix="ke-", dir="/tmp"))
    target = PodmanTarget(directory, guest, stop_points=False, base=options.base)
    faults: list[str] = []
    try:
        target.up(ROOT / "build/images/busybox")
        record = Record(STATE / f"endurance-{target.title.replace(' ', '-')}.jsonl", resume=options.resume)
        endurance = Endurance(target, record)
        with endurance.long_lived():
            for name, count in zip(PARTS, (options.runs, options.execs, options.containers), strict=True):
                faults += endurance.part(name, count, lambda text: print(text, flush=True))
    finally:
        target.down()
    for name in PARTS:
        if lines := record.of(name):
            seconds = [line[2] for line in lines]
            right = sum(not line[3] for line in lines)
            print(f"{name}: {right} of {len(lines)} right, median {statistics.median(seconds):.2f} s")
    print("\n".join(faults) if faults else "all is right, and nothing has grown")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
