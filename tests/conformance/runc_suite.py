"""``make conformance A=--runc``: runc's own tests that go by the command line, with runc and with ``kata-runtime``.

They are run as they are in runc's module, of the version of the runc beside them, in a copy that goes with the run;
only the script that downloads images is replaced, by one that names an image of this machine's busybox. bats runs
one file at a time and writes TAP. It has a controlling terminal, which runc opens (``/dev/tty``) where a container has
one and nobody takes its master.

Resumable as `main` is: ``build/conformance/runc.jsonl``. The table goes into docs/conformance.md.

Source: bats(1), bats(7); https://testanything.org/tap-version-13-specification.html.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import page
from oci_suite import RUNTIMES, Result, asked, prepared, program, versions, written
from rig import ROOT

from kata.sysio import Fd

PROGRAMS = ROOT / "build/programs/runc-tests"
IMAGE = ROOT / "build/images/busybox"
CGROUPS = Path("/sys/fs/cgroup")
TESTS_CGROUP = "runc-cgroups-integration-test"
FILE_S = 900
"""How long a file may take, in seconds. bats's own limit for a test breaks those that `wait` for all children."""

NOT_HERE = {
    "hooks.bats": "its image is a Debian of Docker's",
    "mounts_sshfs.bats": "it mounts by sshfs",
    "seccomp-notify.bats": "its agent is linked to libseccomp's development files",
    "seccomp-notify-compat.bats": "it wants a kernel before 5.6",
}
"""Files of tests that are not run, with either runtime, and why."""

IN_THE_GUEST = (
    "The test looks at the container's cgroup on the host. The container's limits are set in the guest's kernel; on the"
    " host its whole machine has a cgroup."
)
OWN_WORDS = "The test looks for words of runc's own; `--debug` tells how a command ended, and when."
REASONS: dict[str, str] = {
    "cgroups: runc run (cgroup v1 + unified resources should fail)": (
        "The guest's cgroups are of version 2, whatever the host's, and take these."
    ),
    "cgroups: runc run (per-device io weight for bfq)": (
        "A number of a host's device means nothing in the guest."
    ),
    "cgroups: ": IN_THE_GUEST,
    "debug: ": OWN_WORDS,
    "delete: ": IN_THE_GUEST,
    "events: events oom": (
        "Under emulation the guest takes longer to fill its memory than the test waits, ten seconds; the event comes."
    ),
    "exec: runc --debug": OWN_WORDS,
    "exec: runc exec --cgroup": "There is no `--cgroup`: a process is in the container's cgroup of the guest.",
    "exec: runc exec --preserve-fds": "An open file of the host means nothing in another kernel: refused by name.",
    "help: runc command -h": "`checkpoint` and `restore` are refused by name, with their help.",
    "help: ": "The test looks for words of runc's own.",
    "no_pivot: ": "`--no-pivot` is refused by name.",
    "ps: ": "The processes are the guest's, in four columns; options of the host's ps are not taken.",
    "run: runc run --keep (check cgroup exists)": IN_THE_GUEST,
    "seccomp: runc run [seccomp -ENOSYS handling]": (
        "The test calls process_vm_readv, which its profile allows and the guest's small kernel has not"
        " (CONFIG_CROSS_MEMORY_ATTACH)."
    ),
    "seccomp: runc run [seccomp] (startContainer hook)": (
        'The hook is under the filter and ends by "bad system call"; the test looks for "error running hook" before'
        ' that, and kata says "error running startContainer hook", as runc does from 1.2 on.'
    ),
    "start_hello: runc run [rootless with host pidns]": "The host's PID namespace is refused by name.",
    "update: update devices [minimal transition rules]": (
        "The test has a device rule with the access `rwa`, of which `a` is unknown and refused."
    ),
    "update: update rt period and runtime": "The guest's kernel has no groups of real-time processes.",
    "update: ": IN_THE_GUEST,
    "userns: ": (
        "The agent makes the mounts as the container's root, which in a user namespace may not enter the source."
    ),
    "version: ": "The test looks for the word runc.",
}
"""Beginning of ``FILE: TEST`` -> why it does not pass with kata where it does with runc."""


