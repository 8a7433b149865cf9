"""``make conformance A=--oci``: the validation suite of the OCI's runtime-tools, with runc and with ``kata-runtime``.

The suite is one program a test, which calls the runtime that ``$RUNTIME`` names and writes TAP. A test has passed when
none of its assertions failed. Some tests assert nothing and write their complaint as a diagnostic, which counts as one.

Resumable as `main` is: ``build/conformance/oci.jsonl``. The table goes into docs/conformance.md.

Source: https://testanything.org/tap-version-13-specification.html.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import page
from rig import ROOT

from kata import __version__

PROGRAMS = ROOT / "build/programs/runtime-tools"
STATE = ROOT / "build/conformance"
PAGE = ROOT / "docs/conformance.md"
RUNTIMES = ("runc", "kata")
BESIDE = ("runtimetest", "rootfs-amd64.tar.gz")
"""What lies beside the tests: the program that some of them run in the container, and their root file system."""
TIMEOUT_S = 180

IN_THE_GUEST = (
    "The test reads the cgroup of the process on the host. The container's limits are set in the guest's kernel; on the"
    " host its whole machine has a cgroup."
)
OWN_KERNEL = (
    "A guest has a kernel of its own: a namespace of the host cannot be joined, and is refused by name."
)
REASONS = {
    "linux_cgroups_": IN_THE_GUEST,
    "delete_resources": IN_THE_GUEST,
    "linux_devices": "A number of a host's device means nothing in the guest; what it does not have is refused.",
    "linux_ns_itype": OWN_KERNEL,
    "linux_ns_path": OWN_KERNEL,
    "linux_ns_nopath": (
        "The test compares namespaces of processes on the host. The process there stands for the container; its"
        " namespaces are in the guest."
    ),
    "mounts": (
        "The test looks in mountinfo for the last name of a bind mount's source on the host. In the guest the source is"
        " a directory of the share, with a name of its own; the mounts are there."
    ),
    "poststart": (
        "Hook and process run at the same time, the one on the host and the other in the guest, and the test wants the"
        " process to have written first."
    ),
    "start": "A container can be made without a process, and its start is refused: it stays as it was created.",
}
"""A test, or with ``_`` at its end the beginning of several -> why it does not pass with kata, and may with runc."""


class Result(NamedTuple):
    """How one test ended.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``.
        failures: What did not hold.
        seconds: How long it took.
    """

    outcome: str
    failures: tuple[str, ...]
    seconds: float


def parse(text: str) -> tuple[int, list[str]]:
    """What a test says.

    Args:
        text: TAP of version 13.

    Returns:
        How many assertions held, and what did not hold.
    """
    held, failures, about = 0, [], ""
    for line in text.splitlines():
        if match := re.match(r"(not )?ok\b\s*(\d+)?[\s-]*(.*)", line):
            about = match[3]
            if match[1] is None:
                held += "# SKIP" not in about
                about = ""
            else:
                failures.append(about or f"number {match[2]}")
                about = "failed"
        elif not about and (match := re.match(r' {4}"error": "(.+?)(?<!\\)"', line)) and not held:
            failures.append(match[1].split("\\n")[0])
    return held, failures


def run(test: str, program: Path, environment: Mapping[str, str], directory: Path) -> Result:
    """Run one test.

    Args:
        test: Its name.
        program: The runtime.
        environment: The variables that the runtime gets.
        directory: Takes the test's bundles, and goes with them.
    """
    began = time.monotonic()
    env = {**environment, "RUNTIME": str(program), "TMPDIR": str(directory)}
    try:
        done = subprocess.run(
            [PROGRAMS / test], cwd=PROGRAMS, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Result("failed", (f"no end within {TIMEOUT_S} s",), time.monotonic() - began)
    held, failures = parse(done.stdout)
    if done.returncode:
        failures.append(
            done.stderr.strip().splitlines()[0] if done.stderr.strip() else "no reason was given"
        )
    outcome = "failed" if failures else "skipped" if not held and "# SKIP" in done.stdout else "passed"
    return Result(outcome, tuple(failures), time.monotonic() - began)


def tests() -> list[str]:
    """The names of all tests."""
    return sorted(path.name for path in PROGRAMS.iterdir() if path.name not in BESIDE)


@contextmanager
def prepared(guest: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory for bundles, and the environment of a runtime whose containers are removed at the end.

    Args:
        guest: The guest's directory.
    """
    directory = Path(tempfile.mkdtemp(prefix="ko", dir="/tmp"))
    environment = {
        "PATH": os.environ["PATH"],
        "KATA_RUN_DIR": str(directory / "k"),
        "KATA_STATE_DIR": str(directory / "s"),
        "KATA_GUEST_DIR": str(guest),
        "KATA_TEMPLATES": "off",
    }
    bundles = directory / "b"
    bundles.mkdir()
    try:
        yield bundles, environment
    finally:
        for path in directory.glob("k/oci/*"):
            subprocess.run([program("kata"), "delete", "--force", path.name], env=environment, check=False)
        _unmount_below(
            directory
        )  # linux_rootfs_propagation with runc leaves a container's mounts on the host
        shutil.rmtree(directory, ignore_errors=True)


