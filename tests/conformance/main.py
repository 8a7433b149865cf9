"""``make conformance``: critest and the clients' operations, with runc and with kata; what came of it goes into docs/.

Resumable: each result is a line of ``build/conformance/results.jsonl`` the moment it is there, and what is there is
not run again. ``--again TEXT`` forgets the tests whose name contains that text, ``--fresh`` all of them. critest runs
with each containerd that there is: this machine's, and containerd 2 (tools/setup).
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
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import crio_support
import critest
import matrix
import page
import work
from containerd_support import SECOND, USE_SECOND
from rig import ROOT, Rig

from kata import __version__
from kata.hypervisor import kvmprobe

HANDLERS = page.HANDLERS
CONTAINERDS = ("1", "2")
STATE = ROOT / "build/conformance"
PAGE = ROOT / "docs/conformance.md"
WORK_PAGE = ROOT / "docs/clients.md"
WORK_RECORD = "work.jsonl"
LAB_TIMEOUT_S = 7200


class Results:
    """What has been found out so far.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[page.Key, critest.Result] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                key = page.Key(entry.pop("containerd"), entry.pop("handler"), entry.pop("test"))
                self.found[key] = critest.Result(**entry)

    def add(self, key: page.Key, result: critest.Result) -> None:
        """Note a result, at once and for good."""
        self.found[key] = result
        with open(self._path, "a") as file:
            file.write(self._line(key, result))

    def forget(self, text: str, containerds: Collection[str]) -> None:
        """Drop the results of the tests whose name contains a text, with these containerds."""
        self.found = {
            key: result
            for key, result in self.found.items()
            if text not in key.test or key.containerd not in containerds
        }
        self._path.write_text("".join(self._line(key, result) for key, result in self.found.items()))

    @staticmethod
    def _line(key: page.Key, result: critest.Result) -> str:
        return json.dumps({**key._asdict(), **asdict(result)}) + "\n"


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
    parser.add_argument("--containerd", choices=CONTAINERDS, help="with this containerd alone")
    parser.add_argument("--clients", action="store_true", help="only what clients do, without critest")
    parser.add_argument(
        "--work", action="store_true", help="only the table of docs/clients.md: people's real work"
    )
    parser.add_argument("--lab", action="store_true", help="with --work: its column for KVM, in the KVM lab")
    options = parser.parse_args()
    if options.work:
        again = [""] if options.fresh else options.again
        return _work(options.only, again, options.handler or "", lab=options.lab)
    program = shutil.which("critest")
    if program is None and not options.clients:
        parser.error("there is no critest: tools/setup conformance builds it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that daemons are ended on the way out
    STATE.mkdir(parents=True, exist_ok=True)
    results, cells = Results(STATE / "results.jsonl"), matrix.Cells(STATE / "clients.jsonl")
    tests = critest.tests(Path(program), STATE) if program and not options.clients else []
    wanted = CONTAINERDS[0] if options.clients else options.containerd or ("2" if USE_SECOND else "")
    daemons = {
        which: version
        for which in CONTAINERDS
        if wanted in ("", which) and (version := _containerd_version(second=which == "2"))
    }
    for text in [""] if options.fresh else options.again:
        if not options.clients:
            results.forget(text, daemons.values())
        if CONTAINERDS[0] in daemons:
            cells.forget(text)
    for which, version in daemons.items():
        todo = [
            key
            for test in tests
            for handler in ([options.handler] if options.handler else HANDLERS)
            if options.only in test and (key := page.Key(version, handler, test)) not in results.found
        ]
        # What clients do is looked at with the containerd of this machine.
        clients = which == CONTAINERDS[0] and matrix.is_wanting(cells, options.only)
        if todo or clients:
            _run(program or "", todo, results, cells if clients else None, options.only, second=which == "2")
    matrix.run_crio(cells if CONTAINERDS[0] in daemons else None, options.only)
    current = {key: result for key, result in results.found.items() if key.test in tests}
    missing = [
        key
        for test in tests
        for version in daemons.values()
        for handler in HANDLERS
        if (key := page.Key(version, handler, test)) not in current
    ]
    _write(current, cells, program or "", len(missing))
    unexplained = page.unexplained(current) + matrix.unexplained(cells.found)
    for what in unexplained:
        print(f"runc can do this, kata cannot: {what}")
    return 1 if unexplained else 0


def _write(
    current: Mapping[page.Key, critest.Result], cells: matrix.Cells, program: str, missing: int
) -> None:
    """Write the page. What has not been run in this checkout stays on it as it is.

    Args:
        current: The results of critest.
        cells: What clients do.
        program: critest; empty where it was not asked for.
        missing: How many results of critest there are not yet.
    """
    text = PAGE.read_text()
    known = page.sections(text)
    if cells.found:
        known[page.CLIENTS] = matrix.section(cells.found, _client_versions(), known.get(page.CLIENTS, ()))
    lacking = page.lacking(current, text)
    if current and not missing and not lacking:
        beside = [line for heading in page.BESIDE for line in known.get(heading, ())]
        PAGE.write_text(page.page(current, _versions(program), [*known[page.CLIENTS], *beside]))
    else:
        PAGE.write_text("".join(f"{line}\n" for lines in known.values() for line in lines))
    print(f"{PAGE.relative_to(ROOT)} is written")
    if missing:
        print(
            f"{missing} results are missing, so what it says of critest stays: run it again without --only and"
            " --handler"
        )
    elif current and lacking:
        print(
            f"there are no results with containerd {', '.join(lacking)} here, so what it says of critest stays:"
            " run it again without --containerd, where there is that one"
        )


def _work(only: str, again: list[str], handler: str, *, lab: bool) -> int:
    """Fill in the table of people's real work as far as this machine can, or have the KVM lab fill in its column.

    Returns:
        1 when a case with kata is neither right nor known to differ.
    """
    STATE.mkdir(parents=True, exist_ok=True)
    record = work.Record(STATE / WORK_RECORD)
    kvm = work.COLUMNS[-1]
    columns: tuple[str, ...] = (kvm,) if kvmprobe.probe().works else work.COLUMNS[:2]
    columns = tuple(column for column in columns if column.startswith(handler))
    for text in again:
        record.forget(text, (kvm,) if lab else columns)
    if lab:
        # /run is a tmpfs there, on which overlays can lie; /tmp is not.
        words = [
            str(ROOT / "tools/kvm-lab"),
            "--timeout",
            str(LAB_TIMEOUT_S),
            "--get",
            f"{record.path}:{record.path}",
        ]
        for name, value in (("KATA_WORK_DIR", "/run"), ("KATA_TEST_PATIENCE", "900")):
            words += ["-e", f"{name}={value}"]
        subprocess.run(
            [*words, "--", str(ROOT / "tools/conformance"), "--work", "--only", only], check=False
        )
        record = work.Record(record.path)
    else:
        work.run(Path(os.environ["KATA_GUEST_DIR"]), record, columns, only)
    if "KVM_LAB" not in os.environ:
        work.write(WORK_PAGE, record.found)
        print(f"{WORK_PAGE.relative_to(ROOT)} is written")
    wrong = work.wrong(record.found)
    for what in wrong:
        print(f"not right: {what}")
    return 1 if wrong else 0


def _containerd_version(*, second: bool) -> str:
    """What a containerd calls itself; empty where there is none."""
    program = SECOND / "containerd" if second else shutil.which("containerd")
    if program is None or not os.path.exists(program):
        print(f"no containerd {'2' if second else 'of this machine'}: its part is left out", flush=True)
        return ""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2].split("~")[0].removeprefix("v")