def parse(text: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What bats says of one file.

    Args:
        text: TAP.

    Yields:
        The name of a test, its outcome (``passed``, ``failed`` or ``skipped``), and what was said about that.
    """
    last: tuple[str, str, list[str]] | None = None
    for line in text.splitlines():
        if match := re.match(r"(not )?ok \d+ (.*?)(?: # skip ?(.*))?$", line):
            if last is not None:
                yield last[0], last[1], tuple(last[2])
            outcome = "failed" if match[1] else "skipped" if match[3] is not None else "passed"
            last = match[2], outcome, [match[3]] if match[3] else []
        elif last is not None and last[1] == "failed" and not re.match(r"# *(\(from|\(in|in) |[^#]", line):
            last[2].append(line[2:].strip())
    if last is not None:
        yield last[0], last[1], tuple(last[2])


def planned(text: str) -> list[str]:
    """The names of the tests in the text of a file."""
    return re.findall(r'^@test "(.*)" \{$', text, re.MULTILINE)


def copy_of_tests(directory: Path) -> Path:
    """A copy of the tests with images of ours.

    Args:
        directory: Where it is to be; it must not exist.

    Returns:
        The directory of the files of tests.
    """
    shutil.copytree(PROGRAMS, directory)
    tests = directory / "tests/integration"
    manifest = json.loads((IMAGE / "index.json").read_text())["manifests"][0]["digest"]
    layer = json.loads(_blob(manifest).read_text())["layers"][0]["digest"]
    images = tests / "get-images.sh"
    images.write_text(f"#!/bin/sh\necho BUSYBOX_IMAGE={_blob(layer)}\necho DEBIAN_IMAGE=/nonexistent\n")
    images.chmod(0o755)
    return tests


def _blob(digest: str) -> Path:
    return IMAGE / "blobs" / digest.replace(":", "/")


def run(path: Path, runtime: str, environment: Mapping[str, str], directory: Path) -> dict[str, Result]:
    """Run one file of tests.

    Args:
        path: The file.
        runtime: The runtime's name.
        environment: The variables that it gets.
        directory: Takes the containers' bundles and records, which are removed.

    Returns:
        By the names of the tests. One that bats did not come to has failed.
    """
    env = {**environment, "RUNC": str(program(runtime)), "TMPDIR": str(directory)}
    names = planned(path.read_text())
    master, slave = map(Fd, os.openpty())
    with master, slave, subprocess.Popen(
        ["setsid", "--ctty", "bats", "--tap", path], cwd=path.parent, env=env, stdin=slave.raw,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as bats:  # fmt: skip
        try:
            said, _ = bats.communicate(timeout=FILE_S)
        except subprocess.TimeoutExpired as late:
            said = _text(late.output)
        finally:
            if bats.poll() is None:
                os.killpg(bats.pid, signal.SIGKILL)
            _remove_what_is_left(runtime, environment, directory)
    found = {name: Result(outcome, words, 0.0) for name, outcome, words in parse(said)}
    return {name: found.get(name, Result("failed", ("bats did not come to it",), 0.0)) for name in names}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _remove_what_is_left(runtime: str, environment: Mapping[str, str], directory: Path) -> None:
    """Remove the containers and cgroups that the tests have left."""
    for record in directory.glob("bats-run-*/runc.*/state/*"):
        command = [str(program(runtime)), "--root", str(record.parent), "delete", "--force", record.name]
        subprocess.run(command, env=dict(environment), check=False)
    for left in directory.iterdir():
        shutil.rmtree(left, ignore_errors=True)
    # A test that fails leaves its cgroups, and their real-time budget then lacks in the next one.
    for top in (CGROUPS, *CGROUPS.iterdir()):
        for parent, _, _ in os.walk(top / TESTS_CGROUP, topdown=False):
            with suppress(OSError):
                os.rmdir(parent)


def reason(key: str) -> str:
    """Why a test does not pass with kata; empty if that is not known."""
    return next((text for part, text in REASONS.items() if key.startswith(part)), "")


def unexplained(found: Mapping[tuple[str, str], Result]) -> list[str]:
    """The tests that runc passes, and kata does not for no known reason."""
    return [
        test
        for (test, runtime), result in sorted(found.items())
        if runtime == "kata"
        and result.outcome == "failed"
        and not reason(test)
        and found.get((test, "runc"), result).outcome == "passed"
    ]


def section(found: Mapping[tuple[str, str], Result], versions: str) -> list[str]:
    """The section of the page.

    Args:
        found: The results.
        versions: What they are of.
    """
    tests = sorted({test for test, _ in found})
    count = {
        (file, runtime): Counter(
            result.outcome
            for (test, by), result in found.items()
            if by == runtime and file in ("", test.partition(": ")[0])
        )
        for file in {"", *(test.partition(": ")[0] for test in tests)}
        for runtime in RUNTIMES
    }
    lines = [
        f"## {page.RUNC}",
        "",
        "runc's tests call it by its command line; here they are run with it and with `kata-runtime`"
        " (`make conformance A=--runc`).",
        versions + " Not run: " + "; ".join(f"`{file}` ({why})" for file, why in NOT_HERE.items()) + ".",
        "",
        "| file | runc | kata | skipped by both or one |",
        "|---|---|---|---|",
    ]
    for file in sorted({file for file, _ in count}):
        cells = [
            f"{one['passed']} of {one['passed'] + one['failed']}"
            for one in (count[file, runtime] for runtime in RUNTIMES)
        ]
        skipped = max(count[file, runtime]["skipped"] for runtime in RUNTIMES)
        lines.append(f"| {file or 'all'} | {' | '.join(cells)} | {skipped or ''} |")
    lines += ["", "| what does not pass | runc | kata | why, or what was said |", "|---|---|---|---|"]
    for test in tests:
        both = [found.get((test, runtime)) for runtime in RUNTIMES]
        outcomes = [result.outcome if result else "not run" for result in both]
        if "failed" not in outcomes:
            continue
        words = reason(test) if outcomes[1] == "failed" else ""
        if not words:
            last = next(result for result in reversed(both) if result and result.outcome == "failed")
            words = " ".join(_short(failure) for failure in last.failures[:1])
            whose = {("failed", "failed"): "with runc as well: ", ("passed", "failed"): "not known: "}
            words = whose.get((outcomes[0], outcomes[1]), "runc: ") + words
        lines.append(f"| {test.replace('|', chr(92) + '|')} | {' | '.join(outcomes)} | {words} |")
    return [*lines, ""]


def _short(text: str) -> str:
    text = re.sub(r"/tmp/ko\w+|runc\.\w{6}", "", text)
    return re.sub(r"\d{4,}", "N", text).replace("|", "\\|").strip()[:120]


def main() -> int:
    """Run what has not been run, and write the table.

    Returns:
        1 when kata fails a test that runc passes for no known reason.
    """
    options, record = asked("--runc", __doc__, PROGRAMS, "files")
    with prepared(Path(os.environ["KATA_GUEST_DIR"])) as (bundles, environment):
        tests = copy_of_tests(bundles.parent / "tests")
        missing = 0
        for path in sorted(tests.glob("*.bats")):
            names = planned(path.read_text())
            for runtime in RUNTIMES:
                lacks = [name for name in names if (f"{path.stem}: {name}", runtime) not in record.found]
                if path.name in NOT_HERE or not lacks:
                    continue
                if options.only not in path.name:
                    missing += len(lacks)
                    continue
                for name, result in run(path, runtime, environment, bundles).items():
                    record.add(f"{path.stem}: {name}", runtime, result)
                    print(f"{path.stem}: {name}, {runtime}: {result.outcome}", flush=True)
                    for words in result.failures[:8] if result.outcome == "failed" else ():
                        print(f"    {words[:300]}", flush=True)
    release = PROGRAMS.resolve().name.rpartition("-")[2]
    found = section(record.found, f"Tests of runc {release}, {versions()}")
    return written(page.RUNC, found, unexplained(record.found), missing)


if __name__ == "__main__":
    sys.exit(main())