def _unmount_below(directory: Path) -> None:
    """Unmount what is mounted below a directory, before that is removed with all that can be reached through it."""
    mounted = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    for place in reversed([place for place in mounted if place.startswith(f"{directory}/")]):
        subprocess.run(["umount", "--lazy", place], check=False)


def program(runtime: str) -> Path:
    """The program of a runtime.

    Raises:
        FileNotFoundError: There is no such program.
    """
    if runtime == "kata":
        return ROOT / "src/kata/oci_runtime/__main__.py"
    found = shutil.which(runtime)
    if found is None:
        raise FileNotFoundError(runtime)
    return Path(found)


class Record:
    """What was seen so far: (test, runtime) -> result.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[str, str], Result] = {}
        with suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                test, runtime, outcome, failures, seconds = json.loads(line)
                self.found[test, runtime] = Result(outcome, tuple(failures), seconds)

    def add(self, test: str, runtime: str, result: Result) -> None:
        """Note one, at once and for good."""
        self.found[test, runtime] = result
        with open(self._path, "a") as file:
            file.write(json.dumps([test, runtime, *result]) + "\n")

    def forget(self, text: str) -> None:
        """Drop the results of the tests whose name contains a text."""
        kept = {key: result for key, result in self.found.items() if text not in key[0]}
        self._path.unlink(missing_ok=True)
        for (test, runtime), result in kept.items():
            self.add(test, runtime, result)
        self.found = kept


def reason(test: str) -> str:
    """Why a test does not pass with kata; empty if that is not known."""
    return REASONS.get(test) or next(
        (text for part, text in REASONS.items() if part.endswith("_") and test.startswith(part)), ""
    )


def unexplained(found: Mapping[tuple[str, str], Result]) -> list[str]:
    """The tests that runc passes, and kata does not for no known reason."""
    return [
        test
        for (test, runtime), result in sorted(found.items())
        if runtime == "kata"
        and result.outcome == "failed"
        and not reason(test)
        and found.get((test, "runc"), result).outcome != "failed"
    ]


def section(found: Mapping[tuple[str, str], Result], versions: str) -> list[str]:
    """The section of the page.

    Args:
        found: The results.
        versions: What they are of.
    """
    names = sorted({test for test, _ in found})
    count = {
        runtime: Counter(found[key].outcome for key in found if key[1] == runtime) for runtime in RUNTIMES
    }
    lines = [
        f"## {page.OCI}",
        "",
        "The validation suite of the OCI's runtime-tools calls runtimes as callers do (`make conformance A=--oci`).",
        versions,
        "",
        "| | runc | kata |",
        "|---|---|---|",
        *(
            f"| {outcome} | {' | '.join(str(count[runtime][outcome]) for runtime in RUNTIMES)} |"
            for outcome in ("passed", "failed", "skipped")
        ),
        "",
        "| what does not pass | runc | kata | why, or what was said |",
        "|---|---|---|---|",
    ]
    for test in names:
        both = [found.get((test, runtime)) for runtime in RUNTIMES]
        outcomes = [result.outcome if result else "not run" for result in both]
        if "failed" not in outcomes:
            continue
        if outcomes[1] == "failed" and (text := reason(test)):
            words = text
        else:
            last = next(result for result in reversed(both) if result and result.outcome == "failed")
            words = "; ".join(dict.fromkeys(_short(failure) for failure in last.failures))
            words = f"with runc as well: {words}" if outcomes == ["failed", "failed"] else f"runc: {words}"
        lines.append(f"| {test} | {' | '.join(outcomes)} | {words} |")
    return [*lines, ""]


def _short(text: str) -> str:
    text = re.sub(r"/tmp/ko\w+|[0-9a-f]{8}-[0-9a-f-]{27}|time=\S+ level=error msg=", "", text)
    return re.sub(r"\d{4,}", "N", text).replace("|", "\\|").replace('\\"', "'").strip()[:120]


def asked(
    option: str, description: str | None, programs: Path, of_what: str
) -> tuple[argparse.Namespace, Record]:
    """What the command line of a suite asks for, and what was found before, without what is to be run once more."""
    name = option.removeprefix("--")
    parser = argparse.ArgumentParser(prog=f"tools/conformance {option}", description=description)
    parser.add_argument("--again", metavar="TEXT", action="append", default=[], help="run these once more")
    parser.add_argument("--fresh", action="store_true", help="run everything once more")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help=f"run only {of_what} whose name contains this"
    )
    options = parser.parse_args()
    if not programs.exists():
        parser.error("the suite is not there: tools/setup conformance has it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that containers are removed on the way out
    STATE.mkdir(parents=True, exist_ok=True)
    record = Record(STATE / f"{name}.jsonl")
    for text in [""] if options.fresh else options.again:
        record.forget(text)
    return options, record


def versions() -> str:
    """The runtimes, for the page."""
    said = subprocess.run([program("runc"), "--version"], capture_output=True, text=True, check=True).stdout
    return f"runc {said.split()[2]}, kata {__version__}."


def written(section_of: str, lines: list[str], wrong: list[str], missing: int) -> int:
    """Write a suite's section of the page, unless there are results *missing*, of which it would tell no longer; and
    tell what kata fails for no known reason: then it is 1.
    """
    if missing:
        print(
            f"{missing} results are missing, so {PAGE.relative_to(ROOT)} stays: run it again without --only"
        )
    else:
        page.replace(PAGE, section_of, lines)
        print(f"{PAGE.relative_to(ROOT)} is written")
    for what in wrong:
        print(f"runc can do this, kata cannot: {what}")
    return 1 if wrong else 0


def main() -> int:
    """Run what has not been run, and write the table.

    Returns:
        1 when kata fails a test that runc passes for no known reason.
    """
    options, record = asked("--oci", __doc__, PROGRAMS, "tests")
    every = [(test, runtime) for test in tests() for runtime in RUNTIMES]
    todo = [key for key in every if options.only in key[0] and key not in record.found]
    with prepared(Path(os.environ["KATA_GUEST_DIR"])) as (bundles, environment):
        for test, runtime in todo:
            result = run(test, program(runtime), environment, bundles)
            record.add(test, runtime, result)
            print(f"{test}, {runtime}: {result.outcome} ({result.seconds:.1f} s)", flush=True)
            for failure in result.failures[:3]:
                print(f"    {failure[:300]}", flush=True)
    suite = PROGRAMS.resolve().name.replace("-v", " v", 1)
    found = section(record.found, f"{suite}, {versions()}")
    return written(page.OCI, found, unexplained(record.found), len({*every} - {*record.found}))


if __name__ == "__main__":
    sys.exit(main())
