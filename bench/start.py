"""How long a start takes, cold and from a template, beside what a user would have instead, all in the same run.

These things, once each in every round, in an order that is shuffled anew so that no one always runs on the
warmer machine:

* ``bare``: the guest's kernel booted by the same QEMU with the same machine, accelerator, memory, firmware and
  console, and an initrd with one static ``/init`` that powers off: from executing QEMU until it has ended
  (`bareboot.py`; the command line is printed). The kernel is told its console and no more, as by anybody who
  boots it by hand.
* ``tuned``: the same with the kernel parameters that ``kata`` gives (half of the boot is spared by not probing
  timers and buses): no container system in a VM can be quicker than that, with this kernel.
* ``kata cold``: ``kata run --rm IMAGE true`` with templates turned off, from executing it until it has ended.
* ``kata template``: the same by a machine that goes on from a template, which is there before the first round.
* ``runc``: ``runc run`` of the same root file system and command, without a VM.
* ``podman runc``, ``podman crun``, ``podman kata``: ``podman run --rm --network none`` of the same image and command
  with each runtime, where podman is (``tools/setup test``).

Reported are medians and their ratios to both boots, in milliseconds. Needs root, runc, and a guest.

With ``--profile FILE`` only kata is started, from a template or, with ``--cold``, without one, and the medians of
its start ledgers are drawn as a waterfall (`waterfall.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path += [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests/vm")]

import bareboot  # noqa: E402
import podman_support  # noqa: E402
import waterfall  # noqa: E402

from kata.config.files import VARIABLE as CONFIG_VARIABLE  # noqa: E402

TEMPLATE_S = 120.0
"""How long a template may take until starts go on from it."""
PAUSE_S = 3
"""Between two starts that ask for it."""

KATA = ["/usr/bin/python3", "-I", "-S", str(ROOT / "src/kata/__main__.py")]
IMAGE = ROOT / "build/images/busybox"


def timed(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Milliseconds from starting *command* until it has ended, which must be with 0.

    Raises:
        SystemExit: It ended otherwise; its output is in the message.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False
    )
    took = (time.perf_counter() - began) * 1e3
    if done.returncode:
        raise SystemExit(
            f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}"
        )
    return took


def configured(directory: Path, environment: dict[str, str], name: str, lines: str) -> dict[str, str]:
    """An environment whose configuration has these lines in its ``[factory]`` table.

    Args:
        directory: Where the configuration file goes, as NAME.toml.
        environment: What the environment has besides.
        name: Of the file.
        lines: Keys and their values.
    """
    conf = directory / f"{name}.toml"
    conf.write_text(f"[factory]\n{lines}\n")
    return {**environment, CONFIG_VARIABLE: str(conf)}


def await_template(kata: list[str], image: str, environment: dict[str, str], network: str = "none") -> None:
    """Start containers until one goes on from a template, as all do that come after it.

    Args:
        kata: The ``kata`` command.
        image: What the containers run.
        environment: Of the command.
        network: Its ``--network``; each has a template of its own.

    Raises:
        SystemExit: None did within TEMPLATE_S seconds.
        subprocess.CalledProcessError: A start failed.
    """
    run = [*kata, "run", "--rm", "--network", network, "--timings", image, "true"]
    until = time.monotonic() + TEMPLATE_S
    while time.monotonic() < until:
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        if "start: template" in done.stderr:
            return
        time.sleep(PAUSE_S)
    raise SystemExit(f"error: no start goes on from a template: {done.stderr}")


def unpack(image: Path, target: Path) -> None:
    """Extract the layers of our own single-platform busybox image, which has no whiteouts."""
    index = json.loads((image / "index.json").read_text())
    manifest = json.loads(blob(image, index["manifests"][0]["digest"]).read_text())
    for layer in manifest["layers"]:
        with tarfile.open(blob(image, layer["digest"])) as archive:
            archive.extractall(target)


def blob(image: Path, digest: str) -> Path:
    """A blob's file in an OCI layout."""
    return image / "blobs" / digest.replace(":", "/")


