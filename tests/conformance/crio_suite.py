"""``make conformance A=--crio``: critest with CRI-O, with runc and with kata as both types of runtime.

CRI-O is the one of `tests/vm/crio_support.py`, with the images and the registry of `rig`. Resumable as `main` is:
``build/conformance/crio.jsonl``. The table goes into docs/conformance.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import critest
import images
import page
from cni_support import write_network
from crio_support import Crio, lacks, runc_handler, version
from oci_suite import STATE, Result, asked, written
from rig import NAMES, PORT, ROOT, Registry

from kata import __version__

CRITEST = ROOT / "build/programs/usr/bin/critest"
HANDLERS = {"runc": "runc", "kata": "kata, vm", "kata-oci": "kata, oci"}
"""Handler -> the title of its column."""


REASONS = {
    "SeccompProfilePath": "This CRI-O is built without libseccomp, and passes no profile on to a runtime.",
    "runtime should support reopening container log": (
        'CRI-O says of a running container of type "vm" that it does not run; type "oci" has it.'
    ),
    "streaming interfaces runtime should support portforward [Conformance]": (
        'CRI-O does nothing for type "vm"; type "oci" has it.'
    ),
    "Image Identifier Consistency": "With CRI-O an image has another name in each registry, with any runtime.",
}
"""Part of a test's name -> why it does not pass, where that is CRI-O's."""


@contextmanager
def running(guest: Path) -> Iterator[Crio]:
    """CRI-O with three handlers, and a registry that has critest's images.

    Args:
        guest: The guest's directory.

    Raises:
        subprocess.CalledProcessError: A step failed.
    """
    directory = Path(tempfile.mkdtemp(prefix="kr", dir="/tmp"))
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    networks = write_network(directory, "kr", "10.90.7.0/24", ports, hairpinMode=True, ipMasq=True)
    # A user's own file has precedence, and this is the only user here with a home of its own.
    mirrors = directory / "home/.config/containers/registries.conf"
    mirrors.parent.mkdir(parents=True)
    mirrors.write_text(
        "".join(
            f'[[registry]]\nprefix = "{name}"\nlocation = "127.0.0.1:{PORT}"\ninsecure = true\n'
            for name in NAMES
        )
    )
    busybox, pause = ROOT / "build/images/busybox", directory / "pause"
    # A SIGTERM that a process 1 gets before it has a handler is lost, and CRI-O then waits as long as its caller does.
    # Some tests leave a pod less time than an emulated guest takes from the start of a program to its main function.
    waits = {"Cmd": ["/bin/busybox", "tail", "-f", "/dev/null"], "StopSignal": "SIGKILL"}
    images.write(images.Image(waits), busybox, pause)
    crio = Crio(directory, guest, busybox, networks, pause, runc_handler(directory))
    crio.env["HOME"] = str(directory / "home")
    crio.env.pop("XDG_CONFIG_HOME", None)
    registry = Registry(directory, crio.around)
    try:
        crio.make_namespace()
        registry.start()
        crio.start()
        yield crio
    finally:
        try:
            crio.ask("rm", "-a", "-f")
            crio.ask("rmp", "-a", "-f")
            if left := crio.sandboxes():
                sys.stderr.write(f"sandboxes are left: {', '.join(left)}\n")
            shutil.copy(crio.log, STATE / "crio.log")
        finally:
            try:
                registry.stop()
            finally:
                crio.remove()


def reason(test: str) -> str:
    """Why a test does not pass with kata; empty if that is not known."""
    return next((text for part, text in REASONS.items() if part in test), "") or page.reason(test)


def unexplained(found: Mapping[tuple[str, str], Result]) -> list[str]:
    """The tests that runc passes, and kata does not for no known reason."""
    return [
        f"{test} (handler {handler})"
        for (test, handler), result in sorted(found.items())
        if handler != "runc"
        and result.outcome == "failed"
        and not reason(test)
        and found.get((test, "runc"), result).outcome == "passed"
    ]


def section(found: Mapping[tuple[str, str], Result], versions: str) -> list[str]:
    """The section of the page.

    Args:
        found: (test, handler) -> its result.
        versions: What they are of.
    """
    count = {
        handler: Counter(result.outcome for (_, by), result in found.items() if by == handler)
        for handler in HANDLERS
    }
    titles = " | ".join(HANDLERS.values())
    lines = [
        f"## {page.CRIO}",
        "",
        "The same suite with CRI-O, with runc and with kata as both types of runtime (`make conformance A=--crio`).",
        versions,
        "",
        f"| | {titles} |",
        "|---|---|---|---|",
        *(
            f"| {outcome} | {' | '.join(str(count[handler][outcome]) for handler in HANDLERS)} |"
            for outcome in ("passed", "failed", "skipped")
        ),
        "",
        f"| what does not pass | {titles} | why, or what was said |",
        "|---|---|---|---|---|",
    ]
    for test in sorted({test for test, _ in found}):
        results = [found.get((test, handler)) for handler in HANDLERS]
        outcomes = [result.outcome if result else "not run" for result in results]
        if "failed" in outcomes:
            words = reason(test)
            if not words:
                last = next(result for result in reversed(results) if result and result.outcome == "failed")
                if "failed" not in outcomes[1:]:
                    whose = "runc"
                else:
                    whose = "with runc as well" if outcomes[0] == "failed" else "not known"
                words = f"{whose}: {page.first_words(last.failures[0])}"
            lines.append(f"| {page.title(test)} | {' | '.join(outcomes)} | {words} |")
    return [*lines, ""]


def _versions() -> str:
    def said(*command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return (
        f"critest {said(CRITEST, '-version').split('critest version: ')[-1].split()[0]},"
        f" CRI-O {version()}, runc {said('runc', '--version').split()[2]}, kata {__version__}."
    )


def main() -> int:
    """Run what has not been run, and write the table.

    Returns:
        1 when kata fails a test that runc passes for no known reason.
    """
    options, record = asked("--crio", __doc__, CRITEST, "tests")
    if missing := lacks():
        sys.exit(f"tools/conformance --crio: it needs {missing}")
    tests = critest.tests(CRITEST, STATE)
    every = [(test, handler) for handler in reversed(HANDLERS) for test in tests]
    todo = [key for key in every if options.only in key[0] and key not in record.found]
    if todo:
        with running(Path(os.environ["KATA_GUEST_DIR"])) as crio:
            for number, (test, handler) in enumerate(todo):
                if handler != crio.default_runtime:
                    # Some tests ask for no runtime, whatever critest was told.
                    crio.stop()
                    crio.default_runtime = handler
                    crio.start()
                elif crio.crashed:
                    crio.start()
                done = critest.run(CRITEST, test, handler, crio.endpoint, crio.around, STATE)
                record.add(test, handler, Result(done.outcome, (done.message,), done.seconds))
                print(
                    f"{number + 1}/{len(todo)} {handler} {done.outcome} ({done.seconds:.0f} s): {test}",
                    flush=True,
                )
                if done.outcome == "failed":
                    print("    " + done.message[:300].replace("\n", "\n    "), flush=True)
    found = {key: result for key, result in record.found.items() if key[0] in tests}
    lacking = len({*every} - {*found})
    return written(page.CRIO, section(found, _versions()), unexplained(found), lacking)


if __name__ == "__main__":
    sys.exit(main())
