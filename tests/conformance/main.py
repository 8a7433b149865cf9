"""``make conformance``: critest and the clients' operations, with runc and with kata; what came of it goes into docs/.

Resumable: each result is a line of ``build/conformance/results.jsonl`` the moment it is there, and what is there is
not run again. ``--again TEXT`` forgets the tests whose name contains that text, ``--fresh`` all of them.
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
from dataclasses import asdict
from pathlib import Path

import critest
import matrix
import page
from rig import ROOT, Rig

from kata import __version__

HANDLERS = ("runc", "kata")
STATE = ROOT / "build/conformance"
PAGE = ROOT / "docs/conformance.md"


class Results:
    """What has been found out so far.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[str, str], critest.Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                key = (entry.pop("handler"), entry.pop("test"))
                self.found[key] = critest.Result(**entry)

    def add(self, handler: str, test: str, result: critest.Result) -> None:
        """Note a result, at once and for good."""
        self.found[handler, test] = result
        with open(self._path, "a") as file:
            file.write(json.dumps({"handler": handler, "test": test, **asdict(result)}) + "\n")

    def forget(self, text: str) -> None:
        """Drop the results of the tests whose name contains a text."""
        self.found = {key: result for key, result in self.found.items() if text not in key[1]}
        lines = [
            json.dumps({"handler": handler, "test": test, **asdict(result)})
            for (handler, test), result in self.found.items()
        ]
        self._path.write_text("".join(f"{line}\n" for line in lines))


def main() -> int:
    """Run what has not been run yet.

    Returns:
        1 when a test that runc passes is failed by kata for no known reason.
    """
    parser = argparse.ArgumentParser(prog="tools/conformance", description=__doc__)
    parser.add_argument("--again", metavar="TEXT", action="append", default=[], help="run these once more")
    parser.add_argument("--fresh", action="store_true", help="run everything once more")
    parser.add_argument("--only", metavar="TEXT", default="", help="run only tests whose name contains this")
    parser.add_argument("--handler", choices=HANDLERS, help="with this runtime alone")
    options = parser.parse_args()
    program = shutil.which("critest")
    if program is None:
        parser.error("there is no critest: tools/setup conformance builds it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that daemons are ended on the way out
    STATE.mkdir(parents=True, exist_ok=True)
    results, cells = Results(STATE / "results.jsonl"), matrix.Cells(STATE / "clients.jsonl")
    for text in [""] if options.fresh else options.again:
        results.forget(text)
        cells.forget(text)
    tests = critest.tests(Path(program), STATE)
    todo = [
        (handler, test)
        for test in tests
        for handler in ([options.handler] if options.handler else HANDLERS)
        if options.only in test and (handler, test) not in results.found
    ]
    if todo or matrix.is_wanting(cells, options.only):
        _run(Path(program), todo, results, cells, options.only)
    current = {key: result for key, result in results.found.items() if key[1] in tests}
    section = matrix.section(cells.found, _client_versions())
    PAGE.write_text(page.page(current, _versions(program), section))
    print(f"{PAGE.relative_to(ROOT)} is written")
    missing = [
        key for test in tests for key in ((handler, test) for handler in HANDLERS) if key not in current
    ]
    if missing:
        print(f"{len(missing)} results are missing: run it again without --only and --handler")
    unexplained = page.unexplained(current) + matrix.unexplained(cells.found)
    for what in unexplained:
        print(f"runc can do this, kata cannot: {what}")
    return 1 if unexplained else 0


def _versions(program: str) -> page.Versions:
    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return page.Versions(
        critest=said(program, "-version").split("critest version: ")[-1].split()[0],
        containerd=said("containerd", "--version").split()[2].split("~")[0],
        runc=said("runc", "--version").split()[2].split("+")[0],
        kata=f"kata {__version__}",
    )


def _client_versions() -> dict[str, str]:
    found = {}
    for client, command in (("ctr", "ctr"), ("crictl", "crictl"), ("docker", "docker")):
        if shutil.which(command):
            said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
            number = re.search(r"v?(\d+\.\d+[.\d]*)", said)
            found[client] = number[1] if number else ""
    return found


def _run(
    program: Path, todo: list[tuple[str, str]], results: Results, cells: matrix.Cells, only: str
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="kc", dir="/tmp"))
    rig = Rig(directory, Path(os.environ["KATA_GUEST_DIR"]), f"kc{os.getpid()}")
    try:
        rig.start()
        for number, (handler, test) in enumerate(todo):
            result = critest.run(program, test, handler, rig.endpoint, rig.inside, STATE)
            results.add(handler, test, result)
            print(
                f"{number + 1}/{len(todo)} {handler} {result.outcome} ({result.seconds:.0f} s): {test}",
                flush=True,
            )
            if result.outcome == "failed":
                print("    " + result.message[:300].replace("\n", "\n    "), flush=True)
        matrix.run(rig, cells, only)
    finally:
        rig.stop()
        shutil.copy(rig.daemon.log, STATE / "containerd.log")
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