def _versions(program: str) -> page.Versions:
    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return page.Versions(
        critest=said(program, "-version").split("critest version: ")[-1].split()[0],
        runc=said("runc", "--version").split()[2].split("+")[0],
        kata=f"kata {__version__}",
    )


def _client_versions() -> dict[str, str]:
    found = {}
    for client in ("ctr", "crictl", "nerdctl", "docker"):
        if shutil.which(client):
            said = subprocess.run([client, "--version"], capture_output=True, text=True, check=False).stdout
            number = re.search(r"v?(\d+\.\d+[.\d]*)", said)
            found[client] = number[1] if number else ""
    if not crio_support.lacks():
        found.update(dict.fromkeys(matrix.CRIO, crio_support.version()))
    return found


def _run(
    program: str,
    todo: list[page.Key],
    results: Results,
    cells: matrix.Cells | None,
    only: str,
    *,
    second: bool,
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="kc", dir="/tmp"))
    rig = Rig(directory, Path(os.environ["KATA_GUEST_DIR"]), f"kc{os.getpid()}", second=second)
    try:
        rig.start()
        for number, key in enumerate(todo):
            result = critest.run(Path(program), key.test, key.handler, rig.endpoint, rig.inside, STATE)
            results.add(key, result)
            about = f"containerd {key.containerd} {key.handler} {result.outcome} ({result.seconds:.0f} s)"
            print(f"{number + 1}/{len(todo)} {about}: {key.test}", flush=True)
            if result.outcome == "failed":
                print("    " + result.message[:300].replace("\n", "\n    "), flush=True)
        if cells is not None:
            matrix.run(rig, cells, only)
    finally:
        rig.stop()
        if rig.daemon.log.exists():
            shutil.copy(rig.daemon.log, STATE / "containerd.log")
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
