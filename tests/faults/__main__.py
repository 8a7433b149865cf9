"""``tools/faults``: kill engine, hypervisor, shim, conmon and containerd at named points and at random moments."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/vm"), str(ROOT / "tests")]

from containerd_support import SECOND, USE_SECOND  # noqa: E402

from faults import oci_points, report, rounds, stops  # noqa: E402
from faults.daemon import Daemon  # noqa: E402
from faults.podman import PodmanTarget  # noqa: E402
from faults.target import Target  # noqa: E402
from kata.guest import manifest  # noqa: E402
from kata.hypervisor import accel, virtiofsd  # noqa: E402

STATE = ROOT / "build/faults"


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="tools/faults", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the stop points and end")
    parser.add_argument(
        "--points",
        default="all",
        metavar="NAMES",
        help="all, none, or names separated by commas (default all)",
    )
    parser.add_argument(
        "--victims",
        default=",".join(rounds.VICTIMS),
        help="at the points (default %(default)s); hang: the hypervisor is stopped, not killed, and what waits for"
        " the guest ends by its time limit; nonsense, refuse: it answers requests wrongly, those of its root file"
        " system's disk among them",
    )
    parser.add_argument("--rounds", type=int, default=200, help="at random moments (default %(default)s)")
    parser.add_argument(
        "--first", type=int, default=1, help="number of the first random round, to repeat one"
    )
    parser.add_argument(
        "--seed", type=int, help="of the random rounds; by default a new one, which is printed"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run, its seed included"
    )
    parser.add_argument(
        "--containerd",
        choices=("1", "2"),
        default="2" if USE_SECOND else "1",
        help="1: the one on the PATH, 2: containerd 2, which tools/setup builds (default: what"
        " KATA_TEST_CONTAINERD says, else 1)",
    )
    parser.add_argument(
        "--podman",
        action="store_true",
        help="with podman and `kata-runtime` instead of containerd's clients",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIRECTORY", help="podman's packages (tools/debian-podman unpacks them)"
    )
    parser.add_argument(
        "--hypervisor",
        choices=sorted(stops.MONITORS),
        default=stops.hypervisor(),
        help="which one the machines have (default %(default)s); one without software emulation needs KVM:"
        " tools/kvm-lab has it",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the results into a page (docs/faults.md); what it has of other clients stays",
    )
    parser.add_argument(
        "--section",
        metavar="WORDS",
        default="",
        help="what the points of this run are about: its results are kept, and reported, beside those of other runs"
        " with the same client, instead of in their place",
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=STATE,
        metavar="DIRECTORY",
        help="where results are kept (default %(default)s)",
    )
    options = parser.parse_args()
    if options.list:
        for point in stops.POINTS:
            print(f"{point.name:26} {point.where:7} {point.what}")
        return 0
    if os.geteuid() != 0:
        parser.error("virtual machines need root")
    every = (
        oci_points.names()
        if options.podman
        else [one.name for one in stops.POINTS if one.where != "runtime"]
    )
    names = {"all": every, "none": []}.get(options.points) or [
        name for name in options.points.split(",") if name and name != "none"
    ]
    if unknown := sorted({*names} - {*every}) or sorted({*options.victims.split(",")} - {*rounds.VICTIMS}):
        parser.error(
            f"there is no {unknown[0]!r}; --list shows the points, victims are {', '.join(rounds.VICTIMS)}"
        )
    if options.containerd == "2" and not options.podman and not (SECOND / "containerd").exists():
        parser.error("there is no containerd 2: `tools/setup test` builds it")
    os.environ[stops.HYPERVISOR_VARIABLE] = options.hypervisor
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then either
    return carry_out(options, names)


def has_file_server(guest: Path) -> bool:
    """Whether shares are served by a process of their own here; an emulated machine's kernel has to be ready for it."""
    emulated = accel.choose().accel == "tcg"
    return virtiofsd.find() is not None and (not emulated or manifest.load(str(guest)).bounces)


def carry_out(options: argparse.Namespace, names: list[str]) -> int:
    """Carry out what the options ask for; the exit status."""
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    guest = Path(os.environ.get("KATA_GUEST_DIR") or ROOT / "build/guest")

    def make(directory: Path, wrong_answers: bool, templates: bool) -> Target:
        if options.podman:
            return PodmanTarget(directory, guest, base=options.base, templates=templates)
        return Daemon(
            directory,
            guest,
            second=options.containerd == "2",
            wrong_answers=wrong_answers,
            templates=templates,
        )

    runner = rounds.Runner(make, ROOT / "build/images/busybox")
    began = time.monotonic()
    try:
        runner.open()
        title = runner.title if options.hypervisor == "qemu" else f"{runner.title} with {options.hypervisor}"
        title += f": {options.section}" if options.section else ""
        state = options.state / f"{re.sub(r' with |[ :,/]+', '-', title)}.json"
        record = rounds.Record(state, title, seed, resume=options.resume)
        print(f"{record.title}, seed {record.seed}", flush=True)
        wanted = chosen(options, names, record.seed, runner.kinds, guest)
        print(f"{len(wanted)} rounds; undisturbed one takes {runner.takes}", flush=True)
        failed = rounds.run(wanted, runner, record, lambda text: print(text, flush=True))
    finally:
        runner.close()
    if options.report:
        there_was = options.report.read_text() if options.report.exists() else ""
        options.report.write_text(report.page(record, runner.takes, there_was))
    there = [key for key in (one.key for one in wanted) if record.results[key]["ok"] is not None]
    client = "--podman" if options.podman else f"--containerd {options.containerd}"
    again = f"tools/faults --hypervisor {options.hypervisor} {client} --seed {record.seed}"
    print(
        f"{record.title}, seed {record.seed}: {len(there)} faults, {len(failed)} failed,"
        f" {time.monotonic() - began:.0f} s"
        + ("" if not failed else f"; {again} repeats them: {', '.join(failed)}")
    )
    return 1 if failed else 0


def chosen(
    options: argparse.Namespace, names: list[str], seed: int, kinds: tuple[str, ...], guest: Path
) -> list[rounds.Round]:
    """The rounds that the options ask for.

    Args:
        options: The command line's.
        names: Of the points.
        seed: Of the random rounds.
        kinds: Scenarios of these.
        guest: The guest's directory.
    """
    file_server = ["virtiofsd"] if has_file_server(guest) else []
    own = ["conmon", "standing", "runtime"] if options.podman else ["containerd"]
    there_are = ["engine", "hypervisor", *own, *file_server]
    wrongly = stops.WRONGLY if options.hypervisor in stops.PARTS else ()  # QEMU's QMP is tested by itself
    commands = ("shim", "maker", "exec-conmon", "waiter")
    victims = {*options.victims.split(",")} & {*there_are, rounds.HANG, *wrongly, *commands}
    if not file_server:
        names = [name for name in names if name != "create.files"]  # nobody gets there
    if options.hypervisor in stops.SHARES_NOTHING:
        names = [name for name in names if name != "create.root"]  # a disk is not mounted here
    if options.hypervisor != "qemu":
        names = [name for name in names if stops.BY_NAME[name].phase not in ("template", "clone", "pool")]
    at_points = rounds.podman_rounds(names) if options.podman else rounds.point_rounds(names)
    numbers = range(options.first, options.first + options.rounds)
    at_random = rounds.random_rounds(seed, numbers, there_are, kinds)
    return [*(one for one in at_points if one.victim in victims), *at_random]


if __name__ == "__main__":
    sys.exit(main())