def runc_bundle(work: Path) -> list[str]:
    """Make a bundle of the image and return the command that runs ``true`` in it."""
    bundle = work / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    unpack(IMAGE, bundle / "rootfs")
    subprocess.run(["runc", "spec", "--bundle", bundle], check=True)
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"].update(terminal=False, args=["true"])
    # Raising a hard limit needs a capability that root in a container may lack; it takes no time to matter.
    spec["process"].pop("rlimits", None)
    (bundle / "config.json").write_text(json.dumps(spec))
    return ["runc", "--root", str(work / "runc"), "run", "--bundle", str(bundle), f"bench-{os.getpid()}"]


@contextmanager
def podmans(guest: Path) -> Iterator[dict[str, tuple[list[str], dict[str, str]]]]:
    """A podman with storage of its own: contender -> command and environment. There are none without podman.

    Kata's goes on from a template, which is there when this yields.

    Args:
        guest: The guest's directory.

    Raises:
        SystemExit: The container did not run, or there was no template within TEMPLATE_S seconds.
    """
    if podman_support.installed() is None:
        yield {}
        return
    work = Path(tempfile.mkdtemp(prefix="kp", dir="/tmp"))
    with podman_support.running(work, guest, f"oci:{IMAGE}") as podman:
        tail = [podman_support.IMAGE, "true"]
        found = {
            f"podman {runtime}": ([*podman.run_command(runtime, "--network", "none"), *tail], podman.env)
            for runtime in podman_support.RUNTIMES
        }
        if "podman kata" in found:
            state = {"KATA_STATE_DIR": str(podman.directory / "s"), "KATA_RUN_DIR": str(podman.run_dir)}
            _await_made(*found["podman kata"], {**os.environ, **state})
        yield found


def _await_made(command: list[str], environment: dict[str, str], kata: dict[str, str]) -> None:
    """Run *command* until its machine's template is there, as ``kata factory status`` tells in *kata*'s directories."""
    until = time.monotonic() + TEMPLATE_S
    while time.monotonic() < until:
        timed(command, environment)
        time.sleep(PAUSE_S)
        status = [*KATA, "factory", "status", "--json"]
        if json.loads(subprocess.run(status, env=kata, capture_output=True, check=True).stdout)["templates"]:
            return
    raise SystemExit(f"error: no template after {TEMPLATE_S:g} s of {shlex.join(command)}")


def measure(rounds: int, warm_up: int, contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round; the warm-up rounds are not among them."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name in random.sample(list(contenders), len(contenders)):
            milliseconds = contenders[name]()
            if number >= 0:
                took[name].append(milliseconds)
        if sys.stderr.isatty():
            print(f"\r  round {max(number + 1, 0)} of {rounds}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return took


def report(took: dict[str, list[float]], facts: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles and ratios of what was measured."""
    medians = {name: statistics.median(values) for name, values in took.items()}
    rows = {}
    for name, values in took.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows[name] = {
            "median_ms": round(medians[name], 1),
            "quartiles_ms": [round(low, 1), round(high, 1)],
            "min_ms": round(min(values), 1),
            "ratio_to_bare": round(medians[name] / medians["bare"], 3),
            "ratio_to_tuned": round(medians[name] / medians["tuned"], 3),
        }
    return {**facts, "results": rows}


def profile(file: Path, rounds: int, options: list[str], environment: dict[str, str]) -> None:
    """Draw where the time of some starts goes, and print it.

    Args:
        file: Where the picture goes.
        rounds: How many starts; one more, before them, does not count.
        options: Of ``kata run``.
        environment: Of the commands.
    """
    ledgers = []
    for number in range(-1, rounds):
        timed([*KATA, "run", "--name", "profile", *options, f"oci:{IMAGE}", "true"], environment)
        shown = subprocess.run(
            [*KATA, "inspect", "profile"], capture_output=True, env=environment, check=True
        )
        timed([*KATA, "rm", "profile"], environment)
        if number >= 0:
            ledgers.append(json.loads(shown.stdout)[0]["start"])
    rows = waterfall.medians(ledgers)
    paths = sorted({ledger["path"] for ledger in ledgers})
    title = f"kata run {' '.join(options)}: {', '.join(paths)} start, medians of {rounds}"
    file.write_text(waterfall.picture(title, rows))
    print(title)
    for name, start, lasts, is_part in rows:
        print(f"  {'  ' * is_part + name:<24} at {start:8.1f} ms   took {lasts:8.1f} ms")
    for reason in sorted({ledger["reason"] for ledger in ledgers} - {""}):
        print(f"no faster start: {reason}")
    print(f"drawn in {file}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Starts against a bare boot and against runc.")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is run (default %(default)s)")
    parser.add_argument("--network", choices=["user", "none"], default="user", help="of the container")
    parser.add_argument("--json", action="store_true", help="print JSON, with every single time")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="draw the steps of kata's start alone into FILE (SVG)"
    )
    parser.add_argument("--cold", action="store_true", help="with --profile: starts without a template")
    options = parser.parse_args()
    if options.cold and not options.profile:
        parser.error("--cold belongs to --profile; without it both are measured")
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    if os.geteuid() != 0:
        raise SystemExit("error: virtual machines and runc need root for now\nhint: sudo make bench-start")
    if not options.profile and not shutil.which("runc"):
        raise SystemExit("error: runc is not installed\nhint: make bench-start installs it")
    work = Path(tempfile.mkdtemp(prefix="kb-", dir="/tmp"))
    try:
        environment = {**os.environ, "KATA_RUN_DIR": str(work / "r"), "KATA_STATE_DIR": str(work / "s")}
        guest = Path(environment["KATA_GUEST_DIR"])
        cold = configured(work, environment, "cold", "enable_template = false")
        if options.profile and options.cold:
            profile(options.profile, options.rounds, ["--network", options.network], cold)
            return
        await_template(KATA, f"oci:{IMAGE}", environment, options.network)  # converts the image, too
        if options.profile:
            profile(options.profile, options.rounds, ["--network", options.network], environment)
            return
        command = [*KATA, "run", "--rm", "--network", options.network, f"oci:{IMAGE}", "true"]
        runc = runc_bundle(work)
        tuned = bareboot.prepare(guest, work, environment)
        bare = bareboot.untuned(tuned)
        with podmans(guest) as others:
            own = {"bare": bare, "tuned": tuned, "kata template": command, "runc": runc}
            contenders = {**{name: (argv, environment) for name, argv in own.items()}, **others}
            contenders["kata cold"] = (command, cold)
            took = measure(
                options.rounds,
                1,
                {name: functools.partial(timed, *how) for name, how in contenders.items()},
            )
        facts = {
            "rounds": options.rounds,
            "guest": json.loads((guest / "guest.json").read_text()),
            "commands": {name: argv for name, (argv, _) in contenders.items()},
        }
        result = report(took, facts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print(json.dumps({**result, "times_ms": took}, indent=1))
        return
    for name, argv in facts["commands"].items():
        print(f"{name}: {shlex.join(argv)}")
    columns = f"{'median':>10}{'quartiles':>22}{'least':>10}{'to bare':>9}{'to tuned':>10}"
    print(f"\n{'':14}{columns}   ({options.rounds} rounds, ms)")
    for name, row in result["results"].items():
        low, high = row["quartiles_ms"]
        spread = f"{low:.1f} - {high:.1f}"
        print(
            f"{name:14}{row['median_ms']:10.1f}{spread:>22}{row['min_ms']:10.1f}{row['ratio_to_bare']:9.2f}"
            f"{row['ratio_to_tuned']:10.2f}"
        )


if __name__ == "__main__":
    main()
